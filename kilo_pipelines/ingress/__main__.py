"""Runs both listeners in one process: `python -m kilo_pipelines.ingress`."""

from __future__ import annotations

import asyncio
import logging
import signal
from urllib.parse import urlsplit

import uvicorn
import uvloop
from starlette.applications import Starlette

from kilo_pipelines import failpoints
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.core.redact import redact_logs
from kilo_pipelines.ingress.application import Ingress, admin_application, public_application
from kilo_pipelines.ingress.door import Door, Operators
from kilo_pipelines.settings import Settings
from kilo_pipelines.store import Cipher, Store


def _server(application: Starlette, host: str, port: int) -> uvicorn.Server:
    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=3,
        server_header=False,
        lifespan="off",
    )
    return uvicorn.Server(config)


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT."""
    failpoints.arm(settings.failpoints)
    logins = settings.database_logins()
    store = Store(logins["app"], logins["system"], Cipher.from_file(settings.encryption_key_file), SystemClock())
    store.database.check_roles()
    secret = settings.webhook_secret_file.read_text().strip() if settings.webhook_secret_file.exists() else None
    hosts = {"localhost", "127.0.0.1", settings.host}
    origins = {f"http://{host}:{settings.admin_port}" for host in hosts}
    if settings.admin_origin is not None:
        hosts.add(str(urlsplit(settings.admin_origin).hostname))
        origins.add(settings.admin_origin)
    if settings.public_origin is not None:
        hosts.add(str(urlsplit(settings.public_origin).hostname))
    ingress = Ingress(store, secret, frozenset(hosts))
    operators = Operators(settings.operator_password_file, settings.operator_sessions_file, SystemClock())
    door = Door(operators, settings.dagster_socket, settings.dagster_prefix, frozenset(origins))
    servers = [
        _server(public_application(ingress), settings.host, settings.public_port),
        _server(admin_application(ingress, door.routes()), settings.host, settings.admin_port),
    ]
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for server in servers:
            server.should_exit = True

    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stop)
    # `_serve`, not `serve`: each `serve` would install signal handlers of its own over the other's.
    await asyncio.gather(*(server._serve() for server in servers))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    redact_logs()
    uvloop.run(serve(Settings()))
