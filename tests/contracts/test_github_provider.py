"""The GitHub client and its effects against the running twin: over HTTP, with real JWTs, tokens and pages."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kilo_pipelines.core.clock import ManualClock, SystemClock
from kilo_pipelines.core.diff import hunks_of
from kilo_pipelines.core.effects import EffectIntent, EffectKind, EffectReceipt
from kilo_pipelines.providers import github_effects
from kilo_pipelines.providers.github import GitHubApp, GitHubInstallation, ProviderError
from tests.support.twin import POST, READ, Twin

MARKER = "<!-- kilo-pipelines:test:0123 -->"


def apply(installation: GitHubInstallation, intent: EffectIntent) -> EffectReceipt:
    """An effect that stays ours to its end."""
    return github_effects.apply(installation, intent, lambda: True)


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[Twin]:
    running = Twin(tmp_path)
    yield running
    running.stop()


def _place(twin: Twin) -> tuple[str, int]:
    """A file and an added line of the pull request's diff."""
    with twin.installation(READ).errors():
        for file in twin.installation(READ).pull_object(twin.pull["repository"], twin.pull["number"]).get_files():
            hunks = hunks_of(file.patch or "")
            if hunks:
                return file.filename, hunks[-1].new_start + hunks[-1].new_lines - 1
    raise AssertionError("the pull request changes nothing")


def _check(twin: Twin, status: str, **more: Any) -> EffectIntent:
    values = {"head_sha": twin.pull["head_sha"], "name": "kilo/code-review", "external_id": "e1", "title": "t", "summary": "s"}
    return twin.intent(EffectKind.GITHUB_CHECK_RUN, status=status, **values, **more)


def _review(twin: Twin, *comments: dict[str, Any]) -> EffectIntent:
    return twin.intent(
        EffectKind.GITHUB_REVIEW,
        pull_number=twin.pull["number"],
        commit_id=twin.pull["head_sha"],
        body=f"Summary {MARKER}",
        marker=MARKER,
        comments=list(comments),
    )


def test_a_pull_request_is_read_as_it_is_now(twin: Twin) -> None:
    state = twin.installation(READ).pull(twin.pull["repository"], twin.pull["number"])
    assert (state.repository_id, state.number, state.state) == (twin.pull["repository_id"], twin.pull["number"], "open")
    assert (state.head_sha, state.base_ref, state.default_branch) == (twin.pull["head_sha"], "main", "main")
    assert state.head_repository_id == state.repository_id and state.labels == [] and not state.merged


def test_a_check_run_is_made_once_and_updated_in_place(twin: Twin) -> None:
    first = apply(twin.installation(), _check(twin, "in_progress"))
    again = apply(twin.installation(), _check(twin, "in_progress"))
    ended = apply(twin.installation(), _check(twin, "completed", conclusion="failure"))
    assert first.created and not again.created and {again.external_id, ended.external_id} == {first.external_id}
    runs = twin.read()["check_runs"]
    assert [(run["status"], run["conclusion"], run["external_id"]) for run in runs] == [("completed", "failure", "e1")]


@pytest.mark.parametrize("path", ["/check-runs", "/reviews", "/comments", "/reactions"])
def test_a_write_whose_answer_was_lost_is_not_made_twice(twin: Twin, path: str) -> None:
    """The provider did it and the connection broke: the next try reads back first (invariant 5)."""
    summary = {"pull_number": twin.pull["number"], "body": f"All of it {MARKER}", "marker": MARKER}
    intents = {
        "/check-runs": _check(twin, "completed", conclusion="success"),
        "/reviews": _review(twin),
        "/comments": twin.intent(EffectKind.GITHUB_SUMMARY_COMMENT, **summary),
        "/reactions": twin.intent(EffectKind.GITHUB_REACTION, pull_number=twin.pull["number"], content="eyes"),
    }
    twin.fault("POST", path, "lost")
    with pytest.raises(ProviderError) as lost:
        apply(twin.installation(), intents[path])
    assert lost.value.retryable and lost.value.reason == "provider_unavailable"
    apply(twin.installation(), intents[path])
    seen = twin.read()
    here = {"/check-runs": "check_runs", "/reviews": "reviews", "/comments": "comments", "/reactions": "reactions"}[path]
    assert len(seen[here]) == 1


