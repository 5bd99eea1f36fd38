"""Runs both listeners in one process: `python -m kilo_pipelines.ingress`."""

from __future__ import annotations

import asyncio
import signal
from urllib.parse import urlsplit

import uvicorn
import uvloop
from starlette.types import ASGIApp

from kilo_pipelines import failpoints
from kilo_pipelines.core.clock import Clock, SystemClock
from kilo_pipelines.core.operators import OperatorRule
from kilo_pipelines.ingress.application import Ingress, admin_application, public_application
from kilo_pipelines.ingress.door import Door
from kilo_pipelines.ingress.metrics import Counted, Scraped, exposition, own_counts
from kilo_pipelines.ingress.oidc import OidcLogin, registration_of
from kilo_pipelines.ingress.operators import Operators, Ways
from kilo_pipelines.ingress.setup_github import SetupDesk
from kilo_pipelines.providers.oidc import OidcClient
from kilo_pipelines.settings import Settings, current
from kilo_pipelines.store import Cipher, Store
from kilo_pipelines.store.app_secrets import WebhookSecrets
from kilo_pipelines.telemetry import logs, traces


def _server(application: ASGIApp, host: str, port: int) -> uvicorn.Server:
    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        log_config=None,  # the process's own
        access_log=False,
        timeout_graceful_shutdown=3,
        server_header=False,
        lifespan="off",
    )
    return uvicorn.Server(config)


def make_door(settings: Settings, origins: frozenset[str], clock: Clock) -> Door:
    """The operators' door with the logins that are configured."""
    rule = OperatorRule(frozenset(settings.oidc_operators), settings.oidc_operator_group)
    ways = Ways(settings.password_login, settings.oidc_issuer if settings.oidc_configured else None, rule)
    operators = Operators(settings.operator_password_file, settings.operator_sessions_file, clock, ways)
    registration = registration_of(settings)
    oidc = OidcLogin(OidcClient(registration, clock), operators, clock) if registration is not None else None
    return Door(operators, settings.dagster_socket, settings.dagster_prefix, origins, oidc)


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    failpoints.arm(settings.failpoints)
    traces.arm(settings, "ingress")
    logins = settings.database_logins()
    store = Store(logins["app"], logins["system"], Cipher.from_file(settings.encryption_key_file), SystemClock())
    store.database.check_roles()
    hosts = {"localhost", "127.0.0.1", settings.host}
    origins = {f"http://{host}:{settings.admin_port}" for host in hosts}
    for address in (settings.admin_origin, settings.public_origin, settings.callback_address):
        if address is not None:
            hosts.add(str(urlsplit(address).hostname))
    if settings.admin_origin is not None:
        origins.add(settings.admin_origin)
    ingress = Ingress(store, WebhookSecrets(settings), frozenset(hosts))
    door = make_door(settings, frozenset(origins), SystemClock())
    servers = []
    token = settings.metrics_token_file
    if settings.listeners != "admin":
        public: ASGIApp = public_application(ingress)
        if settings.listeners == "public":  # beside the admin listener, that one tells both listeners' counts
            public = Scraped(public, token, own_counts)
        servers.append(_server(Counted(public, "public"), settings.host, settings.public_port))
    if settings.listeners != "public":
        pages = [*SetupDesk(store, current, SystemClock()).routes(), *door.routes()]
        admin = Scraped(admin_application(ingress, pages), token, lambda: exposition(store, ingress.clock.now()))
        servers.append(_server(Counted(admin, "admin"), settings.host, settings.admin_port))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
    # `_serve`, not `serve`: each `serve` would install signal handlers of its own over the other's.
    await asyncio.gather(*(server._serve() for server in servers))


def main() -> None:
    """Serves until SIGTERM or SIGINT."""
    settings = Settings()
    logs.set_up(settings, "ingress")
    uvloop.run(serve(settings))


if __name__ == "__main__":
    main()
