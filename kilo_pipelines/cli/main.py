"""`kilo-pipelines`: up, down, status, doctor, demo, owners, integrations, reviews; and the operator's hands (cli/work.py). `--json` everywhere, honest exit codes.

0: done, or everything is well; 1: it could not be done, or something is missing; 2: the command was misused (click's own).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psutil

from kilo_pipelines import __version__
from kilo_pipelines.cli import (
    backup,
    deliveries,
    handover,
    limits,
    people,
    roles,
    security,
    security_analysis,  # noqa: F401  # registers on the group `security`, as the next ones do
    security_dismissal,  # noqa: F401
    security_notices,  # noqa: F401
    security_remediation,  # noqa: F401
    security_report,  # noqa: F401
    setup,
    setup_commands,
    supervisor,
    upkeep,
    work,
    world,
)
from kilo_pipelines.cli import doctor as doctor_checks
from kilo_pipelines.cli.client import api
from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.ingress.operators import new_password
from kilo_pipelines.services.code_review import admission, launch
from kilo_pipelines.settings import Settings, SettingsError
from kilo_pipelines.store import NewItem
from kilo_pipelines.store.crypto import CipherError
from kilo_pipelines.store.embedded import EmbeddedPostgresError
from kilo_pipelines.store.migrate import SchemaError

# What ends a start with one line instead of a traceback.
FAULTS = (supervisor.SupervisorError, EmbeddedPostgresError, SettingsError, SchemaError, CipherError, ValueError, OSError)


@click.group()
@click.version_option(__version__)
def main() -> None:
    """A self-hosted automation platform for coding agents."""


@main.command()
@click.option("--agent", type=click.Choice(["kilo", "scripted", "hosted"]), help="Agent; kept for this home.")
@click.option("--once", is_flag=True, help="Stops after the first review instead of at Ctrl-C.")
@as_json
def up(agent: str | None, once: bool, plain: bool) -> None:
    """Starts the whole platform and shows a pull request being reviewed; Ctrl-C stops it.

    With --json: one document on stdout when everything answers, the rest on stderr.
    """
    if agent:
        os.environ["KILO_AGENT"] = agent
    say = world.say_aside if plain else world.say
    platform = supervisor.Platform(Settings(), say)
    stop = _stop_on_signals(platform)
    started = time.monotonic()
    code = 0
    try:
        platform.lock()
        settings = world.start_platform(platform)
        world.table(platform, say)
        if plain:
            click.echo(json.dumps(world.report(platform)))
        say(f"everything answers after {time.monotonic() - started:.1f} s")
        reviewed = not settings.offline or _live_review(platform, say)
        if once:
            code = 0 if reviewed else world.fail("the review didn't end")
        else:
            say("Ctrl-C stops everything.")
            platform.watch(stop)
    except FAULTS as failure:
        code = world.fail(str(failure))
    except KeyboardInterrupt:
        say("stopping")
    finally:
        stopping = time.monotonic()
        if platform.stop():
            say(f"stopped in {time.monotonic() - stopping:.1f} s")
    sys.exit(code)


def _live_review(platform: supervisor.Platform, say: Callable[[str], None]) -> bool:
    """Something to see: the first time a pull request, afterwards a new commit on it. Whether its review ended."""
    settings = platform.settings
    store = setup.open_store(settings)
    owner_id = setup.ensure_demo_owner(settings, store, setup.twin_credentials(settings), "critical")
    setup.ensure_demo_security(settings, store, owner_id, world.DEMO_ALERTS)
    say("a pull request is on its way:")
    return world.follow(platform, store, owner_id, world.next_pull(settings, store, owner_id), say).reviewed is not None


def _stop_on_signals(platform: supervisor.Platform) -> threading.Event:
    """A first Ctrl-C (SIGINT, SIGTERM, or the terminal's end) interrupts what the main thread does; once a stop has begun, the next kills."""
    stop = threading.Event()

    def handler(_number: int, _frame: Any) -> None:
        if stop.is_set() or platform.stopping:
            platform.kill()
            os._exit(130)
        stop.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, handler)
    return stop


