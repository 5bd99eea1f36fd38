"""Two machines in network namespaces with a router between them, and the platform's processes spread over both.

Each process has a home of its own with the secrets that `kilo-pipelines bundle` gave it, as in containers; those of one machine share
its directory of sockets. PostgreSQL and the broker listen on TCP with passwords (the embedded build knows no TLS). GitHub and the model, which are
the twin's, reach both machines past the router.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import psutil
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError

from kilo_pipelines.cli import setup, supervisor
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.settings import Settings, write_secret
from kilo_pipelines.store import Cipher, Store
from kilo_pipelines.store.embedded import EmbeddedPostgres
from kilo_pipelines.store.rows import ReviewRow
from tests.support.http import HTTP

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
ROOT = Path(__file__).parents[2]
KILO = [sys.executable, "-m", "kilo_pipelines.cli.main"]
ADDRESS = {"a": "10.213.1.2", "b": "10.213.2.2"}
ROUTER = {"a": "10.213.1.1", "b": "10.213.2.1"}


def missing() -> str | None:
    """Why this machine can't have two machines in it, None when it can."""
    if os.getuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program ip (package iproute2) is not installed"
    probe = subprocess.run(["ip", "netns", "add", f"kilo-{os.getpid()}-p"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"network namespaces can't be made here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", f"kilo-{os.getpid()}-p"], check=True)
    return None


