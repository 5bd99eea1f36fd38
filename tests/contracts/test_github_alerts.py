"""The client for Dependabot alerts against the running twin: every class of answer, hostile pages, dismissals, pull requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.providers import github, github_alerts
from kilo_pipelines.providers.github import GitHubApp, GitHubInstallation, ProviderError
from kilo_pipelines.providers.github_alerts import DISMISS_ALERTS, READ_ALERTS, AlertPage, dismiss_alert, fetch_alerts, get_alert
from tests.support.twin import Twin

WRITE_PULLS = {"metadata": "read", "contents": "read", "pull_requests": "write"}
_names = (f"shop-{number}" for number in count(1))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    running = Twin(tmp_path_factory.mktemp("twin"))
    yield running
    running.stop()


class Shop:
    """A repository of its own with alerts."""

    def __init__(self, twin: Twin, alerts: int) -> None:
        self.twin, self.app = twin, _app_of(twin)
        made = twin.control("seed-alerts", count=alerts, repositories=[next(_names)])["repositories"][0]
        self.full_name, self.id = str(made["repository"]), int(made["repository_id"])

    def reader(self, permissions: dict[str, str] = READ_ALERTS) -> GitHubInstallation:
        return self.app.installation(self.twin.credentials["installation_id"], [self.id], permissions)

    def fetch(self, *, etag: str | None = None, after_page: str | None = None) -> AlertPage:
        return fetch_alerts(self.reader(), self.full_name, etag=etag, after_page=after_page)

    def fault(self, kind: str = "error", **more: Any) -> None:
        self.twin.fault("GET", f"{self.full_name}/dependabot", kind, **more)

    def control(self, call: str, **more: Any) -> dict[str, Any]:
        return self.twin.control(call, repository=self.full_name, **more)


_apps: dict[int, GitHubApp] = {}


def _app_of(twin: Twin) -> GitHubApp:
    """One client for all tests, as in a worker: its connections and tokens live on."""
    return _apps.setdefault(twin.port, twin.app())


@pytest.fixture
def shop(twin: Twin) -> Shop:
    return Shop(twin, 7)


@pytest.fixture(scope="module")
def read_only(twin: Twin) -> Shop:
    """For tests that leave the alerts as they are."""
    return Shop(twin, 7)


def _state(page: AlertPage, number: int) -> Any:
    return next(one["state"] for one in page.alerts if isinstance(one, dict) and one["number"] == number)


def test_every_alert_comes_once_page_by_page(twin: Twin) -> None:
    shop = Shop(twin, 230)
    page = shop.fetch()
    sizes, numbers = [], []
    while True:
        assert (page.status, page.reason) == ("ok", None)
        sizes.append(len(page.alerts))
        numbers += [one["number"] for one in page.alerts if isinstance(one, dict)]
        if page.next is None:
            break
        page = shop.fetch(after_page=page.next)
        assert len(sizes) <= 3, "a page leads to itself"
    assert sizes == [100, 100, 30] and sorted(numbers) == list(range(1, 231))
    assert page.rate_remaining == 4999


def test_the_same_first_page_again_is_unchanged_until_any_alert_moves(twin: Twin) -> None:
    """An alert of the last page, too: what moved last comes first."""
    shop = Shop(twin, 120)
    first = shop.fetch()
    assert first.etag and first.next
    again = shop.fetch(etag=first.etag)
    assert (again.status, again.alerts, again.next, again.reason) == ("unchanged", [], None, None)
    last = shop.fetch(after_page=first.next).alerts
    number = next(one["number"] for one in last if isinstance(one, dict) and one["state"] == "open")
    shop.control("move-alert", number=number, action="fixed")
    moved = shop.fetch(etag=first.etag)
    assert moved.status == "ok" and _state(moved, number) == "fixed"


@pytest.mark.parametrize(
    ("fault", "status", "reason", "retryable", "wait"),
    [
        ({"status": 401, "message": "Bad credentials"}, "auth_invalid", "provider_auth", True, None),
        ({"status": 404, "message": "Not Found"}, "repository_unavailable", "provider_not_found", False, None),
        ({"status": 410, "message": "Gone"}, "repository_unavailable", "provider_not_found", False, None),
        ({"status": 451, "message": "Repository access blocked"}, "access_blocked", "access_blocked", False, None),
        ({"status": 403, "message": "Repository access blocked"}, "access_blocked", "access_blocked", False, None),
        ({"status": 422, "message": "Repository access blocked"}, "access_blocked", "access_blocked", False, None),
        ({"status": 429, "headers": {"retry-after": "11"}}, "rate_limited", "provider_rate_limited", True, 11.0),
        ({"status": 429}, "rate_limited", "provider_rate_limited", True, 60.0),
        ({"status": 403, "headers": {"retry-after": "13"}}, "rate_limited", "provider_rate_limited", True, 13.0),
        ({"status": 403, "headers": {"retry-after": "9" * 500}}, "rate_limited", "provider_rate_limited", True, 3600.0),
        (
            {"status": 403, "message": "You have exceeded a secondary rate limit."},
            "rate_limited",
            "provider_rate_limited",
            True,
            60.0,
        ),
        ({"status": 403, "message": "Resource not accessible by integration"}, "failed", "provider_refused", False, None),
        ({"status": 400, "message": "Bad Request"}, "failed", "provider_invalid", False, None),
        ({"status": 500}, "failed", "provider_unavailable", True, None),
        ({"status": 503, "headers": {"retry-after": "7"}}, "failed", "provider_unavailable", True, 7.0),
    ],
)
def test_each_answer_has_one_outcome(
    read_only: Shop, fault: dict[str, Any], status: str, reason: str, retryable: bool, wait: float | None
) -> None:
    read_only.fault(**fault)
    page = read_only.fetch()
    assert (page.status, page.reason, page.retryable, page.retry_after_s) == (status, reason, retryable, wait)
    assert page.detail == f"HTTP {fault['status']}: {read_only.full_name}" and page.alerts == []
    assert read_only.fetch().status == "ok"


def test_a_used_up_limit_waits_for_its_reset(read_only: Shop) -> None:
    reset = str(int(time.time()) + 1_800)
    read_only.fault(status=403, headers={"x-ratelimit-remaining": "0", "x-ratelimit-reset": reset})
    page = read_only.fetch()
    assert (page.status, page.rate_remaining) == ("rate_limited", 0) and 1_700 < (page.retry_after_s or 0) <= 1_801


def test_disabled_alerts_and_archived_repositories_are_told_by_githubs_words(shop: Shop) -> None:
    for settings in ({"alerts_enabled": False}, {"archived": True}):
        shop.control("set-repository", **settings)
        page = shop.fetch()
        assert (page.status, page.reason, page.retryable) == ("alerts_disabled", "alerts_disabled", False)
    shop.control("set-repository")
    assert shop.fetch().status == "ok"


def test_a_refused_token_is_dropped(read_only: Shop) -> None:
    app, arguments = read_only.twin.app(), (read_only.twin.credentials["installation_id"], [read_only.id], READ_ALERTS)
    before = app.token(*arguments)
    read_only.fault(status=401)
    assert fetch_alerts(app.installation(*arguments), read_only.full_name, etag=None, after_page=None).status == "auth_invalid"
    assert app.token(*arguments) != before


@pytest.mark.parametrize(
    ("fault", "reason", "retryable"),
    [
        ({"kind": "cut"}, "provider_unavailable", True),
        ({"kind": "raw", "text": '[{"number": 1'}, "provider_unavailable", True),
        ({"kind": "raw", "text": "<html>"}, "provider_unavailable", True),
        ({"kind": "raw", "text": '{"message": "hello"}'}, "provider_unavailable", True),
        ({"kind": "raw", "text": '[{"number": NaN}]'}, "provider_unavailable", True),
        ({"kind": "raw", "text": "[" * 200_000}, "provider_unavailable", True),
        ({"kind": "raw", "text": " " * (github_alerts.MAX_PAGE_BYTES + 1)}, "alert_page_too_large", False),
        ({"kind": "raw", "status": 403, "text": '{"message": ' + '"x' * 100_000}, "provider_refused", False),
        ({"kind": "raw", "status": 403, "text": '["Dependabot alerts are disabled"]'}, "provider_refused", False),
    ],
    ids=["cut", "half", "html", "object", "nan", "deep", "large", "large-error", "odd-error"],
)
def test_a_broken_answer_is_a_failure_that_says_nothing_of_its_body(
    read_only: Shop, fault: dict[str, Any], reason: str, retryable: bool
) -> None:
    read_only.fault(**fault)
    page = read_only.fetch()
    assert (page.status, page.reason, page.retryable, page.alerts) == ("failed", reason, retryable, [])
    assert len(page.detail) < 100 and read_only.full_name in page.detail


def test_a_server_that_is_silent_or_trickles_is_left(read_only: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(github, "TIMEOUT_SECONDS", 1)
    silent = read_only.twin.installation(READ_ALERTS, read_only.id)
    read_only.fault("slow", seconds=1.5)
    page = fetch_alerts(silent, read_only.full_name, etag=None, after_page=None)
    assert (page.status, page.reason, page.retryable) == ("failed", "provider_unavailable", True)
    monkeypatch.setattr(github, "BODY_SECONDS", -1.0)
    assert fetch_alerts(silent, read_only.full_name, etag=None, after_page=None).detail.startswith("TimeoutError")


@pytest.mark.parametrize(
    "link",
    [
        "http://169.254.169.254/repos/x/dependabot/alerts?after=x",
        "http://localhost:{port}@evil.test/api/v3/repos/x/y/dependabot/alerts?after=x",
        "https://localhost:{port}/api/v3/repos/x/y/dependabot/alerts?after=x",
        "http://localhost:{port}/api/v3/user?after=x",
        "http://localhost:{port}/api/v3/repos/x/y/dependabot/alerts",
        "http://[::1/dependabot/alerts?after=x",
        "//evil.test/dependabot/alerts?after=x",
    ],
)
def test_a_next_page_elsewhere_is_refused(read_only: Shop, link: str) -> None:
    read_only.fault("headers", headers={"link": f'<{link.replace("{port}", str(read_only.twin.port))}>; rel="next"'})
    page = read_only.fetch()
    assert (page.status, page.reason, page.alerts) == ("failed", "page_link_refused", [])


def test_a_link_by_the_repositorys_id_is_followed_under_its_name(read_only: Shop) -> None:
    link = f"{read_only.twin.api}/repositories/{read_only.id}/dependabot/alerts?per_page=3&after=a%26state%3Dopen"
    read_only.fault("headers", headers={"link": f'<{link}>; rel="next"'})
    page = read_only.fetch()
    assert (page.status, page.next) == ("ok", "per_page=3&after=a%26state%3Dopen")


@pytest.mark.parametrize("cursor", ["after=nonsense", "page=2", "after=\x00", "after=x#y", "per_page=0"])
def test_a_place_that_github_does_not_take_has_a_reason_of_its_own(read_only: Shop, cursor: str) -> None:
    page = read_only.fetch(after_page=cursor)
    assert (page.status, page.reason, page.retryable) == ("failed", "page_cursor_refused", False)


@pytest.mark.parametrize("name", ["acme", "a/b/c", "../x", "acme/..", "acme/x?state=open", "acme/x\n", "", "a b/c"])
def test_what_is_no_repositorys_name_is_asked_of_nobody(read_only: Shop, name: str) -> None:
    page = fetch_alerts(read_only.reader(), name, etag=None, after_page=None)
    assert (page.status, page.reason, page.detail) == ("failed", "provider_invalid", "not a repository's name")


def test_broken_and_hostile_alerts_come_through_as_they_are(twin: Twin) -> None:
    """The page isn't lost with them: whoever reads each alert decides."""
    shop = Shop(twin, 12)
    kinds = ["unknown_state", "unknown_severity", "wrong_types", "number_is_text", "advisory_missing", "not_an_object"]
    kinds += ["huge_description", "injection", "control_characters", "html"]
    for number, kind in enumerate(kinds, 1):
        shop.control("spoil-alert", number=number, kind=kind)
    page = shop.fetch()
    assert page.status == "ok" and len(page.alerts) == 12
    assert [one for one in page.alerts if not isinstance(one, dict)] == ["alert 6"]
    by_number = {one["number"]: one for one in page.alerts if isinstance(one, dict)}
    assert by_number[1]["state"] == "snoozed" and by_number["4junk"]["number"] == "4junk"
    assert len(by_number[7]["security_advisory"]["description"]) > 1_000_000
    assert "\x00" in by_number[9]["security_advisory"]["summary"]


