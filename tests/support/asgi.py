"""The real ingress application in this process: requests as raw header and body bytes, so that nothing tidies them up first.

A test that weakens a defence (`tests/hostile/test_proof.py`) can reach this one; the running ingress of `support/ingress.py`
is for what only a wire shows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import text

from kilo_pipelines.ingress.application import Ingress, public_application
from kilo_pipelines.ops.admission import admit
from kilo_pipelines.ops.markers import marker_of
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.services.code_review.config import CodeReviewConfig
from kilo_pipelines.store import Repository, Store
from tests.support.ingress import SECRET, OneSecret, sign

Headers = list[tuple[bytes, bytes]]


class Post(NamedTuple):
    """One request to the webhook address."""

    headers: Headers
    chunks: Sequence[bytes]


@dataclass(frozen=True)
class Answer:
    """What the application sent."""

    status: int
    body: bytes

    @property
    def reason(self) -> str:
        """The reason code of a JSON answer, else its outcome."""
        found = json.loads(self.body)
        return str(found.get("reason") or found.get("outcome"))


@cache
def _runner() -> asyncio.Runner:
    """One event loop for all: the application's semaphore of large bodies belongs to one."""
    return asyncio.Runner()


def signed(
    body: bytes,
    event: str = "pull_request",
    *,
    delivery: str | None = None,
    signature: str | None = None,
    more: Headers | None = None,
) -> Post:
    """A request as GitHub sends it."""
    headers = [
        (b"host", b"localhost"),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-github-event", event.encode()),
        (b"x-github-delivery", (delivery or str(uuid4())).encode()),
        (b"x-hub-signature-256", (sign(body) if signature is None else signature).encode()),
    ]
    return Post(headers + (more or []), [body])


class InProcess:
    """One owner with one installation and one repository, and the application in front of them."""

    def __init__(self, store: Store, secret: str | None = SECRET) -> None:
        self.store = store
        numbers = uuid4().int
        self.installation = 10_000 + numbers % 10**12
        self.repository = 10_000 + (numbers >> 64) % 10**12
        self.owner = store.owners.create("organization", f"octo-{self.installation}")
        self.connect(self.owner.id, self.installation, self.repository)
        config = CodeReviewConfig().model_dump(mode="json")
        store.owners.put_config(self.owner.id, SERVICE, config, enabled=True, expected_revision=0, actor="test")
        self.application = public_application(Ingress(store, OneSecret(secret), frozenset({"localhost"})))

    def connect(self, owner: UUID, installation: int, repository: int, full_name: str = "octo/demo") -> None:
        """Connects an installation with one repository."""
        self.store.owners.connect(
            owner,
            provider="github",
            installation_id=installation,
            account="octo",
            repositories=[Repository(repository, full_name, "main", True)],
            actor="test",
        )

    def ours(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The payload as one of this owner's installation and repository."""
        changed: dict[str, Any] = json.loads(json.dumps(payload))
        changed["installation"] = {**(changed.get("installation") or {}), "id": self.installation}
        if isinstance(changed.get("repository"), dict):
            changed["repository"] |= {"id": self.repository, "full_name": "octo/demo"}
        return changed

    def post(self, one: Post, path: str = "/webhooks/github") -> Answer:
        """One request; whatever the application doesn't handle is raised here."""
        return _runner().run(self._call(one, path))

    def post_all(self, many: Iterable[Post], at_once: int = 8) -> list[Answer]:
        """Many requests, some at the same time."""

        async def all_of_them() -> list[Answer]:
            gate = asyncio.Semaphore(at_once)

            async def one_of_them(one: Post) -> Answer:
                async with gate:
                    return await self._call(one, "/webhooks/github")

            return await asyncio.gather(*(one_of_them(one) for one in many))

        return _runner().run(all_of_them())

    async def _call(self, one: Post, path: str) -> Answer:
        chunks = list(one.chunks)
        sent: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": one.headers,
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
        }

        async def receive() -> dict[str, Any]:
            if not chunks:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.application(scope, receive, send)
        body = b"".join(one["body"] for one in sent if one["type"] == "http.response.body")
        return Answer(int(sent[0]["status"]), body)

    # -- what came of it -------------------------------------------------------------------------------------------------

    def admit(self) -> int:
        """Admits whatever was stored, as the sensors do."""
        marker = marker_of(self.store)
        done = 0
        while step := self.store.inbox.admit_next(lambda tx: admit(tx, marker), 50):
            done += step
        return done

    def deliveries(self) -> list[dict[str, Any]]:
        """Stored deliveries of the owner, without their bodies."""
        return self._rows("select id, provider_delivery_id, event, action, state, reason, tries, item_id from deliveries")

    def items(self) -> list[dict[str, Any]]:
        """Work items of the owner with the event that each came from."""
        return self._rows(
            "select w.id, w.service, r.pull_number, r.head_sha, d.event, d.action from work_items w"
            " join reviews r on r.owner_id = w.owner_id and r.item_id = w.id"
            " left join deliveries d on d.owner_id = w.owner_id and d.item_id = w.id and d.state = 'admitted'"
        )

    def _rows(self, statement: str) -> list[dict[str, Any]]:
        with self.store.database.owner(self.owner.id) as connection:
            return [dict(row) for row in connection.execute(text(statement)).mappings()]
