"""The set-up's pure parts: what the App asks for, how a webhook secret is rotated, what a model's refusal means, addresses."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.cloud_agent.model_proxy import ModelProxy, Upstream
from kilo_pipelines.core.checks import Check
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress.setup_pages import app_page
from kilo_pipelines.providers import github_alerts
from kilo_pipelines.providers.github_permissions import (
    EVENTS,
    PERMISSIONS,
    SERVICES,
    events_for,
    manifest,
    missing,
    permissions_for,
)
from kilo_pipelines.providers.github_webhooks import signed_with
from kilo_pipelines.providers.models import _refusal
from kilo_pipelines.resources import github as resource
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.settings import Settings, api_url_of, web_url_of, write_secret
from kilo_pipelines.store import app_secrets
from kilo_pipelines.store.app_secrets import AppSecrets, WebhookSecret
from kilo_pipelines.store.crypto import Cipher, CipherError
from tests.support.ingress import sign

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PAGE = (Path(__file__).parents[2] / "docs" / "setup.md").read_text()


def test_the_app_asks_for_what_tokens_are_minted_with_and_for_nothing_that_is_forbidden() -> None:
    asked = permissions_for(SERVICES)
    minted = [resource.READ, resource.POST, *resource.PERMISSIONS.values(), github_alerts.READ_ALERTS, {"contents": "write"}]
    used = {(name, level) for one in minted for name, level in one.items()}
    assert {(name, level) for name, level in used if asked.get(name) not in (level, "write")} == set()
    assert not {"workflows", "administration", "secrets", "actions"} & set(asked) and "admin" not in asked.values()
    assert set(asked) == {name for name, _ in used} | {"members"}, "nothing that no token uses, but the proof of a person"


def test_the_guide_lists_the_same_permissions_and_events_with_the_same_reasons() -> None:
    rows = set(re.findall(r"^\| (?!permission|event|check|-)(.+) \|$", PAGE, re.MULTILINE))
    assert {f"{one.title} | {one.level} | `{one.service}` | {one.reason}" for one in PERMISSIONS} <= rows
    assert {f"`{one.name}` | `{one.service}` | {one.reason}" for one in EVENTS} <= rows
    named = {one for row in rows if row.count("|") == 2 for one in re.findall(r"`([a-z]+_[a-z_]+)`", row.split("|")[1])}
    assert named - {one.name for one in EVENTS} - set(SERVICES) - {"platform"} <= set(Reason)


@given(st.sets(st.sampled_from(SERVICES)))
def test_an_app_made_from_the_manifest_lacks_nothing(services: set[str]) -> None:
    assert missing(services, permissions_for(services), events_for(services)) == []


@given(st.sampled_from(PERMISSIONS), st.sampled_from(["nothing", "read", "unheard-of"]))
def test_each_missing_permission_is_named_with_the_service_that_needs_it(one: object, held: str) -> None:
    granted = permissions_for(SERVICES) | {one.name: held}  # type: ignore[attr-defined]
    found = {(lack.service, lack.name) for lack in missing(SERVICES, granted, events_for(SERVICES))}
    enough = held == "read" and one.level == "read"  # type: ignore[attr-defined]
    assert ((one.service, one.name) in found) is not enough  # type: ignore[attr-defined]


def test_a_persons_installation_has_no_members_to_read() -> None:
    granted = {name: level for name, level in permissions_for(SERVICES).items() if name != "members"}
    assert [one.name for one in missing(SERVICES, granted, events_for(SERVICES))] == ["members"]
    assert missing(SERVICES, granted, events_for(SERVICES), organization=False) == []


def test_the_manifest_is_private_and_brings_our_state_back_by_our_own_authorization() -> None:
    made = manifest(name="n", home="h", webhook="w", created="c", authorized="a", installed="i")
    assert (made["public"], made["request_oauth_on_install"], made["callback_urls"]) == (False, False, ["a"])
    assert json.loads(json.dumps(made)) == made


def test_what_comes_from_outside_stays_text_on_a_page() -> None:
    """Names and GitHub's words are data: no element and no attribute comes out of them, whatever they hold."""
    hostile = """"><script>x</script>`<img src=x>` https://a.example/"onmouseover=x 'y'"""
    check = Check(hostile, "signature_invalid", False, hostile, hostile)
    told = {"owner": hostile, "name": hostile, "made": True, "repositories": 1, "person": hostile, "account": hostile}
    page = app_page([check], {}, told, ["setup_state_invalid", hostile], Settings())
    assert not re.search(r"<script|<img|<[^>]* onmouseover", page)
    assert "&lt;script&gt;" in page


