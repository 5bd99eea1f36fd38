"""The hosted Cloud Agent's client against the twin's service in this process, and what a turn's outcome means."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette

from kilo_pipelines.cloud_agent import hosted_turns as turns
from kilo_pipelines.cloud_agent.hosted import (
    ANSWER_BYTES,
    Action,
    CloudAgentError,
    HostedClient,
    MessageResult,
    classify,
    guarded,
)
from kilo_pipelines.cloud_agent.protocol import RepositoryRef, SessionSpec
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.retry import CLASS_OF, HOSTED_TRIES, hosted_wait
from kilo_pipelines.core.session import DiffEntry, WorkspaceFacts
from kilo_pipelines.core.verdict import EvidenceKey, fault_of
from kilo_pipelines.providers import outbound
from kilo_pipelines.services.code_review.brief import CodeReviewTask
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_twin.cloud_agent import CloudAgents, routes

TOKEN, KEY = "twin-token-of-this-test", "twin-key-of-this-test"
NONCE = "n" * 32


class Service:
    """The twin's service, spoken to without a socket; turns stay queued until `work`."""

    def __init__(self) -> None:
        twin: Any = SimpleNamespace(credentials={"cloud_agent_token": TOKEN, "cloud_agent_internal_key": KEY})
        self.told: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.waiting: list[Callable[[], None]] = []
        self.agents = CloudAgents(twin, self._deliver, self.waiting.append)
        self.agents.configure(behaviour="prose", seconds=0, scale=0)
        self.faults: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.token = TOKEN
        self._app = Starlette(routes=routes(self.agents, lambda _method, _path: self.faults.pop(0) if self.faults else None))
        self.client = HostedClient("https://agent.test/cloud-agent", lambda: self.token, lambda: KEY, self._send)

    def _deliver(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> int:
        self.told.append((url, body, headers))
        return self.answers.pop(0) if self.answers else 202

    def _send(self, method: str, url: str, raw: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        async def one() -> tuple[int, bytes]:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport) as client:
                answer = await client.request(method, url, content=raw, headers=headers)
                return answer.status_code, answer.content

        return asyncio.run(one())

    def work(self) -> None:
        """Lets every admitted turn run to its end."""
        while self.waiting:
            self.waiting.pop(0)()

    def fault(self, status: int, **more: Any) -> None:
        self.faults.append({"status": status, **more})


@pytest.fixture
def service() -> Service:
    return Service()


def _wanted(**changes: Any) -> dict[str, Any]:
    return {"prompt": "p", "mode": "code", "model": "m", "githubRepo": "acme/orders", **changes}


def _refused(call: Callable[[], Any]) -> CloudAgentError:
    with pytest.raises(CloudAgentError) as failure:
        call()
    return failure.value


# -- calls ----------------------------------------------------------------------------------------------------------------


def test_a_session_goes_its_way_on_both_planes(service: Service) -> None:
    assert service.client.health() == "ok"
    ids = []
    for _ in range(2):
        prepared = service.client.prepare(
            _wanted(callbackTarget={"url": "https://us.test/x", "headers": {"X-Callback-Token": "t"}})
        )
        ack = service.client.initiate(prepared.session_id)
        assert ack is not None and service.client.session(prepared.session_id).first_turn == ack.turn
        assert service.client.result(prepared.session_id, ack.turn).status == "queued"
        service.work()
        told = service.client.result(prepared.session_id, ack.turn)
        assert told.status == "completed" and told.assistant is not None and told.assistant.text
        assert service.told[-1][1]["messageId"] == ack.turn and service.told[-1][2] == {"X-Callback-Token": "t"}
        service.client.interrupt(prepared.session_id)
        service.client.delete(prepared.session_id)
        service.client.delete(prepared.session_id)
        ids.append(prepared.session_id.partition("_")[0])
        assert _refused(lambda at=prepared.session_id: service.client.session(at)).reason is Reason.CLOUD_AGENT_SESSION_GONE  # type: ignore[misc]
    assert ids == ["agent", "workspace"]


def test_a_second_initiate_is_a_success_and_starts_nothing(service: Service) -> None:
    session = service.client.prepare(_wanted()).session_id
    service.fault(0, lost=True)
    lost = _refused(lambda: service.client.initiate(session))
    assert (lost.reason, lost.retry) == (Reason.CLOUD_AGENT_UNAVAILABLE, True)
    assert service.client.initiate(session) is None
    assert len(service.agents.sessions[session]["turns"]) == 1


def test_a_lost_answer_of_prepare_leaves_a_session_that_never_starts(service: Service) -> None:
    service.fault(0, lost=True)
    assert _refused(lambda: service.client.prepare(_wanted())).retry
    session = service.client.prepare(_wanted()).session_id
    assert service.client.initiate(session) is not None
    assert [one["initiated"] for one in service.agents.told()["sessions"]] == [False, True]


@pytest.mark.parametrize(
    ("fault", "reason", "retry"),
    [
        ({"status": 400, "error": "x"}, Reason.CLOUD_AGENT_INVALID, False),
        ({"status": 401}, Reason.CLOUD_AGENT_REFUSED, False),
        ({"status": 402}, Reason.INSUFFICIENT_CREDITS, False),
        ({"status": 404}, Reason.CLOUD_AGENT_SESSION_GONE, False),
        ({"status": 409, "error": "COMPUTE_STOPPING", "retryable": True}, Reason.CLOUD_AGENT_BUSY, True),
        ({"status": 409, "error": "operation_key_reuse_mismatch"}, Reason.CLOUD_AGENT_INVALID, False),
        ({"status": 429, "error": "PENDING_QUEUE_FULL"}, Reason.CLOUD_AGENT_BUSY, True),
        ({"status": 500, "error": "INTERNAL", "retryable": True}, Reason.CLOUD_AGENT_UNAVAILABLE, True),
        ({"status": 502}, Reason.CLOUD_AGENT_UNAVAILABLE, True),
        ({"status": 503, "error": "SANDBOX_CONNECT_FAILED"}, Reason.CLOUD_AGENT_UNAVAILABLE, True),
        ({"status": 200}, Reason.CLOUD_AGENT_PROTOCOL, False),  # a page in between
        ({"status": 302}, Reason.CLOUD_AGENT_PROTOCOL, False),
    ],
)
def test_each_error_class_has_its_reason(service: Service, fault: dict[str, Any], reason: Reason, retry: bool) -> None:
    service.faults.append(fault)
    failure = _refused(lambda: service.client.prepare(_wanted()))
    assert (failure.reason, failure.retry) == (reason, retry)


def test_the_queue_and_the_balance_are_the_services(service: Service) -> None:
    session = service.client.prepare(_wanted()).session_id
    service.agents.configure(behaviour="prose", balance=0.99)
    assert _refused(lambda: service.client.initiate(session)).reason is Reason.INSUFFICIENT_CREDITS
    service.agents.configure(behaviour="prose", balance=1.0)
    assert service.client.initiate(session) is not None
    for _ in range(9):
        service.client.send_message(session, "more", mode="code", model="m")
    full = _refused(lambda: service.client.send_message(session, "more", mode="code", model="m"))
    assert (full.reason, full.retry) == (Reason.CLOUD_AGENT_BUSY, True)


def test_a_renewed_token_is_used_once_and_never_told(service: Service) -> None:
    old = "an-old-token-of-this-account"
    tokens = iter([old, TOKEN])
    service.client._token = lambda: next(tokens)
    assert service.client.prepare(_wanted()).session_id
    service.client._token = lambda: old
    failure = _refused(lambda: service.client.prepare(_wanted()))
    assert failure.reason is Reason.CLOUD_AGENT_REFUSED and not failure.retry
    service.client._send = lambda *_asked: (400, json.dumps({"error": {"message": f"Bearer {old} and {KEY}"}}).encode())
    told = _refused(lambda: service.client.prepare(_wanted()))
    assert old not in str(told) and KEY not in str(told) and "[redacted]" in told.detail


def test_an_answer_about_another_session_is_refused(service: Service) -> None:
    other = f"agent_{uuid4()}"
    service.client._send = lambda *_asked: (200, json.dumps({"result": {"data": {"sessionId": other}}}).encode())
    assert _refused(lambda: service.client.session(f"agent_{uuid4()}")).reason is Reason.CLOUD_AGENT_PROTOCOL
    service.client._send = lambda *_asked: (200, json.dumps({"result": {"data": {"cloudAgentSessionId": "../x"}}}).encode())
    assert _refused(lambda: service.client.prepare(_wanted())).reason is Reason.CLOUD_AGENT_PROTOCOL


@pytest.mark.parametrize(
    ("address", "offline"),
    [
        ("https://127.0.0.1:1/x", False),
        ("https://169.254.169.254/x", True),
        ("http://93.184.216.34/x", False),
        ("http://10.0.0.1/x", True),
    ],
)
def test_only_public_https_is_spoken_to(monkeypatch: pytest.MonkeyPatch, address: str, offline: bool) -> None:
    def never(*_asked: Any, **_more: Any) -> Any:
        raise AssertionError("connected")

    monkeypatch.setattr(outbound, "exchange", never)
    client = HostedClient(address, lambda: TOKEN, lambda: KEY, guarded(offline=offline))
    failure = _refused(client.health)
    assert (failure.reason, failure.retry) == (Reason.CLOUD_AGENT_ADDRESS_REFUSED, False)


# -- classification -------------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(["already initiated", "Paid Model"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "result", "data", "message", "code", "retryable", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.integers(100, 599),
    st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()),
)
def test_any_answer_has_exactly_one_outcome(status: int, body: bytes) -> None:
    found = classify(status, body)
    assert (found.reason is None) == (found.action is Action.DONE)
    assert (found.action is Action.DONE) <= (200 <= status < 300)
    if found.reason is not None:
        assert found.reason in CLASS_OF
    if 200 <= status < 300:
        assert found.action in (Action.DONE, Action.FAIL), "an assistant's words in a success are no error of the service's"
    if found.action is Action.RETRY:
        assert status >= 500 or status in (409, 429)
    if status == 402:
        assert found.action is Action.BILLING