@main.command()
@as_json
def down(plain: bool) -> None:
    """Stops the platform that `up` started, from another terminal."""
    settings = Settings()
    state = supervisor.read_state(settings)
    if not supervisor.is_running(settings) or "pid" not in state:
        end(plain, f"no platform runs in {settings.home}")
    process = psutil.Process(int(str(state["pid"])))
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(supervisor.STOP_SECONDS + 5)
    except psutil.TimeoutExpired:
        end(plain, f"process {process.pid} doesn't end; its children are {[one.pid for one in process.children()]}")
    show(plain, {"stopped": True}, lambda: "stopped")


@main.command()
@as_json
def status(plain: bool) -> None:
    """Shows what runs; exit status 1 when nothing does."""
    settings = Settings()
    running = supervisor.is_running(settings)
    children: list[dict[str, Any]] = list(supervisor.read_state(settings).get("children", [])) if running else []
    for child in children:
        child["alive"] = psutil.pid_exists(int(child["pid"]))
    queue = setup.open_store(settings).queue if running else None
    work = {f"{what}.{state}": count for (what, state), count in queue.gauges().items()} if queue else {}
    switches = queue.switches() if queue else []
    report = {"home": str(settings.home), "running": running, "processes": children, "work": work, "switches": switches}

    def text() -> str:
        if not running:
            return f"no platform runs in {settings.home}"
        lines = [
            f"{child['name']:<16} {'runs' if child['alive'] else 'DEAD'}  pid {child['pid']:<8} restarts {child['restarts']}  {child['address']}"
            for child in children
        ]
        lines += [
            f"{one['kind']} of {one['scope'].removeprefix('suggest:')} since {one['set_at']:%Y-%m-%d %H:%M}: {one['reason']}"
            for one in switches
        ]
        return "\n".join([*lines, "work: " + (", ".join(f"{count} {name}" for name, count in work.items()) or "nothing waits")])

    show(plain, report, text)
    sys.exit(0 if running and all(child["alive"] for child in children) else 1)


@main.command()
@as_json
def doctor(plain: bool) -> None:
    """Checks everything that the platform needs; each missing thing comes with its remedy."""
    checks = doctor_checks.run(Settings())
    bad = [check for check in checks if not check.ok and check.required]

    def text() -> str:
        return "\n".join(
            f"{'ok     ' if check.ok else 'MISSING' if check.required else 'note   '} {check.name}: {check.found}"
            + (f"\n        {check.code}: {check.remedy}" if not check.ok else "")
            for check in checks
        )

    show(plain, {"ok": not bad, "checks": [asdict(check) for check in checks]}, text)
    sys.exit(1 if bad else 0)


