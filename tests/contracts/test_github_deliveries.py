"""The client of GitHub's log of deliveries against the running twin: pages, hostile answers, payloads that aren't what they are called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import github_deliveries as client
from kilo_pipelines.providers.github import GitHubApp, ProviderError
from tests.support.twin import Twin

LOG = "/app/hook/deliveries"


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    running = Twin(tmp_path_factory.mktemp("log"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def app(twin: Twin) -> GitHubApp:
    for number in range(5):
        twin.control("open-pull", kind="planted", head_ref=f"topic-{number}")
    return twin.app()


def refusal(call: Any) -> ProviderError:
    with pytest.raises(ProviderError) as failed:
        call()
    return failed.value


def test_every_attempt_comes_once_page_by_page(app: GitHubApp, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = client.list_deliveries(app, None)
    monkeypatch.setattr(client, "PER_PAGE", 2)
    page, seen = client.list_deliveries(app, None), []
    while True:
        seen += page.attempts
        if page.next is None:
            break
        page = client.list_deliveries(app, page.next)
        assert len(seen) <= len(whole.attempts), "a page leads to itself"
    assert seen == whole.attempts and len(seen) >= 5 and whole.next is None


def test_a_page_elsewhere_is_not_followed(app: GitHubApp, twin: Twin) -> None:
    """Threats, rule 22: the App's token goes to the address that it was given for."""
    for link in (
        "http://elsewhere.test/api/v3/app/hook/deliveries?cursor=v1_1",
        f"{twin.api}/app/hook/deliveries/1?cursor=v1_1",
        f"{twin.api}/app/hook/deliveries?cursor={'9' * 500}",
        f"{twin.api}/app/hook/deliveries?page=2",
    ):
        twin.fault("GET", LOG, kind="headers", headers={"link": f'<{link}>; rel="next"'})
        assert refusal(lambda: client.list_deliveries(app, None)).reason is Reason.PAGE_LINK_REFUSED, link


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, Reason.PROVIDER_UNAVAILABLE),
        ("{}", Reason.PROVIDER_UNAVAILABLE),
        ("nothing", Reason.PROVIDER_UNAVAILABLE),
        (json.dumps([{"guid": "x" * 2_100_000}]), Reason.BODY_TOO_LARGE),
    ],
)
def test_an_answer_that_is_no_page_is_refused(app: GitHubApp, twin: Twin, text: str, reason: Reason) -> None:
    twin.fault("GET", LOG, kind="raw", text=text)
    assert refusal(lambda: client.list_deliveries(app, None)).reason is reason


def test_a_broken_line_hides_no_other(app: GitHubApp, twin: Twin) -> None:
    line = {
        "id": 7,
        "guid": "58474f00-b361-11eb-836d-0e4f3503ccbe",
        "delivered_at": "2026-03-01T12:00:00Z",
        "status_code": 502,
        "event": "pull_request",
        "action": None,
        "installation_id": 1,
        "repository_id": None,
    }
    broken = [line | change for change in ({"id": -1}, {"guid": "a\u0000b"}, {"delivered_at": "soon"}, {"installation_id": True})]
    twin.fault("GET", LOG, kind="raw", text=json.dumps([*broken, line, "x"]))
    page = client.list_deliveries(app, None)
    assert [one.id for one in page.attempts] == [7] and page.malformed == 5 and not page.attempts[0].answered


@pytest.mark.parametrize(
    ("status", "headers", "reason", "retryable"),
    [
        (401, {}, Reason.PROVIDER_REFUSED, False),
        (404, {}, Reason.PROVIDER_NOT_FOUND, False),
        (403, {"retry-after": "9"}, Reason.PROVIDER_RATE_LIMITED, True),
        (500, {}, Reason.PROVIDER_UNAVAILABLE, True),
        (302, {"location": "http://elsewhere.test/"}, Reason.PROVIDER_INVALID, False),
    ],
)
def test_each_refusal_has_its_reason(
    app: GitHubApp, twin: Twin, status: int, headers: dict[str, str], reason: Reason, retryable: bool
) -> None:
    twin.fault("GET", LOG, status=status, headers=headers)
    failure = refusal(lambda: client.list_deliveries(app, None))
    assert (failure.reason, failure.retryable) == (reason, retryable)


def test_a_cursor_that_github_doesnt_take_is_told_apart(app: GitHubApp) -> None:
    assert refusal(lambda: client.list_deliveries(app, "expired")).reason is Reason.PAGE_CURSOR_REFUSED


def test_a_payload_comes_as_it_was_sent(app: GitHubApp) -> None:
    newest = client.list_deliveries(app, None).attempts[0]
    found = client.fetch_delivery(app, newest.id)
    assert (found.guid, found.event, found.installation_id) == (newest.guid, newest.event, newest.installation_id)
    assert json.loads(found.body)["pull_request"]["head"]["sha"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"event": "installation"}, Reason.PAYLOAD_SHAPE_MISMATCH),
        ({"id": 1}, Reason.PAYLOAD_SHAPE_MISMATCH),
        ({"guid": "other"}, Reason.PAYLOAD_SHAPE_MISMATCH),
        ({"request": {"headers": {}, "payload": None}}, Reason.PAYLOAD_SHAPE_MISMATCH),
        ({"installation_id": 4}, Reason.INSTALLATION_ID_MISSING),
    ],
)
def test_a_payload_that_isnt_what_the_log_calls_it_is_refused(
    app: GitHubApp, twin: Twin, change: dict[str, Any], reason: Reason
) -> None:
    """Threats, rule 15: the checks of the ingress."""
    newest = client.list_deliveries(app, None).attempts[0]
    with app.stream_as_app("GET", f"{LOG}/{newest.id}") as response:
        whole = json.loads(response.read())
    twin.fault("GET", f"{LOG}/{newest.id}", kind="raw", text=json.dumps(whole | change))
    assert refusal(lambda: client.fetch_delivery(app, newest.id)).reason is reason
