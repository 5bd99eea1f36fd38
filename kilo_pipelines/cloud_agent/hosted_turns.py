"""A hosted session's turns: what is sent, what an answer means, and what it proves. Pure; the calls are `hosted.py`'s.

One hosted session, a message per part of the brief in order, at most one repair message a part. Everything that comes back is
the service's word, so the evidence is of class `reported`, and what counts as sent is what *we* sent in a turn that completed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from kilo_pipelines.cloud_agent.facts import ledger_of
from kilo_pipelines.cloud_agent.hosted import MessageResult
from kilo_pipelines.cloud_agent.protocol import SessionSpec
from kilo_pipelines.cloud_agent.transcript import canonical, objects_in
from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.session import Brief, SessionTask, WorkspaceFacts

# Contract A4.
PROMPT_CHARS = 100_000
# Diff text of a part, so that with policy, description, listing and schema the prompt stays below `PROMPT_CHARS`.
PART_CHARS = 60_000
# Reads and reasons; the service's own policy of the platform `code-review` denies edits and writing commands (contract B8).
MODE = "code"
PLATFORM = "code-review"

_ASSISTANT = {
    "insufficient_credits": Reason.INSUFFICIENT_CREDITS,
    "rate_limited": Reason.MODEL_UNREACHABLE,
    "model_unavailable": Reason.MODEL_REFUSED,
    "provider_authentication": Reason.MODEL_REFUSED,
    "provider_unavailable": Reason.MODEL_UNREACHABLE,
    "provider_disconnect": Reason.MODEL_UNREACHABLE,
    "gateway_unavailable": Reason.MODEL_UNREACHABLE,
    "timeout": Reason.MODEL_UNREACHABLE,
}
_CODE = {
    "payment_required": Reason.INSUFFICIENT_CREDITS,
    "admission_billing_unavailable": Reason.CLOUD_AGENT_UNAVAILABLE,
    "model_missing": Reason.MODEL_REFUSED,
    "missing_assistant_reply": Reason.RESULT_MISSING,
    "user_interrupt": Reason.INTERRUPTED,
}
# Of `workspace_setup_failed`: what somebody has to change at the service's account (contract A9, "user-owned").
_REFUSED_SETUP = frozenset({"git_authentication_failed", "git_branch_missing", "setup_command_failed", "setup_command_timeout"})


class Plan(BaseModel):
    """What a session will send; kept with it until it has ended, so that a repeated `prepare` sends the same."""

    model_config = ConfigDict(extra="forbid")

    nonce: str
    prompts: list[str]
    covers: list[list[str]]
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Waiting:
    """The turn is under way."""


@dataclass(frozen=True)
class Failed:
    """The turn ended without an answer that could be read."""

    reason: Reason
    detail: str


@dataclass(frozen=True)
class Said:
    """The turn's result: `result` is valid where there are no problems."""

    result: dict[str, Any] | None
    problems: list[str]


def plan(spec: SessionSpec, facts: WorkspaceFacts, brief: Brief, nonce: str) -> Plan | Reason:
    """The messages of a brief and the evidence's frame; a reason when it can't be sent whole."""
    if brief.refused is not None:
        return Reason(brief.refused)
    prompts = [part.prompt for part in brief.parts]
    if any(len(prompt) > PROMPT_CHARS for prompt in prompts):
        return Reason.DIFF_TOO_LARGE
    frame = Evidence(
        evidence_class="reported",
        repository_id=spec.repository.external_id,
        pull_number=spec.pull_number,
        base_ref=spec.base_ref,
        merge_base=facts.merge_base,
        head=facts.head_sha,
        diff_hash=facts.diff_hash,
        ledger=ledger_of(facts, {}, brief.excluded),
        agent="hosted",
        model=spec.model,
        policy_commit=facts.policy_commit,
        policy_truncated=facts.policy_truncated,
    )
    covers = [sorted(part.covers) for part in brief.parts]
    return Plan(nonce=nonce, prompts=prompts, covers=covers, evidence=frame.model_dump(mode="json"))


def prepare_input(
    spec: SessionSpec, planned: Plan, *, callback: tuple[str, str] | None, organization: str | None
) -> dict[str, Any]:
    """The input of `prepareSession` (A4): the repository by name, no token of a provider, no secret but the callback's own."""
    wanted: dict[str, Any] = {
        "prompt": planned.prompts[0],
        "mode": MODE,
        "model": spec.model,
        "githubRepo": spec.repository.full_name,
        "platform": "github",
        "upstreamBranch": spec.checkout_ref,
        "autoCommit": False,
        "createdOnPlatform": PLATFORM,
        "operationKey": str(spec.session_id),
    }
    if organization is not None:
        wanted["kilocodeOrganizationId"] = organization
    if callback is not None:
        url, token = callback
        wanted["callbackTarget"] = {"url": url, "headers": {"X-Callback-Token": token}}
    return wanted


def read(told: MessageResult, task: SessionTask, nonce: str) -> Waiting | Failed | Said:
    """What a turn's outcome means; a status that nobody knows is a failure (A9)."""
    if told.status in ("queued", "running"):
        return Waiting()
    if told.status == "completed":
        return _said((told.assistant.text if told.assistant else None) or "", task, nonce)
    if told.status in ("failed", "interrupted"):
        return _failed(told.status, told.failure if isinstance(told.failure, dict) else {})
    return Failed(Reason.CLOUD_AGENT_PROTOCOL, "a status that is not in the contract")


def _said(text: str, task: SessionTask, nonce: str) -> Said:
    """The last object of the message that carries the nonce; others are examples, quotations or somebody else's."""
    found = [one for one in objects_in(text) if isinstance(one, dict) and one.get("nonce") == nonce]
    if not found:
        return Said(None, ["the last message holds no JSON object with this task's nonce"])
    valid = [one for one in found if not task.validate(one, nonce)]
    # A message that contradicts itself has no result: which of them was meant is not ours to say.
    if len({canonical(one) for one in valid}) > 1:
        return Said(None, ["the last message holds more than one result"])
    return Said(valid[0], []) if valid else Said(None, task.validate(found[-1], nonce))


def _failed(status: str, failure: dict[str, Any]) -> Failed:
    code, subtype, assistant = (str(failure.get(name) or "") for name in ("code", "subtype", "assistantReason"))
    detail = ", ".join(one for one in (code, subtype, assistant) if one.isascii() and one.replace("_", "").isalnum())[:200]
    reason = _CODE.get(code) or _ASSISTANT.get(assistant)
    if reason is None and code == "workspace_setup_failed" and subtype in _REFUSED_SETUP:
        reason = Reason.CLOUD_AGENT_REFUSED
    if reason is None:
        reason = Reason.INTERRUPTED if status == "interrupted" and not code else Reason.CLOUD_AGENT_FAILED
    return Failed(reason, detail or status)


def evidence(planned: Plan, results: Sequence[dict[str, Any]]) -> Evidence:
    """The record after these parts: their blobs count as sent, the rest is a gap. Bound only when every part has its result."""
    frame = Evidence.model_validate(planned.evidence)
    sent = {entry: number for number, covered in enumerate(planned.covers[: len(results)], 1) for entry in covered}
    whole = len(results) == len(planned.prompts)
    digest = hashlib.sha256(canonical(list(results)).encode()).hexdigest() if whole else None
    return frame.model_copy(
        update={
            "turns": len(results),
            "ledger": [one.model_copy(update={"sent_turn": sent.get(one.entry_id)}) for one in frame.ledger],
            "result_sha256": digest,
            "result_turns": list(range(1, len(results) + 1)) if whole else [],
        }
    )
