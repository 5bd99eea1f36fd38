"""Signed webhooks, recorded with their answers. Like GitHub: 10 s time-out, no retry of its own."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from kilo_twin.shapes import Shapes, account, organization
from kilo_twin.state import Twin, now

TIMEOUT_SECONDS = 10


class Webhooks:
    """Sends events of one twin to one address."""

    def __init__(self, twin: Twin, url: str) -> None:
        self.twin = twin
        self.url = url
        self.shapes = Shapes(twin)
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="webhooks")

    def pull_request(self, repository: dict[str, Any], pull: dict[str, Any], action: str, **more: Any) -> dict[str, Any]:
        """Sends a pull_request event; the recorded delivery."""
        return self.send("pull_request", action, self.pull_payload(repository, pull, action, **more), repository["id"])

    def pull_payload(self, repository: dict[str, Any], pull: dict[str, Any], action: str, **more: Any) -> dict[str, Any]:
        """The body of a pull_request event."""
        told = {"action": action, "number": pull["number"], "pull_request": self.shapes.pull(repository, pull), **more}
        return self.in_repository(repository, account(pull["author"], pull["author_type"]), **told)

    def in_repository(self, repository: dict[str, Any], sender: dict[str, Any], **told: Any) -> dict[str, Any]:
        """What happened, with what every event of a repository carries."""
        return {
            "repository": self.shapes.repository(repository),
            "organization": organization(self.twin.credentials["account"]),
            "sender": sender,
            "installation": {"id": self.twin.credentials["installation_id"], "node_id": "SW5z"},
            **told,
        }

    def ping(self) -> None:
        """What GitHub sends when a webhook is made."""
        hook = {"type": "App", "id": 1, "name": "web", "active": True, "app_id": self.twin.credentials["app_id"]}
        config = {**self.hook(), "secret": "********"}
        more = {"events": self.shapes.app()["events"], "config": config, "updated_at": now(), "created_at": now()}
        self.send("ping", None, {"zen": "Keep it logically awesome.", "hook_id": 1, "hook": hook | more})

    def hook(self) -> dict[str, str]:
        """The App's webhook; the seeded App's leads where the twin was told to at its start."""
        return dict(self.twin.credentials.get("hook", {"url": self.url, "content_type": "json", "insecure_ssl": "0"}))

    def later(self, event: str, action: str | None, payload: dict[str, Any], repository_id: int | None) -> None:
        """Sends one event after those that wait already; whoever holds the twin's lock doesn't wait for the answer."""
        self._sender.submit(self.send, event, action, payload, repository_id)

    def send(self, event: str, action: str | None, payload: dict[str, Any], repository_id: int | None = None) -> dict[str, Any]:
        """Sends one event and records it with its answer."""
        delivery = {
            "id": self.twin.new_id(),
            "guid": str(uuid.uuid4()),
            "redelivery": False,
            "event": event,
            "action": action,
            "installation_id": self.twin.credentials["installation_id"],
            "repository_id": repository_id,
            "body": json.dumps(payload),
        }
        self._post(delivery)
        with self.twin.lock:
            self.twin.data["deliveries"].append(delivery)
            del self.twin.data["deliveries"][:-200]
            self.twin.save()
        return delivery

    def again(self, delivery_id: int) -> None:
        """Redelivers without waiting for the answer."""
        self._sender.submit(self.redeliver, delivery_id)

    def redeliver(self, delivery_id: int) -> dict[str, Any]:
        """Sends a recorded event again, with the same id and body."""
        delivery: dict[str, Any] = next(one for one in self.twin.data["deliveries"] if one["id"] == delivery_id)
        delivery["redelivery"] = True
        self._post(delivery)
        self.twin.save()
        return delivery

    def _post(self, delivery: dict[str, Any]) -> None:
        body = delivery["body"].encode()
        secret = self.twin.credentials["webhook_secret"].encode()
        started = time.perf_counter()
        headers = {
            "content-type": "application/json",
            "user-agent": "GitHub-Hookshot/twin",
            "x-github-delivery": delivery["guid"],
            "x-github-event": delivery["event"],
            "x-github-hook-id": "1",
            "x-github-hook-installation-target-id": str(self.twin.credentials["app_id"]),
            "x-github-hook-installation-target-type": "integration",
            "x-hub-signature": "sha1=" + hmac.new(secret, body, hashlib.sha1).hexdigest(),
            "x-hub-signature-256": "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest(),
        }
        try:
            answer = httpx.post(self.hook()["url"], content=body, headers=headers, timeout=TIMEOUT_SECONDS)
            code, status, text = answer.status_code, answer.reason_phrase or "OK", answer.text[:2000]
        except httpx.HTTPError as failure:
            code, status, text = 0, type(failure).__name__, ""
        delivery.update(delivered_at=now(), duration=time.perf_counter() - started, status=status, status_code=code, answer=text)
