"""The twin's side of a set-up against GitHub's published description; and what the platform makes of its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from kilo_pipelines.core.clock import ManualClock, SystemClock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers.github_checks import look
from kilo_pipelines.providers.github_permissions import manifest
from kilo_pipelines.providers.github_setup import GitHubSetup
from kilo_twin.state import new_private_key
from tests.contracts.test_twin_openapi import Api, description
from tests.support.http import HTTP
from tests.support.twin import Twin

__all__ = ["description"]


@pytest.fixture
def twin(tmp_path: Any) -> Iterator[Twin]:
    """One for each test: the App is another one afterwards."""
    running = Twin(tmp_path / "twin")
    yield running
    running.stop()


def test_answers_of_the_set_up_follow_githubs_description(twin: Twin, description: dict[str, Any]) -> None:
    """A manifest's code, a person's installations and membership, the App's webhook; the App is another one afterwards."""
    api = Api(twin, description)
    api.ask("GET", "/app/hook/config", expected=200, app=True)
    api.ask("PATCH", "/app/hook/config", expected=200, app=True, body={"content_type": "json"})
    asked = {name: f"http://localhost:9/{name}" for name in ("created", "authorized", "installed")}
    made = manifest(name="n", home="http://localhost:9", webhook="http://localhost:9/w", **asked)
    web = f"http://localhost:{twin.port}"
    sent = {"manifest": json.dumps(made), "name": "n", "state": "s", "org": "acme", "person": "grace"}
    back = HTTP.post(f"{web}/settings/apps", data=sent).headers["location"]
    code = httpx.URL(back).params["code"]
    new = api.ask("POST", f"/app-manifests/{code}/conversions", expected=201, token="none")
    api.ask("POST", f"/app-manifests/{code}/conversions", expected=404, token="none")
    twin.control("install", where="acme")
    chosen = {"person": "grace", "state": "s", "redirect_uri": asked["authorized"]}
    code = httpx.URL(HTTP.post(f"{web}/login/oauth/authorize", data=chosen).headers["location"]).params["code"]
    exchange = {"client_id": new["client_id"], "client_secret": new["client_secret"], "code": code}
    exchange["redirect_uri"] = asked["authorized"]
    token = HTTP.post(f"{web}/login/oauth/access_token", json=exchange).json()["access_token"]
    assert HTTP.post(f"{web}/login/oauth/access_token", json=exchange).json()["error"] == "bad_verification_code", "once"
    api.ask("GET", "/user", expected=200, token=token)
    (seen,) = api.ask("GET", "/user/installations", expected=200, token=token)["installations"]
    assert seen["account"]["login"] == "acme"
    assert api.ask("GET", "/user/memberships/orgs/acme", expected=200, token=token)["role"] == "admin"
    api.ask("GET", "/user/memberships/orgs/umbrella", expected=403, token=token)


def test_a_wrong_clock_is_told_from_a_wrong_key(twin: Twin) -> None:
    """GitHub answers 401 to both; its own clock tells which it is."""
    held = json.loads((twin.home / "credentials.json").read_text())
    web = f"http://localhost:{twin.port}"
    early, late = (ManualClock(datetime.now(UTC) + timedelta(minutes=minutes)) for minutes in (-20, 20))
    for clock, pem, reason in (
        (early, held["private_key_pem"], Reason.CLOCK_SKEW),
        (late, held["private_key_pem"], Reason.CLOCK_SKEW),
        (SystemClock(), new_private_key(), Reason.APP_KEY_REFUSED),
        (SystemClock(), "no key", Reason.APP_KEY_REFUSED),
    ):
        (found,) = look(GitHubSetup(f"{web}/api/v3", web, clock), held["app_id"], pem, "http://localhost:9/w", {})
        assert (found.ok, found.code) == (False, reason) and found.remedy
