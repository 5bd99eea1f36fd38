"""Every op, sensor, schedule and asset at work for B beside an A that differs in nothing but its id (goals, section 4).

A has the same repository, pull requests, heads and subjects. Nothing of A is named in a statement, read into a row, a run, a
log or a payload, or asked of the provider. What runs is Dagster's own code over the real store; GitHub is a recorder, because
what is asked of it is what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from dagster import (
    AssetsDefinition,
    DagsterInstance,
    JobDefinition,
    RunRequest,
    build_schedule_context,
    build_sensor_context,
    materialize,
)
from sqlalchemy import event

from kilo_pipelines import tags
from kilo_pipelines.acts.dismissal import dismiss
from kilo_pipelines.acts.security import request_sync
from kilo_pipelines.assets import default_assets, review_outcomes
from kilo_pipelines.assets.deliveries import delivery_gaps
from kilo_pipelines.assets.engine import reconciliation
from kilo_pipelines.assets.limits import spend
from kilo_pipelines.assets.security import finding_sla, security_findings, security_posture, sla_compliance
from kilo_pipelines.cloud_agent.protocol import SessionOutcome, SessionSpec, SessionStatus
from kilo_pipelines.core.delivery_gaps import Attempt
from kilo_pipelines.core.effects import EffectIntent, EffectReceipt
from kilo_pipelines.core.limits import Usage
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.jobs import (
    agent_session,
    audit_seal,
    code_review,
    default_jobs,
    delivery_repair,
    dismissal,
    hosted_session,
    notice,
    outbox,
    remediation,
    requested_security_sync,
    retention,
    security_analysis,
    security_notices,
    security_sweep,
    security_sync,
    settle_code_review,
    settle_quiet_items,
    settle_remediation,
    settle_security_analysis,
)
from kilo_pipelines.partitions import OWNERS_NAME
from kilo_pipelines.providers.github import PullState
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import AlertPage, GitHubResource, LoggedDelivery, LogPage
from kilo_pipelines.resources.store import StoreResource
from kilo_pipelines.schedules import default_schedules, notices, outcomes, security_sweeps, security_syncs, spends
from kilo_pipelines.sensors import default_sensors, hosted_sessions, recovery, security_changes, work_once
from kilo_pipelines.services.security.config import SERVICE as SECURITY
from kilo_pipelines.store import Repository, SessionClaim, Store
from tests.conftest import Database
from tests.support.alerts import alert
from tests.support.figures import Figures
from tests.support.two import HEAD, Corner, as_json, connect, digest

REPOSITORY = 991_077
_numbers = iter(range(100, 10_000))


class Held:
    """What the resources of this module reach; Dagster copies resources, so it stands beside them."""

    store: Store
    asked: list[tuple[str, int, int, Any]] = []  # noqa: RUF012  # one for the module, on purpose
    log: list[Attempt] = []  # noqa: RUF012


class TheStore(StoreResource):
    def get(self) -> Store:
        return Held.store


class Reader:
    """A pull request as both owners' GitHub shows it."""

    def pull(self, full_name: str, number: int) -> PullState:
        return PullState(
            repository_id=REPOSITORY,
            number=number,
            state="open",
            draft=False,
            merged=False,
            title="t",
            body="",
            author="grace",
            author_type="User",
            labels=[],
            head_sha=HEAD,
            head_ref="topic",
            head_repository_id=REPOSITORY,
            base_sha="b" * 40,
            base_ref="main",
            url="http://localhost/pull",
            full_name=full_name,
            clone_url="http://localhost/octo/demo.git",
            default_branch="main",
        )

    def may_write(self, _full_name: str, login: str) -> bool:
        return login == "grace"

    def summary_comment(self, _full_name: str, _number: int, _marker: str) -> None:
        return None

    def review_comments(self, _full_name: str, _number: int) -> list[Any]:
        return []


class Recorder(GitHubResource):
    """Keeps which installation was asked for what."""

    def reader(self, installation_id: int, repository_id: int) -> Any:
        Held.asked.append(("read", installation_id, repository_id, None))
        return Reader()

    def alerts(
        self, installation_id: int, repository_id: int, full_name: str, *, etag: str | None, after: str | None
    ) -> AlertPage:
        Held.asked.append(("alerts", installation_id, repository_id, full_name))
        return AlertPage("ok", alerts=[alert(number) for number in range(1, 6)], etag="tag")

    def app_id(self) -> int | None:
        return 1

    def deliveries(self, cursor: str | None) -> LogPage:
        return LogPage(Held.log, 0, None, Held.log[0].delivered_at + timedelta(hours=1))

    def delivery(self, attempt_id: int) -> LoggedDelivery:
        (one,) = [one for one in Held.log if one.id == attempt_id]
        assert one.installation_id is not None
        Held.asked.append(("delivery", one.installation_id, REPOSITORY, None))
        return LoggedDelivery(one.guid, one.event, one.action, one.installation_id, b"{}")

    def clone_token(self, installation_id: int, repository_id: int) -> str:
        Held.asked.append(("clone", installation_id, repository_id, None))
        return "token"

    def push_token(self, installation_id: int, repository_id: int) -> str:
        Held.asked.append(("push", installation_id, repository_id, None))
        return "push token"

    def apply(
        self, installation_id: int, repository_id: int, intent: EffectIntent, before_write: Callable[[], bool]
    ) -> EffectReceipt:
        assert before_write()
        Held.asked.append(("apply", installation_id, repository_id, intent.model_dump(mode="json")))
        return EffectReceipt(external_id="1", created=True)


