"""Every command of the command line (threats, rule 18): the operator's, of this home, and useless without the home's secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import click
import pytest
from click.testing import Result

from kilo_pipelines.cli.main import main
from kilo_pipelines.cli.roles import ROLES, adopt_secrets
from kilo_pipelines.core.limits import Usage
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import Cipher
from tests.conftest import Database
from tests.support.figures import Figures
from tests.support.keys import api_key
from tests.support.served import alone, invoked, served
from tests.support.two import Corner

# api: asks the control API with a key, and is what that key is; operator: opens the store of this home, over all owners; host: this
# machine's processes and files, and no owner's rows.
# With the arguments that make click call it.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "up": ("host", []),
    "down": ("host", []),
    "status": ("host", []),
    "doctor": ("host", []),
    "demo": ("host", []),
    "run": ("host", ["model-proxy"]),
    "probe": ("host", []),
    "init": ("host", []),
    "bundle": ("host", ["there", "--database", "postgresql://x@y/z"]),
    "backup": ("host", ["file", "--passphrase-file", "-"]),
    "restore": ("host", ["file", "--passphrase-file", "-"]),
    "drain": ("operator", ["--seconds", "0"]),
    "owners list": ("api", []),
    "owners create": ("api", ["new", "--kind", "user", "--login", "new"]),
    "integrations list": ("api", []),
    "integrations connect": ("operator", ["--owner", str(uuid4()), "--installation", "1", "--account", "x"]),
    "reviews list": ("api", []),
    "reviews show": ("api", [str(uuid4())]),
    "reviews dispatch": ("operator", ["--owner", str(uuid4()), "--repository", "o/r", "--pull", "1"]),
    "reviews cancel": ("api", [str(uuid4())]),
    "reviews approve": ("api", [str(uuid4()), "--head", "0123456"]),
    "password reset": ("host", []),
    "audit list": ("api", []),
    "audit seal": ("operator", []),
    "audit verify": ("operator", []),
    "setup github rotate-webhook-secret": ("host", []),
    "setup github webhook": ("host", []),
    "setup github key": ("host", ["-"]),
    "setup model": ("host", []),
    "encryption-keys list": ("operator", []),
    "encryption-keys rotate": ("operator", []),
    "encryption-keys prune": ("operator", []),
    "pause": ("api", []),
    "kill": ("api", []),
    "resume": ("api", []),
    "items list": ("api", []),
    "items show": ("api", [str(uuid4())]),
    "items cancel": ("api", [str(uuid4())]),
    "items retry": ("api", [str(uuid4())]),
    "effects list": ("api", []),
    "effects retry": ("api", [str(uuid4())]),
    "effects drop": ("api", [str(uuid4())]),
    "effects show": ("api", [str(uuid4())]),
    "effects approve": ("api", [str(uuid4()), "--sha256", "0" * 64]),
    "spend": ("api", []),
    "budgets show": ("api", ["--owner", str(uuid4())]),
    "budgets cap": ("api", ["--owner", str(uuid4()), "--revision", "7", "{}"]),
    "budgets set": ("api", ["--owner", str(uuid4()), "--revision", "7", "{}"]),
    "suggest-only on": ("api", ["--owner", str(uuid4())]),
    "suggest-only off": ("api", ["--owner", str(uuid4())]),
    "security findings": ("api", ["--owner", str(uuid4())]),
    "security show": ("api", [str(uuid4())]),
    "security notices list": ("api", ["--owner", str(uuid4())]),
    "security notices webhook-secret": ("api", ["--owner", str(uuid4())]),
    "security dismiss": ("api", [str(uuid4()), "--reason", "not_used"]),
    "security analyze": ("api", [str(uuid4())]),
    "security summary": ("api", ["--owner", str(uuid4())]),
    "security report": ("api", ["--owner", str(uuid4())]),
    "security sync": ("api", ["--owner", str(uuid4())]),
    "security settings": ("api", ["--owner", str(uuid4())]),
    "security remediate": ("api", [str(uuid4())]),
    "security remediations": ("api", ["--owner", str(uuid4())]),
    "security quarantine": ("api", ["--owner", str(uuid4())]),
    "security sla explain": ("api", [str(uuid4())]),
    "services list": ("api", []),
    "services enable": ("api", ["code_review", "--owner", str(uuid4())]),
    "services disable": ("api", ["code_review", "--owner", str(uuid4())]),
    "deliveries list": ("api", ["--owner", str(uuid4())]),
    "deliveries repair": ("operator", []),
    "people list": ("api", []),
    "members list": ("api", ["--owner", str(uuid4())]),
    "members add": ("api", ["grace", "--role", "viewer", "--owner", str(uuid4())]),
    "members change": ("api", ["grace", "--role", "viewer", "--owner", str(uuid4())]),
    "members remove": ("api", ["grace", "--owner", str(uuid4())]),
    "keys list": ("api", ["--owner", str(uuid4())]),
    "keys create": ("api", ["ci", "--role", "viewer", "--owner", str(uuid4())]),
    "keys rotate": ("api", [str(uuid4())]),
    "keys revoke": ("api", [str(uuid4())]),
    "operator-key rotate": ("operator", []),
    "services settings": ("api", ["code_review", "--owner", str(uuid4())]),
}
OPERATORS = sorted(name for name, (scope, _) in COMMANDS.items() if scope == "operator")
OVER_THE_API = sorted(name for name, (scope, _) in COMMANDS.items() if scope == "api")


def commands(group: click.Group, prefix: str = "") -> Iterator[str]:
    """Every command of the tree by its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_every_command_is_in_the_table() -> None:
    assert set(commands(main)) == set(COMMANDS)


