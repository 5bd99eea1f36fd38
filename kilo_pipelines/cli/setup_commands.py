"""`kilo-pipelines setup`: the GitHub App and the model of this platform. Secrets come from files, stdin or GitHub, never from argv."""

from __future__ import annotations

import json
import secrets
import sys
import time
from typing import Any, NoReturn
from urllib.parse import urlsplit
from uuid import UUID

import click
import httpx

from kilo_pipelines.cli import supervisor
from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.providers import outbound
from kilo_pipelines.providers.github_setup import GitHubAppView, GitHubSetup, SetupError
from kilo_pipelines.providers.models import ModelError, try_model
from kilo_pipelines.settings import Settings, api_url_of, in_environment, write_config, write_secret
from kilo_pipelines.store import app_secrets
from kilo_pipelines.store.crypto import CipherError

# GitHub's log shows a redelivery within seconds.
SEEN_SECONDS = 15.0


def refused(plain: bool, reason: Reason, detail: str = "") -> NoReturn:
    """Ends a command with a reason code, what it means and what to do."""
    meaning, remedy = MEANING[reason]
    if plain:
        click.echo(json.dumps({"error": meaning, "reason": reason, "detail": detail, "remedy": remedy}))
    else:
        more = f" ({detail})" if detail else ""
        click.echo(f"kilo-pipelines: {reason}: {meaning}{more}\n  {remedy}", err=True)
    sys.exit(1)


@click.group("setup")
def setup_group() -> None:
    """The GitHub App and the model."""


@setup_group.group("github", invoke_without_command=True)
@click.option("--org", help="Organization that the App will belong to. Default: the account of whoever creates it.")
@click.option("--enterprise-url", help="Address of a GitHub Enterprise Server, such as https://github.corp.example.")
@click.option("--public-url", help="Origin under which GitHub reaches this platform; kept as KILO_PUBLIC_ORIGIN.")
@click.option("--installation", type=click.IntRange(1, 2**63 - 1), help="Connects an installation that is there already.")
@click.option("--owner", type=click.UUID, help="Connects to this owner instead of a new one.")
@click.option("--new-app", is_flag=True, help="Makes another App in the place of the present one.")
@as_json
@click.pass_context
def setup_github(
    context: click.Context,
    org: str | None,
    enterprise_url: str | None,
    public_url: str | None,
    installation: int | None,
    owner: UUID | None,
    new_app: bool,
    plain: bool,
) -> None:
    """Prints a link that creates the App and connects installations in a browser: once, for an hour, for one browser."""
    if context.invoked_subcommand is not None:
        return
    settings, store = open_store(plain)
    _here(plain, settings)
    if owner is not None and owner not in {one.id for one in store.owners.all()}:
        end(plain, f"no owner {owner}")
    if enterprise_url is not None and settings.offline:
        end(plain, "the offline world has its own GitHub: start with KILO_OFFLINE=false for another one")
    settings = _keep_public(plain, settings, public_url)
    there = app_secrets.read(settings).private_key is not None and settings.github_app_id is not None
    if there and not new_app and (org is not None or enterprise_url is not None):
        refused(plain, Reason.APP_EXISTS, f"App {settings.github_app_id}")
    web_url = (enterprise_url or settings.github_web_url).rstrip("/")
    api_url = api_url_of(enterprise_url) if enterprise_url else settings.github_api_url
    request = {
        "web_url": web_url,
        "api_url": api_url,
        "organization": org,
        "installation": installation,
        "owner": str(owner) if owner else None,
        "new_app": new_app,
    }
    try:
        GitHubSetup(api_url, web_url, SystemClock())
    except SetupError as failure:
        refused(plain, failure.reason, failure.detail)
    link = f"{settings.admin_address}/setup/github?link={store.setup_links.make(request)}"
    show(plain, {"link": link, "webhook": settings.webhook_url}, lambda: f"Open within an hour, in one browser:\n\n  {link}\n")


