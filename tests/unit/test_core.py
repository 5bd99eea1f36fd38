"""The engine's pure rules."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.cloud_agent.transcript import Turn, bind, canonical
from kilo_pipelines.core.diff import commentable, hunks_of
from kilo_pipelines.core.evidence import Evidence, LedgerEntry
from kilo_pipelines.core.markers import Marker
from kilo_pipelines.core.owners import review_pools
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.core.text import cut, fence, harmless, one_line
from kilo_pipelines.core.verdict import GATES, SEVERITIES, Conclusion, EvidenceKey, conclude, fault_of, worst
from kilo_pipelines.core.work import FINAL, SESSION_TRANSITIONS, TRANSITIONS, SessionState, WorkState

KEY = EvidenceKey(1, 7, "main", "a" * 40)


def evidence(**more: object) -> Evidence:
    entry = LedgerEntry(
        entry_id="e",
        path="a.py",
        status="modified",
        old_blob="1" * 40,
        new_blob="2" * 40,
        old_mode="100644",
        new_mode="100644",
        bytes=1,
        sent_turn=1,
    )
    fields: dict[str, object] = {
        "evidence_class": "observed",
        "repository_id": 1,
        "pull_number": 7,
        "base_ref": "main",
        "merge_base": "b" * 40,
        "head": "a" * 40,
        "diff_hash": "d" * 64,
        "turns": 2,
        "ledger": [entry],
        "result_sha256": "f" * 64,
        "result_turns": [2],
        "agent": "kilo",
    }
    return Evidence.model_validate(fields | more)


def test_complete_evidence_is_no_fault() -> None:
    assert fault_of(evidence(), KEY, accept_reported=False) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"repository_id": 2}, Reason.EVIDENCE_MISMATCH),
        ({"pull_number": 8}, Reason.EVIDENCE_MISMATCH),
        ({"base_ref": "release"}, Reason.EVIDENCE_MISMATCH),
        ({"head": "c" * 40}, Reason.EVIDENCE_MISMATCH),
        ({"merge_base": ""}, Reason.EVIDENCE_MISMATCH),
        ({"turns": 0}, Reason.NO_TURNS),
        ({"result_sha256": None}, Reason.RESULT_UNBOUND),
        ({"result_turns": []}, Reason.RESULT_UNBOUND),
        ({"ledger": []}, Reason.DIFF_EMPTY),
        ({"evidence_class": "reported"}, Reason.EVIDENCE_REPORTED),
    ],
)
def test_each_missing_piece_of_evidence_is_a_fault_and_never_green(change: dict[str, object], fault: Reason) -> None:
    found = fault_of(evidence(**change), KEY, accept_reported=False)
    assert found is fault
    assert conclude(found, [], "off", advisory=False).conclusion not in (Conclusion.SUCCESS, Conclusion.NEUTRAL)


def test_one_unsent_blob_is_a_gap_unless_the_owner_excluded_it() -> None:
    entry = evidence().ledger[0]
    unsent = evidence(ledger=[entry, entry.model_copy(update={"sent_turn": None, "path": "b.py"})])
    assert fault_of(unsent, KEY, accept_reported=False) is Reason.COVERAGE_GAP
    excluded = evidence(ledger=[entry, entry.model_copy(update={"sent_turn": None, "excluded": "path_excluded"})])
    assert fault_of(excluded, KEY, accept_reported=False) is None


@pytest.mark.parametrize("reason", sorted(Reason))
def test_no_reason_but_reviewed_can_be_green(reason: Reason) -> None:
    """GitHub lets `neutral` and `skipped` merge: not reviewed is neither, unless the owner chose advisory."""
    assert conclude(reason, [], "off", advisory=False).conclusion not in (Conclusion.SUCCESS, Conclusion.NEUTRAL)
    assert conclude(reason, [], "off", advisory=True).conclusion is Conclusion.NEUTRAL


@given(st.lists(st.sampled_from(SEVERITIES)), st.sampled_from(sorted(GATES)))
def test_the_gate_fails_exactly_on_what_it_forbids(severities: list[str], gate: str) -> None:
    verdict = conclude(None, severities, gate, advisory=False)
    assert (verdict.conclusion is Conclusion.FAILURE) == bool(set(severities) & GATES[gate])


@given(st.lists(st.sampled_from(list(Conclusion)), min_size=1))
def test_the_worst_of_several_pull_requests_wins(conclusions: list[Conclusion]) -> None:
    found = worst(conclusions)
    assert found in conclusions
    assert found is not Conclusion.SUCCESS or set(conclusions) == {Conclusion.SUCCESS}


def test_final_states_are_left_by_a_new_attempt_only() -> None:
    for state in FINAL:
        assert TRANSITIONS[state] == {WorkState.WAITING}
    reachable = {WorkState.WAITING}
    for _ in WorkState:
        reachable |= {after for state in reachable for after in TRANSITIONS[state]}
    assert reachable == set(WorkState)
    assert all(
        not SESSION_TRANSITIONS[state] for state in (SessionState.COMPLETED, SessionState.FAILED, SessionState.INTERRUPTED)
    )


def test_every_reason_has_a_meaning_and_a_remedy() -> None:
    assert set(MEANING) == set(Reason)
    assert all(meaning.endswith(".") and remedy.endswith(".") for meaning, remedy in MEANING.values())


def test_slots_follow_the_plan() -> None:
    pools = [review_pools("organization", "default"), review_pools("user", "funded"), review_pools("user", "default")]
    assert pools == [{"code_review": 20}, {"code_review": 3}, {"code_review": 1}]


def make_diff(blocks: list[tuple[int, int, int]]) -> str:
    """A diff whose blocks have context, removed and added lines."""
    lines, old, new = ["diff --git a/x b/x", "--- a/x", "+++ b/x"], 1, 1
    for context, removed, added in blocks:
        lines.append(f"@@ -{old},{context + removed} +{new},{context + added} @@ def f():")
        lines += [" same"] * context + ["-@@ -1 +1 @@"] * removed + ["+@@ -9,9 +9,9 @@"] * added
        old, new = old + context + removed + 10, new + context + added + 10
    return "\n".join([*lines, "\\ No newline at end of file"])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)).filter(lambda one: sum(one) > 0), max_size=4))
def test_hunks_are_read_by_their_lengths_whatever_the_lines_look_like(blocks: list[tuple[int, int, int]]) -> None:
    usable = [one for one in blocks if one[0] + one[1] > 0 and one[0] + one[2] > 0]
    assert [(h.old_lines, h.new_lines) for h in hunks_of(make_diff(usable))] == [(c + r, c + a) for c, r, a in usable]


def test_a_comment_stays_inside_one_hunk() -> None:
    hunks = hunks_of(make_diff([(2, 0, 2), (2, 1, 0)]))
    assert commentable(hunks, "RIGHT", 4) and commentable(hunks, "RIGHT", 4, 1)
    assert not commentable(hunks, "RIGHT", 5) and not commentable(hunks, "RIGHT", 15, 1)
    assert commentable(hunks, "LEFT", 14) and not commentable(hunks, "RIGHT", 3, 4)


@given(st.text(max_size=200))
def test_posted_text_has_no_tag_mention_image_or_command(text: str) -> None:
    safe = harmless(text + "\n<img src=x> @octocat ![x](http://x) [y](javascript:x)\n/merge\ncloses #1 Fixes: owner/repo#2")
    for bad in ("<img", "@octocat", "![", "](javascript", "\n/merge", "closes #1", "Fixes: owner"):
        assert bad not in safe


def test_invisible_characters_from_outside_are_removed() -> None:
    assert harmless("a\u202eb\u200bc\x00") == "abc"


@given(st.text(alphabet="`ab\n", max_size=40))
def test_a_fence_cannot_be_closed_by_its_text(text: str) -> None:
    assert fence(text) not in text


@given(st.text(max_size=300), st.integers(30, 100))
def test_texts_keep_their_limits(text: str, limit: int) -> None:
    assert len(cut(text, limit)) <= limit and len(one_line(text, limit)) <= limit and "\n" not in one_line(text, limit)


@given(st.text(min_size=1, max_size=20), st.lists(st.text(max_size=10), max_size=3), st.binary(min_size=8, max_size=8))
def test_a_marker_depends_on_key_scope_and_every_part(scope: str, parts: list[str], other_key: bytes) -> None:
    marker = Marker(b"k" * 32)
    token = marker.token(scope, *parts)
    assert token != marker.token(scope, *parts, "more") and token != Marker(other_key).token(scope, *parts)
    assert "k" * 8 not in repr(marker)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(st.text(max_size=5), JSON, min_size=1, max_size=4)


@given(OBJECT, st.sampled_from(["argument", "text", "fenced", "prose"]))
def test_a_result_is_bound_to_the_turn_in_which_the_model_wrote_it(result: dict[str, object], way: str) -> None:
    written = json.dumps(result, indent=2)
    turn = {
        "argument": Turn(number=3, nonce="n", text="", arguments=[json.dumps({"filePath": "/x", "content": written})]),
        "text": Turn(number=3, nonce="n", text=written),
        "fenced": Turn(number=3, nonce="n", text=f"Here:\n```json\n{written}\n```\nDone."),
        "prose": Turn(number=3, nonce="n", text=f"I found {written} and that is all."),
    }[way]
    assert bind(result, [turn], "n") == 3
    assert bind(result, [turn], "other nonce") is None
    assert bind({**result, "\x01extra": 1}, [turn], "n") is None


def test_canonical_json_ignores_order_and_spaces() -> None:
    for order in itertools.permutations(["a", "b", "c"]):
        assert canonical(dict.fromkeys(order, 1)) == '{"a":1,"b":1,"c":1}'
