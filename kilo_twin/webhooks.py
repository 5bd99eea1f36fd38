"""Signed webhooks and the log of their attempts. Like GitHub: 10 s time-out, no retry of its own."""

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
# Attempts that the log keeps; GitHub keeps three days.
LOGGED = 400


class Webhooks:
    """Sends events of one twin to one address."""

    def __init__(self, twin: Twin, url: str) -> None:
        self.twin = twin
        self.url = url
        self.shapes = Shapes(twin)
        self._outage: dict[str, Any] = {"status": "", "code": 0, "left": 0}
        # One client, since making one costs more than a delivery; it keeps no connection, since receivers are restarted.
        self._http = httpx.Client(timeout=TIMEOUT_SECONDS, limits=httpx.Limits(max_keepalive_connections=0))
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="webhooks")

    def pull_request(self, repository: dict[str, Any], pull: dict[str, Any], action: str, **more: Any) -> dict[str, Any]:
        """Sends a pull_request event; the recorded delivery."""
        return self.send("pull_request", action, self.pull_payload(repository, pull, action, **more), repository["id"])

    def pull_payload(self, repository: dict[str, Any], pull: dict[str, Any], action: str, **more: Any) -> dict[str, Any]:
        """The body of a pull_request event."""
        told = {"action": action, "number": pull["number"], "pull_request": self.shapes.pull(repository, pull), **more}
        sender = told.pop("sender", None) or account(pull["author"], pull["author_type"])
        return self.in_repository(repository, sender, **told)

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

    def send(
        self,
        event: str,
        action: str | None,
        payload: dict[str, Any],
        repository_id: int | None = None,
        installation_id: int | None = None,
    ) -> dict[str, Any]:
        """Sends one event and logs the attempt with its answer; of another installation of the App where one is named."""
        delivery = {
            "guid": str(uuid.uuid4()),
            "event": event,
            "action": action,
            "installation_id": installation_id or self.twin.credentials["installation_id"],
            "repository_id": repository_id,
            "body": json.dumps(payload),
        }
        return self._attempt(delivery, redelivery=False)

    def redeliver(self, delivery_id: int) -> dict[str, Any]:
        """Sends a logged event again, with the same guid and body: another attempt in the log. ValueError for an unknown one."""
        return self._attempt(self.logged(delivery_id), redelivery=True)

    def redeliver_later(self, delivery_id: int) -> None:
        """The same, after what waits to be sent already."""
        self._sender.submit(self.redeliver, delivery_id)

    def logged(self, delivery_id: int) -> dict[str, Any]:
        """An attempt of the log; ValueError for an unknown one."""
        for one in self.twin.data["deliveries"]:
            if one["id"] == delivery_id:
                return dict(one)
        raise ValueError(f"no delivery {delivery_id}")

    def outage(self, status: str, code: int, left: int = 1_000_000) -> dict[str, Any]:
        """The next attempts (`left`; 0: from now on all reach again) don't reach their receiver and are logged with this outcome.

        "failed to connect" with 502, "timed out" with 504, or "OK" with 200: what a receiver answered and then lost. With status "" they
        aren't even logged, as when GitHub itself is down.
        """
        self._outage = {"status": status, "code": code, "left": left}
        return self._outage

    def _attempt(self, event: dict[str, Any], *, redelivery: bool) -> dict[str, Any]:
        delivery = {name: event[name] for name in ("guid", "event", "action", "installation_id", "repository_id", "body")}
        delivery |= {"id": self.twin.new_id(), "redelivery": redelivery}
        hidden = self._post(delivery)
        with self.twin.lock:
            if not hidden:
                self.twin.data["deliveries"].append(delivery)
            del self.twin.data["deliveries"][:-LOGGED]
            self.twin.save()
        return delivery

    def _post(self, delivery: dict[str, Any]) -> bool:
        """Sends an attempt and notes its outcome; True when nobody is to hear of it."""
        with self.twin.lock:
            lost = self._outage["left"] > 0
            self._outage["left"] -= lost
        if lost:
            status, code = self._outage["status"], self._outage["code"]
            delivery.update(delivered_at=now(), duration=0.0, status=status or "dropped", status_code=code, answer="")
            return not status
        body = delivery["body"].encode()
        secret = self.twin.credentials["webhook_secret"].encode()
        started = time.perf_counter()
        headers = self.headers(delivery) | {
            "x-hub-signature": "sha1=" + hmac.new(secret, body, hashlib.sha1).hexdigest(),
            "x-hub-signature-256": "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest(),
        }
        try:
            answer = self._http.post(self.hook()["url"], content=body, headers=headers)
            code, status, text = answer.status_code, answer.reason_phrase or "OK", answer.text[:2000]
        except httpx.TimeoutException:
            code, status, text = 504, "timed out", ""
        except httpx.HTTPError:
            code, status, text = 502, "failed to connect", ""
        delivery.update(delivered_at=now(), duration=time.perf_counter() - started, status=status, status_code=code, answer=text)
        return False

    def headers(self, delivery: dict[str, Any]) -> dict[str, str]:
        """What is sent beside the body, without its signature."""
        return {
            "content-type": "application/json",
            "user-agent": "GitHub-Hookshot/twin",
            "x-github-delivery": delivery["guid"],
            "x-github-event": delivery["event"],
            "x-github-hook-id": "1",
            "x-github-hook-installation-target-id": str(self.twin.credentials["app_id"]),
            "x-github-hook-installation-target-type": "integration",
        }