def test_a_review_carries_its_inline_comments(twin: Twin) -> None:
    path, line = _place(twin)
    receipt = apply(twin.installation(), _review(twin, {"path": path, "line": line, "side": "RIGHT", "body": "Look"}))
    seen = twin.read()
    assert [(one["path"], one["line"], one["body"]) for one in seen["review_comments"]] == [(path, line, "Look")]
    assert receipt.created and str(seen["reviews"][0]["id"]) == receipt.external_id
    ours = twin.installation(READ).review_comments(twin.pull["repository"], twin.pull["number"])
    assert [one.is_ours for one in ours] == [True]


def test_comments_that_github_refuses_go_to_the_body(twin: Twin) -> None:
    path, line = _place(twin)
    good = {"path": path, "line": line, "side": "RIGHT", "body": "Look here"}
    bad = [
        {"path": path, "line": 99_999, "side": "RIGHT", "body": "Outside"},
        {"path": "no/such", "line": 1, "side": "RIGHT", "body": "Nowhere"},
    ]
    assert apply(twin.installation(), _review(twin, good, *bad)).created
    seen = twin.read()
    assert [one["body"] for one in seen["review_comments"]] == ["Look here"]
    body = seen["reviews"][0]["body"]
    assert "Outside" in body and "Nowhere" in body and "Look here" not in body and len(seen["reviews"]) == 1


def test_a_refusal_for_another_cause_is_tried_once_more_and_no_oftener(twin: Twin) -> None:
    path, line = _place(twin)
    intent = _review(twin, {"path": path, "line": line, "side": "RIGHT", "body": "Look"})
    twin.fault("POST", "/reviews", status=422, times=2)
    with pytest.raises(ProviderError) as refused:
        apply(twin.installation(), intent)
    assert (refused.value.reason, refused.value.retryable) == ("provider_invalid", False)
    assert twin.read()["reviews"] == []
    apply(twin.installation(), intent)  # the two refusals are used up: exactly two were asked for
    assert len(twin.read()["review_comments"]) == 1


def test_the_summary_is_updated_in_place_beyond_the_first_page_and_forged_markers_are_ignored(twin: Twin) -> None:
    def summary(body: str) -> EffectIntent:
        return twin.intent(EffectKind.GITHUB_SUMMARY_COMMENT, pull_number=twin.pull["number"], body=body, marker=MARKER)

    first = apply(twin.installation(), summary(f"one {MARKER}"))
    other = "<!-- another -->"
    pull = twin.installation().pull_object(twin.pull["repository"], twin.pull["number"])
    for number in range(35):  # PyGithub's page holds 30
        pull.create_issue_comment(f"{number} {other}")
    second = apply(twin.installation(), summary(f"two {MARKER}"))
    same = apply(twin.installation(), summary(f"two {MARKER}"))
    assert first.created and not second.created and first.external_id == second.external_id == same.external_id
    assert twin.installation(READ).summary_comment(twin.pull["repository"], twin.pull["number"], MARKER) == f"two {MARKER}"
    assert twin.installation(READ).summary_comment(twin.pull["repository"], twin.pull["number"], "<!-- of nobody -->") is None


def test_a_repository_that_left_the_installation_gets_nothing(twin: Twin) -> None:
    """Asked at effect time, also with a token from before (threats, rule 16)."""
    held = twin.installation()
    apply(held, _check(twin, "in_progress"))
    twin.control("uninstall", repository=twin.pull["repository"])
    for client in (lambda: held, twin.installation):
        with pytest.raises(ProviderError) as gone:
            apply(client(), _check(twin, "completed", conclusion="success"))
        assert (gone.value.reason, gone.value.retryable) == ("owner_changed", False)


def test_a_token_can_do_only_what_it_was_minted_for(twin: Twin) -> None:
    with pytest.raises(ProviderError) as refused:
        apply(twin.installation(READ), _check(twin, "in_progress"))
    assert refused.value.reason in ("provider_refused", "provider_not_found") and not refused.value.retryable


def test_an_unknown_installation_or_repository_is_owner_changed(twin: Twin) -> None:
    for installation, repository in ((1, twin.pull["repository_id"]), (twin.credentials["installation_id"], 1)):
        with pytest.raises(ProviderError) as gone:
            twin.app().installation(installation, [repository], READ)
        assert gone.value.reason == "owner_changed"


