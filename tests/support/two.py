"""Two owners that nothing but their own ids tells apart: same repository, same pull requests, same heads, same subjects."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from kilo_pipelines.core.delivery_gaps import Attempt
from kilo_pipelines.core.limits import SETTINGS, Budget, LimitsConfig, Usage
from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.store import Claimed, HostedClaim, NewItem, SessionClaim
from tests.conftest import Database
from tests.support.alerts import alert
from tests.support.catalogue import owner_tables
from tests.support.keys import api_key
from tests.support.store import World, intent

HEAD = "c" * 40
_attempts = itertools.count(5_000)


class Corner(World):
    """An owner with a row in every table, each text of it marked with the owner's canary."""

    def __init__(self, database: Database, repository: int, canary: str) -> None:
        super().__init__(database.store, database.clock, repository=repository)
        self.canary = canary
        self.opened: dict[str, UUID] = {}
        config = CodeReviewConfig().model_dump(mode="json")
        database.store.owners.put_config(
            self.owner.id, "code_review", config, enabled=True, expected_revision=0, actor=f"{canary}-actor"
        )

    def details(self, pull: int, head: str | None = None) -> dict[str, Any]:
        marked = {"title": f"{self.canary}-title", "author": f"{self.canary}-author", "head_ref": f"{self.canary}-ref"}
        return super().details(pull, head or HEAD) | marked | {"settings": CodeReviewConfig().model_dump(mode="json")}

    def finished(self, pull: int, conclusion: str) -> UUID:
        """A completed review with its verdict, effects that wait and a callback."""
        claim, session = self.launched(self.item(pull))
        held = self.session_claim(session)
        assert isinstance(held, SessionClaim)
        self.store.sessions.event(held, "turn", {"text": f"{self.canary}-event"})
        self.store.sessions.record_callback(session, held.callback_token, f'{{"of": "{self.canary}"}}'.encode())
        result = {"summary": f"{self.canary}-summary"}
        assert self.store.sessions.finish(held, status="completed", reason=None, detail=f"{self.canary}-detail", result=result)
        with self.store.settlements.open(claim.item_id) as tx:
            assert tx is not None
            verdict = {"conclusion": conclusion, "reason": "reviewed", "earned": True, "counts": {}, "of": self.canary}
            effects = [intent(f"{self.canary}:{pull}", f"github:{self.repository}:pull:{pull}")]
            assert tx.conclude(state="completed", reason="reviewed", verdict=verdict, evidence=None, effects=effects)
        return claim.item_id

    def fill(self, admin: psycopg.Connection[Any]) -> None:
        """A row in every table of the platform; a new table wants its row here."""
        self.done = self.finished(1, "failure")
        self.live, self.session = self.launched(self.item(2))
        self.waiting = self.item(3)
        _, hosted = self.hosted()
        step = self.store.hosted.claim(hosted, run_id="run", lease_s=30)
        assert isinstance(step, HostedClaim) and self.store.hosted.keep(step, plan={"prompt": f"{self.canary}-prompt"})
        assert self.store.hosted.keep_ids(step, f"agent_{uuid4()}", f"{self.canary}-ses")
        self.store.budgets.block(self.owner.id, self.integration, self.clock.now())
        self.spent()
        assert isinstance(self.claim(self.item(4)), Claimed)
        self.findings()
        self.gap(f"{self.canary}-guid")
        self.store.owners.allow_model(self.owner.id, f"{self.canary}-model", True, actor=f"{self.canary}-actor")
        # They wait for ever: what their claims do is another test's.
        admin.execute(
            "update work_items set not_before = now() + interval '9 years' where owner_id = %s and service <> 'code_review'",
            (self.owner.id,),
        )
        person = self.store.people.ensure(f"{self.canary}-login")
        self.store.people.add(self.owner.id, person, "owner", lambda _kind, _members: None, actor=f"{self.canary}-actor")
        self.person = person.id
        admin.execute("update delivery_gaps set not_before = now() + interval '9 years' where owner_id = %s", (self.owner.id,))

    def attempt(self, guid: str) -> Attempt:
        """A line of GitHub's log: a webhook of this installation that was answered and isn't here."""
        sent = self.clock.now() - timedelta(minutes=5)
        return Attempt(next(_attempts), guid, sent, True, "pull_request", "opened", self.installation, self.repository)

    def gap(self, guid: str) -> None:
        """A missed delivery."""
        integration = self.store.owners.by_installation("github", self.installation)
        assert integration is not None
        self.store.delivery_gaps.record(integration, [[self.attempt(guid)]])

    def spent(self) -> None:
        """A meter that reached a budget, and an approval."""
        limits = LimitsConfig(daily=Budget(tokens=10**12), services={"security_analysis": Budget(tokens=1)}).model_dump(
            mode="json"
        )
        self.store.owners.put_config(
            self.owner.id, SETTINGS, limits, enabled=True, expected_revision=0, actor=f"{self.canary}-actor"
        )
        self.store.spend.record(
            self.owner.id,
            "meter",
            item_id=self.live.item_id,
            session_id=self.session,
            service="security_analysis",
            model=f"{self.canary}-model",
            usage=Usage(10, 1),
            price=None,
        )
        self.store.approvals.give(self.owner.id, self.details(2), "s", actor=f"{self.canary}-actor")

    def findings(self) -> None:
        """Alerts of the same numbers, one of them set aside, after a sync that stopped at a page."""
        self.store.owners.put_config(self.owner.id, SERVICE, {}, enabled=True, expected_revision=0, actor=f"{self.canary}-actor")
        policy = policy_for(self.store, self.owner.id, SecurityConfig(), actor=f"{self.canary}-actor")
        taker = AlertTaker(self.owner.id, self.repository, policy, first_sync=True)
        raw = [alert(number, **{"security_advisory.summary": f"{self.canary}-advisory"}) for number in range(1, 4)]
        good, bad = taker.sort([*raw, alert(4, state="none")])
        stored = self.store.findings
        stored.begin_sync(self.owner.id, self.repository)
        stored.quarantine(
            self.owner.id, self.repository, [(number, reason, f"{self.canary}-{detail}") for number, reason, detail in bad]
        )
        stored.apply_page(self.owner.id, self.repository, SOURCE, good, taker.decide, cursor=f"{self.canary}-page")
        self._security_work(stored.of_repository(self.owner.id, self.repository, open_or_superseded=False)[0].id)

    def _security_work(self, finding: UUID) -> None:
        """One waiting item of each kind of the Security Agent's work."""
        blocked = self.store.queue.block_service(self.owner.id, "security_analysis", "question", f"{self.canary}-reason", finding)
        assert blocked is not None
        self.store.queue.unblock_service(self.owner.id, "security_analysis", "question")
        common = {"finding_id": str(finding), "origin": "manual", "requested_by": f"{self.canary}-actor"}
        analysis = self._open("security_analysis", finding, {**common, "mode": "auto"})
        self._open("dismissal", finding, {**common, "reason": "not_used", "analysis_id": str(analysis)})
        more = {"analysis_id": str(analysis), "fingerprint": self.canary, "findings": [str(finding)]}
        self._open("remediation", finding, {**common, **more})
        self._open("notice", finding, {"finding_id": str(finding), "kind": "new_finding"})
        self._open("security_sync", finding, {"requested_by": f"{self.canary}-actor"})

    def _open(self, service: str, finding: UUID, details: dict[str, Any]) -> UUID:
        item = NewItem(
            service=service, subject_key=f"finding:{finding}", repository_id=self.repository, priority=0, details=details
        )
        opened = self.store.queue.open(self.owner.id, item, actor=f"{self.canary}-actor")
        assert opened is not None
        self.opened[service] = opened
        return opened

    def marks(self) -> list[str]:
        """What must not be found outside this owner: its canary and ids that name it alone."""
        return [self.canary, *(str(one) for one in (self.owner.id, self.integration, self.done, self.live.item_id, self.session))]