def test_no_command_that_opens_the_store_acts_as_an_owner() -> None:
    """Whoever reaches the home's secrets is the operator; a command that pretended to a smaller scope would promise what it can't keep."""
    assert {scope for scope, _ in COMMANDS.values()} == {"api", "operator", "host"}


def test_a_command_without_an_entry_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's own proof."""
    monkeypatch.setitem(main.commands, "tenants", click.Group("tenants", commands={"list": click.Command("list")}))
    assert set(commands(main)) != set(COMMANDS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database) -> Path:
    """A home with everything that the commands need; the database is the module's."""
    alone(monkeypatch, tmp_path, database_url="postgresql://given/elsewhere")
    write_secret(tmp_path / "secrets" / "database.json", json.dumps(database.logins))
    write_secret(tmp_path / "secrets" / "encryption.key", Cipher.new_key_file())
    return tmp_path


@pytest.fixture(scope="module")
def address(database: Database) -> Iterator[str]:
    """A running control API."""
    with served(database) as found:
        yield found


def run(name: str) -> Result:
    """The command with arguments that make it ask."""
    return invoked(*name.split(), *COMMANDS[name][1], "--json")


@pytest.mark.parametrize("name", OVER_THE_API)
def test_a_command_without_a_live_key_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database, address: str, name: str, figures: Figures
) -> None:
    """From another machine: no key, a wrong one, one in a file that others read, one that would go over the wire in the clear."""
    file = tmp_path / "key"
    file.write_text(api_key(database.store, "operator"))
    file.chmod(0o644)
    wrong = {
        "api_key_missing": ({}, {"api_key": " "}, {"api_key_file": str(file)}, {"api_key_file": str(tmp_path / "none")}),
        "key_refused": ({"api_key": "kilo_wrong"},),
        "api_unreachable": ({"api_key": "kilo_wrong", "api_url": "http://127.0.0.1:1"},),
        "api_address_refused": (
            {"api_key": "kilo_wrong", "api_url": "http://kilo.example"},
            {"api_key": "kilo_wrong", "api_url": "https://user@kilo.example"},
            {"api_key": "kilo_wrong", "api_url": "file:///etc"},
        ),
    }
    # Every kind of refusal is met before anything is asked: one command tries them all, the others one of each kind.
    for reason, each in wrong.items():
        for settings in each if name == "owners list" else each[:1]:
            alone(monkeypatch, tmp_path, **{"api_url": address, **settings})
            done = run(name)
            answer = json.loads(done.stdout)
            figures(tried=1, accepted=int(done.exit_code == 0))
            assert (done.exit_code, answer["reason"]) == (1, reason) and "kilo_wrong" not in done.output


@pytest.mark.parametrize("name", OVER_THE_API)
def test_with_the_operators_key_the_same_command_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database, address: str, name: str
) -> None:
    """Else the refusals above prove nothing."""
    alone(monkeypatch, tmp_path, api_url=address, api_key=api_key(database.store, "operator"))
    done = run(name)
    answer = json.loads(done.stdout)
    assert done.exit_code == 0 or set(answer) <= {"error", "reason"}
    assert not {"api_unreachable", "api_answer_unusable", "key_refused"} & {
        answer.get("reason") if isinstance(answer, dict) else None
    }
    if name in ("owners list", "reviews list", "owners create", "people list", "items list", "audit list"):
        assert done.exit_code == 0, answer


