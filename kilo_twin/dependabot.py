"""Dependabot of one twin: which repository has which alerts, lists of them, dismissals, scans of lock files.

Kept in a file of its own, so that thousands of alerts don't slow down what has nothing to do with them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kilo_twin import npm, world_alerts
from kilo_twin.shapes import Shapes, person
from kilo_twin.state import Twin, git, now
from kilo_twin.webhooks import Webhooks

LOCK_FILE = "package-lock.json"
MAX_PER_PAGE = 100  # GitHub's; more is taken as a hundred
MAX_COMMENT = 280  # characters of a dismissal's comment (REST API, "Update a Dependabot alert")
_LISTS: dict[str, tuple[str, ...]] = {
    "state": ("auto_dismissed", "dismissed", "fixed", "open"),
    "severity": ("low", "medium", "high", "critical"),
    "ecosystem": ("composer", "go", "maven", "npm", "nuget", "pip", "pub", "rubygems", "rust"),
    "package": (),
    "manifest": (),
}
# Every parameter with its values; none listed: any.
_ALLOWED = _LISTS | {
    "scope": ("development", "runtime"),
    "sort": ("created", "updated"),
    "direction": ("asc", "desc"),
    **dict.fromkeys(("before", "after", "per_page"), ()),
}


class AlertError(Exception):
    """What GitHub answers to a request that it doesn't take: a status and its message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Dependabot:
    """Alerts by repository id; whoever changes them holds the twin's lock and saves."""

    def __init__(self, twin: Twin, shapes: Shapes, webhooks: Webhooks) -> None:
        self.twin, self.shapes, self.webhooks = twin, shapes, webhooks
        self._data: dict[str, Any] = twin.read("alerts.json") or {"advisories": {}, "repositories": {}}

    def save(self) -> None:
        """Writes the alerts."""
        self.twin.write("alerts.json", self._data)

    def alerts(self, repository: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The alerts of a repository by number."""
        found: dict[str, dict[str, Any]] = self._data["repositories"].setdefault(str(repository["id"]), {})
        return found

    def alert(self, repository: dict[str, Any], number: int) -> dict[str, Any]:
        """One alert; AlertError 404 when there is none."""
        found = self.alerts(repository).get(str(number))
        if found is None:
            raise AlertError(404, f"No alert found for alert number {number}")
        return found

    def shape(self, repository: dict[str, Any], alert: dict[str, Any]) -> Any:
        """An alert's JSON, spoiled where somebody asked for it."""
        whole = self.shapes.alert(repository, alert, self._data["advisories"][alert["ghsa_id"]])
        return world_alerts.SPOILED[alert["spoiled"]](whole) if alert["spoiled"] else whole

    # -- reading ----------------------------------------------------------------------------------------------------

    def check(self, repository: dict[str, Any]) -> None:
        """AlertError with GitHub's words when the repository has no alerts to show."""
        if repository.get("archived"):
            raise AlertError(403, "Dependabot alerts are not available for archived repositories.")
        if not repository.get("alerts_enabled", True):
            raise AlertError(403, "Dependabot alerts are disabled for this repository.")

    def page(self, repository: dict[str, Any], query: Mapping[str, str]) -> tuple[list[Any], dict[str, dict[str, str]]]:
        """A page of alerts, and by relation (`next`, `prev`) the parameters that lead on; AlertError as GitHub has it."""
        self.check(repository)
        wanted = _checked(query)
        key = "updated_at" if wanted.get("sort") == "updated" else "created_at"

        def place(alert: dict[str, Any]) -> tuple[str, int]:
            return alert[key], alert["number"]

        found = sorted(
            (one for one in self.alerts(repository).values() if self._meets(one, wanted)),
            key=place,
            reverse=wanted.get("direction", "desc") == "desc",
        )
        size = min(MAX_PER_PAGE, int(wanted.get("per_page", "30")))
        order = 1 if wanted.get("direction", "desc") == "asc" else -1
        start, end = 0, min(size, len(found))
        if "after" in wanted:
            bound = _cursor(wanted["after"])
            start = sum(1 for one in found if (place(one) <= bound if order == 1 else place(one) >= bound))
            end = min(start + size, len(found))
        elif "before" in wanted:
            bound = _cursor(wanted["before"])
            end = sum(1 for one in found if (place(one) < bound if order == 1 else place(one) > bound))
            start = max(0, end - size)
        links = {}
        rest = {name: value for name, value in query.items() if name not in ("after", "before")}
        if end < len(found) and end > start:
            links["next"] = {**rest, "after": _cursor_text(place(found[end - 1]))}
        if start > 0 and end > start:
            links["prev"] = {**rest, "before": _cursor_text(place(found[start]))}
        return [self.shape(repository, one) for one in found[start:end]], links

    def _meets(self, alert: dict[str, Any], wanted: Mapping[str, str]) -> bool:
        advisory = self._data["advisories"][alert["ghsa_id"]]
        package = advisory["vulnerabilities"][0]
        values = {
            "state": alert["state"],
            "severity": advisory["severity"],
            "ecosystem": package["ecosystem"],
            "package": package["name"],
            "manifest": alert["manifest_path"],
        }
        return all(values[name] in wanted[name].split(",") for name in _LISTS if name in wanted) and (
            "scope" not in wanted or alert["scope"] == wanted["scope"]
        )

    # -- changes ----------------------------------------------------------------------------------------------------

    def update(self, repository: dict[str, Any], number: int, body: Any, by: str) -> dict[str, Any]:
        """A dismissal or its undoing over REST; AlertError for what GitHub refuses.

        Stricter than GitHub's description where that is silent: only an open alert can be dismissed, only a dismissed one opened.
        """
        self.check(repository)
        alert = self.alert(repository, number)
        if not isinstance(body, dict) or body.keys() - {"state", "dismissed_reason", "dismissed_comment"}:
            raise AlertError(422, "Invalid request. Only state, dismissed_reason and dismissed_comment are taken.")
        state, reason, comment = (body.get(name) for name in ("state", "dismissed_reason", "dismissed_comment"))
        if state not in ("dismissed", "open"):
            raise AlertError(422, "Invalid request. state must be dismissed or open.")
        if state == "dismissed" and reason not in world_alerts.DISMISSAL_REASONS:
            raise AlertError(
                422, f"Invalid request. dismissed_reason must be one of {', '.join(world_alerts.DISMISSAL_REASONS)}."
            )
        if comment is not None and (not isinstance(comment, str) or len(comment) > MAX_COMMENT):
            raise AlertError(422, f"Invalid request. dismissed_comment has at most {MAX_COMMENT} characters.")
        action = "dismissed" if state == "dismissed" else "reopened"
        if alert["state"] not in world_alerts.MOVES[action][0]:
            raise AlertError(422, f"Alert is {alert['state']} and can't be {action}.")
        self.move(repository, number, action, by=by, reason=reason, comment=comment)
        self.save()
        return alert

    def move(
        self,
        repository: dict[str, Any],
        number: int,
        action: str,
        *,
        by: str = "grace",
        reason: str | None = None,
        comment: str | None = None,
    ) -> None:
        """Moves an alert and sends the webhook; ValueError for a move that isn't one, AlertError for no such alert."""
        alert = self.alert(repository, number)
        person = by if action in ("dismissed", "reopened") else "github"
        world_alerts.move(alert, action, now(), by=by, reason=reason, comment=comment)
        self._send(repository, alert, action, person)

    def add(self, repository: dict[str, Any], seeded: world_alerts.Seeded) -> None:
        """Takes seeded alerts in; known advisories stay as they are. Nothing is sent: they were there before anybody listened."""
        for ghsa_id, advisory in seeded.advisories.items():
            self._data["advisories"].setdefault(ghsa_id, advisory)
        self.alerts(repository).update({str(one["number"]): one for one in seeded.alerts})

    def create(self, repository: dict[str, Any], advisory: dict[str, Any], manifest_path: str) -> dict[str, Any]:
        """A new alert of today, with its webhook."""
        self._data["advisories"].setdefault(advisory["ghsa_id"], advisory)
        number = max((int(one) for one in self.alerts(repository)), default=0) + 1
        alert = world_alerts.new_alert(number, advisory["ghsa_id"], manifest_path, now(), "runtime")
        self.alerts(repository)[str(number)] = alert
        self._send(repository, alert, "created", "github")
        return alert

    def raise_severity(self, repository: dict[str, Any], number: int) -> None:
        """The advisory's next severity, for every alert of it; no webhook tells, and the alert's `updated_at` stays.

        GitHub's description: `updated_at` is when the alert's *state* last changed.
        """
        advisory = self._data["advisories"][self.alert(repository, number)["ghsa_id"]]
        advisory.update(severity=world_alerts.raised(advisory["severity"]), updated_at=now())

    def change(self, repository: dict[str, Any], count: int, seed: int) -> list[dict[str, Any]]:
        """`count` things happen one after the other; what they were."""
        happened = []
        for step in range(count):
            what = world_alerts.next_change(self.alerts(repository).values(), seed, step, datetime.now(UTC))
            number = what.number
            if what.advisory is not None:
                number = self.create(repository, what.advisory, what.manifest_path)["number"]
            elif what.action == "severity_raised":
                self.raise_severity(repository, _known(number))
            else:
                self.move(repository, _known(number), what.action, reason="tolerable_risk", comment="Seen at GitHub.")
            happened.append({"action": what.action, "number": number})
        self.save()
        return happened

    def scan(self, repository: dict[str, Any]) -> list[dict[str, Any]]:
        """Reads the default branch's lock file like GitHub after a push: opens, fixes and reintroduces alerts; what it did.

        A dismissed alert stays dismissed. ValueError for a lock file that isn't JSON.
        """
        tip = self.twin.resolve(repository["full_name"], repository["default_branch"])
        if tip is None:
            return []
        path = self.twin.path(repository["full_name"])
        if not git(path, "ls-tree", tip, "--", LOCK_FILE):
            return []
        locked = npm.locked_versions(json.loads(git(path, "cat-file", "blob", f"{tip}:{LOCK_FILE}")))
        done = []
        for advisory in list(self._data["advisories"].values()):
            package = advisory["vulnerabilities"][0]
            if package["ecosystem"] != "npm" or package["name"] not in npm.PACKAGES:
                continue
            present = any(npm.in_range(version, package["range"]) for version in locked.get(package["name"], []))
            known = [
                one
                for one in self.alerts(repository).values()
                if one["ghsa_id"] == advisory["ghsa_id"] and one["manifest_path"] == LOCK_FILE
            ]
            if present and not known:
                done.append({"action": "created", "number": self.create(repository, advisory, LOCK_FILE)["number"]})
            action = "reintroduced" if present else "fixed"
            for alert in known:
                if alert["state"] in world_alerts.MOVES[action][0]:
                    self.move(repository, alert["number"], action)
                    done.append({"action": action, "number": alert["number"]})
        self.save()
        return done

    def _send(self, repository: dict[str, Any], alert: dict[str, Any], action: str, by: str) -> None:
        if not repository["installed"]:
            return
        payload = self.webhooks.in_repository(repository, person(by), action=action, alert=self.shape(repository, alert))
        self.webhooks.later("dependabot_alert", action, payload, repository["id"])


def _known(number: int | None) -> int:
    assert number is not None  # noqa: S101  # every change but a new alert names one
    return number


def _checked(query: Mapping[str, str]) -> dict[str, str]:
    """The parameters, or what GitHub answers to a wrong one."""
    if "page" in query:
        raise AlertError(400, "Pagination using the `page` parameter is not supported.")
    if "after" in query and "before" in query:
        raise AlertError(422, "Invalid request. after and before exclude each other.")
    for name, value in query.items():
        if name not in _ALLOWED:
            raise AlertError(422, f"The twin doesn't filter by {name}.")
        for one in value.split(",") if name in _LISTS else [value]:
            if _ALLOWED[name] and one not in _ALLOWED[name]:
                raise AlertError(422, f"Invalid request. {name} must be one of {', '.join(_ALLOWED[name])}.")
    if not query.get("per_page", "30").isdecimal() or int(query.get("per_page", "30")) < 1:
        raise AlertError(422, "Invalid request. per_page must be a number from 1.")
    return dict(query)


def _cursor_text(place: tuple[str, int]) -> str:
    return base64.urlsafe_b64encode(b"cursor:v2:" + json.dumps(place).encode()).decode().rstrip("=")


def _cursor(text: str) -> tuple[str, int]:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).removeprefix(b"cursor:v2:")
        at, number = json.loads(raw)
    except (ValueError, TypeError):
        raise AlertError(422, "Invalid request. The cursor is not one of ours.") from None
    if not isinstance(at, str) or not isinstance(number, int):
        raise AlertError(422, "Invalid request. The cursor is not one of ours.")
    return at, number