def test_billing_is_known_by_its_words_in_errors_only() -> None:
    assert classify(500, b"<html>Insufficient Credits</html>").action is Action.BILLING
    said = json.dumps({"result": {"data": {"assistant": {"text": "payment required: add credits"}}}}).encode()
    assert classify(200, said).action is Action.DONE


def test_an_endless_answer_is_none() -> None:
    assert classify(200, b'{"result":{"data":"' + b"x" * ANSWER_BYTES + b'"}}').reason is Reason.CLOUD_AGENT_PROTOCOL


def test_waits_grow_and_end() -> None:
    waits = [hosted_wait(tries) for tries in range(1, HOSTED_TRIES + 1)]
    assert waits[-1] is None and all(one is not None for one in waits[:-1])
    assert waits[:-1] == sorted(waits[:-1])  # type: ignore[type-var]


# -- turns ----------------------------------------------------------------------------------------------------------------


def _facts(*texts: str) -> WorkspaceFacts:
    entries = [
        DiffEntry(
            entry_id=str(number),
            path=f"f{number}.py",
            status="modified",
            old_blob="0" * 40,
            new_blob="1" * 40,
            old_mode="100644",
            new_mode="100644",
            text=f"@@ -1 +1 @@\n-a\n+{one}\n",
        )
        for number, one in enumerate(texts)
    ]
    return WorkspaceFacts(merge_base="a" * 40, head_sha="b" * 40, diff_hash="c" * 64, entries=entries)


