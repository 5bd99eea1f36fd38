"""An owner with a repository in a real database, and the short ways to put work into it."""

from __future__ import annotations

import itertools
import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from kilo_pipelines.core.clock import ManualClock
from kilo_pipelines.core.effects import EffectIntent, EffectKind
from kilo_pipelines.core.receipt import Receipt
from kilo_pipelines.store import AdmissionTx, Claimed, HostedClaim, NewDelivery, NewItem, Repository, SessionClaim, Store

_numbers = itertools.count(1000)

# What a session of a member's pull request may see and do.
RECEIPT = Receipt(
    text=["member"],
    holds_secrets=False,
    effects=True,
    approved_by="grace",
    writes=False,
    network="model",
    model="m",
    turns=60,
    tokens=1_000,
    seconds=60,
    evidence="observed",
    sandbox="bwrap",
)


class World:
    """One owner's corner of the database."""

    def __init__(self, store: Store, clock: ManualClock, kind: str = "organization", repository: int | None = None) -> None:
        self.store, self.clock = store, clock
        self.installation = next(_numbers)
        self.repository = repository or next(_numbers)
        self.owner = store.owners.create(kind, f"owner-{self.installation}")
        self.integration = store.owners.connect(
            self.owner.id,
            provider="github",
            installation_id=self.installation,
            account="octo",
            repositories=[Repository(self.repository, "octo/demo", "main", False)],
            actor="test",
        )

    def delivery(self, **more: Any) -> NewDelivery:
        body = json.dumps({"nonce": uuid4().hex, **more}).encode()
        return NewDelivery(self.owner.id, self.integration, uuid4().hex, "pull_request", "opened", body, {})

    def details(self, pull: int, head: str | None = None) -> dict[str, Any]:
        return {
            "repository_id": self.repository,
            "full_name": "octo/demo",
            "pull_number": pull,
            "title": "t",
            "author": "grace",
            "author_type": "User",
            "url": "http://localhost/pull",
            "base_ref": "main",
            "base_sha": "b" * 40,
            "head_ref": "topic",
            "head_sha": head or uuid4().hex + "00000000",
            "trigger": "webhook",
            "settings": {},
        }

    def new_item(self, pull: int, head: str | None = None) -> NewItem:
        """What an admission opens for a pull request."""
        subject = f"github:{self.repository}:pull:{pull}"
        return NewItem("code_review", subject, self.repository, 0, self.details(pull, head))

    def item(self, pull: int | None = None, head: str | None = None) -> UUID:
        """A waiting item, as an admission makes it."""
        opened: list[UUID] = []
        number = pull or next(_numbers)

        def admit(tx: AdmissionTx) -> None:
            if tx.delivery.id != receipt.delivery_id:
                tx.skip("event_unknown")
                return
            opened.append(tx.open(self.new_item(number, head)))

        receipt = self.store.inbox.record(self.delivery())
        while not opened:
            assert self.store.inbox.admit_next(admit, 50)
        return opened[0]

    def claim(self, item: UUID, cap: int = 20, lease: float = 30) -> Any:
        return self.store.queue.claim(
            item, "code_review", run_id=uuid4().hex, pools=lambda _kind, _plan: {"code_review": cap}, lease_s=lease
        )

    def launched(self, item: UUID | None = None, spec: dict[str, Any] | None = None) -> tuple[Claimed, UUID]:
        """A running item with a queued session."""
        claim = self.claim(item or self.item())
        assert isinstance(claim, Claimed), claim
        session = uuid4()
        head = {name: claim.details[name] for name in ("head_sha", "base_sha", "base_ref", "title")}
        launched = self.store.sessions.launch(
            claim, session_id=session, spec=spec or {}, head=head, effects=[], cap_s=60, receipt=RECEIPT
        )
        assert launched
        return claim, session

    def session_claim(self, session: UUID, lease: float = 30) -> Any:
        self.store.sessions.ensure_capacity(64)
        return self.store.sessions.claim(session, run_id=uuid4().hex, lease_s=lease)

    def hosted(self) -> tuple[Claimed, UUID]:
        """A running item whose queued session is a hosted one."""
        return self.launched(spec={"agent": "hosted"})

    def step(self, session: UUID, lease: float = 30) -> Any:
        """The next step's claim of a hosted session."""
        return self.store.hosted.claim(session, run_id=uuid4().hex, lease_s=lease)

    def initiated(self) -> tuple[Claimed, HostedClaim]:
        """A hosted session whose first turn runs at the service; the claim of the step that got it there is over."""
        claim, session = self.hosted()
        held = self.step(session)
        assert isinstance(held, HostedClaim), held
        assert self.store.hosted.keep(held, plan={"nonce": "n"})
        assert self.store.hosted.keep_ids(held, f"agent_{uuid4()}", "ses_1")
        assert self.store.hosted.park(
            held, timedelta(seconds=30), state="initiated", message_id="msg_1", initiated_at=held.now, tries=0
        )
        return claim, held

    def running(self) -> tuple[Claimed, SessionClaim]:
        claim, session = self.launched()
        held = self.session_claim(session)
        assert isinstance(held, SessionClaim), held
        return claim, held

    def state(self, item: UUID) -> str:
        found = self.store.queue.get(item)
        assert found is not None
        return found.state


def intent(key: str, subject: str = "s") -> EffectIntent:
    """An effect that nobody applies."""
    return EffectIntent(kind=EffectKind.GITHUB_REACTION, intent_key=key, subject_key=subject, payload={"content": "eyes"})
