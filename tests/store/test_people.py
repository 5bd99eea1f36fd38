"""Members and keys over a real database: what a person's role and a key's time do to it, at the next request."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from alembic import command
from sqlalchemy import create_engine, text

from kilo_pipelines.acts import people as acts
from kilo_pipelines.acts.people import By
from kilo_pipelines.core import people as rules
from kilo_pipelines.core.people import Role
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.refusal import Refusal
from kilo_pipelines.store import NewKey, Person, prefix_of
from kilo_pipelines.store.migrate import _config
from tests.conftest import Database, made_database


class Team:
    """An organization with an owner, and short ways to ask."""

    def __init__(self, database: Database) -> None:
        self.store, self.clock = database.store, database.clock
        made = acts.create_owner(
            self.store, "organization", "octo", "default", f"ada-{uuid4().hex}", role="operator", actor="operator"
        )
        assert not isinstance(made, Refusal)
        self.id = made.id
        self.ada = self.store.people.members(self.id)[0]
        self.by = By(self.id, "owner", "person:ada", self.ada.person_id)

    def join(self, role: Role) -> Person:
        added = acts.add_member(self.store, f"p-{uuid4().hex}", role, by=self.by)
        assert isinstance(added, Person)
        return added

    def key(self, role: Role, person: Person | None = None, days: int = 90, by: By | None = None) -> NewKey:
        made = acts.create_key(
            self.store, role, "ci", person.id if person else None, days, by=by or self.by, now=self.clock.now()
        )
        assert isinstance(made, NewKey), made
        return made

    def role(self, key: NewKey) -> str | None:
        found = self.store.api_keys.principal(key.value)
        return found.role if found else None


@pytest.fixture
def team(database: Database) -> Team:
    return Team(database)


def test_a_key_sinks_and_dies_with_its_persons_role(team: Team) -> None:
    bob = team.join("owner")
    key, small = team.key("owner", bob), team.key("viewer", bob)
    assert (team.role(key), team.role(small)) == ("owner", "viewer")
    assert acts.change_member(team.store, bob.id, "member", by=team.by) is None
    assert (team.role(key), team.role(small)) == ("member", "viewer")
    assert acts.change_member(team.store, bob.id, None, by=team.by) is None
    assert team.role(key) is None and team.role(small) is None


def test_keys_of_a_former_membership_stay_dead(team: Team) -> None:
    """Whoever comes back, a leaked key of the former time doesn't."""
    bob = team.join("member")
    key = team.key("member", bob)
    acts.change_member(team.store, bob.id, None, by=team.by)
    assert isinstance(acts.add_member(team.store, bob.login, "member", by=team.by), Person)
    assert team.role(key) is None and team.role(team.key("member", bob)) == "member"
    assert {one.id: one.live for one in team.store.api_keys.of_owner(team.id)}[key.id] is False


def test_a_key_ends_at_its_end(team: Team) -> None:
    key = team.key("owner", days=1)
    team.clock.advance(timedelta(days=1) - timedelta(seconds=1))
    assert team.role(key) == "owner"
    team.clock.advance(timedelta(seconds=1))
    assert team.role(key) is None
    assert acts.rotate_key(team.store, key.id, 90, 24, by=team.by, now=team.clock.now()) == Refusal(
        Reason.KEY_NOT_LIVE, str(key.id)
    )


def test_a_rotated_key_lives_for_the_overlap_and_never_longer_than_it_would_have(team: Team) -> None:
    for days, overlap, lives in ((90, 24, timedelta(hours=24)), (1, 168, timedelta(days=1)), (90, 0, timedelta(0))):
        old = team.key("owner", days=days)
        new = acts.rotate_key(team.store, old.id, 90, overlap, by=team.by, now=team.clock.now())
        assert isinstance(new, NewKey) and new.value != old.value and team.role(new) == "owner"
        if lives:
            team.clock.advance(lives - timedelta(seconds=1))
            assert team.role(old) == "owner"
            team.clock.advance(timedelta(seconds=1))
        assert team.role(old) is None and team.role(new) == "owner"