def _spec() -> SessionSpec:
    return SessionSpec(
        session_id=uuid4(),
        owner_id=uuid4(),
        service="code_review",
        repository=RepositoryRef(
            provider="github", external_id=5, full_name="acme/orders", clone_url="https://git.test/x", default_branch="main"
        ),
        pull_number=7,
        base_ref="main",
        base_sha="a" * 40,
        head_sha="b" * 40,
        checkout_ref="refs/pull/7/head",
        agent="hosted",
        model="scripted-reviewer",
    )


TASK = CodeReviewTask(
    {
        "title": "t",
        "body": "b",
        "author": "a",
        "head_ref": "h",
        "base_ref": "main",
        "full_name": "acme/orders",
        "pull_number": 7,
        "settings": CodeReviewConfig().model_dump(mode="json"),
    },
    part_chars=turns.PART_CHARS,
)


def _plan(*texts: str) -> turns.Plan:
    found = turns.plan(_spec(), facts := _facts(*texts), TASK.compose(facts, NONCE, None), NONCE)
    assert isinstance(found, turns.Plan)
    return found


def _result(**changes: Any) -> dict[str, Any]:
    return {"nonce": NONCE, "summary": "s", "findings": [], **changes}


def _completed(text: str | None) -> MessageResult:
    return MessageResult.model_validate({"status": "completed", "assistant": {"text": text}})


def test_what_is_prepared_holds_no_secret_but_the_callbacks_and_fits_the_api(service: Service) -> None:
    wanted = turns.prepare_input(_spec(), _plan("x"), callback=("https://us.test/callbacks/sessions/1", "t"), organization=None)
    assert {"githubToken", "gitToken", "envVars", "encryptedSecrets"} & wanted.keys() == set()
    assert json.dumps(wanted).count('"t"') == 1
    assert service.client.prepare(wanted).session_id
    assert NONCE in wanted["prompt"] and "Result path" not in wanted["prompt"]