@main.command()
@click.option("--agent", type=click.Choice(["kilo", "scripted"]), default="kilo", show_default=True)
@click.option("--scenario", type=click.Choice(["review", "security", "hosted"]), default="review", show_default=True)
@click.option("--repo", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A local git repository.")
@click.option("--base", default="HEAD~1", show_default=True, help="Base revision of --repo.")
@click.option("--head", default="HEAD", show_default=True, help="Head revision of --repo.")
@click.option("--keep", is_flag=True, help="Keeps the scratch home.")
@as_json
def demo(agent: str, scenario: str, repo: Path | None, base: str, head: str, keep: bool, plain: bool) -> None:
    """Runs a scenario on free ports in a scratch home and ends; the last line of stdout is one JSON object, with --json the only one."""
    home = Path(tempfile.mkdtemp(prefix="kilo-demo-"))
    world.scratch_environment(home)
    os.environ["KILO_AGENT"] = agent = "hosted" if scenario == "hosted" else agent
    say = world.say_aside if plain else world.say
    platform = supervisor.Platform(Settings(), say)
    _stop_on_signals(platform)
    answer: dict[str, Any] = {}
    try:
        platform.lock()
        world.start_platform(platform)
        say(f"everything answers; agent: {agent}")
        if scenario == "security":
            # The orchestrator's library takes seconds to load, and no other scenario needs it.
            from kilo_pipelines.cli import world_security

            answer = world_security.demo(platform, say)
        elif scenario == "hosted":
            answer = world.demo_hosted(platform, say)
        else:
            answer = world.demo(platform, repo, base, head, say)
    except FAULTS as failure:
        world.fail(str(failure))
    except KeyboardInterrupt:
        world.fail("interrupted")
    finally:
        platform.stop()
        if keep or not answer.get("ok"):
            say(f"the home is kept: {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(platform.settings.sockets, ignore_errors=True)
    ok = bool(answer.pop("ok", False))
    if answer:
        click.echo(json.dumps(answer))
    sys.exit(0 if ok else 1)


@main.group()
def password() -> None:
    """The operator's password of the Dagster UI."""


@password.command("reset")
@as_json
def password_reset(plain: bool) -> None:
    """Makes a new password, prints it once and ends every session."""
    settings = Settings()
    if not settings.secrets_dir.is_dir():
        end(plain, f"{settings.home} has never been started: `kilo-pipelines up` makes the first password")
    made = new_password(settings.operator_password_file, settings.operator_sessions_file)
    show(plain, {"password": made}, lambda: made)


@main.group()
def owners() -> None:
    """Owners: persons and organizations that work is done for."""


@owners.command("list")
@as_json
def owners_list(plain: bool) -> None:
    """Lists owners."""
    found = api(plain).get("/owners")["owners"]
    show(
        plain,
        found,
        lambda: "\n".join(f"{one['id']}  {one['kind']:<12} {one['plan']:<8} {one['name']}" for one in found) or "no owners",
    )


@owners.command("create")
@click.argument("name")
@click.option("--kind", type=click.Choice(["user", "organization"]), required=True)
@click.option("--plan", type=click.Choice(["default", "funded"]), default="default", show_default=True)
@click.option("--login", help="Its first person, who becomes its owner; needed for --kind user.")
@as_json
def owners_create(name: str, kind: str, plan: str, login: str | None, plain: bool) -> None:
    """Creates an owner and enables Code Review with its defaults."""
    made = api(plain).post("/owners", {"name": name, "kind": kind, "plan": plan, **({"login": login} if login else {})})
    show(plain, made, lambda: str(made["id"]))


@main.group()
def integrations() -> None:
    """Connections of owners to GitHub."""


@integrations.command("list")
@click.option("--owner", type=click.UUID)
@as_json
def integrations_list(owner: UUID | None, plain: bool) -> None:
    """Lists integrations with their repositories."""
    found = [{"owner": one["owner_id"], **one} for one in api(plain).get("/integrations", owner=owner)["integrations"]]
    show(
        plain,
        found,
        lambda: (
            "\n".join(
                f"{one['owner']}  {one['provider']} {one['installation_id']}  {one['account']}: {', '.join(one['repositories'])}"
                for one in found
            )
            or "no integrations"
        ),
    )


@integrations.command("connect")
@click.option("--owner", type=click.UUID, required=True)
@click.option("--installation", type=int, required=True, help="GitHub's number of the App's installation.")
@click.option("--account", required=True, help="Login of the account that installed the App.")
@as_json
def integrations_connect(owner: UUID, installation: int, account: str, plain: bool) -> None:
    """Connects an installation of the offline world; a real one is connected by a person who proves to administer it."""
    settings, store = open_store(plain)
    if not settings.offline:
        end(plain, f"run `kilo-pipelines setup github --installation {installation} --owner {owner}` and open its link")
    holder = store.owners.by_installation("github", installation)
    if holder is not None and holder.owner_id != owner:
        end(plain, f"installation {installation} belongs to another owner already")
    try:
        made = setup.connect_installation(settings, store, owner, installation, account)
    except (ValueError, setup.ProviderError) as failure:
        end(plain, str(failure))
    show(plain, {"integration": str(made)}, lambda: str(made))


@main.group()
def reviews() -> None:
    """Code reviews."""


@reviews.command("list")
@click.option("--owner", type=click.UUID)
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 1_000))
@as_json
def reviews_list(owner: UUID | None, limit: int, plain: bool) -> None:
    """Lists reviews, newest first."""
    found = api(plain).get("/reviews", owner=owner, limit=limit)["reviews"]
    show(
        plain,
        found,
        lambda: (
            "\n".join(
                f"{row['item_id']}  {row['state']:<10} {row['reason'] or '':<18} {(row['verdict'] or {}).get('conclusion', ''):<10}"
                f" {row['repository']}#{row['pull_number']} {row['head_sha'][:12]}"
                for row in found
            )
            or "no reviews"
        ),
    )