class Runner:
    """A session that fetches, beats, says something, keeps what it would push and ends."""

    def run(
        self,
        spec: SessionSpec,
        _task: Any,
        control: Any,
        token: Callable[[], str],
        push_token: Callable[[], str],
        accepted: SessionOutcome | None,
    ) -> SessionOutcome:
        Held.asked.append(("spec", 0, spec.repository.external_id, str(spec.owner_id)))
        assert (token(), push_token()) == ("token", "push token") and control.beat() == "ok"
        control.event("turn", {"number": 1})
        assert control.spent("the same meter", Usage(10, 1))
        assert accepted is None and control.accepted(SessionOutcome(status=SessionStatus.COMPLETED, result={"kept": True}))
        return SessionOutcome(status=SessionStatus.FAILED, reason=Reason.NO_TURNS)


class Agent(CloudAgentResource):
    def runner(self, agent: str) -> Any:
        return Runner()

    def agent_ready(self, agent: str) -> bool:
        return True

    def call_back(self, session_id: UUID, token: str, outcome: SessionOutcome) -> int:
        return 202 if Held.store.sessions.record_callback(session_id, token, b"{}") == "accepted" else 401


RESOURCES = {"store": TheStore(), "github": Recorder(), "cloud_agent": Agent()}


class Stage:
    """A and B, and a Dagster instance for B's runs."""

    def __init__(self, database: Database, admin: psycopg.Connection[Any], instance: DagsterInstance) -> None:
        self.database, self.admin, self.instance = database, admin, instance
        self.a, self.b = Corner(database, REPOSITORY, "canary-a"), Corner(database, REPOSITORY, "canary-b")
        self.a.fill(admin)

    def run(self, job: JobDefinition, op: str, ids: list[UUID]) -> None:
        done = job.execute_in_process(
            run_config={"ops": {op: {"config": {"ids": [str(one) for one in ids]}}}},
            resources=RESOURCES,
            instance=self.instance,
            tags={tags.OWNER: str(self.b.owner.id), tags.ITEM: str(ids[0])},
        )
        assert done.success

    def effects(self, item: UUID) -> list[tuple[str, str | None]]:
        return [(one["state"], one["reason"]) for one in self.database.store.outbox.of_item(item)]


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterInstance]:
    with DagsterInstance.local_temp(str(tmp_path_factory.mktemp("dagster"))) as found:
        yield found