def test_a_renamed_repository_is_told_from_one_that_is_gone(twin: Twin) -> None:
    renamed, transferred, removed = Shop(twin, 1), Shop(twin, 1), Shop(twin, 1)
    readers = [(one, one.reader()) for one in (renamed, transferred, removed)]
    renamed.control("rename", to=f"{renamed.full_name.partition('/')[2]}-new")
    transferred.control("transfer", to="elsewhere")
    removed.control("remove")
    pages = [fetch_alerts(reader, one.full_name, etag=None, after_page=None) for one, reader in readers]
    assert [page.status for page in pages] == ["repository_unavailable"] * 3
    assert [page.reason for page in pages] == ["repository_moved", "provider_not_found", "provider_not_found"]
    assert fetch_alerts(readers[0][1], f"{renamed.full_name}-new", etag=None, after_page=None).status == "ok"
    for gone in (transferred, removed):
        with pytest.raises(ProviderError) as left:
            twin.installation(READ_ALERTS, gone.id)
        assert left.value.reason == "owner_changed"


def test_a_permission_that_the_owner_withholds_is_told_from_a_repository_that_left(shop: Shop) -> None:
    shop.twin.control("withhold", permissions=["vulnerability_alerts"])
    with pytest.raises(ProviderError) as missing:
        shop.reader()
    shop.twin.control("withhold", permissions=[])
    assert (missing.value.reason, missing.value.retryable) == ("permission_missing", False)
    page = fetch_alerts(shop.reader({"metadata": "read"}), shop.full_name, etag=None, after_page=None)
    assert (page.status, page.reason) == ("failed", "provider_refused")


