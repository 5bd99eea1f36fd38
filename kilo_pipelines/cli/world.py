"""Running the whole platform from one command: `up` until Ctrl-C, `demo` to its own end."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy.exc import OperationalError

from kilo_pipelines.cli import setup, supervisor
from kilo_pipelines.cli.supervisor import Platform
from kilo_pipelines.ingress.keys import ensure_operator_key
from kilo_pipelines.services.code_review.admission import SERVICE
from kilo_pipelines.settings import Settings
from kilo_pipelines.store import Store, app_secrets
from kilo_pipelines.store.rows import ReviewRow

# A session's own cap is longer; a demonstration that takes ten minutes has failed.
REVIEW_SECONDS = 600.0
# A few thousand: what a company of some dozen repositories has.
DEMO_ALERTS = 3_000


def say(line: str) -> None:
    """One line for people, at once."""
    print(line, flush=True)


def say_aside(line: str) -> None:
    """The same on stderr, where stdout is for one JSON document."""
    print(line, file=sys.stderr, flush=True)


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody uses at the moment."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(probe.getsockname()[1]) for probe in probes]


def start_platform(platform: Platform) -> Settings:
    """Everything in its order, as much at once as possible; the settings as decided.

    ValueError when the twin would meet credentials of a real App, or real addresses the twin's.
    """
    settings = platform.settings
    setup.refuse_mixed_worlds(settings)
    platform.new_password = setup.prepare_secrets(settings)
    app_secrets.adopt(settings)
    first = [] if settings.broker_address is not None else [supervisor.redis(settings)]
    if settings.offline:
        first.append(supervisor.twin(settings))
    given = settings.given_database()
    if given is None:
        server, child = supervisor.postgres(settings)
        platform.start([child, *first])
        server.wait_ready(20)
        admin_url = server.admin_url
    else:
        platform.start(first)
        admin_url = given
    setup.prepare_database(settings, admin_url)
    app_id = settings.github_app_id
    if settings.offline:
        credentials = setup.twin_credentials(settings)
        setup.adopt_twin(settings, credentials)
        app_id = credentials["app_id"]
    platform.settings = settings = decide(settings, app_id)
    store = setup.open_store(settings)
    store.database.check_roles()
    ensure_operator_key(store, settings.operator_key_file)
    platform.start([*supervisor.outer_processes(settings), *supervisor.dagster_processes(settings)])
    return settings


def decide(settings: Settings, github_app_id: int | None) -> Settings:
    """Keeps this home's choices in its config.env, for every later process of this home; the twin's addresses when offline."""
    offline = settings.offline
    values: dict[str, Any] = {
        "public_port": settings.public_port,
        "admin_port": settings.admin_port,
        "twin_port": settings.twin_port,
        "agent": settings.agent,
        "offline": offline,
        "github_api_url": f"{settings.twin_url}/api/v3" if offline else settings.github_api_url,
        "github_app_id": github_app_id,
        "model_base_url": f"{settings.twin_url}/model/v1" if offline else settings.model_base_url,
        "model": "scripted-reviewer" if offline else settings.model,
        "cloud_agent_url": f"{settings.twin_url}/cloud-agent" if offline else settings.cloud_agent_url,
        "registries": json.dumps({"npm": f"{settings.twin_url}/npm/"} if offline else settings.registries),
    }
    setup.write_config(settings, values)
    return Settings()


@dataclass
class Followed:
    """A pull request on its way, with the moments that were seen."""

    pull: dict[str, Any]
    sent_at: float
    answered: float
    launched: float | None = None
    reviewed: float | None = None
    row: ReviewRow | None = None


def follow(platform: Platform, store: Store, owner_id: UUID, pull: dict[str, Any], line: Callable[[str], None]) -> Followed:
    """Waits for the review of a pull request's present head and for its effects, telling each step once.

    SupervisorError when the platform under it can't be kept up.
    """
    settings = platform.settings
    done = Followed(pull, time.monotonic(), float(pull["delivery"]["duration"]))
    line(f"  pull request  {pull['url']}")
    line(
        f"  delivery      {pull['delivery']['guid']} answered {pull['delivery']['status_code']} in {done.answered * 1000:.0f} ms"
    )
    told: set[str] = set()

    def tell(key: str, text: str) -> None:
        if key not in told:
            told.add(key)
            line(f"  {text}")

    while time.monotonic() - done.sent_at < REVIEW_SECONDS:
        platform.check()
        # A database that restarts under the eyes of its operator comes back, and the review goes on.
        with suppress(OperationalError):
            if _look(store, settings, owner_id, done, tell):
                return done
        time.sleep(0.1)
    return done


def _look(store: Store, settings: Settings, owner_id: UUID, done: Followed, tell: Callable[[str, str], None]) -> bool:
    """One look at the review; whether it and its effects have ended."""
    pull = done.pull
    row = next(
        (
            one
            for one in store.reviews.of_owner(owner_id, limit=20)
            if one.pull_number == pull["number"] and one.head_sha == pull["head_sha"] and one.repository == pull["repository"]
        ),
        None,
    )
    if row is not None:
        done.row = row
        if row.run_id:
            tell("run", f"run           {settings.dagster_url}/runs/{row.run_id}")
        if row.session_id:
            done.launched = done.launched or time.monotonic() - done.sent_at
            tell("session", f"session       {row.session_id}, launched after {done.launched:.1f} s")
        if row.session_run_id:
            tell("agent", f"agent         {settings.dagster_url}/runs/{row.session_run_id}")
            for event in store.sessions.events(row.session_id) if row.session_id else []:
                tell(
                    f"event:{event['id']}",
                    "              " + event["kind"] + " " + " ".join(f"{key}={value}" for key, value in event["data"].items()),
                )
        if row.ended_at is not None and _effects_ended(store, row):
            done.reviewed = time.monotonic() - done.sent_at
            verdict = row.verdict or {}
            tell("end", f"review        {row.state} ({row.reason}), {verdict.get('counts', {})}")
            tell("check", f"check         {verdict.get('conclusion')} after {done.reviewed:.1f} s")
            return True
    return False


def _effects_ended(store: Store, row: ReviewRow) -> bool:
    effects = store.outbox.of_item(row.item_id)
    return bool(effects) and row.verdict is not None and all(one["state"] not in ("pending", "applying") for one in effects)


def report(platform: Platform) -> dict[str, Any]:
    """What runs where, for programs."""
    settings = platform.settings
    return {
        "home": str(settings.home),
        "agent": settings.agent,
        "processes": [
            {
                "name": child.name,
                "pid": child.popen.pid if child.popen else None,
                "address": child.address,
                "log": str(platform.log_file(child)),
            }
            for child in platform.children
        ],
        "addresses": {
            "webhooks": f"{settings.public_url}/webhooks/github",
            "admin": settings.admin_url,
            "dagster": settings.dagster_url,
            "twin": settings.twin_url if settings.offline else None,
        },
        "log": str(settings.logs_dir / "platform.log"),
    }


def table(platform: Platform, say: Callable[[str], None]) -> None:
    """What runs where, for people."""
    settings = platform.settings
    say(f"kilo-pipelines runs in {settings.home} (agent: {settings.agent}, sessions at once: {supervisor.agents_max(settings)})")
    for child in platform.children:
        pid = child.popen.pid if child.popen else 0
        say(f"  {child.name:<19} pid {pid:<8} {child.address:<24} {platform.log_file(child).name}")
    say(f"  Dagster UI          {settings.dagster_url}/runs")
    if platform.new_password is not None:
        say(f"  operator's password {platform.new_password} (shown this once; `kilo-pipelines password reset` makes a new one)")
    if settings.offline:
        say(f"  offline GitHub      {settings.twin_url}/acme/orders")
    say(f"  operator's API key  {settings.operator_key_file}")
    say(f"  logs                {settings.logs_dir}; merged: platform.log")


def next_pull(settings: Settings, store: Store, owner_id: UUID) -> dict[str, Any]:
    """The first time a pull request, afterwards a new commit on it."""
    for row in store.reviews.of_owner(owner_id, limit=200):
        if row.repository == "acme/orders" and row.pull_number == 1:
            return setup.twin_call(settings, "push", "--pull", "1")
    return setup.twin_call(settings, "open-pull", "--kind", "planted")


def demo(platform: Platform, repository: Path | None, base: str, head: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The scenario `review`: its JSON object, with `ok`."""
    settings = platform.settings
    store = setup.open_store(settings)
    credentials = setup.twin_credentials(settings)
    owner_id = setup.ensure_demo_owner(settings, store, credentials, "critical")
    if repository is not None:
        return _demo_repository(platform, store, owner_id, repository, base, head, say)
    say("a pull request with planted defects:")
    planted = follow(platform, store, owner_id, setup.twin_call(settings, "open-pull", "--kind", "planted"), say)
    say("a clean pull request:")
    clean = follow(platform, store, owner_id, setup.twin_call(settings, "open-pull", "--kind", "clean"), say)
    seen = [_read_back(settings, one) for one in (planted, clean)]
    answer = _answer(settings, store, planted, seen[0])
    answer["clean"] = {"conclusion": seen[1]["conclusion"]}
    answer["ok"] = bool(seen[0]["inline"]) and seen[0]["conclusion"] == "failure" and seen[1]["conclusion"] == "success"
    return answer