def test_the_operators_key_of_this_home_goes_to_no_other_address(
    home: Path, monkeypatch: pytest.MonkeyPatch, database: Database, address: str
) -> None:
    write_secret(home / "secrets" / "operator-api-key", api_key(database.store, "operator"))
    monkeypatch.setenv("KILO_ADMIN_PORT", address.rsplit(":", 1)[1])
    assert run("owners list").exit_code == 0, "this home's own listener"
    monkeypatch.setenv("KILO_API_URL", address)
    done = run("owners list")
    assert (done.exit_code, json.loads(done.stdout)["reason"]) == (1, "api_key_missing")


def test_where_the_admin_listener_runs_by_itself_its_home_makes_the_operators_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database, address: str
) -> None:
    """With no more than that process has: its own two logins and the encryption key, mounted by an orchestrator."""
    mounted, home = tmp_path / "mounted", tmp_path / "home"
    mounted.mkdir()
    (mounted / "database.json").write_text(json.dumps({name: database.logins[name] for name in ROLES["ingress"].logins}))
    (mounted / "encryption.key").write_text(Cipher.new_key_file())
    alone(monkeypatch, home, secrets_from=str(mounted), admin_port=address.rsplit(":", 1)[1])
    adopt_secrets(Settings())  # as `run ingress` does before it becomes that process
    assert json.loads(run("owners list").stdout)["reason"] == "api_key_missing"
    done = run("operator-key rotate")
    file = Path(json.loads(done.stdout)["file"])
    first = file.read_text()
    assert (done.exit_code, file.stat().st_mode & 0o777) == (0, 0o600) and first not in done.output
    assert run("owners list").exit_code == 0
    assert run("operator-key rotate").exit_code == 0 and database.store.api_keys.principal(first) is None
    assert run("owners list").exit_code == 0