def test_an_alert_is_dismissed_once_and_with_its_reason(shop: Shop) -> None:
    number = _open(shop)
    writer = shop.reader(DISMISS_ALERTS)
    done = dismiss_alert(writer, shop.full_name, number, "not_used", "é" * 280)
    seen = get_alert(shop.reader(), shop.full_name, number)
    assert done == seen and (seen["state"], seen["dismissed_reason"]) == ("dismissed", "not_used")
    assert len(seen["dismissed_comment"]) == 280 and seen["dismissed_by"]["login"] == "kilo-reviewer[bot]"
    with pytest.raises(ProviderError) as again:
        dismiss_alert(writer, shop.full_name, number, "not_used", "")
    assert (again.value.reason, again.value.retryable) == ("provider_invalid", False)


def _open(shop: Shop) -> int:
    return next(int(one["number"]) for one in shop.fetch().alerts if isinstance(one, dict) and one["state"] == "open")


@pytest.mark.parametrize("action", ["fixed", "auto_dismissed", "dismissed"])
def test_what_is_not_open_any_more_is_not_dismissed(shop: Shop, action: str) -> None:
    number = _open(shop)
    shop.control("move-alert", number=number, action=action)
    before = get_alert(shop.reader(), shop.full_name, number)
    with pytest.raises(ProviderError) as refused:
        dismiss_alert(shop.reader(DISMISS_ALERTS), shop.full_name, number, "not_used", "")
    assert refused.value.reason == "provider_invalid" and get_alert(shop.reader(), shop.full_name, number) == before


