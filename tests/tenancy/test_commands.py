"""Every command of the command line (threats, rule 18): the operator's, of this home, and useless without the home's secrets."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import click
import pytest
from click.testing import CliRunner, Result

from kilo_pipelines.cli.main import main
from kilo_pipelines.settings import write_secret
from kilo_pipelines.store import Cipher
from tests.conftest import Database
from tests.support.figures import Figures
from tests.support.two import Corner

# operator: opens the store of this home, over all owners; host: this machine's processes and files, and no owner's rows.
# With the arguments that make click call it.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "up": ("host", []),
    "down": ("host", []),
    "status": ("host", []),
    "doctor": ("host", []),
    "demo": ("host", []),
    "owners list": ("operator", []),
    "owners create": ("operator", ["new", "--kind", "user"]),
    "integrations list": ("operator", []),
    "integrations connect": ("operator", ["--owner", str(uuid4()), "--installation", "1", "--account", "x"]),
    "reviews list": ("operator", []),
    "reviews show": ("operator", [str(uuid4())]),
    "reviews dispatch": ("operator", ["--owner", str(uuid4()), "--repository", "o/r", "--pull", "1"]),
    "reviews cancel": ("operator", [str(uuid4())]),
    "password reset": ("host", []),
    "audit list": ("operator", []),
    "audit seal": ("operator", []),
    "audit verify": ("operator", []),
    "keys list": ("operator", []),
    "keys rotate": ("operator", []),
    "keys prune": ("operator", []),
    "setup github rotate-webhook-secret": ("host", []),
    "setup github webhook": ("host", []),
    "setup github key": ("host", ["-"]),
    "setup model": ("host", []),
    "pause": ("operator", []),
    "kill": ("operator", []),
    "resume": ("operator", []),
    "items list": ("operator", []),
    "items show": ("operator", [str(uuid4())]),
    "items cancel": ("operator", [str(uuid4())]),
    "items retry": ("operator", [str(uuid4())]),
    "effects list": ("operator", []),
    "effects retry": ("operator", [str(uuid4())]),
    "effects drop": ("operator", [str(uuid4())]),
    "security findings": ("operator", ["--owner", str(uuid4())]),
    "security show": ("operator", [str(uuid4())]),
    "security notices list": ("operator", ["--owner", str(uuid4())]),
    "security notices webhook-secret": ("operator", ["--owner", str(uuid4())]),
    "security dismiss": ("operator", [str(uuid4()), "--reason", "not_used"]),
    "security analyze": ("operator", [str(uuid4())]),
    "security summary": ("operator", ["--owner", str(uuid4())]),
    "security report": ("operator", ["--owner", str(uuid4())]),
    "security sync": ("operator", ["--owner", str(uuid4())]),
    "security settings": ("operator", ["--owner", str(uuid4())]),
    "security remediate": ("operator", [str(uuid4())]),
    "security remediations": ("operator", ["--owner", str(uuid4())]),
    "security quarantine": ("operator", ["--owner", str(uuid4())]),
    "security sla explain": ("operator", [str(uuid4())]),
    "services list": ("operator", []),
    "services enable": ("operator", ["code_review", "--owner", str(uuid4())]),
    "services disable": ("operator", ["code_review", "--owner", str(uuid4())]),
}
OPERATORS = sorted(name for name, (scope, _) in COMMANDS.items() if scope == "operator")


def commands(group: click.Group, prefix: str = "") -> Iterator[str]:
    """Every command of the tree by its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}"


def test_every_command_is_in_the_table() -> None:
    assert set(commands(main)) == set(COMMANDS)


def test_no_command_acts_as_an_owner() -> None:
    """Whoever reaches the home's secrets is the operator; a command that pretended to a smaller scope would promise what it can't keep."""
    assert {scope for scope, _ in COMMANDS.values()} == {"operator", "host"}


def test_a_command_without_an_entry_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's own proof."""
    monkeypatch.setitem(main.commands, "tenants", click.Group("tenants", commands={"list": click.Command("list")}))
    assert set(commands(main)) != set(COMMANDS)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: Database) -> Path:
    """A home with everything that the commands need; the database is the module's."""
    for name in [one for one in os.environ if one.startswith("KILO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KILO_HOME", str(tmp_path))
    monkeypatch.setenv("KILO_DATABASE_URL", "postgresql://given/elsewhere")
    write_secret(tmp_path / "secrets" / "database.json", json.dumps(database.logins))
    write_secret(tmp_path / "secrets" / "encryption.key", Cipher.new_key_file())
    return tmp_path


def run(name: str) -> Result:
    """The command in this process; its connections, which end with a process of its own, are collected here."""
    done = CliRunner().invoke(main, [*name.split(), *COMMANDS[name][1], "--json"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
    return done


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
    assert not {"database.json", "encryption.key"} & set(str(answer).replace("/", " ").split()) and (
        name not in ("owners list", "reviews list", "owners create") or done.exit_code == 0
    )


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