def test_a_key_follows_no_redirect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers at the address may not send the key on."""
    asked: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(307)
            self.send_header("Location", "/stolen")
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        alone(monkeypatch, tmp_path, api_url=f"http://127.0.0.1:{server.server_port}", api_key="kilo_secret")
        done = run("owners list")
        server.shutdown()
    assert (done.exit_code, json.loads(done.stdout)["reason"]) == (1, "api_answer_unusable")
    assert asked == ["/api/v1/owners"] and "kilo_secret" not in done.output


def test_an_owners_key_commands_its_own_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database, address: str
) -> None:
    """The whole way of a team: its people, their keys, a demotion, a rotation, a pause."""
    a, b = Corner(database, 4_711, "canary-a"), Corner(database, 4_711, "canary-b")
    b.item(1)
    alone(monkeypatch, tmp_path, api_url=address, api_key=api_key(database.store, "owner", a.owner.id))

    def told(*arguments: str, code: int = 0) -> Any:
        done = invoked(*arguments, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    assert [one["id"] for one in told("owners", "list")] == [str(a.owner.id)]
    assert told("reviews", "list") == [] and told("items", "list") == []
    assert told("people", "list", code=1)["reason"] == "role_not_allowed"
    told("members", "add", "Ada@octo", "--role", "owner")
    told("members", "add", "bob", "--role", "member")
    assert told("members", "remove", "ada@octo", code=1)["reason"] == "last_owner"
    bobs = told("keys", "create", "bob's laptop", "--role", "member", "--member", "bob")
    new = told("keys", "rotate", bobs["id"], "--overlap-hours", "0")
    told("members", "change", "bob", "--role", "viewer")
    rows = {one["id"]: one for one in told("keys", "list")}
    assert (rows[new["id"]]["present_role"], rows[new["id"]]["login"], rows[bobs["id"]]["live"]) == ("viewer", "bob", False)
    assert not {bobs["key"], new["key"]} & set(json.dumps(rows).replace('"', " ").split())
    assert told("pause", "--reason", "a freeze")["scope"] == f"owner:{a.owner.id}"
    assert told("resume")["released"] is True
    assert told("pause", "--owner", str(b.owner.id), code=2)["reason"] == "payload_shape_mismatch"
    database.store.queue.switch(f"owner:{a.owner.id}", "kill", "abuse", actor="operator")
    assert told("resume", code=1)["reason"] == told("pause", code=1)["reason"] == "switch_held"
    changed = told("services", "settings", "code_review", "--set", "max_parts=4")
    assert changed["max_parts"] == 4 and told("services", "settings", "code_review", "--set", "max_parts=99", code=2)
    monkeypatch.setenv("KILO_API_KEY", new["key"])
    assert told("members", "add", "eve", "--role", "viewer", code=1)["reason"] == "role_not_allowed"
    assert {one["id"] for one in told("keys", "list")} == {new["id"], bobs["id"]}, "a person sees the own keys"
    assert {one["action"] for one in database.store.audit.listed(owner_id=a.owner.id, limit=20)} >= {
        "member.add",
        "member.change",
        "key.create",
        "key.rotate",
        "config.put",
    }


def test_an_owners_key_sets_its_own_limits_and_lets_go_what_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database, address: str
) -> None:
    a, b = Corner(database, 4_712, "canary-a"), Corner(database, 4_712, "canary-b")
    mine, theirs = a.item(1), b.item(1)
    alone(monkeypatch, tmp_path, api_url=address, api_key=api_key(database.store, "owner", a.owner.id))

    def told(*arguments: str, code: int = 0) -> Any:
        done = invoked(*arguments, "--json")
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    assert told("budgets", "set", "--revision", "0", '{"daily": {"tokens": 10}}') == {"revision": 1}
    assert told("budgets", "set", "--revision", "0", "{}", code=1)["reason"] == "settings_stale"
    shown = told("budgets", "show")
    assert (shown["revision"], shown["limits"]["daily"]["tokens"], shown["today"][0]["tokens"]) == (1, 10, 10)
    (budget,) = told("spend")["budgets"]
    assert (budget["owner"], budget["scope"]) == (a.owner.name, "all")
    usage = {"session_id": None, "service": "code_review", "model": "m", "usage": Usage(11, 0), "price": None}
    database.store.spend.record(a.owner.id, "meter", item_id=mine, **usage)
    assert told("spend", code=1)["days"][0]["tokens_in"] == 11, "over the budget"
    assert told("budgets", "set", "--revision", "1", '{"daily": {}}') == {"revision": 2}
    assert told("spend")["budgets"] == []
    assert told("suggest-only", "on")["scope"] == f"owner:{a.owner.id}"
    assert told("suggest-only", "on", "--service", "code_review", code=2)["reason"] == "payload_shape_mismatch"
    assert told("suggest-only", "off")["on"] is False
    head = a.details(1)["head_sha"]
    assert "another owner's" in told("reviews", "approve", str(theirs), "--head", head, code=1)["error"]
    assert told("reviews", "approve", str(mine), "--head", "0" * 40, code=1)["reason"] == "approval_stale"
    assert told("reviews", "approve", str(mine), "--head", head)["approval"]
    assert [len(database.store.approvals.of_pull(one.owner.id, 4_712, 1)) for one in (a, b)] == [1, 0]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("lacking", ["database.json", "encryption.key", "both", "key that others read", "key that is none"])
def test_a_command_refuses_without_the_homes_secrets(home: Path, name: str, lacking: str, figures: Figures) -> None:
    secrets = home / "secrets"
    for file in secrets.iterdir():
        if lacking in (file.name, "both"):
            file.unlink()
    if lacking == "key that others read":
        (secrets / "encryption.key").chmod(0o644)
    if lacking == "key that is none":
        (secrets / "encryption.key").write_text("{}")
    done = run(name)
    figures(tried=1, accepted=int(done.exit_code == 0))
    assert done.exit_code == 1
    assert set(json.loads(done.stdout)) == {"error"}, "one line that says what to do, and no traceback"


@pytest.mark.parametrize("name", OPERATORS)
def test_with_the_secrets_the_same_command_reaches_the_store(home: Path, name: str) -> None:
    """Else the refusals above prove nothing."""
    done = run(name)
    answer = json.loads(done.stdout)
    assert done.exit_code == 0 or set(answer) == {"error"}
    assert not {"database.json", "encryption.key"} & set(str(answer).replace("/", " ").split())


@pytest.mark.parametrize("name", OPERATORS)
def test_a_command_needs_a_running_platform_of_this_home(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KILO_DATABASE_URL")
    done = run(name)
    assert done.exit_code == 1 and "isn't running" in json.loads(done.stdout)["error"]


def test_the_commands_that_need_no_store_touch_none(home: Path, database: Database) -> None:
    """`down` and `status` of a home where nothing runs: they say so, whatever secrets lie there."""
    Corner(database, 1, "canary-a")
    for name in ("down", "status"):
        done = run(name)
        assert done.exit_code == 1 and "canary-a" not in done.output


def test_another_user_of_the_machine_can_not_read_the_homes_secrets(home: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    for parent in [home, *home.parents]:
        if str(parent).startswith("/tmp/") and parent != Path("/tmp"):
            parent.chmod(0o755)
    read = f"import os; os.setuid(65534); print(open({str(home / 'secrets' / 'database.json')!r}).read())"
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Permission denied" in done.stderr and not done.stdout