@pytest.fixture
def stage(
    database: Database, postgres_admin: str, instance: DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    monkeypatch.setenv("KILO_HOME", str(tmp_path))
    monkeypatch.setenv("KILO_AGENT", "scripted")
    Held.store, Held.asked = database.store, []
    with connect(database, postgres_admin) as admin:
        yield Stage(database, admin, instance)
        # The next test's owners have the same subjects; sessions that wait would be offered there.
        admin.execute("update work_items set state = 'cancelled', ended_at = now(), announced = true where ended_at is null")
        admin.execute("update sessions set state = 'interrupted', ended_at = now() where ended_at is null")
        admin.execute("update effects set state = 'dropped', ended_at = now() where state in ('pending', 'applying')")


@contextmanager
def watched(stage: Stage) -> Iterator[list[str]]:
    """Whatever of A is named in a statement's values while the block runs."""
    seen: list[str] = []
    marks = stage.a.marks()

    def listen(_connection: object, _cursor: object, statement: str, values: object, *_rest: object) -> None:
        seen.extend(f"{mark} in {statement}" for mark in marks if mark in str(values))

    engines = (stage.database.store.database._app, stage.database.store.database._system)
    for engine in engines:
        event.listen(engine, "before_cursor_execute", listen)
    try:
        yield seen
    finally:
        for engine in engines:
            event.remove(engine, "before_cursor_execute", listen)


def _launch(stage: Stage) -> None:
    item = stage.b.item(next(_numbers))
    stage.run(code_review, "launch_reviews", [item])
    assert stage.b.state(item) == "running"
    assert {state for state, _ in stage.effects(item)} == {"applied"}, "A's earlier effects on the same subjects stand in no way"


def _session(stage: Stage) -> None:
    item = stage.b.item(next(_numbers))
    stage.run(code_review, "launch_reviews", [item])
    row = stage.database.store.queue.get(item)
    assert row is not None and row.session_id is not None
    stage.database.store.sessions.ensure_capacity(64)
    stage.run(agent_session, "run_agent_session", [row.session_id])
    ended = stage.database.store.sessions.get(row.session_id)
    assert ended is not None and ended.state == "failed"
    assert ("spec", 0, REPOSITORY, str(stage.b.owner.id)) in Held.asked


def _hosted_launched(stage: Stage) -> UUID:
    """B's session that waits for the hosted agent."""
    item = stage.b.item(next(_numbers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILO_AGENT", "hosted")
        stage.run(code_review, "launch_reviews", [item])
    row = stage.database.store.queue.get(item)
    assert row is not None and row.session_id is not None
    return row.session_id


def _hosted(stage: Stage) -> None:
    """Without an address of the service B's session ends, and is closed; A's, which a step has, goes on."""
    session = _hosted_launched(stage)
    stage.run(hosted_session, "step_hosted_session", [session])
    ended = stage.database.store.sessions.get(session)
    assert ended is not None and (ended.state, ended.reason) == ("failed", Reason.AGENT_UNAVAILABLE)
    stage.run(hosted_session, "step_hosted_session", [session])
    states = "select state from hosted_sessions where owner_id = %s and session_id = any(%s)"
    assert stage.admin.execute(states, (stage.b.owner.id, [session])).fetchall() == [("closed",)]
    mine = stage.admin.execute("select state from hosted_sessions where owner_id = %s", (stage.a.owner.id,)).fetchall()
    assert mine == [("prepared",)]


def _hosted_sensor(stage: Stage) -> None:
    """Each run that it asks for is of one owner's session, and says whose."""
    session = _hosted_launched(stage)
    with build_sensor_context(instance=stage.instance, resources=RESOURCES) as context:
        answer = hosted_sessions(context)
    (request,) = [one for one in answer.run_requests if one.tags[tags.OWNER] == str(stage.b.owner.id)]  # type: ignore[union-attr]
    assert _ids(request) == [str(session)]
    assert not [mark for mark in stage.a.marks() if mark in as_json([request.tags, request.run_config])]


def _settle(stage: Stage) -> None:
    """A's pull request with the same head failed its review; it is no sibling of B's."""
    claim, session = stage.b.launched(stage.b.item(next(_numbers)))
    held = stage.b.session_claim(session)
    assert isinstance(held, SessionClaim)
    assert stage.database.store.sessions.finish(held, status="failed", reason=Reason.NO_TURNS)
    with stage.database.store.settlements.open(claim.item_id) as tx:
        assert tx is not None and tx.siblings() == []
    stage.run(settle_code_review, "settle_reviews", [claim.item_id])
    assert stage.b.state(claim.item_id) == "failed"
    checks = [one[3]["payload"] for one in Held.asked if one[0] == "apply" and "summary" in one[3]["payload"]]
    assert checks and checks[-1]["status"] == "completed" and checks[-1]["head_sha"] == HEAD


def _findings_of_b(stage: Stage) -> UUID:
    """B's waiting analysis, which A has one of for an equal finding, due now."""
    stage.b.findings()
    return stage.b.opened["security_analysis"]


def _analysis_launched(stage: Stage) -> None:
    """Without a model B's item waits; the slot that it held is B's, and A's items are where they were."""
    item = _findings_of_b(stage)
    stage.run(security_analysis, "launch_analyses", [item])
    row = stage.database.store.queue.get(item)
    assert row is not None and (row.state, row.reason) == ("waiting", Reason.MODEL_UNREACHABLE)


def _analysis_settled(stage: Stage) -> None:
    item = _findings_of_b(stage)
    assert stage.database.store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test")
    stage.run(settle_security_analysis, "settle_analyses", [item])
    told = stage.database.store.queue.get(item)
    assert told is not None and told.announced


def _noticed(stage: Stage) -> None:
    """Nobody of B's is to be told: its item ends; A's of the same finding still waits."""
    stage.b.findings()
    item = stage.b.opened["notice"]
    stage.run(notice, "send_notices", [item])
    row = stage.database.store.queue.get(item)
    assert row is not None and (row.state, row.reason) == ("cancelled", Reason.NOTICE_NOT_WANTED)


def _notices_staged(stage: Stage) -> None:
    """B named a webhook and has findings past their deadlines; A, whose findings are the same, gets no item."""
    stage.b.findings()
    setting = stage.database.store.owners.config(stage.b.owner.id, SECURITY)
    assert setting is not None
    config = {"notice_recipients": [{"kind": "webhook", "url": "https://hooks.acme.test/b"}], "sla_notice_min_severity": "all"}
    stage.database.store.owners.put_config(
        stage.b.owner.id, SECURITY, config, enabled=True, expected_revision=setting.revision, actor="test"
    )
    stage.admin.execute("update finding_sla set due_at = now() - interval '1 day' where owner_id = %s", (stage.b.owner.id,))
    stage.run(security_notices, "stage_notices", [stage.b.owner.id])
    look = "select owner_id, count(*) from notices where kind = 'sla_breach' group by 1"
    assert [row for row in stage.admin.execute(look).fetchall() if row[0] in (stage.a.owner.id, stage.b.owner.id)] == [
        (stage.b.owner.id, 3)
    ]


def _notices_schedule(stage: Stage) -> None:
    """It names owners and nothing of theirs."""
    _notices_staged(stage)
    with build_schedule_context(
        instance=stage.instance, resources=RESOURCES, scheduled_execution_time=stage.database.clock.now()
    ) as context:
        requests = notices(context)
    carried = {one for request in requests for one in _ids(request)}  # type: ignore[union-attr]
    assert str(stage.b.owner.id) in carried and str(stage.a.owner.id) not in carried


def _dismissed(stage: Stage) -> None:
    """B's finding is dismissed here and asked for at the source as B's; A's equal one stays as it is."""
    stage.b.findings()
    stage.database.store.queue.cancel(stage.b.opened["dismissal"], reason=Reason.USER_CANCELLED, actor="test")
    row = stage.database.store.queue.get(stage.b.opened["dismissal"])
    assert row is not None
    finding = stage.database.store.findings.get(stage.b.owner.id, UUID(row.details["finding_id"]))
    assert finding is not None
    item = dismiss(stage.database.store, finding, role="owner", actor="test", reason="not_used", comment="")
    assert isinstance(item, UUID)
    stage.run(dismissal, "apply_dismissals", [item])
    mine = stage.database.store.findings.get(stage.b.owner.id, finding.id)
    assert mine is not None and mine.status == "ignored" and stage.effects(item) == [("applied", None)]


def _remediation_launched(stage: Stage) -> None:
    """Without a completed analysis of B's own the item ends; A's of an equal finding still waits."""
    stage.b.findings()
    item = stage.b.opened["remediation"]
    stage.run(remediation, "launch_remediations", [item])
    row = stage.database.store.queue.get(item)
    assert row is not None and (row.state, row.reason) == ("cancelled", Reason.ANALYSIS_REQUIRED)


def _remediation_settled(stage: Stage) -> None:
    stage.b.findings()
    item = stage.b.opened["remediation"]
    assert stage.database.store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test")
    stage.run(settle_remediation, "settle_remediations", [item])
    told = stage.database.store.queue.get(item)
    assert told is not None and told.announced


def _analyses_swept(stage: Stage) -> None:
    """B's open findings get analyses; A, whose findings and settings are the same, gets none."""
    stage.b.findings()
    setting = stage.database.store.owners.config(stage.b.owner.id, SECURITY)
    assert setting is not None
    config = {
        "auto_analysis_enabled": True,
        "auto_analysis_enabled_at": "2020-01-01T00:00:00Z",
        "auto_analysis_min_severity": "all",
    }
    stage.database.store.owners.put_config(
        stage.b.owner.id, SECURITY, config, enabled=True, expected_revision=setting.revision, actor="test"
    )
    stage.run(security_sweep, "sweep_analyses", [stage.b.owner.id])
    found = stage.admin.execute(
        "select owner_id, count(*) from finding_analyses where origin = 'automatic' group by 1"
    ).fetchall()
    assert [row for row in found if row[0] in (stage.a.owner.id, stage.b.owner.id)] == [(stage.b.owner.id, 2)]


def _changes(stage: Stage) -> None:
    """It names owners, each in a run of its own, and nothing of theirs."""
    stage.b.findings()
    stage.admin.execute(
        "update service_configs set updated_at = now() + interval '1 hour' where owner_id = %s", (stage.b.owner.id,)
    )
    with build_sensor_context(instance=stage.instance, resources=RESOURCES) as context:
        answer = security_changes(context)
    requests = [one for one in answer.run_requests if one.tags[tags.OWNER] == str(stage.b.owner.id)]  # type: ignore[union-attr]
    assert [_ids(one) for one in requests] == [[str(stage.b.owner.id)]]


def _sweeps_schedule(stage: Stage) -> None:
    """It names owners and nothing of theirs."""
    stage.b.findings()
    with build_schedule_context(
        instance=stage.instance, resources=RESOURCES, scheduled_execution_time=stage.database.clock.now()
    ) as context:
        requests = security_sweeps(context)
    carried = {one for request in requests for one in _ids(request)}  # type: ignore[union-attr]
    assert str(stage.b.owner.id) in carried


def _quietly(stage: Stage) -> None:
    """B's dismissal that was cancelled is told of; A's of the same finding still waits."""
    stage.b.findings()
    item = stage.b.opened["dismissal"]
    assert stage.database.store.queue.cancel(item, reason=Reason.USER_CANCELLED, actor="test")
    stage.run(settle_quiet_items, "settle_quietly", [item])
    told = stage.database.store.queue.get(item)
    assert told is not None and told.announced
    states = stage.admin.execute("select state from work_items where id = %s", (stage.a.opened["dismissal"],)).fetchall()
    assert states == [("waiting",)]


def _outbox(stage: Stage) -> None:
    item = stage.b.finished(1, "success")
    stage.run(outbox, "apply_waiting_effects", [item])
    assert stage.effects(item) == [("applied", None)]
    waiting = stage.admin.execute("select state from effects where owner_id = %s", (stage.a.owner.id,)).fetchall()
    assert waiting == [("pending",)], "the same subject, and not applied along"


def _outcomes_asset(stage: Stage) -> None:
    stage.b.finished(1, "success")
    stage.instance.add_dynamic_partitions(OWNERS_NAME, [str(stage.b.owner.id)])
    done = materialize([review_outcomes], partition_key=str(stage.b.owner.id), resources=RESOURCES, instance=stage.instance)
    (made,) = done.asset_materializations_for_node("review_outcomes")
    assert made.metadata["reviews"].value == 1 and made.metadata["completed"].value == 1
    records = made.metadata["newest reviews"].records  # type: ignore[attr-defined]  # a table
    assert [one.data["check"] for one in records] == ["success"]


def _ids(request: RunRequest) -> list[str]:
    """What a run is to carry."""
    (op,) = request.run_config["ops"].values()
    found: list[str] = op["config"]["ids"]
    return found


def _shard(stage: Stage) -> None:
    """The sensors serve all owners: each run that they ask for is of one, and says whose."""
    mine = {stage.b.item(next(_numbers)) for _ in range(3)}
    stage.database.clock.advance(timedelta(minutes=1))
    requests = [one for _ in range(4) for one in work_once(stage.database.store)]
    carried = {UUID(one) for request in requests for one in _ids(request)}
    assert mine <= carried
    for request in requests:
        look = (
            "select owner_id from work_items where id = any(%(ids)s::uuid[])"
            " union select owner_id from sessions where id = any(%(ids)s::uuid[])"
        )
        owners = stage.admin.execute(look, {"ids": _ids(request)}).fetchall()
        assert [str(row[0]) for row in owners] == [request.tags[tags.OWNER]]
        if request.tags[tags.OWNER] == str(stage.b.owner.id):
            assert not [mark for mark in stage.a.marks() if mark in as_json([request.tags, request.run_config])]


def _recovery(stage: Stage) -> None:
    """B's claim ran out, A's stands."""
    for corner, lease in ((stage.a, 9_000.0), (stage.b, 1.0)):
        corner.last = corner.item(next(_numbers))  # type: ignore[attr-defined]
        corner.claim(corner.last, lease=lease)  # type: ignore[attr-defined]
    stage.database.clock.advance(timedelta(seconds=5))
    before = digest(stage.admin, stage.a.owner.id)
    with build_sensor_context(resources=RESOURCES) as context:
        recovery(context)
    assert stage.b.state(stage.b.last) == "waiting"  # type: ignore[attr-defined]
    assert digest(stage.admin, stage.a.owner.id) == before


def _reconciliation(stage: Stage) -> None:
    """The engine's own asset looks over all owners: B's claim ran out, A's stands."""
    for corner, lease in ((stage.a, 9_000.0), (stage.b, 1.0)):
        corner.last = corner.item(next(_numbers))  # type: ignore[attr-defined]
        corner.claim(corner.last, lease=lease)  # type: ignore[attr-defined]
    stage.database.clock.advance(timedelta(seconds=5))
    before = digest(stage.admin, stage.a.owner.id)
    assert materialize([reconciliation], resources=RESOURCES, instance=stage.instance).success
    assert stage.b.state(stage.b.last) == "waiting"  # type: ignore[attr-defined]
    assert digest(stage.admin, stage.a.owner.id) == before


def _failed_run(stage: Stage) -> None:
    """A run that failed ends its own leases only."""
    for corner in (stage.a, stage.b):
        corner.last = corner.item(next(_numbers))  # type: ignore[attr-defined]
        corner.claim(corner.last, lease=9_000)  # type: ignore[attr-defined]
    run = stage.admin.execute("select run_id from work_items where id = %s", (stage.b.last,)).fetchone()  # type: ignore[attr-defined]
    before = digest(stage.admin, stage.a.owner.id)
    assert run is not None and stage.database.store.queue.run_failed(run[0]) == 1
    assert digest(stage.admin, stage.a.owner.id) == before


def _seal(stage: Stage) -> None:
    """The chain goes over all owners and changes nobody's facts."""
    stage.database.store.queue.cancel(stage.b.item(next(_numbers)), reason="user_cancelled", actor="b")
    facts = "select md5(string_agg(to_jsonb(x)::text, ',' order by id)) from (select owner_id, id, at, actor, action, subject, data from audit_events) x"
    before = stage.admin.execute(facts).fetchone()
    assert audit_seal.execute_in_process(resources=RESOURCES, instance=stage.instance).success
    assert stage.admin.execute(facts).fetchone() == before


def _sweep(stage: Stage) -> None:
    """What is young stays, whoever's it is."""
    before = digest(stage.admin, stage.a.owner.id)
    assert retention.execute_in_process(resources=RESOURCES, instance=stage.instance).success
    assert digest(stage.admin, stage.a.owner.id) == before


def _clocked(stage: Stage) -> None:
    """These schedules start one job each, whose op is in this table."""
    names = {one.name: one.job_name for one in default_schedules()}
    assert (names["audit_seals"], names["retention_sweeps"]) == ("audit_seal", "retention") and stage


def _reconcilers_schedule(_stage: Stage) -> None:
    """It starts one job, which `asset reconciliation` is about."""
    (found,) = [one for one in default_schedules() if one.name == "reconcilers"]
    assert found.job_name == "reconcile"


def _outcomes_schedule(stage: Stage) -> None:
    stage.b.finished(1, "success")
    with build_schedule_context(
        instance=stage.instance, resources=RESOURCES, scheduled_execution_time=stage.database.clock.now()
    ) as context:
        requests = outcomes(context)
    asked = {one.partition_key: one.tags[tags.OWNER] for one in requests}  # type: ignore[union-attr]
    assert str(stage.b.owner.id) in asked and all(partition == owner for partition, owner in asked.items())


def _synced(stage: Stage) -> None:
    """B's repository has the alerts that A's has, by number."""
    store = stage.database.store
    store.owners.put_config(stage.b.owner.id, SECURITY, {}, enabled=True, expected_revision=0, actor="b")
    stage.run(security_sync, "sync_owners", [stage.b.owner.id])
    assert store.findings.numbers(stage.b.owner.id)["findings"] == 5


def _requested(stage: Stage) -> None:
    """A's request for the same repository waits on."""
    store = stage.database.store
    store.owners.put_config(stage.b.owner.id, SECURITY, {}, enabled=True, expected_revision=0, actor="b")
    item = request_sync(store, stage.b.owner.id, None, role="owner", actor="b")
    assert isinstance(item, UUID)
    stage.run(requested_security_sync, "sync_requested", [item])
    assert stage.b.state(item) == "completed" and store.findings.numbers(stage.b.owner.id)["findings"] == 5
    states = stage.admin.execute("select state from work_items where id = %s", (stage.a.opened["security_sync"],)).fetchall()
    assert states == [("waiting",)]


def _findings_asset(asset_def: AssetsDefinition) -> Callable[[Stage], None]:
    def work(stage: Stage) -> None:
        _synced(stage)
        stage.instance.add_dynamic_partitions(OWNERS_NAME, [str(stage.b.owner.id)])
        done = materialize([asset_def], partition_key=str(stage.b.owner.id), resources=RESOURCES, instance=stage.instance)
        (made,) = done.asset_materializations_for_node(asset_def.node_def.name)
        assert not [mark for mark in stage.a.marks() if mark in as_json({name: str(one) for name, one in made.metadata.items()})]

    return work


def _spend_asset(stage: Stage) -> None:
    """B spent what A did, under a meter of the same name."""
    claim, session = stage.b.launched(stage.b.item(next(_numbers)))
    told = {"item_id": claim.item_id, "session_id": session, "service": "code_review", "model": "m", "usage": Usage(7, 1)}
    stage.database.store.spend.record(stage.b.owner.id, "meter", price=None, **told)  # type: ignore[arg-type]
    stage.instance.add_dynamic_partitions(OWNERS_NAME, [str(stage.b.owner.id)])
    done = materialize([spend], partition_key=str(stage.b.owner.id), resources=RESOURCES, instance=stage.instance)
    (made,) = done.asset_materializations_for_node("spend")
    assert made.metadata["tokens of the last day"].value == 8
    assert not [mark for mark in stage.a.marks() if mark in as_json({name: str(one) for name, one in made.metadata.items()})]


def _spends_schedule(stage: Stage) -> None:
    with build_schedule_context(
        instance=stage.instance, resources=RESOURCES, scheduled_execution_time=stage.database.clock.now()
    ) as context:
        requests = spends(context)
    asked = {one.partition_key: one.tags[tags.OWNER] for one in requests}  # type: ignore[union-attr]
    assert str(stage.a.owner.id) in asked and all(partition == owner for partition, owner in asked.items())


def _budget_schedule(_stage: Stage) -> None:
    """It starts one job of one check, over all owners."""
    (found,) = [one for one in default_schedules() if one.name == "budget_checks"]
    assert found.job_name == "check_budgets"


def _posture_asset(stage: Stage) -> None:
    """The operator's: it compares all owners by name and number, and shows nobody's advisories."""
    _synced(stage)
    done = materialize([security_posture], resources=RESOURCES, instance=stage.instance)
    (made,) = done.asset_materializations_for_node("security_posture")
    assert "canary-a-advisory" not in as_json({name: str(one) for name, one in made.metadata.items()})


def _syncs_schedule(stage: Stage) -> None:
    """It names owners and nothing of theirs."""
    _synced(stage)
    with build_schedule_context(
        instance=stage.instance, resources=RESOURCES, scheduled_execution_time=stage.database.clock.now()
    ) as context:
        requests = security_syncs(context)
    carried = {one for request in requests for one in _ids(request)}  # type: ignore[union-attr]
    assert str(stage.b.owner.id) in carried
    assert not [
        mark
        for mark in stage.a.marks()
        if mark != str(stage.a.owner.id) and mark in as_json([one.run_config for one in requests])
    ]  # type: ignore[union-attr]


def _repaired(stage: Stage) -> None:
    """The log is one for all installations: B's webhook comes to B, and a missed one of A's waits on."""
    missing = stage.b.attempt(f"b-{uuid4()}")
    Held.log = [missing]
    before = digest(stage.admin, stage.a.owner.id)
    assert delivery_repair.execute_in_process(resources=RESOURCES, instance=stage.instance).success
    assert digest(stage.admin, stage.a.owner.id) == before
    assert missing.guid in [one["guid"] for one in stage.database.store.delivery_gaps.received(stage.b.owner.id, 5)]


def _gaps_asset(stage: Stage) -> None:
    """The operator's: numbers by owner, and no id of a webhook."""
    done = materialize([delivery_gaps], resources=RESOURCES, instance=stage.instance)
    (made,) = done.asset_materializations_for_node("delivery_gaps")
    assert "canary-a-guid" not in as_json({name: str(one) for name, one in made.metadata.items()})


def _repairs_schedule(_stage: Stage) -> None:
    """It starts one job, whose op is in this table."""
    (found,) = [one for one in default_schedules() if one.name == "delivery_repairs"]
    assert found.job_name == "delivery_repair"


def _postures_schedule(_stage: Stage) -> None:
    """It starts one job, which `asset security_posture` is about."""
    (found,) = [one for one in default_schedules() if one.name == "security_postures"]
    assert found.job_name == "refresh_posture"


# What works for all owners at once is looked at in its own function; the rest must not name A at all.
WORK: dict[str, Callable[[Stage], None]] = {
    "op launch_reviews": _launch,
    "op run_agent_session": _session,
    "op settle_reviews": _settle,
    "op step_hosted_session": _hosted,
    "sensor hosted_sessions": _hosted_sensor,
    "op launch_analyses": _analysis_launched,
    "op settle_analyses": _analysis_settled,
    "op sweep_analyses": _analyses_swept,
    "schedule security_sweeps": _sweeps_schedule,
    "sensor security_changes": _changes,
    "op send_notices": _noticed,
    "op stage_notices": _notices_staged,
    "schedule notices": _notices_schedule,
    "op apply_dismissals": _dismissed,
    "op launch_remediations": _remediation_launched,
    "op settle_remediations": _remediation_settled,
    "op settle_quietly": _quietly,
    "op apply_effects": _launch,
    "op apply_waiting_effects": _outbox,
    "asset review_outcomes": _outcomes_asset,
    "sensor work_00": _shard,
    "sensor recovery": _recovery,
    "schedule outcomes": _outcomes_schedule,
    "asset reconciliation": _reconciliation,
    "sensor failed_runs": _failed_run,
    "schedule reconcilers": _reconcilers_schedule,
    "op seal_audit": _seal,
    "op remove_old": _sweep,
    "schedule audit_seals": _clocked,
    "schedule retention_sweeps": _clocked,
    "op sync_owners": _synced,
    "op sync_requested": _requested,
    "asset security_findings": _findings_asset(security_findings),
    "asset finding_sla": _findings_asset(finding_sla),
    "asset sla_compliance": _findings_asset(sla_compliance),
    "asset security_posture": _posture_asset,
    "asset spend": _spend_asset,
    "schedule spends": _spends_schedule,
    "schedule budget_checks": _budget_schedule,
    "schedule security_syncs": _syncs_schedule,
    "schedule security_postures": _postures_schedule,
    "op repair_deliveries": _repaired,
    "asset delivery_gaps": _gaps_asset,
    "schedule delivery_repairs": _repairs_schedule,
}
OVER_ALL = {
    "sensor security_changes",
    "sensor hosted_sessions",
    "sensor work_00",
    "sensor recovery",
    "sensor failed_runs",
    "schedule outcomes",
    "schedule reconcilers",
    "asset reconciliation",
    "op seal_audit",
    "op remove_old",
    "schedule audit_seals",
    "schedule retention_sweeps",
    "asset security_posture",
    "schedule security_syncs",
    "schedule security_sweeps",
    "schedule notices",
    "schedule security_postures",
    "op repair_deliveries",
    "asset delivery_gaps",
    "schedule delivery_repairs",
    "schedule spends",
    "schedule budget_checks",
}


def defined() -> set[str]:
    """Every op, asset, sensor and schedule of the platform."""
    ops = {f"op {node.definition.name}" for job in default_jobs() for node in job.nodes}
    keys = {f"asset {key.to_user_string()}" for one in default_assets() for key in one.keys}
    return (
        ops
        | keys
        | {f"sensor {one.name}" for one in default_sensors(1)}
        | {f"schedule {one.name}" for one in default_schedules()}
    )


def test_everything_that_runs_is_in_the_table() -> None:
    assert defined() == set(WORK)


@pytest.mark.parametrize("name", WORK)
def test_work_for_one_owner_touches_nothing_of_another(stage: Stage, name: str, figures: Figures) -> None:
    before = digest(stage.admin, stage.a.owner.id)
    with watched(stage) as named:
        WORK[name](stage)
    leaks = [] if name in OVER_ALL else named
    leaks += [f"asked of {one}" for one in Held.asked if one[1] == stage.a.installation or as_json(one).find("canary-a") >= 0]
    told = as_json([entry.message for run in stage.instance.get_runs() for entry in stage.instance.all_logs(run.run_id)])
    told += as_json([[run.tags, run.run_config] for run in stage.instance.get_runs()])
    told += as_json(
        stage.admin.execute("select to_jsonb(r)::text from reviews r where owner_id = %s", (stage.b.owner.id,)).fetchall()
    )
    told += as_json(
        stage.admin.execute("select to_jsonb(r)::text from effects r where owner_id = %s", (stage.b.owner.id,)).fetchall()
    )
    leaks += [mark for mark in stage.a.marks() if mark in told]
    figures(tried=1, leaked=len(leaks))
    assert leaks == []
    if name not in OVER_ALL:
        assert digest(stage.admin, stage.a.owner.id) == before


def test_a_run_under_another_owners_tag_works_for_the_items_owner(stage: Stage) -> None:
    """A run's tags are labels for people: whose an item is comes from the item."""
    item = stage.a.item(next(_numbers))
    stage.run(code_review, "launch_reviews", [item])  # tagged as B's
    assert {one[1] for one in Held.asked} == {stage.a.installation}


def _leave_repository(stage: Stage) -> None:
    held = stage.database.store.owners.by_installation("github", stage.a.installation)
    assert held is not None
    stage.database.store.owners.change_repositories(held, added=[], removed=[REPOSITORY])


def _leave_integration(stage: Stage) -> None:
    held = stage.database.store.owners.by_installation("github", stage.a.installation)
    assert held is not None
    stage.database.store.owners.disconnect(held.owner_id, held.id)


def _connect_to_b(stage: Stage) -> None:
    stage.database.store.owners.connect(
        stage.b.owner.id,
        provider="github",
        installation_id=stage.a.installation,
        account="octo",
        repositories=[Repository(REPOSITORY, "octo/demo", "main", True)],
        actor="test",
    )


def _change_owner(stage: Stage) -> None:
    """GitHub still shows the repository to this installation: only our own rows tell that it isn't A's any more."""
    _leave_integration(stage)
    _connect_to_b(stage)


MOVES = {
    "repository removed": _leave_repository,
    "installation gone": _leave_integration,
    "installation is B's now": _change_owner,
}


@pytest.mark.parametrize("name", MOVES)
def test_effects_of_what_left_its_owner_are_dropped(stage: Stage, name: str, figures: Figures) -> None:
    """Threats, rule 16: at effect as well as at claim."""
    item = stage.a.finished(next(_numbers), "success")
    MOVES[name](stage)
    stage.run(outbox, "apply_waiting_effects", [item, stage.a.done])
    applied = [one for one in Held.asked if one[0] == "apply"]
    figures(tried=2, leaked=len(applied))
    assert applied == []
    assert stage.effects(item) == stage.effects(stage.a.done) == [("dropped", Reason.OWNER_CHANGED)]


@pytest.mark.parametrize("name", MOVES)
def test_work_on_what_left_its_owner_ends_at_once(stage: Stage, name: str, figures: Figures) -> None:
    """A waiting session would fetch what may be somebody else's by now; a running one is told to stop."""
    _, running = stage.a.running()
    MOVES[name](stage)
    stage.run(agent_session, "run_agent_session", [stage.a.session])
    clones = [one for one in Held.asked if one[0] == "clone"]
    figures(tried=3, leaked=len(clones))
    assert clones == [] and stage.database.store.sessions.beat(running, 30) == "cancel"
    assert {stage.a.state(one) for one in (stage.a.live.item_id, stage.a.waiting, running.item_id)} == {"cancelled"}


def test_effects_of_an_installation_that_two_owners_hold_wait(stage: Stage, figures: Figures) -> None:
    """An operator's slip loses nothing once it is mended (invariant 9)."""
    item = stage.a.finished(next(_numbers), "success")
    _connect_to_b(stage)
    stage.run(outbox, "apply_waiting_effects", [item])
    figures(tried=1, leaked=len([one for one in Held.asked if one[0] == "apply"]))
    assert [one for one in Held.asked if one[0] == "apply"] == []
    assert stage.effects(item) == [("pending", Reason.INTEGRATION_AMBIGUOUS)]
    stage.admin.execute(
        "update integrations set disconnected_at = now() where owner_id = %s and installation_id = %s",
        (stage.b.owner.id, stage.a.installation),
    )
    stage.database.clock.advance(timedelta(minutes=6))
    stage.run(outbox, "apply_waiting_effects", [item])
    assert stage.effects(item) == [("applied", None)]


def test_the_table_of_work_proves_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that nobody entered fails."""
    monkeypatch.delitem(WORK, "op settle_reviews")
    assert defined() != set(WORK)