def test_dismissals_that_cannot_be_are_refused(shop: Shop) -> None:
    number, writer = _open(shop), shop.reader(DISMISS_ALERTS)
    cases: list[tuple[GitHubInstallation, int, str, str, str]] = [
        (writer, number, "bored", "", "provider_invalid"),
        (writer, number, "not_used", "x" * 281, "provider_invalid"),
        (writer, 9_999, "not_used", "", "provider_not_found"),
        (shop.reader(), number, "not_used", "", "provider_refused"),
    ]
    for client, wanted, reason, comment, expected in cases:
        with pytest.raises(ProviderError) as refused:
            dismiss_alert(client, shop.full_name, wanted, reason, comment)
        assert (refused.value.reason, refused.value.retryable) == (expected, False)
    assert get_alert(shop.reader(), shop.full_name, number)["state"] == "open"


def test_a_dismissal_whose_answer_was_lost_is_seen_when_it_is_read_back(shop: Shop) -> None:
    number, writer = _open(shop), shop.reader(DISMISS_ALERTS)
    shop.twin.fault("PATCH", f"{shop.full_name}/dependabot", "lost")
    with pytest.raises(ProviderError) as lost:
        dismiss_alert(writer, shop.full_name, number, "tolerable_risk", "seen")
    assert (lost.value.reason, lost.value.retryable) == (Reason.PROVIDER_UNAVAILABLE, True)
    assert get_alert(writer, shop.full_name, number)["state"] == "dismissed"


def test_no_token_or_body_is_in_logs_and_messages(read_only: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        reader = read_only.reader()
        fetch_alerts(reader, read_only.full_name, etag=None, after_page=None)
        read_only.fault(status=500, message="CANARY-BODY")
        page = fetch_alerts(reader, read_only.full_name, etag=None, after_page=None)
        with pytest.raises(ProviderError) as failed:
            read_only.fault(status=403, message="CANARY-BODY")
            get_alert(reader, read_only.full_name, 1)
    assert "ghs_" not in caplog.text and "Bearer ey" not in caplog.text and "ghs_" not in repr(reader)
    assert "CANARY" not in caplog.text + page.detail + str(failed.value)
