"""Runs the stock code location on a server of its own and tells how long its rows waited."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg

from benchmarks.homes import Server, cpu_seconds, end, environment, eventually, server
from benchmarks.results import ROOT

# Storage as dagster-postgres documents it; launcher and run coordinator are whatever Dagster takes by itself.
CONFIG = """
storage:
  postgres:
    postgres_url: {env: BENCH_DAGSTER_URL}
telemetry: {enabled: false}
"""
TABLE = "create table bench_rows (id bigint generated always as identity primary key, committed_at timestamptz not null, op_at timestamptz)"


@dataclass(frozen=True)
class Outcome:
    """Waits in seconds of the rows whose op began, how many never began in time, and the whole time until the last one."""

    waits: list[float]
    unfinished: int
    seconds: float
    cpu_s: float

    @property
    def runs_per_minute(self) -> float:
        """Ops begun a minute, from the first row's commit to the last op."""
        return len(self.waits) * 60 / self.seconds

    @property
    def cpu_s_per_run(self) -> float:
        """CPU of daemon, code server, run processes and PostgreSQL for each run."""
        return self.cpu_s / max(1, len(self.waits))


class Stock:
    """A running stock daemon."""

    def __init__(self, database: Server, daemon: subprocess.Popen[bytes]) -> None:
        self._database = database
        self.daemon = psutil.Process(daemon.pid)

    def cpu(self) -> float:
        """CPU of the daemon's tree (its code server and run processes are in it) and of its PostgreSQL."""
        return cpu_seconds([self.daemon, psutil.Process(self._database.pid)])

    def feed(self, count: int, per_second: float, patience: float) -> Outcome:
        """Commits rows at a rate (0: all at once) and waits until each op began, at most `patience` seconds."""
        url = self._database.system_url
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("delete from bench_rows")
            began, cpu = time.time(), self.cpu()
            for number in range(count):
                if per_second:
                    time.sleep(max(0.0, began + number / per_second - time.time()))
                connection.execute("insert into bench_rows (committed_at) values (clock_timestamp())")

            def begun() -> int:
                row = connection.execute("select count(op_at) from bench_rows").fetchone()
                return int(row[0]) if row else 0

            with suppress(TimeoutError):
                eventually(lambda: begun() == count, patience, "stock runs", 0.5)
            spent = self.cpu() - cpu
            found = connection.execute(
                "select extract(epoch from op_at - committed_at), extract(epoch from op_at) from bench_rows where op_at is not null"
            ).fetchall()
        last = max((float(row[1]) for row in found), default=time.time())
        return Outcome([float(row[0]) for row in found], count - len(found), last - began, spent)


@contextmanager
def stock() -> Iterator[Stock]:
    """A stock Dagster over a fresh server for the length of a block; its first run is over when it begins."""
    with server() as database:
        home = database.home / "dagster"
        home.mkdir()
        (home / "dagster.yaml").write_text(CONFIG)
        with psycopg.connect(database.logins["migrator"].replace("+psycopg", ""), autocommit=True) as owner:
            owner.execute(TABLE)
            owner.execute("grant all on bench_rows to kilo_system")
        env = environment(
            DAGSTER_HOME=str(home), BENCH_DATABASE_URL=database.system_url, BENCH_DAGSTER_URL=database.logins["dagster"]
        )
        log = home / "log"
        with log.open("wb") as output:
            argv = [str(Path(sys.executable).parent / "dagster-daemon"), "run", "-m", "benchmarks.stock.definitions"]
            daemon = subprocess.Popen(argv, env=env, stdout=output, stderr=output, start_new_session=True, cwd=ROOT)
        try:
            running = Stock(database, daemon)
            warm = running.feed(1, 0, 90)
            if warm.unfinished:
                raise RuntimeError(f"the stock daemon starts no run:\n{log.read_text()[-3000:]}")
            yield running
        finally:
            tree = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
            end(daemon, signal.SIGINT, 30)
            for left in tree:  # runs that still wait for a core
                with suppress(psutil.NoSuchProcess):
                    left.kill()