def test_a_key_is_rotated_once(team: Team) -> None:
    """A leaked key's overlap makes no further keys."""
    old = team.key("member")
    again = [acts.rotate_key(team.store, old.id, 90, 24, by=team.by, now=team.clock.now()) for _ in range(2)]
    assert isinstance(again[0], NewKey) and again[1] == Refusal(Reason.KEY_NOT_LIVE, str(old.id))


def test_a_revoked_key_is_dead_at_once(team: Team) -> None:
    key = team.key("owner")
    assert acts.revoke_key(team.store, key.id, by=team.by) is None and team.role(key) is None
    assert acts.revoke_key(team.store, key.id, by=team.by) == Refusal(Reason.KEY_NOT_LIVE, str(key.id))


def test_a_key_is_never_made_above_its_person_or_for_a_stranger(team: Team, database: Database) -> None:
    bob, stranger = team.join("member"), Team(database).join("owner")
    now = team.clock.now()
    for person, role, reason in ((bob, "owner", Reason.ROLE_TOO_HIGH), (stranger, "viewer", Reason.NOT_A_MEMBER)):
        made = acts.create_key(team.store, role, "x", person.id, 90, by=team.by, now=now)  # type: ignore[arg-type]
        assert isinstance(made, Refusal) and made.reason is reason
    for role in ("member", "viewer"):
        made = acts.create_key(team.store, "viewer", "x", None, 90, by=By(team.id, role, "x"), now=now)
        assert made == Refusal(Reason.ROLE_NOT_ALLOWED, role)


def test_a_person_handles_own_keys_and_never_trades_a_small_one_for_a_bigger(team: Team) -> None:
    bob = team.join("owner")
    big, small, others = team.key("owner", bob), team.key("viewer", bob), team.key("viewer")
    by = By(team.id, "viewer", "person:bob", bob.id, small.id)
    assert {one.id for one in acts.keys_of(team.store, by=by)} == {big.id, small.id}
    now = team.clock.now()
    assert acts.rotate_key(team.store, big.id, 90, 24, by=by, now=now) == Refusal(Reason.ROLE_NOT_ALLOWED, "viewer")
    assert isinstance(acts.rotate_key(team.store, small.id, 90, 24, by=by, now=now), NewKey)
    for act in (acts.revoke_key(team.store, others.id, by=by), acts.rotate_key(team.store, others.id, 90, 24, by=by, now=now)):
        assert act == Refusal(Reason.KEY_UNKNOWN, str(others.id))
    assert team.role(others) == "viewer"


def test_another_owners_key_is_unknown(team: Team, database: Database) -> None:
    foreign = Team(database)
    key = foreign.key("owner")
    assert acts.revoke_key(team.store, key.id, by=team.by) == Refusal(Reason.KEY_UNKNOWN, str(key.id))
    assert foreign.role(key) == "owner"


def test_the_last_owner_stays_even_when_two_remove_each_other(team: Team) -> None:
    bob = team.join("owner")
    both = [team.ada.person_id, bob.id]
    answers: list[Reason | None] = []

    def remove(person: UUID) -> None:
        def slowly(kind: str, members: Mapping[UUID, str]) -> Reason | None:
            time.sleep(0.3)  # the other one is here, too, unless it has to wait
            return rules.refuse_change(kind, members, person, None)

        answers.append(team.store.people.change(team.id, person, None, slowly, actor="test"))

    threads = [threading.Thread(target=remove, args=(one,)) for one in both]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(str(one) for one in answers) == ["None", Reason.LAST_OWNER]
    assert [one.role for one in team.store.people.members(team.id)] == ["owner"]