# -- the webhook secret ----------------------------------------------------------------------------------------------------


def _held(*secrets: WebhookSecret) -> AppSecrets:
    return AppSecrets(webhook_secrets=secrets)


def _values(held: AppSecrets, at: datetime) -> list[str]:
    return [one.value for one in held.valid(at)]


def test_both_are_valid_until_the_new_one_is_seen_and_a_little_longer() -> None:
    both = app_secrets.rotated(_held(WebhookSecret(id="a", value="old", seen_at=NOW)), "new", NOW)
    assert _values(both, NOW) == ["new", "old"]
    assert _values(both, NOW + app_secrets.OVERLAP) == ["new"], "a day at most"
    later = NOW + timedelta(hours=1)
    ending = app_secrets.seen(both, both.webhook_secrets[0].id, later)
    assert _values(ending, later) == ["new", "old"]
    assert _values(ending, later + app_secrets.AFTER_SEEN) == ["new"]
    assert app_secrets.seen(ending, both.webhook_secrets[0].id, later + timedelta(minutes=5)) == ending, "the end doesn't move"
    assert app_secrets.seen(both, "a", later) == both, "the old one's deliveries end nothing"


@given(st.lists(st.tuples(st.sampled_from(["rotate", "seen", "wait"]), st.integers(0, 3_000)), max_size=12))
def test_at_most_two_are_valid_and_the_newest_always_is(steps: list[tuple[str, int]]) -> None:
    held, now = _held(WebhookSecret(id="first", value="0")), NOW
    for number, (what, minutes) in enumerate(steps, 1):
        now += timedelta(minutes=minutes)
        if what == "rotate":
            held = app_secrets.rotated(held, str(number), now)
        elif what == "seen":
            held = app_secrets.seen(held, held.webhook_secrets[0].id, now)
        assert 1 <= len(held.valid(now)) <= 2 and held.valid(now)[0] == held.webhook_secrets[0]
        assert held.webhook_secrets[0].until is None


def test_a_second_rotation_before_anything_was_signed_goes_on_with_the_same_value() -> None:
    """GitHub may have taken the first one before its answer was lost: a third value would make its deliveries unreadable."""
    once = app_secrets.rotated(_held(WebhookSecret(id="a", value="old")), "new", NOW)
    assert app_secrets.rotated(once, "newer", NOW + timedelta(minutes=1)) == once


def test_a_signature_is_looked_for_under_every_secret() -> None:
    assert [signed_with(["new", "old"], b"body", sign(b"body", one)) for one in ("new", "old", "other")] == [0, 1, None]
    assert signed_with([], b"body", sign(b"body", "new")) is None


# -- secrets at rest -------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path)
    write_secret(settings.encryption_key_file, Cipher.new_key_file())
    return settings


def test_plain_files_count_at_once_and_are_sealed_and_gone_after_the_start(home: Settings) -> None:
    write_secret(home.github_private_key_file, "canary-key")
    write_secret(home.webhook_secret_file, "canary-secret\n")
    before = app_secrets.read(home)
    assert (before.private_key, before.webhook_secrets[0].value) == ("canary-key", "canary-secret")
    app_secrets.adopt(home)
    assert not home.github_private_key_file.exists() and not home.webhook_secret_file.exists()
    assert "canary" not in "".join(one.read_text() for one in home.secrets_dir.iterdir())
    after = app_secrets.read(home)
    assert (after.private_key, after.webhook_secrets[0].value) == ("canary-key", "canary-secret")
    assert "canary" not in repr(after) + repr(after.webhook_secrets)


def test_a_new_key_file_opens_nothing_and_says_so(home: Settings) -> None:
    app_secrets.update(home, lambda held: held.model_copy(update={"private_key": "k"}))
    write_secret(home.encryption_key_file, Cipher.new_key_file())
    with pytest.raises(CipherError):
        app_secrets.read(home)
    write_secret(home.github_app_file, "no hexadecimal")
    with pytest.raises(CipherError, match="damaged"):
        app_secrets.read(home)