def demo_hosted(platform: Platform, say: Callable[[str], None]) -> dict[str, Any]:
    """The scenario `hosted`: a clean pull request by the twin's hosted agent, first as by default, then with its reports accepted."""
    settings = platform.settings
    store = setup.open_store(settings)
    owner_id = setup.ensure_demo_owner(settings, store, setup.twin_credentials(settings), "critical")
    say("a clean pull request, reviewed by the hosted agent:")
    first = follow(platform, store, owner_id, setup.twin_call(settings, "open-pull", "--kind", "clean"), say)
    known = store.owners.config(owner_id, SERVICE)
    assert known is not None  # noqa: S101  # made just before
    config = {**known.config, "accept_reported_evidence": True}
    store.owners.put_config(owner_id, SERVICE, config, enabled=True, expected_revision=known.revision, actor="demo")
    say("another one, with `accept_reported_evidence`:")
    second = follow(platform, store, owner_id, setup.twin_call(settings, "open-pull", "--kind", "clean"), say)
    told = [_hosted_answer(settings, store, one) for one in (first, second)]
    ok = [one["check"] for one in told] == ["failure", "success"] and all(one["evidence_class"] == "reported" for one in told)
    return {"agent": settings.agent, "default": told[0], "accepted": told[1], "ok": ok}


