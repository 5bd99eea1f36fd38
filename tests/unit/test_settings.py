"""Settings: where a value comes from, and how private files stay private."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kilo_pipelines.cli import setup, world
from kilo_pipelines.settings import SOCKETS_BYTES, Settings, SettingsError, private_dir, write_secret


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("KILO_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))


def test_the_environment_wins_over_the_homes_file_and_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILO_HOME", str(tmp_path))
    (tmp_path / "config.env").write_text("KILO_AGENT=scripted\nKILO_PUBLIC_PORT=1234\n")
    monkeypatch.setenv("KILO_PUBLIC_PORT", "4321")
    found = Settings()
    assert (found.agent, found.public_port, found.admin_port) == ("scripted", 4321, 8081)


def test_a_home_given_by_the_caller_brings_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for home, model in ((mine, "a"), (other, "b")):
        home.mkdir()
        (home / "config.env").write_text(f"KILO_MODEL={model}\n")
    monkeypatch.setenv("KILO_HOME", str(other))
    assert Settings(home=mine).model == "a" and Settings().model == "b"


def test_a_home_is_absolute_because_children_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILO_HOME", "here")
    assert Settings().home == tmp_path / "here"
    monkeypatch.setenv("KILO_HOME", "~/there")
    assert Settings().home == tmp_path / "user" / "there"
    monkeypatch.delenv("KILO_HOME")
    assert Settings().home == tmp_path / "user" / ".kilo-pipelines"


def test_each_home_has_its_own_short_socket_directory_and_a_long_one_is_refused(tmp_path: Path) -> None:
    first, second = Settings(home=tmp_path / ("x" * 200)).sockets, Settings(home=tmp_path).sockets
    assert first != second and len(str(first)) <= SOCKETS_BYTES
    with pytest.raises(SettingsError, match="KILO_RUN_DIR"):
        _ = Settings(home=tmp_path, run_dir=tmp_path / ("x" * SOCKETS_BYTES)).sockets


def test_secrets_are_readable_by_their_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_secret(tmp_path / "secrets" / "key", "one")
        write_secret(tmp_path / "secrets" / "key", "two")
    finally:
        os.umask(before)
    path = tmp_path / "secrets" / "key"
    assert path.read_text() == "two" and path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700 and [one.name for one in path.parent.iterdir()] == ["key"]


def test_a_private_directory_is_never_reached_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(SettingsError, match="must be a directory"):
        private_dir(tmp_path / "link")


def test_what_up_decides_is_kept_beside_a_persons_own_lines_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILO_HOME", str(tmp_path))
    monkeypatch.setenv("KILO_DATABASE_URL", "postgresql://admin:canary@db/postgres")
    (tmp_path / "config.env").write_text("KILO_SENSOR_SHARDS=2\nKILO_AGENT=kilo\n")
    monkeypatch.setenv("KILO_AGENT", "scripted")
    kept = world.decide(Settings(), 7)
    assert (kept.sensor_shards, kept.agent, kept.github_app_id) == (2, "scripted", 7)
    lines = (tmp_path / "config.env").read_text().splitlines()
    assert "canary" not in "".join(lines) and lines.count("KILO_AGENT=scripted") == 1 and "KILO_AGENT=kilo" not in lines
    assert world.decide(Settings(), 7) == kept, "deciding again changes nothing"


@pytest.mark.parametrize("offline", [True, False])
def test_the_twin_and_a_real_app_never_share_a_home(tmp_path: Path, offline: bool) -> None:
    settings = Settings(home=tmp_path, offline=offline)
    write_secret(settings.github_private_key_file, "key")
    if not offline:
        write_secret(settings.secrets_dir / "origin", "twin")
    with pytest.raises(ValueError, match="another KILO_HOME"):
        setup.refuse_mixed_worlds(settings)


def test_a_demo_takes_nothing_of_a_real_platforms_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("DATABASE_URL", "postgresql://x"), ("OFFLINE", "false"), ("GITHUB_APP_ID", "1"), ("HOST", "0.0.0.0")):
        monkeypatch.setenv(f"KILO_{name}", value)
    for name in ("HOME", "PUBLIC_PORT", "ADMIN_PORT", "TWIN_PORT"):
        monkeypatch.setenv(f"KILO_{name}", "1")  # so that it is put back afterwards
    world.scratch_environment(tmp_path)
    found = Settings()
    assert (found.database_url, found.offline, found.github_app_id, found.host) == (None, True, None, "127.0.0.1")
    ports = {found.public_port, found.admin_port, found.twin_port}
    assert len(ports) == 3 and found.home == tmp_path


def test_importing_the_command_line_reads_no_settings_and_makes_no_home(tmp_path: Path) -> None:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KILO_PUBLIC_PORT": "not a number"}
    code = "import kilo_pipelines.cli.main, kilo_pipelines.settings"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