@reviews.command("show")
@click.argument("review", type=click.UUID)
@as_json
def reviews_show(review: UUID, plain: bool) -> None:
    """Shows a review with its evidence: what was sent to the model, what was not."""
    row = api(plain).get(f"/reviews/{review}")

    def text() -> str:
        lines = [
            f"{row['repository']}#{row['pull_number']} {row['title']}",
            f"{row['url']}",
            f"head {row['head_sha']} into {row['base_ref']}",
            f"state {row['state']}, attempt {row['attempt']}",
            *work.why(row["reason"]),
        ]
        if row["verdict"]:
            lines.append(f"check {row['verdict']['conclusion']}, findings {row['verdict']['counts']}")
        if row["evidence"]:
            evidence = Evidence.model_validate(row["evidence"])
            lines.append(
                f"evidence {evidence.evidence_class}: {evidence.covered} of {evidence.changed_blobs} blobs in {evidence.turns} turns,"
                f" diff {evidence.diff_hash[:16]}, agent {evidence.agent} {evidence.agent_version}, model {evidence.model}"
            )
            for entry in evidence.ledger:
                how = f"turn {entry.sent_turn}" if entry.sent_turn else entry.excluded or "NEVER SENT"
                lines.append(f"  {how:<14} {entry.status:<9} {entry.path}")
        lines += map(work.effect_line, row["effects"])
        lines += [f"event  {one['at'][11:19]} {one['kind']} {one['data']}" for one in row["events"]]
        return "\n".join(lines)

    show(plain, row, text)


@reviews.command("dispatch")
@click.option("--owner", type=click.UUID, required=True)
@click.option("--repository", required=True, help="owner/name")
@click.option("--pull", type=int, required=True)
@as_json
def reviews_dispatch(owner: UUID, repository: str, pull: int, plain: bool) -> None:
    """Asks for a review of any open pull request by hand: on the platform's machine, whose App reads it."""
    settings, store = open_store(plain)
    config = store.owners.config(owner, admission.SERVICE)
    known = {name: one for one in store.owners.integrations(owner) for name in one["repositories"]}
    if config is None or not config.enabled or repository not in known:
        end(plain, f"{repository} isn't connected to this owner, or Code Review is off")
    try:
        installation = known[repository]["installation_id"]
        app = setup.github_app(settings)
        ids = [one.external_id for one in app.installed_repositories(installation) if one.full_name == repository]
        state = app.installation(installation, ids, {"metadata": "read", "pull_requests": "read"}).pull(repository, pull)
    except (ValueError, setup.ProviderError) as failure:
        end(plain, str(failure))
    details, subject = launch.details_of(state, config.config), admission.subject(state.repository_id, pull)
    item = store.queue.open(
        owner,
        NewItem(
            service=admission.SERVICE,
            subject_key=subject,
            repository_id=state.repository_id,
            priority=1,
            details=details,
        ),
        actor=OPERATOR,
    )
    if item is None:
        end(plain, "this pull request has an active review already")
    # Who asks for this head by hand approves it.
    store.approvals.give(owner, details, subject, actor=OPERATOR)
    show(plain, {"review": str(item)}, lambda: str(item))


@reviews.command("cancel")
@click.argument("review", type=click.UUID)
@as_json
def reviews_cancel(review: UUID, plain: bool) -> None:
    """Cancels an active review; its session stops and its slot is free."""
    api(plain).post(f"/reviews/{review}/cancel")
    show(plain, {"cancelled": True}, lambda: "cancelled")


reviews.add_command(limits.reviews_approve)
for command in (
    *setup_commands.COMMANDS,
    *roles.COMMANDS,
    *limits.COMMANDS,
    *backup.COMMANDS,
    *handover.COMMANDS,
    *work.COMMANDS,
    *people.COMMANDS,
    *upkeep.COMMANDS,
    *security.COMMANDS,
    *deliveries.COMMANDS,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