def _hosted_answer(settings: Settings, store: Store, followed: Followed) -> dict[str, Any]:
    row = followed.row
    hosted = store.hosted.get(row.session_id) if row is not None and row.session_id is not None else None
    evidence = (row.evidence or {}) if row is not None else {}
    return {
        "session": str(row.session_id) if row is not None else None,
        "cloud_session": hosted["cloud_session_id"] if hosted else None,
        "turn": hosted["message_id"] if hosted else None,
        "evidence_class": evidence.get("evidence_class"),
        "covered": sum(1 for entry in evidence.get("ledger", []) if entry["sent_turn"] is not None),
        "changed_blobs": len(evidence.get("ledger", [])),
        "reason": row.reason if row is not None else None,
        "check": _read_back(settings, followed)["conclusion"],
        "seconds": round(followed.reviewed, 1) if followed.reviewed else None,
    }


def _demo_repository(
    platform: Platform, store: Store, owner_id: UUID, repository: Path, base: str, head: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """One pull request of a given repository; `ok` when its review concluded with an earned verdict."""
    settings = platform.settings
    say(f"a pull request of {repository.resolve().name}, {base}..{head}:")
    pull = setup.twin_call(settings, "import-repo", "--path", str(repository.resolve()), "--base", base, "--head", head)
    followed = follow(platform, store, owner_id, pull, say)
    seen = _read_back(settings, followed)
    answer = _answer(settings, store, followed, seen)
    answer["clean"] = {"conclusion": None}
    answer["ok"] = bool(followed.row and (followed.row.verdict or {}).get("earned"))
    return answer


def _read_back(settings: Settings, followed: Followed) -> dict[str, Any]:
    """What stands on the pull request, read by another process over REST."""
    read = setup.twin_call(settings, "read", "--pull", str(followed.pull["number"]), "--repo", followed.pull["repository"])
    checks = [one for one in read["check_runs"] if one["name"] == "kilo/code-review"]
    summaries = [one for one in read["comments"] if "kilo-pipelines:summary" in one["body"]]
    return {
        "inline": len(read["review_comments"]),
        "summary_url": summaries[0]["html_url"] if summaries else None,
        "conclusion": checks[0]["conclusion"] if checks else None,
    }


def _answer(settings: Settings, store: Store, followed: Followed, seen: dict[str, Any]) -> dict[str, Any]:
    row = followed.row
    ledger = (row.evidence or {}).get("ledger", []) if row else []
    return {
        "delivery": followed.pull["delivery"]["guid"],
        "runs": [run for run in (row.run_id, row.session_run_id) if run] if row else [],
        "session": str(row.session_id) if row and row.session_id else None,
        "review": {"inline": seen["inline"], "summary_url": seen["summary_url"]},
        "check": {"conclusion": seen["conclusion"]},
        "clean": {"conclusion": None},
        "evidence": {
            "turns": (row.evidence or {}).get("turns", 0) if row else 0,
            "changed_blobs": len(ledger),
            "covered": sum(1 for entry in ledger if entry["sent_turn"] is not None),
        },
        "seconds": {
            "answered": round(followed.answered, 3),
            "launched": round(followed.launched, 2) if followed.launched else None,
            "reviewed": round(followed.reviewed, 2) if followed.reviewed else None,
        },
        "agent": settings.agent,
    }


def scratch_environment(home: Path) -> None:
    """Free ports and a home of its own for this process and its children; nothing of a real platform's environment."""
    for name in Settings.model_fields:
        if name in ("run_dir", "host", "database_url", "offline", "password_login") or name.startswith(
            ("github_", "model", "oidc_", "cloud_agent")
        ):
            os.environ.pop(f"KILO_{name.upper()}", None)
    os.environ["KILO_HOME"] = str(home)
    names = ("PUBLIC", "ADMIN", "TWIN")
    for name, port in zip(names, free_ports(len(names)), strict=True):
        os.environ[f"KILO_{name}_PORT"] = str(port)


def fail(message: str) -> int:
    """One line of what went wrong, on stderr."""
    print(f"kilo-pipelines: {message}", file=sys.stderr)
    return 1