def _keep_public(plain: bool, settings: Settings, public_url: str | None) -> Settings:
    """Keeps the origin, and sees that the running ingress answers under it: its allow-list of names is read at its start."""
    if public_url is not None:
        if in_environment("public_origin"):
            end(plain, "the environment sets KILO_PUBLIC_ORIGIN: change it there")
        try:
            wanted = Settings(home=settings.home, public_origin=public_url).public_origin
        except ValueError:
            end(plain, "--public-url must be an origin such as https://hooks.example")
        write_config(settings, {"public_origin": wanted})
        settings = Settings()
    host = urlsplit(settings.webhook_url).netloc
    if supervisor.is_running(settings):
        try:
            answer = httpx.get(f"{settings.public_url}/health", headers={"host": host}, timeout=5, trust_env=False)
        except httpx.HTTPError:
            end(plain, f"the ingress doesn't answer at {settings.public_url}: `kilo-pipelines status`")
        if answer.status_code == 400:
            end(plain, f"{host} is kept as this platform's name; restart it once: `kilo-pipelines down`, `kilo-pipelines up`")
    return settings


def _view(plain: bool, settings: Settings) -> GitHubAppView:
    """The App's own view of itself; ends the command when there is none."""
    try:
        held = app_secrets.read(settings)
    except CipherError as failure:
        refused(plain, Reason.SECRET_UNREADABLE, str(failure))
    if settings.github_app_id is None or held.private_key is None:
        refused(plain, Reason.GITHUB_APP_MISSING)
    try:
        github = GitHubSetup(settings.github_api_url, settings.github_web_url, SystemClock())
        return github.as_app(settings.github_app_id, held.private_key)
    except SetupError as failure:
        refused(plain, failure.reason, failure.detail)


def _here(plain: bool, settings: Settings) -> None:
    """Ends what stores secrets where an orchestrator hands them out: they would be lost, and no other process would see them."""
    if settings.secrets_from is not None:
        refused(plain, Reason.SETUP_ELSEWHERE)


@setup_github.command("rotate-webhook-secret")
@as_json
def rotate_webhook_secret(plain: bool) -> None:
    """Makes a new webhook secret: both are valid until GitHub signs with the new one, at most a day. Interrupted: run it again."""
    settings = Settings()
    _here(plain, settings)
    view = _view(plain, settings)
    clock = SystemClock()
    made = app_secrets.update(settings, lambda held: app_secrets.rotated(held, secrets.token_hex(32), clock.now()))
    newest = made.webhook_secrets[0]
    try:
        view.set_hook(secret=newest.value)
        newest_delivery = max(view.deliveries(), key=lambda one: one.delivered_at, default=None)
        if newest_delivery is not None:
            view.redeliver(newest_delivery)
    except SetupError as failure:
        refused(plain, failure.reason, f"both secrets stay valid: {failure.detail}")
    seen = newest_delivery is not None and _wait_seen(settings, newest.id)
    said = (
        "GitHub signs with the new secret; the one before ends in ten minutes"
        if seen
        else "nothing signed with the new secret has arrived yet; both are valid for a day"
    )
    show(plain, {"secret": newest.id, "seen": seen}, lambda: said)


def _wait_seen(settings: Settings, secret_id: str) -> bool:
    """Whether the ingress met a delivery that was signed with this secret, within `SEEN_SECONDS`."""
    until = time.monotonic() + SEEN_SECONDS
    while time.monotonic() < until:
        present = app_secrets.read(settings).webhook_secrets
        if present and present[0].id == secret_id and present[0].seen_at is not None:
            return True
        time.sleep(0.25)
    return False


@setup_github.command("webhook")
@click.option("--public-url", help="Origin under which GitHub reaches this platform; kept as KILO_PUBLIC_ORIGIN.")
@as_json
def setup_webhook(public_url: str | None, plain: bool) -> None:
    """Sets the App's webhook address at GitHub to this platform's."""
    settings = _keep_public(plain, Settings(), public_url)
    view = _view(plain, settings)
    try:
        hook = view.set_hook(url=settings.webhook_url, content_type="json", insecure_ssl="0")
    except SetupError as failure:
        refused(plain, failure.reason, failure.detail)
    show(plain, {"webhook": hook.url}, lambda: f"GitHub sends to {hook.url}")


@setup_github.command("key")
@click.argument("file", type=click.File())
@as_json
def setup_key(file: Any, plain: bool) -> None:
    """Takes a new private key of the same App over from a file or stdin (-), after GitHub accepted it."""
    settings, pem = Settings(), file.read()
    _here(plain, settings)
    if settings.github_app_id is None:
        refused(plain, Reason.GITHUB_APP_MISSING)
    try:
        github = GitHubSetup(settings.github_api_url, settings.github_web_url, SystemClock())
        app = github.as_app(settings.github_app_id, pem).app()
    except SetupError as failure:
        refused(plain, failure.reason, failure.detail)
    app_secrets.update(settings, lambda held: held.model_copy(update={"private_key": pem}))
    show(plain, {"app": app.id, "slug": app.slug}, lambda: f"the key of {app.name} is stored; delete the old one at GitHub")


