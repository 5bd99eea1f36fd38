"""The supervisor with small children: starts, restarts, stops, one per home, logs. The real ones: tests/flow/test_up.py."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kilo_pipelines.cli import supervisor
from kilo_pipelines.cli.supervisor import Child, Journal, Platform, SupervisorError
from kilo_pipelines.settings import Settings

PATIENT = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]
DEAF = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
]


@pytest.fixture
def settings() -> Iterator[Settings]:
    with tempfile.TemporaryDirectory(prefix="kilo-s-") as home:
        yield Settings(home=Path(home), run_dir=Path(home) / "sockets")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def platform(settings: Settings, said: list[str]) -> Iterator[Platform]:
    found = Platform(settings, said.append)
    found.lock()
    yield found
    found.stop()


def _wait(look: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _pid(child: Child) -> int:
    assert child.popen is not None
    return child.popen.pid


def _up(platform: Platform, child: Child) -> Child:
    child.ready = lambda: "up" in platform.log_file(child).read_text()
    return child


def test_a_start_returns_when_the_probe_says_so_and_records_who_runs(platform: Platform, settings: Settings) -> None:
    child = _up(platform, Child("one", PATIENT, address="nowhere"))
    platform.start([child])
    (record,) = supervisor.read_state(settings)["children"]
    assert (record["name"], record["pid"], record["restarts"], record["address"]) == ("one", _pid(child), 0, "nowhere")
    assert os.getsid(_pid(child)) == _pid(child), "Ctrl-C in the terminal must not reach children"


def test_a_child_that_ends_at_its_start_is_reported_with_the_end_of_its_log(platform: Platform) -> None:
    with pytest.raises(SupervisorError, match=r"one ended at its start:\nno such luck"):
        platform.start([Child("one", [sys.executable, "-c", "import sys; sys.exit('no such luck')"], ready=lambda: False)])


def test_a_child_that_is_never_ready_is_reported(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "READY_SECONDS", 0.3)
    with pytest.raises(SupervisorError, match="one isn't ready"):
        platform.start([Child("one", PATIENT, ready=lambda: False)])


def test_a_dead_child_is_started_again_and_its_group_is_ended_before(
    platform: Platform, settings: Settings, said: list[str]
) -> None:
    parent = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '60']).pid, 'up', flush=True); time.sleep(60)"
    child = _up(platform, Child("one", [sys.executable, "-c", parent]))
    platform.start([child])
    first, grandchild = _pid(child), int(platform.log_file(child).read_text().split()[0])
    os.kill(first, signal.SIGKILL)
    _wait(lambda: _pid(child) != first and child.alive)
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE
    _wait(lambda: [one["restarts"] for one in supervisor.read_state(settings)["children"]] == [1])
    assert any("one died (status -9)" in line for line in said)


def test_a_child_that_dies_again_and_again_ends_the_platform_with_its_log(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(supervisor, "KEEPER_SECONDS", 0.02)
    child = Child("one", [sys.executable, "-c", "import time; time.sleep(0.3); print('the reason')"])
    platform.start([child])
    with pytest.raises(SupervisorError, match=rf"one died {supervisor.MAX_RESTARTS + 1} times:\n(the reason\n)+"):
        platform.watch(threading.Event())
    assert len(child.starts) == supervisor.MAX_RESTARTS + 1


def test_accidents_far_apart_end_nothing(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "RESTART_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(supervisor, "KEEPER_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.1)
    child = Child("one", [sys.executable, "-c", "import time; time.sleep(0.3)"])
    platform.start([child])
    _wait(lambda: len(child.starts) > supervisor.MAX_RESTARTS + 2)
    platform.check()


def test_a_stop_ends_even_what_ignores_its_signal_in_time_and_forgets_the_state(platform: Platform, settings: Settings) -> None:
    deaf = [_up(platform, Child(f"deaf{number}", DEAF, stop_seconds=0.5)) for number in range(3)]
    platform.start(deaf)
    started = time.monotonic()
    assert platform.stop() and time.monotonic() - started < 2, "those that stop together wait together"
    assert not any(child.alive for child in deaf)
    assert supervisor.read_state(settings) == {} and not supervisor.is_running(settings)
    assert not platform.stop(), "a second stop does nothing"


def test_workers_stop_before_the_ingress_and_the_database_last(platform: Platform, settings: Settings) -> None:
    trace = settings.home / "trace"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n    open(sys.argv[2], 'a').write(sys.argv[1] + ' ')\n    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(60)"
    )
    names = ["postgres", "ingress", "worker-agents"]
    platform.start([_up(platform, Child(name, [sys.executable, "-c", code, name, str(trace)])) for name in names])
    platform.stop()
    assert trace.read_text().split() == ["worker-agents", "ingress", "postgres"]


def test_a_second_platform_of_a_home_is_refused_and_harms_nothing(
    platform: Platform, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOCK_SECONDS", 0.1)
    child = _up(platform, Child("one", PATIENT))
    platform.start([child])
    second = Platform(settings, lambda _line: None)
    with pytest.raises(SupervisorError, match="running already"):
        second.lock()
    assert not second.stop()
    assert child.alive and [one["name"] for one in supervisor.read_state(settings)["children"]] == ["one"]


def test_a_look_at_the_lock_refuses_no_start(settings: Settings) -> None:
    """`status` and `doctor` hold the lock for an instant while they look."""
    (settings.home / "run").mkdir()
    looking = os.open(settings.home / "run" / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(looking, fcntl.LOCK_EX)
    done = threading.Timer(supervisor.LOCK_SECONDS / 4, os.close, [looking])
    done.start()
    found = Platform(settings, lambda _line: None)
    found.lock()
    assert supervisor.is_running(settings)
    found.stop()
    done.join()


def test_what_a_killed_supervisor_left_is_ended_and_nobody_else(settings: Settings) -> None:
    env = {**os.environ, "KILO_HOME": str(settings.home)}
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, start_new_session=True) as left:
        assert left.stdout is not None
        pool_child = int(left.stdout.readline())
        with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
            state = settings.home / "run" / "processes.json"
            state.parent.mkdir()
            old = psutil.Process(left.pid).create_time()
            # The stranger's id was recorded once for another process: an id that was given out again.
            children = [{"pid": left.pid, "started": old}, {"pid": stranger.pid, "started": old - 1000}]
            state.write_text(json.dumps({"pid": 1, "children": children}))
            left.kill()  # its pool child outlives it
            left.wait()
            found = Platform(settings, lambda _line: None)
            found.lock()
            found.stop()
            _wait(lambda: not psutil.pid_exists(pool_child) or psutil.Process(pool_child).status() == psutil.STATUS_ZOMBIE)
            assert stranger.poll() is None
            stranger.kill()


def test_a_kill_ends_everything_at_once(platform: Platform) -> None:
    deaf = [_up(platform, Child(f"deaf{number}", DEAF)) for number in range(2)]
    platform.start(deaf)
    platform.kill()
    for child in deaf:
        assert child.popen is not None
        child.popen.wait(2)


def test_no_child_gets_the_administrators_login_and_the_twin_gets_nothing_of_ours(
    platform: Platform, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KILO_DATABASE_URL", "postgresql://admin:canary@db/postgres")
    monkeypatch.setenv("KILO_AGENT", "scripted")
    monkeypatch.setenv("UNRELATED_TOKEN", "canary")
    show = [sys.executable, "-c", "import os, time; print(sorted(os.environ), 'up', flush=True); time.sleep(60)"]
    ours, twin = _up(platform, Child("ours", show)), _up(platform, Child("twin", show, inherits=False))
    platform.start([ours, twin])
    seen = platform.log_file(ours).read_text()
    assert "KILO_AGENT" in seen and "KILO_HOME" in seen
    assert "KILO_DATABASE_URL" not in seen and "UNRELATED_TOKEN" not in seen
    assert "KILO_" not in platform.log_file(twin).read_text()
    assert supervisor.twin(settings).inherits is False


def test_the_merged_log_has_every_whole_line_once_with_its_process(tmp_path: Path) -> None:
    (tmp_path / "old.log").write_text("of an earlier run\n")
    journal = Journal(tmp_path)
    (tmp_path / "a.log").write_text("first\nhal")
    journal.collect()
    journal.collect()
    with (tmp_path / "a.log").open("a") as log:
        log.write("f\n")
    journal.note("supervisor", "b died\nand more")
    journal.collect()
    lines = [line.split(maxsplit=1)[1] for line in (tmp_path / "platform.log").read_text().splitlines()]
    assert [tuple(line.split(maxsplit=1)) for line in lines] == [
        ("a", "first"),
        ("supervisor", "b died"),
        ("supervisor", "and more"),
        ("a", "half"),
    ]


def test_logs_are_bounded_on_disk_while_their_writer_goes_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path, limit=1000)
    with (tmp_path / "a.log").open("ab", buffering=0) as writer:
        for number in range(500):
            writer.write(f"line {number} {'x' * 40}\n".encode())
            journal.collect()
        writer.write(b"y" * 5000)  # a line without an end must not grow for ever
        for _ in range(6):
            journal.collect()
        writer.write(b"the last\n")
        journal.collect()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"a.log", "a.log.1", "platform.log", "platform.log.1"}
    assert all(size <= 7000 for size in sizes.values()), sizes
    assert "the last" in (tmp_path / "platform.log").read_text() + (tmp_path / "platform.log.1").read_text()


def test_a_full_disk_loses_log_lines_and_not_the_platform(tmp_path: Path) -> None:
    (tmp_path / "platform.log").symlink_to("/dev/full")
    journal = Journal(tmp_path)
    (tmp_path / "a.log").write_text("line\n")
    journal.collect()
    journal.note("supervisor", "line")


def test_sessions_at_once_follow_memory_unless_they_are_set(settings: Settings) -> None:
    assert supervisor.agents_max(settings.model_copy(update={"agents_max": 7})) == 7
    assert 1 <= supervisor.agents_max(settings) <= (os.cpu_count() or 1)