def connect(database: Database, postgres_admin: str) -> psycopg.Connection[Any]:
    """A superuser in the module's database: it looks past every policy, to see what an attack did."""
    name = database.logins["app"].rsplit("/", 1)[1].split("?")[0]
    return psycopg.connect(postgres_admin.replace("+psycopg", ""), dbname=name, autocommit=True)


def mirror(admin: psycopg.Connection[Any], source: UUID, target: UUID) -> None:
    """Gives `target` a copy of every row of `source`: equal in every key but the owner's id."""
    admin.execute("set session_replication_role = replica")  # the order of the foreign keys doesn't matter then
    for table in owner_tables(admin):
        if table.name == "owners":
            continue
        copy = "insert into {t} overriding system value select (jsonb_populate_record(x, jsonb_build_object('owner_id', %s::text))).* from {t} x where owner_id = %s"
        admin.execute(sql.SQL(copy).format(t=sql.Identifier(table.name)), (target, source))
    admin.execute("set session_replication_role = origin")


def digest(admin: psycopg.Connection[Any], owner: UUID) -> dict[str, tuple[int, str]]:
    """Number and content of an owner's rows, by table."""
    found = {}
    for table in owner_tables(admin):
        look = "select count(*), coalesce(md5(string_agg(to_jsonb(x)::text, ',' order by to_jsonb(x)::text)), '') from {t} x where {o} = %s"
        statement = sql.SQL(look).format(t=sql.Identifier(table.name), o=sql.Identifier(table.owner_column))
        row = admin.execute(statement, (owner,)).fetchone()
        assert row is not None
        found[table.name] = (row[0], row[1])
    return found


def expired(database: Database, key_owner: UUID) -> str:
    """A key of an owner whose time is over."""
    import hashlib

    key = api_key(database.store, "owner", key_owner)
    with database.store.database.system() as connection:
        connection.exec_driver_sql(
            "update api_keys set expires_at = %(at)s where key_hash = %(hash)s",
            {"at": database.clock.now() - timedelta(seconds=1), "hash": hashlib.sha256(key.encode()).digest()},
        )
    return key


def as_json(value: Any) -> str:
    """Anything as one text to search for canaries in."""
    return json.dumps(value, default=str)