def test_a_rotated_encryption_key_may_forget_the_old_one_after_the_next_start(home: Settings) -> None:
    app_secrets.update(home, lambda held: held.model_copy(update={"private_key": "k"}))
    rotated = Cipher.rotated(home.encryption_key_file.read_text())
    write_secret(home.encryption_key_file, rotated)
    app_secrets.adopt(home)
    current = Cipher.key_ids(rotated)[0]
    only = {"current": current, "keys": {current: json.loads(rotated)["keys"][current]}}
    write_secret(home.encryption_key_file, json.dumps(only))
    assert app_secrets.read(home).private_key == "k"


# -- the model -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (401, "no", Reason.MODEL_KEY_REFUSED),
        (403, "forbidden", Reason.MODEL_KEY_REFUSED),
        (402, "no credits", Reason.INSUFFICIENT_CREDITS),
        (404, "The model `x` does not exist", Reason.MODEL_UNKNOWN),
        (400, "x is not a valid model ID", Reason.MODEL_UNKNOWN),
        (400, "this model does not support tools", Reason.MODEL_CANNOT_CALL_TOOLS),
        (404, "No endpoints found that support tool use", Reason.MODEL_CANNOT_CALL_TOOLS),
        (429, "slow down", Reason.MODEL_UNREACHABLE),
        (503, "overloaded model", Reason.MODEL_UNREACHABLE),
        (302, "", Reason.MODEL_REFUSED),
        (404, "nothing here", Reason.MODEL_REFUSED),
    ],
)
def test_a_models_refusal_is_told_by_status_and_words(status: int, error: str, reason: Reason) -> None:
    assert _refusal(status, {"error": {"message": error}}) == reason


def test_an_owner_names_the_default_model_or_one_that_it_was_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("HOME", str(tmp_path)), ("MODEL", "big"), ("MODELS", '["small"]')):
        monkeypatch.setenv(f"KILO_{name}", value)
    agent = CloudAgentResource()
    assert agent.may_use(None, []) and agent.may_use("big", []) and agent.may_use("small", ["small"])
    assert not agent.may_use("small", []) and not agent.may_use("withdrawn", ["withdrawn"]), "the platform's list goes first"


def test_the_model_proxy_opens_nothing_for_a_model_that_isnt_the_platforms(tmp_path: Path) -> None:
    proxy = ModelProxy(tmp_path, lambda: Upstream(None, "key", frozenset({"big"})))
    question = {"messages": [], "tool": {"name": "t"}, "seconds": 1, "max_tokens": 1}
    session = {"session_id": "s", "turns": 1, "tokens": 1}

    async def ask(path: str, body: dict[str, object]) -> httpx.Response:
        transport = httpx.ASGITransport(proxy.control())
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.post(path, json=body)

    refused = anyio.run(ask, "/sessions", {**session, "model": "other"})
    assert (refused.status_code, refused.json()["reason"]) == (403, Reason.MODEL_NOT_ALLOWED)
    assert anyio.run(ask, "/questions", {**question, "model": "other"}).json() == {"reason": Reason.MODEL_NOT_ALLOWED}
    assert anyio.run(ask, "/questions", {**question, "model": "big"}).json() == {"reason": Reason.MODEL_MISSING}


# -- addresses -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("web", "api"),
    [
        ("https://github.com", "https://api.github.com"),
        ("https://acme.ghe.com", "https://api.acme.ghe.com"),
        ("https://github.acme.example", "https://github.acme.example/api/v3"),
        ("http://localhost:8090", "http://localhost:8090/api/v3"),
    ],
)
def test_web_and_api_addresses_belong_together(web: str, api: str) -> None:
    assert (api_url_of(f"{web}/"), web_url_of(api)) == (api, web)


@pytest.mark.parametrize(
    "origin", ["hooks.example", "ftp://hooks.example", "https://hooks.example/path", "https://u@hooks.example"]
)
def test_a_public_origin_is_a_scheme_and_a_host(origin: str) -> None:
    with pytest.raises(ValueError, match="origin"):
        Settings(public_origin=origin)