class Machines:
    """The network, what lies on it, and the platform's processes by machine and name."""

    def __init__(self, lease_seconds: float, behaviour: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="kilo-m-"))
        self.home.chmod(0o711)
        self._name = f"kilo-{os.getpid()}"
        self._processes: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        self.secrets = self.home / "bundle"
        self._env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "KILO_HOST": ADDRESS["a"],
            "KILO_CALLBACK_ADDRESS": f"http://{ADDRESS['a']}:8080",
            "KILO_BROKER_ADDRESS": f"redis://{ADDRESS['a']}:6379/0",
            "KILO_GITHUB_API_URL": "http://localhost:8090/api/v3",
            "KILO_MODEL_BASE_URL": "http://localhost:8090/model/v1",
            "KILO_MODEL": "scripted-reviewer",
            "KILO_AGENT": "scripted",
            "KILO_SCRIPTED_BEHAVIOUR": behaviour,
            "KILO_AGENTS_MAX": "1",
            "KILO_LEASE_SECONDS": str(lease_seconds),
            "KILO_SENSOR_SHARDS": "4",
            "KILO_GITHUB_READS_PER_HOUR": "1e6",
            "KILO_GITHUB_WRITES_PER_HOUR": "1e6",
        }
        self.env: dict[str, str]
        self.store: Store

    def build(self) -> None:
        """The network, the twin, database and broker, prepared for the platform's processes."""
        self._make_network()
        self._start_world()
        self._start_database_and_broker()
        self._prepare()

    # -- the network ---------------------------------------------------------------------------------------------------

    def _ip(self, *words: str, inside: str | None = None) -> None:
        argv = ["ip", *(["-n", self._ns(inside)] if inside else []), *words]
        subprocess.run(argv, check=True, capture_output=True)

    def _ns(self, machine: str) -> str:
        return f"{self._name}-{machine}"

    def _make_network(self) -> None:
        for machine in ("a", "b", "r"):
            self._ip("netns", "add", self._ns(machine))
            self._ip("link", "set", "dev", "lo", "up", inside=machine)
        for machine in ("a", "b"):
            self._ip(
                "link", "add", "net", "netns", self._ns(machine), "type", "veth", "peer", "name", machine, "netns", self._ns("r")
            )
            for where, device, address in ((machine, "net", ADDRESS[machine]), ("r", machine, ROUTER[machine])):
                self._ip("address", "add", f"{address}/24", "dev", device, inside=where)
                self._ip("link", "set", "dev", device, "up", inside=where)
            self._ip("route", "add", "default", "via", ROUTER[machine], inside=machine)
        self.link(up=True)

    def link(self, *, up: bool) -> None:
        """Whether the router hands packets on. When not, they vanish without an answer, the worst that a network does."""
        self._run("r", ["sysctl", "-q", "-w", f"net.ipv4.ip_forward={int(up)}"])

    def _run(self, machine: str, argv: list[str], env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self._ns(machine), *argv], env=env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def inside(self, machine: str = "a") -> Iterator[None]:
        """This thread's connections are made from that machine meanwhile."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/proc/thread-self/ns/net").open() as home, Path(f"/run/netns/{self._ns(machine)}").open() as there:
            assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                assert libc.setns(home.fileno(), CLONE_NEWNET) == 0

    # -- processes -----------------------------------------------------------------------------------------------------

    def _spawn(self, machine: str, name: str, argv: list[str], env: dict[str, str] | None = None, cwd: Path = ROOT) -> None:
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self._ns(machine)]
        with (self.home / f"{machine}-{name}.log").open("ab") as log:
            self._processes[machine, name] = subprocess.Popen(
                ["ip", "netns", "exec", self._ns(machine), *named, *argv],
                env=env,
                cwd=cwd,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self, machine: str, *names: str) -> None:
        """Processes of the platform, by the command that units and containers start them with."""
        for name in names:
            env = self.env | {
                "KILO_HOME": str(self.home / machine / name),
                "KILO_RUN_DIR": str(self.home / machine / "s"),
                "KILO_SECRETS_FROM": str(self.secrets / name),
            }
            (self.home / machine).mkdir(exist_ok=True)
            self._spawn(machine, name, [*KILO, "run", name], env)

    def process(self, machine: str, name: str) -> psutil.Process:
        return psutil.Process(self._processes[machine, name].pid)

    def _start_world(self) -> None:
        twin = ["-m", "kilo_twin", "serve", "--home", str(self.home / "twin"), "--port", "8090"]
        self._spawn("a", "twin", [sys.executable, *twin, "--webhook-url", f"http://{ADDRESS['a']}:8080/webhooks/github"])
        way = f"unix:{self.home / 'internet'}"
        self._spawn("a", "internet", [sys.executable, "-m", "tests.support.bridge", way, "tcp:8090"])
        self._spawn("b", "internet", [sys.executable, "-m", "tests.support.bridge", "tcp:8090", way])

    def _start_database_and_broker(self) -> None:
        self._postgres = server = EmbeddedPostgres(self.home / "pg", self.home / "pgs")
        server.prepare()
        with (server.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.213.0.0/16 scram-sha-256\n")
        self._spawn("a", "postgres", [*server.command(), "-c", f"listen_addresses={ADDRESS['a']}"], cwd=Path("/"))
        admin = make_url(server.admin_url)
        self.admin_url = f"postgresql://{admin.username}:{quote(str(admin.password))}@{ADDRESS['a']}:5432/postgres"
        self.wait(lambda: (self.home / "twin" / "credentials.json").exists(), 30)
        self.credentials = json.loads((self.home / "twin" / "credentials.json").read_text())
        self.env = self._env | {"KILO_GITHUB_APP_ID": str(self.credentials["app_id"])}
        bundle = [*KILO, "bundle", str(self.secrets), "--database", self.admin_url]
        self._run("a", bundle, self.env)
        whole = Settings(home=self.secrets)
        setup.adopt_twin(whole, self.credentials)
        # As a person puts them there (docs/deploy.md): each process gets its own part of the App's secrets.
        write_secret(whole.github_private_key_file, self.credentials["private_key_pem"])
        write_secret(whole.webhook_secret_file, self.credentials["webhook_secret"])
        self._run("a", bundle, self.env)
        (self.home / "broker").mkdir()
        settings = f'bind {ADDRESS["a"]}\nport 6379\ndir {self.home / "broker"}\nappendonly yes\nsave ""\n'
        config = self.home / "broker" / "redis.conf"
        config.write_text(settings + (self.secrets / "broker" / "auth.conf").read_text())
        self._spawn("a", "broker", [str(supervisor.redis_server()), str(config)])
        self.wait(lambda: (server.sockets / ".s.PGSQL.5432").exists(), 30)
        server.wait_ready(10)

    def _prepare(self) -> None:
        env = self.env | {"KILO_HOME": str(self.home / "a" / "init"), "KILO_SECRETS_FROM": str(self.secrets / "init")}
        (self.home / "a").mkdir(exist_ok=True)
        self._run("a", [*KILO, "init"], env)
        logins = json.loads((self.secrets / "secrets" / "database.json").read_text())
        # The test looks at the database from outside the network.
        here = {
            name: make_url(url)
            ._replace(host=None, port=None)
            .set(query={"host": str(self._postgres.sockets)})
            .render_as_string(False)
            for name, url in logins.items()
        }
        cipher = Cipher.from_file(self.secrets / "secrets" / "encryption.key")
        self.store = Store(here["app"], here["system"], cipher, SystemClock())
        self.settings = Settings(
            home=self.secrets, github_api_url=self.env["KILO_GITHUB_API_URL"], github_app_id=self.credentials["app_id"]
        )
        with self.inside():
            self.wait(lambda: HTTP.get("http://localhost:8090/health").status_code == 200, 30)
            self.owner = setup.ensure_demo_owner(self.settings, self.store, self.credentials, "critical")

    # -- looking -------------------------------------------------------------------------------------------------------

    def wait(self, look: Callable[[], T | None], seconds: float) -> T:
        """The first thing that `look` finds."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(OperationalError, httpx.TransportError):
                found = look()
                if found:
                    return found
            for name, process in self._processes.items():
                assert process.poll() is None, f"{name} ended\n{self.log(*name)}"
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.logs()}"
            time.sleep(0.1)

    def log(self, machine: str, name: str) -> str:
        return (self.home / f"{machine}-{name}.log").read_text(errors="replace")[-2_000:]

    def logs(self) -> str:
        return "\n".join(f"== {machine} {name}\n{self.log(machine, name)}" for machine, name in self._processes)

    def control(self, call: str, **body: Any) -> dict[str, Any]:
        """What a person does at the twin's GitHub."""
        from kilo_twin.__main__ import control

        with self.inside():
            answer = control("http://localhost:8090", self.credentials, call, body)
        assert "error" not in answer, answer
        return answer

    def read(self, pull: dict[str, Any]) -> dict[str, Any]:
        """What stands on the pull request, over REST."""
        from kilo_twin.__main__ import read_back

        with self.inside():
            return read_back("http://localhost:8090", self.credentials, pull["repository"], pull["number"])

    def review(self, pull: dict[str, Any]) -> ReviewRow | None:
        rows = self.store.reviews.of_owner(self.owner, limit=50)
        return next((one for one in rows if one.head_sha == pull["head_sha"]), None)

    def settled(self, pull: dict[str, Any], seconds: float) -> ReviewRow:
        """The review after its end, with all effects applied."""

        def look() -> ReviewRow | None:
            row = self.review(pull)
            effects = self.store.outbox.of_item(row.item_id) if row else []
            done = row and row.verdict and effects and all(one["state"] not in ("pending", "applying") for one in effects)
            return row if done else None

        return self.wait(look, seconds)

    def close(self) -> None:
        """Ends every process, the foundation last, and takes the network away."""
        if "store" in self.__dict__:
            self.store.database.dispose()
        foundation = [("a", "broker"), ("a", "postgres")]
        for name in sorted(self._processes, key=foundation.__contains__):
            process = self._processes[name]
            process.send_signal(signal.SIGINT if name[1] == "postgres" else signal.SIGTERM)
            if name in foundation:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        for machine in ("a", "b", "r"):
            subprocess.run(["ip", "netns", "del", self._ns(machine)], check=False, capture_output=True)
        shutil.rmtree(self.home, ignore_errors=True)