def test_a_persons_own_owner_takes_nobody_else(team: Team) -> None:
    made = acts.create_owner(team.store, "user", "bob", "default", "bob-of-his-own", role="operator", actor="operator")
    assert not isinstance(made, Refusal)
    by = By(made.id, "owner", "x")
    added = acts.add_member(team.store, "eve", "viewer", by=by)
    assert isinstance(added, Refusal) and added.reason is Reason.PERSONAL_OWNER
    nobodys = acts.create_owner(team.store, "user", "x", "default", None, role="operator", actor="operator")
    assert isinstance(nobodys, Refusal) and nobodys.reason is Reason.PERSONAL_OWNER
    assert acts.create_owner(team.store, "user", "x", "default", "x", role="owner", actor="x") == Refusal(
        Reason.ROLE_NOT_ALLOWED, "owner"
    )


def test_every_act_is_told_in_the_audit_and_no_value_is_kept(team: Team) -> None:
    bob = team.join("member")
    key = team.key("member", bob)
    new = acts.rotate_key(team.store, key.id, 90, 24, by=team.by, now=team.clock.now())
    assert isinstance(new, NewKey)
    acts.revoke_key(team.store, key.id, by=team.by)
    acts.change_member(team.store, bob.id, "viewer", by=team.by)
    acts.change_member(team.store, bob.id, None, by=team.by)
    told = team.store.audit.listed(owner_id=team.id)
    wanted = ["member.remove", "member.change", "key.revoke", "key.rotate", "key.create", "member.add"]
    assert [one["action"] for one in told][:6] == wanted
    assert {one["actor"] for one in told[:6]} == {"person:ada"}
    with team.store.database.system() as connection:
        rows = connection.execute(text("select to_jsonb(k)::text from api_keys k where owner_id = :o"), {"o": team.id}).scalars()
        kept = " ".join(rows) + str(told)
    for one in (key, new):
        assert one.value.startswith(prefix_of(one.id)) and one.value.split("_", 2)[2] not in kept


def test_the_last_use_is_kept_to_the_hour(team: Team) -> None:
    key = team.key("owner")
    first = team.clock.now()
    for _ in range(3):
        team.role(key)
        team.clock.advance(timedelta(minutes=20))
    held = team.store.api_keys.get(key.id)
    assert held is not None and held.last_used_at == first
    team.role(key)
    held = team.store.api_keys.get(key.id)
    assert held is not None and held.last_used_at == first + timedelta(hours=1)


def test_people_of_the_first_schema_become_members(postgres_admin: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same login of two owners is one person; `reader` is called `viewer`; what has no end gets one."""
    with made_database(postgres_admin, tmp_path_factory) as database:
        store = database.store
        one, other = (store.owners.create("organization", name) for name in ("one", "other"))
        engine = create_engine(database.logins["migrator"])
        row = "insert into people (owner_id, id, login, role) values (:o, gen_random_uuid(), :login, :role)"
        key = "insert into api_keys (id, owner_id, role, key_hash) values (gen_random_uuid(), :o, 'reader', sha256('old'))"
        with engine.begin() as connection:
            command.downgrade(_config(connection), "0011")
            connection.execute(text("alter table people no force row level security"))
            for owner, login, role in ((one, "Hal", "reader"), (other, "hal", "owner"), (other, "ida", "member")):
                connection.execute(text(row), {"o": owner.id, "login": login, "role": role})
            connection.execute(text("alter table people force row level security"))
            connection.execute(text(key), {"o": one.id})
            command.upgrade(_config(connection), "head")
        engine.dispose()
        assert [(member.login, member.role) for member in store.people.members(one.id)] == [("hal", "viewer")]
        assert [(member.login, member.role) for member in store.people.members(other.id)] == [("hal", "owner"), ("ida", "member")]
        found = store.api_keys.principal("old")
        assert found is not None and (found.role, found.owner_id) == ("viewer", one.id)
        assert timedelta(days=89) < store.api_keys.of_owner(one.id)[0].expires_at - database.clock.now() < timedelta(days=91)