def test_a_large_change_becomes_parts_that_fit_and_a_larger_one_is_refused() -> None:
    planned = _plan("x" * 50_000, "y" * 50_000)
    assert len(planned.prompts) == 2 and all(len(one) <= turns.PROMPT_CHARS for one in planned.prompts)
    first = turns.evidence(planned, [_result()])
    assert [one.entry_id for one in first.gaps] == ["1"] and first.result_sha256 is None, "half a review proves nothing"
    whole = turns.evidence(planned, [_result(), _result()])
    key = EvidenceKey(5, 7, "main", "b" * 40)
    assert fault_of(whole, key, accept_reported=False) is Reason.EVIDENCE_REPORTED
    assert fault_of(whole, key, accept_reported=True) is None
    facts = _facts("x" * 70_000)
    assert turns.plan(_spec(), facts, TASK.compose(facts, NONCE, None), NONCE) is Reason.DIFF_TOO_LARGE


@pytest.mark.parametrize(
    "text",
    [
        None,
        "All is well.",
        json.dumps(_result(nonce="0" * 32)),
        json.dumps(_result())[:-3],
        json.dumps(_result(verdict="approved")),
        json.dumps(_result()) + json.dumps(_result(summary="other")),
        "[" * 5_000,
    ],
)
def test_a_message_without_exactly_one_valid_result_asks_for_a_repair(text: str | None) -> None:
    found = turns.read(_completed(text), TASK, NONCE)
    assert isinstance(found, turns.Said) and found.result is None and found.problems


def test_a_result_is_found_in_prose_and_in_a_fence() -> None:
    for text in (
        json.dumps(_result()),
        f"Here:\n```json\n{json.dumps(_result(), indent=1)}\n```\nBye",
        f"x {json.dumps(_result())}",
    ):
        assert turns.read(_completed(text), TASK, NONCE) == turns.Said(_result(), [])


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"status": "approved"}, Reason.CLOUD_AGENT_PROTOCOL),
        ({"status": "failed"}, Reason.CLOUD_AGENT_FAILED),
        ({"status": "failed", "failure": "odd"}, Reason.CLOUD_AGENT_FAILED),
        ({"status": "failed", "failure": {"code": "payment_required"}}, Reason.INSUFFICIENT_CREDITS),
        (
            {"status": "failed", "failure": {"code": "assistant_error", "assistantReason": "insufficient_credits"}},
            Reason.INSUFFICIENT_CREDITS,
        ),
        (
            {"status": "failed", "failure": {"code": "assistant_error", "assistantReason": "rate_limited"}},
            Reason.MODEL_UNREACHABLE,
        ),
        (
            {"status": "failed", "failure": {"code": "workspace_setup_failed", "subtype": "git_authentication_failed"}},
            Reason.CLOUD_AGENT_REFUSED,
        ),
        ({"status": "interrupted", "failure": {"code": "user_interrupt"}}, Reason.INTERRUPTED),
        ({"status": "interrupted", "failure": {"code": "container_shutdown"}}, Reason.CLOUD_AGENT_FAILED),
        ({"status": "failed", "failure": {"code": "<b>\u202e", "message": "x" * 9_000}}, Reason.CLOUD_AGENT_FAILED),
    ],
)
def test_a_failed_turn_has_a_reason_of_ours(told: dict[str, Any], reason: Reason) -> None:
    found = turns.read(MessageResult.model_validate(told), TASK, NONCE)
    assert isinstance(found, turns.Failed) and found.reason is reason and reason in CLASS_OF
    assert "<" not in found.detail and len(found.detail) <= 200


# -- the twin's callbacks -------------------------------------------------------------------------------------------------


def test_the_twin_tells_at_least_once_and_gives_up_where_the_contract_says(service: Service) -> None:
    def told(*answers: int) -> int:
        before = len(service.told)
        service.answers = list(answers)
        session = service.client.prepare(_wanted(callbackTarget={"url": "https://us.test/x"})).session_id
        service.client.initiate(session)
        service.work()
        return len(service.told) - before

    assert told(500, 429, 0, 202) == 4
    assert told(404) == 1
    assert told(*[500] * 9) == 5


@pytest.mark.parametrize(
    ("mode", "statuses"),
    [
        ("none", []),
        ("once", ["completed"]),
        ("twice", ["completed", "completed"]),
        ("forged", ["completed", "completed"]),
        ("early", ["completed", "completed"]),
    ],
)
def test_the_twins_callbacks_may_come_early_twice_or_with_lies(service: Service, mode: str, statuses: list[str]) -> None:
    service.agents.configure(behaviour="prose", callbacks=mode, seconds=0, scale=0)
    session = service.client.prepare(_wanted(callbackTarget={"url": "https://us.test/x"})).session_id
    service.client.initiate(session)
    assert [body["status"] for _, body, _ in service.told] == (statuses[:1] if mode == "early" else [])
    service.work()
    bodies = [body for _, body, _ in service.told]
    assert [one["status"] for one in bodies] == statuses
    assert len({json.dumps(one, sort_keys=True) for one in bodies}) == (2 if mode in ("forged", "early") else min(1, len(bodies)))
