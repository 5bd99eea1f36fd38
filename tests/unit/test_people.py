"""Roles and keys: what may never be more than it was given."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilo_pipelines.core import people as rules
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.services.permissions import ALLOWED, ROLES, act_of, may

NOW = datetime(2026, 5, 1, tzinfo=UTC)
roles = st.sampled_from(["viewer", "member", "owner"])


@given(roles, roles)
def test_a_key_may_no_more_than_either_its_grant_or_its_person(granted: str, present: str) -> None:
    found = rules.lower_of(granted, present)
    assert found in (granted, present)
    for act in ALLOWED:
        assert not may(str(found), act) or (may(granted, act) and may(present, act))


@pytest.mark.parametrize(("granted", "present"), [("owner", None), ("owner", "boss"), ("operator", "owner"), ("", "viewer")])
def test_whoever_is_no_member_or_has_no_known_role_has_none(granted: str, present: str | None) -> None:
    assert rules.lower_of(granted, present) is None


def test_a_higher_role_allows_what_a_lower_one_does() -> None:
    """Else a demotion could give something; and nobody but the operator reaches the platform."""
    for low, high in zip(ROLES[:0:-1], ROLES[-2::-1], strict=True):
        assert {act for act in ALLOWED if may(low, act)} <= {act for act in ALLOWED if may(high, act)}
    assert ALLOWED["platform"] == {"operator"}
    assert not any(may("reader", act) for act in ALLOWED)
    with pytest.raises(ValueError, match="no act"):
        act_of("anything")


@given(st.dictionaries(st.uuids(), roles, max_size=4), st.uuids(), st.one_of(st.none(), roles))
def test_an_organization_never_loses_its_last_owner(members: dict[UUID, str], new: UUID, role: str | None) -> None:
    for person in [*members, new]:
        refusal = rules.refuse_change("organization", members, person, role)
        after = {**members, person: role}
        lost = "owner" in members.values() and "owner" not in after.values()
        assert refusal == (Reason.LAST_OWNER if lost else None)


@given(st.dictionaries(st.uuids(), roles, max_size=3), st.uuids(), st.one_of(st.none(), roles))
def test_a_persons_own_owner_has_exactly_that_person(members: dict[UUID, str], person: UUID, role: str | None) -> None:
    after = [one for one in {**members, person: role}.values() if one]
    assert (rules.refuse_change("user", members, person, role) is None) == (after == ["owner"])


def test_ends_are_bounded() -> None:
    assert rules.key_ends(NOW) == NOW + timedelta(days=90)
    assert rules.overlap_ends(NOW) == NOW + timedelta(hours=24) and rules.overlap_ends(NOW, 0) == NOW
    for days in (0, -1, 366):
        with pytest.raises(ValueError, match="a key lives"):
            rules.key_ends(NOW, days)
    for hours in (-1, 169):
        with pytest.raises(ValueError, match="the overlap"):
            rules.overlap_ends(NOW, hours)


@pytest.mark.parametrize("text", ["", " ", "-x", "a b", "grace\n", "x" * 101, "grâce", "a/b"])
def test_what_is_no_login_is_refused(text: str) -> None:
    found = rules.login_of(text)
    assert found is None or found == "grace", "surrounding space is no part of a login"


def test_logins_that_differ_in_case_are_one() -> None:
    assert rules.login_of(" Grace@Example.org ") == "grace@example.org"