@setup_group.command("model")
@click.option("--base-url", help="OpenAI-compatible address, such as https://models.example/v1.")
@click.option("--model", "models", multiple=True, help="A model to use; the first is the default. May be given again.")
@click.option("--key-file", type=click.File(), help="File with the key; - is stdin. Default: the stored key of the same address.")
@click.option("--private", is_flag=True, help="The address may lie in a network of one's own.")
@click.option("--owner", type=click.UUID, help="With --allow or --forbid: the owner that it is for.")
@click.option("--allow", multiple=True, help="A model that the owner may name in its settings beside the default one.")
@click.option("--forbid", multiple=True, help="A model that the owner may name no more.")
@as_json
def setup_model(
    base_url: str | None,
    models: tuple[str, ...],
    key_file: Any,
    private: bool,
    owner: UUID | None,
    allow: tuple[str, ...],
    forbid: tuple[str, ...],
    plain: bool,
) -> None:
    """Stores address, key and models after a test call of each model; or says which models an owner may use."""
    if owner is not None or allow or forbid:
        _allow(plain, owner, allow, forbid, alone=not (base_url or models or key_file))
        return
    settings = Settings()
    _here(plain, settings)
    fixed = in_environment("model_base_url", "model", "models")
    if fixed:
        end(plain, f"the environment sets {', '.join(fixed)}: unset it, the set-up decides it")
    address = base_url or settings.model_base_url
    if address is None:
        refused(plain, Reason.MODEL_MISSING, "--base-url is needed")
    stored = settings.model_key_file
    # The stored key is the stored address's: another one doesn't get to see it.
    kept = stored.read_text().strip() if stored.exists() and address.rstrip("/") == settings.model_base_url else ""
    key = key_file.read().strip() if key_file else kept
    if not key:
        refused(plain, Reason.MODEL_KEY_MISSING)
    wanted = list(models) or settings.all_models
    place = _vetted(plain, address, settings, private)
    told = []
    for model in wanted:
        try:
            told.append(try_model(address, key, model, address=place))
        except ModelError as failure:
            refused(plain, failure.reason, f"{model}: {failure.detail}")
    if address.rstrip("/") != settings.model_base_url:
        stored.unlink(missing_ok=True)  # between the two writes a session gets no key rather than the wrong address
    write_config(settings, {"model_base_url": address.rstrip("/"), "model": wanted[0], "models": json.dumps(wanted[1:])})
    write_secret(stored, key)
    show(
        plain,
        {"model": wanted[0], "models": wanted, "tested": told},
        lambda: "\n".join([*told, "stored; sessions use it from now on"]),
    )


def _vetted(plain: bool, url: str, settings: Settings, private: bool) -> str:
    """The address that is spoken to; `private`: also of a network of one's own, over https, or this machine."""
    try:
        return outbound.vetted_address(url, loopback=settings.offline or private, private=private)
    except outbound.AddressRefusedError:
        hint = "https, or this machine, is needed" if private else "a model in a network of your own needs --private"
        end(plain, f"{Reason.ADDRESS_REFUSED}: {url} is not a public https address; {hint}")
    except outbound.UnreachableError:
        refused(plain, Reason.MODEL_UNREACHABLE, "the host has no address")


def _allow(plain: bool, owner: UUID | None, allow: tuple[str, ...], forbid: tuple[str, ...], *, alone: bool) -> None:
    if owner is None or not (allow or forbid) or not alone:
        raise click.UsageError("--owner goes with --allow or --forbid, and with nothing else")
    settings, store = open_store(plain)
    if owner not in {one.id for one in store.owners.all()}:
        end(plain, f"no owner {owner}")
    unknown = [one for one in allow if one not in settings.all_models]
    if unknown:
        refused(plain, Reason.MODEL_NOT_ALLOWED, f"{', '.join(unknown)}: not among the platform's models")
    for model in allow:
        store.owners.allow_model(owner, model, True, actor=OPERATOR)
    for model in forbid:
        store.owners.allow_model(owner, model, False, actor=OPERATOR)
    found = list(dict.fromkeys([settings.model, *store.owners.models(owner)]))
    show(plain, {"owner": str(owner), "models": found}, lambda: f"may use: {', '.join(found)}")


COMMANDS = (setup_group,)
