"""A platform whose reviews go to the twin's hosted agent: real store, ops and GitHub client, without Dagster's processes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast
from uuid import UUID, uuid4

from dagster import OpExecutionContext

from kilo_pipelines.ops import code_review as reviews
from kilo_pipelines.ops.effects import apply_effects_of
from kilo_pipelines.ops.hosted_session import take_step
from kilo_pipelines.resources.cloud_agent import CloudAgentResource
from kilo_pipelines.resources.github import GitHubResource
from kilo_pipelines.sensors import work_once
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import SessionRow, Store
from tests.support.engine import Engine, _Context


class Hosted:
    """One platform whose reviews go to the twin's hosted agent; callbacks have nowhere to go, so sessions are polled."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.store, self.clock = engine, engine.store, engine.clock
        settings = Settings()
        write_secret(settings.cloud_agent_token_file, engine.credentials["cloud_agent_token"])
        write_secret(settings.cloud_agent_key_file, engine.credentials["cloud_agent_internal_key"])

    def service(self, **how: Any) -> None:
        """How the twin's service goes from now on."""
        self.engine.control("cloud-agent", **({"seconds": 0.0} | how))

    def told(self) -> dict[str, Any]:
        return self.engine.control("cloud-agent-sessions")

    def accept_reported(self, *, accepted: bool) -> None:
        setting = self.store.owners.config(self.engine.owner, SERVICE)
        assert setting is not None
        config = setting.config | {"accept_reported_evidence": accepted}
        self.store.owners.put_config(
            self.engine.owner, SERVICE, config, enabled=True, expected_revision=setting.revision, actor="test"
        )

    def launched(self, kind: str = "clean") -> tuple[dict[str, Any], UUID, UUID]:
        """A pull request whose session waits: pull request, item, session."""
        pull = self.engine.control("open-pull", kind=kind)
        self.engine.deliver(pull)
        self.runs()
        (item,) = [one for one in self.store.queue.items(state="live") if one["subject_key"].endswith(f":pull:{pull['number']}")]
        assert item["session_id"] is not None
        return pull, item["id"], item["session_id"]

    def runs(self) -> None:
        """A shard's evaluation and its runs, until nothing is offered."""
        while requests := work_once(self.store):
            for request in requests:
                ids = next(iter(request.run_config["ops"].values()))["config"]["ids"]
                work = {"code_review": reviews._launch, "settle_code_review": reviews._settle}[request.job_name]
                context = cast(OpExecutionContext, _Context(str(uuid4())))
                for one in ids:
                    work(context, self.store, GitHubResource(), CloudAgentResource(), UUID(one))
                apply_effects_of(context, self.store, GitHubResource(), ids)

    def take(self, store: Store, session: UUID) -> None:
        """The next step of a session, in a process's own store."""
        context = cast(OpExecutionContext, _Context(str(uuid4())))
        take_step(context, store, GitHubResource(), CloudAgentResource(), session)

    def step(self, session: UUID) -> SessionRow:
        """The next step of a session, when it is due."""
        self.take(self.store, session)
        row = self.store.sessions.get(session)
        assert row is not None
        return row

    def offered(self, session: UUID) -> bool:
        """Whether the session's next step is offered."""
        return [session] in [one.ids for one in self.store.hosted.offers(50)]

    def until_ended(self, session: UUID, most: int = 20) -> SessionRow:
        """Steps, a poll apart, until the session has ended."""
        for _ in range(most):
            row = self.step(session)
            if row.ended_at is not None:
                return row
            self.clock.advance(timedelta(seconds=31))
            time_for_the_agent()
        raise AssertionError(f"not ended: {self.store.hosted.get(session)}")

    def checks(self, pull: dict[str, Any]) -> list[tuple[str, str | None]]:
        return [(one["status"], one["conclusion"]) for one in self.engine.seen(pull)["check_runs"]]


def time_for_the_agent() -> None:
    """The twin's agent works in another process; its work on a small repository takes milliseconds."""
    time.sleep(0.15)


@contextmanager
def hosted_platform(logins: dict[str, str]) -> Iterator[Hosted]:
    """One in a given database, with the environment of `KILO_AGENT=hosted`."""
    outer = {name: os.environ.get(name) for name in ("KILO_AGENT", "KILO_CLOUD_AGENT_URL", "KILO_MODEL")}
    engine = Engine(logins)
    os.environ |= {
        "KILO_AGENT": "hosted",
        "KILO_CLOUD_AGENT_URL": f"{engine.url}/cloud-agent",
        "KILO_MODEL": "scripted-reviewer",
    }
    try:
        yield Hosted(engine)
    finally:
        engine.close()
        for name, value in outer.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