@pytest.mark.parametrize(
    ("fault", "reason", "retryable", "wait"),
    [
        ({"status": 500}, "provider_unavailable", True, None),
        ({"status": 503, "headers": {"retry-after": "7"}}, "provider_unavailable", True, 7.0),
        ({"status": 429, "headers": {"retry-after": "11"}}, "provider_rate_limited", True, 11.0),
        ({"status": 403, "headers": {"retry-after": "13"}}, "provider_rate_limited", True, 13.0),
        ({"status": 403}, "provider_refused", False, None),
        ({"status": 401}, "provider_refused", True, None),
        ({"status": 404}, "provider_not_found", False, None),
        ({"status": 422}, "provider_invalid", False, None),
    ],
)
def test_each_failure_has_its_reason_and_says_whether_to_try_again(
    twin: Twin, fault: dict[str, Any], reason: str, retryable: bool, wait: float | None
) -> None:
    client = twin.installation(READ)
    twin.fault("GET", "/pulls/", **fault)
    with pytest.raises(ProviderError) as failed:
        client.pull(twin.pull["repository"], twin.pull["number"])
    assert (failed.value.reason, failed.value.retryable, failed.value.retry_after_s) == (reason, retryable, wait)


def test_a_used_up_rate_limit_waits_for_its_reset(twin: Twin) -> None:
    client = twin.installation(READ)
    reset = str(int(time.time()) + 1_800)
    twin.fault("GET", "/pulls/", status=403, headers={"x-ratelimit-remaining": "0", "x-ratelimit-reset": reset})
    with pytest.raises(ProviderError) as limited:
        client.pull(twin.pull["repository"], twin.pull["number"])
    assert limited.value.reason == "provider_rate_limited" and 1_700 < (limited.value.retry_after_s or 0) <= 1_801


def test_a_refused_token_is_dropped_and_the_next_try_has_a_new_one(twin: Twin) -> None:
    """Revoked tokens, a new key: a cached token must not fail its whole hour."""
    app = twin.app()
    arguments = (twin.credentials["installation_id"], [twin.pull["repository_id"]], READ)
    before = app.token(*arguments)
    assert app.token(*arguments) == before
    twin.fault("GET", "/pulls/", status=401)
    with pytest.raises(ProviderError):
        app.installation(*arguments).pull(twin.pull["repository"], twin.pull["number"])
    assert app.token(*arguments) != before
    assert app.installation(*arguments).pull(twin.pull["repository"], twin.pull["number"]).state == "open"


def test_tokens_are_kept_until_five_minutes_before_their_end(twin: Twin) -> None:
    clock = ManualClock(datetime.now(UTC))
    app = twin.app(clock)
    arguments = (twin.credentials["installation_id"], [twin.pull["repository_id"]], READ)
    first = app.token(*arguments)
    clock.advance(timedelta(minutes=54))
    assert app.token(*arguments) == first
    clock.advance(timedelta(minutes=2))
    assert app.token(*arguments) != first
    assert app.token(arguments[0], arguments[1], POST) != app.token(*arguments)


def test_a_foreign_key_and_no_server_are_errors_of_ours(twin: Twin) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    forged = GitHubApp(twin.api, twin.credentials["app_id"], key.private_bytes(*form).decode(), SystemClock())
    with pytest.raises(ProviderError) as refused:
        forged.installation(twin.credentials["installation_id"], [twin.pull["repository_id"]], READ)
    assert (refused.value.reason, refused.value.retryable) == ("provider_refused", False)
    nowhere = GitHubApp(
        "http://localhost:9/api/v3", twin.credentials["app_id"], twin.credentials["private_key_pem"], SystemClock()
    )
    with pytest.raises(ProviderError) as lost:
        nowhere.installation(1, [1], READ)
    assert (lost.value.reason, lost.value.retryable) == ("provider_unavailable", True)


@pytest.mark.parametrize("address", ["http://api.github.com", "http://10.0.0.1/api/v3", "ftp://api.github.com"])
def test_tokens_never_travel_in_the_clear(address: str) -> None:
    with pytest.raises(ProviderError):
        GitHubApp(address, 1, "", SystemClock())


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"pull_number": "seven"},
        {"pull_number": 7, "content": "eggplant"},
        {"pull_number": 7, "content": "eyes", "token": "x"},
    ],
)
def test_a_payload_that_is_not_its_kinds_is_refused_before_anything_is_asked(twin: Twin, payload: dict[str, Any]) -> None:
    with pytest.raises(ProviderError) as refused:
        apply(twin.installation(), twin.intent(EffectKind.GITHUB_REACTION, **payload))
    assert (refused.value.reason, refused.value.retryable) == ("provider_invalid", False)


def test_no_token_is_logged_or_shown(twin: Twin, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client = twin.installation()
        apply(client, _check(twin, "in_progress"))
    assert "ghs_" not in caplog.text and "Bearer ey" not in caplog.text
    assert "ghs_" not in repr(client) and "BEGIN" not in repr(twin.app())
