"""Prometheus metrics: what the ingress counts itself, and the platform's figures out of the database, read at a scrape.

Every name is documented in docs/observability.md; a test holds both lists together. No label names an owner, a repository or a person
(docs/decisions/0034).
"""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import anyio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kilo_pipelines import __version__
from kilo_pipelines.core.limits import MICRO
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import BOUNDS, Ended, Now, SQLAlchemyError, Store

log = logging.getLogger(__name__)

# Several scrapers, or an impatient one, cost the database one look in this time.
FRESH = timedelta(seconds=5)

# What this process counts itself.
registry = CollectorRegistry()
# What the database holds: the same whichever process tells it.
figures = CollectorRegistry()
# Whether it could be asked for them.
look = CollectorRegistry()

deliveries = Counter("kilo_deliveries", "Webhook deliveries by outcome or reason.", ["outcome"], registry=registry)
signatures = Counter(
    "kilo_webhook_signatures", "Webhooks by the secret that signed them: current, previous.", ["secret"], registry=registry
)
callbacks = Counter("kilo_callbacks", "Session callbacks by outcome.", ["outcome"], registry=registry)
logins = Counter("kilo_logins", "Logins of operators by way and outcome or reason.", ["way", "outcome"], registry=registry)
answer_seconds = Histogram(
    "kilo_answer_seconds",
    "Time from the first byte of a webhook to its answer.",
    registry=registry,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
responses = Counter(
    "kilo_http_responses", "Answers of the ingress by listener and status.", ["listener", "status"], registry=registry
)
# Seen at zero before the first of them; see `_Sums`.
for _outcome in ("stored", "duplicate"):
    deliveries.labels(_outcome)
for _listener in ("public", "admin"):
    for _status in ("500", "503"):
        responses.labels(_listener, _status)
live = Gauge("kilo_live", "Live rows by what and state.", ["what", "state"], registry=figures)
spent_tokens = Gauge(
    "kilo_spent_tokens",
    "Tokens of this UTC day by service, model and direction.",
    ["service", "model", "direction"],
    registry=figures,
)
spent_usd = Gauge(
    "kilo_spent_usd",
    "USD of this UTC day by service and model, as far as prices are known.",
    ["service", "model"],
    registry=figures,
)
counted = Gauge("kilo_counted", "Counted oddities, such as late writes that changed nothing.", ["name"], registry=figures)


class Counted:
    """Counts a listener's answers by their status, the unexpected 500 included."""

    def __init__(self, application: ASGIApp, listener: str) -> None:
        self._application, self._listener = application, listener

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        begun = False

        async def counting(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                responses.labels(self._listener, str(message["status"])).inc()
            await send(message)

        try:
            await self._application(scope, receive, counting)
        except Exception:
            if not begun:
                responses.labels(self._listener, "500").inc()
            raise


class _Sums:
    """Counts of what ended, since this process began to look, by the labels of one metric.

    Labels that are new begin at zero and get their count with the next look: what Prometheus never saw at zero counts for nothing in its
    `rate` and `increase`, and the first failures of a kind would raise no alert.
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[str, ...], float] = {}
        self._born: dict[tuple[str, ...], float] = {}

    def grow(self) -> None:
        """A new look begins."""
        self.counts |= self._born
        self._born = {}

    def add(self, rows: Iterable[Mapping[str, Any]], labels: tuple[str, ...], value: str = "n") -> None:
        """Adds rows under their own labels."""
        for row in rows:
            key = tuple(str(row[name]) for name in labels)
            if key in self.counts and key not in self._born:
                self.counts[key] += float(row[value])
            else:
                self.counts[key] = 0.0
                self._born[key] = self._born.get(key, 0.0) + float(row[value])


class _Times:
    """A histogram over `BOUNDS` of what ended; new labels begin at zero, as with `_Sums`."""

    def __init__(self) -> None:
        self.buckets: dict[tuple[str, ...], list[int]] = {}
        self._seconds = _Sums()
        self._born: dict[tuple[str, ...], list[int]] = {}

    def grow(self) -> None:
        """A new look begins."""
        self.buckets |= self._born
        self._born = {}
        self._seconds.grow()

    def add(self, rows: Iterable[Mapping[str, Any]], labels: tuple[str, ...]) -> None:
        """Adds rows that were put into buckets by the database."""
        for row in rows:
            key = tuple(str(row[name]) for name in labels)
            if key not in self.buckets:
                self.buckets[key], self._born[key] = [0] * (len(BOUNDS) + 1), [0] * (len(BOUNDS) + 1)
            counts = self._born.get(key, self.buckets[key])
            counts[int(row["bucket"])] += int(row["n"])
            self._seconds.add([{**row, "seconds": row["seconds"] or 0}], labels, "seconds")

    def fill(self, family: HistogramMetricFamily) -> HistogramMetricFamily:
        """The family with these times; Prometheus's buckets add up."""
        edges = [*(str(bound) for bound in BOUNDS), "+Inf"]
        for key, counts in self.buckets.items():
            family.add_metric(list(key), list(zip(edges, accumulate(counts), strict=True)), self._seconds.counts[key])
        return family


class Platform(Collector):
    """The database's figures as the last look found them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looked_at: datetime | None = None
        self._seen_until: datetime | None = None
        self._now: Now | None = None
        self._sessions, self._tokens, self._turns, self._items, self._effects = (_Sums() for _ in range(5))
        self._session_times, self._launch_times, self._settle_times, self._effect_times = (_Times() for _ in range(4))

    def look(self, store: Store, at: datetime) -> None:
        """Reads the figures, unless somebody just did; the store's exceptions pass through and change nothing."""
        with self._lock:
            if self._looked_at is not None and timedelta(0) <= at - self._looked_at < FRESH:
                return
            present, ended = store.figures.now(), store.figures.ended(self._seen_until)
            gauges, counters, spent = store.queue.gauges(), store.queue.counters(), store.spend.gauges()
            self._now, self._seen_until, self._looked_at = present, ended.until, at
            self._add(ended)
            live.clear()
            for (what, state), number in gauges.items():
                live.labels(what, state).set(number)
            for name, value in counters.items():
                counted.labels(name).set(value)
            spent_tokens.clear()
            spent_usd.clear()
            for row in spent:
                spent_tokens.labels(row["service"], row["model"], "in").set(row["tokens_in"])
                spent_tokens.labels(row["service"], row["model"], "out").set(row["tokens_out"])
                spent_usd.labels(row["service"], row["model"]).set(float(row["micro_usd"]) / MICRO)

    def _add(self, ended: Ended) -> None:
        times = (self._session_times, self._launch_times, self._settle_times, self._effect_times)
        for one in (self._sessions, self._tokens, self._turns, self._items, self._effects, *times):
            one.grow()
        self._sessions.add(ended.sessions, ("service", "state", "reason"))
        for row in ended.sessions:
            self._tokens.add([{**row, "direction": "in"}], ("service", "direction"), "tokens_in")
            self._tokens.add([{**row, "direction": "out"}], ("service", "direction"), "tokens_out")
        self._turns.add(ended.sessions, ("service",), "turns")
        self._session_times.add(ended.sessions, ("service",))
        self._launch_times.add(ended.launches, ("service",))
        self._items.add(ended.items, ("service", "state", "reason"))
        self._settle_times.add(ended.settles, ("service",))
        self._effects.add(ended.effects, ("kind", "state", "reason"))
        self._effect_times.add([row for row in ended.effects if row["state"] == "applied"], ("kind",))

    def collect(self) -> Iterator[Metric]:
        """Every family, in one state; without rows before the first look."""
        with self._lock:
            yield from self._present()
            yield from self._ended()

    def _present(self) -> Iterator[Metric]:
        now = self._now

        def gauge(name: str, text: str, labels: tuple[str, ...], rows: Iterable[Mapping[str, Any]], value: str) -> Metric:
            family = GaugeMetricFamily(name, text, labels=labels)
            for row in rows:
                if row[value] is not None:
                    family.add_metric([str(row[label]) for label in labels], float(row[value]))
            return family

        def of(name: str) -> list[dict[str, Any]]:
            return getattr(now, name) if now is not None else []

        oldest: dict[str, float] = {}
        for row in of("waiting"):
            oldest[row["service"]] = max(oldest.get(row["service"], 0.0), row["oldest"])
        ages = [{"service": service, "oldest": age} for service, age in oldest.items()]
        yield gauge("kilo_items_waiting", "Waiting work items.", ("service", "reason"), of("waiting"), "n")
        yield gauge("kilo_items_oldest_waiting_seconds", "Since when the oldest one waits.", ("service",), ages, "oldest")
        yield gauge("kilo_deliveries_waiting", "Deliveries that are not admitted yet.", (), of("deliveries"), "n")
        yield gauge("kilo_deliveries_oldest_waiting_seconds", "Age of the oldest of them.", (), of("deliveries"), "oldest")
        yield gauge("kilo_slots_in_use", "Slots that owners' items hold.", ("pool",), of("slots"), "n")
        yield gauge("kilo_agent_places", "Sessions that a host may run at once.", ("host",), of("places"), "n")
        yield gauge("kilo_agent_places_in_use", "Sessions that a host runs.", ("host",), of("places"), "used")
        yield gauge(
            "kilo_effects_live", "Effects that are not over, or that a person looks at.", ("kind", "state"), of("effects"), "n"
        )
        yield gauge("kilo_effects_oldest_seconds", "Age of the oldest of them.", ("kind", "state"), of("effects"), "oldest")
        yield gauge(
            "kilo_provider_budget_least",
            "Requests left of the integration that has the fewest.",
            ("kind",),
            of("budgets"),
            "least",
        )
        yield gauge("kilo_provider_blocked", "Integrations whose provider asked to wait.", ("kind",), of("budgets"), "blocked")
        yield gauge("kilo_switches", "Pause and kill switches that are set.", ("scope", "kind"), of("switches"), "n")
        yield gauge(
            "kilo_switch_oldest_seconds", "Since when the oldest one is set.", ("scope", "kind"), of("switches"), "oldest"
        )
        yield gauge("kilo_services_need_person", "Owners whose service waits for a person.", ("service",), of("persons"), "n")
        yield gauge("kilo_heartbeat_age_seconds", "Since when nothing was heard of it.", ("name",), of("heartbeats"), "age")
        schema = [{**row, "one": 1} for row in of("schema")]
        yield gauge("kilo_schema_info", "The database's revision.", ("revision",), schema, "one")
        yield gauge("kilo_build_info", "This process's version.", ("version",), [{"version": __version__, "one": 1}], "one")
        claims = CounterMetricFamily("kilo_claims", "Claims by outcome.", labels=["service", "outcome"])
        for row in of("claims"):
            claims.add_metric([row["service"], row["outcome"]], float(row["n"]))
        yield claims

    def _ended(self) -> Iterator[Metric]:
        def counter(name: str, text: str, labels: tuple[str, ...], sums: _Sums) -> Metric:
            family = CounterMetricFamily(name, text, labels=labels)
            for key, value in sums.counts.items():
                family.add_metric(list(key), value)
            return family

        def times(name: str, text: str, label: str, found: _Times) -> Metric:
            return found.fill(HistogramMetricFamily(name, text, labels=[label]))

        yield counter("kilo_items_ended", "Work items that ended.", ("service", "state", "reason"), self._items)
        yield counter("kilo_sessions_ended", "Sessions that ended.", ("service", "state", "reason"), self._sessions)
        yield counter("kilo_session_turns", "Model turns that counted, of ended sessions.", ("service",), self._turns)
        yield counter("kilo_session_tokens", "Model tokens of ended sessions.", ("service", "direction"), self._tokens)
        yield counter("kilo_effects_ended", "Effects that ended.", ("kind", "state", "reason"), self._effects)
        yield times("kilo_session_seconds", "From a session's start to its end.", "service", self._session_times)
        yield times("kilo_launch_seconds", "From an item's opening to its first session.", "service", self._launch_times)
        yield times("kilo_settle_seconds", "From a session's end to its item's.", "service", self._settle_times)
        yield times("kilo_effect_seconds", "From an effect's intention to its application.", "kind", self._effect_times)


platform = Platform()
figures.register(platform)
database_up = Gauge(
    "kilo_database_up", "Whether the figures of the database could be read at this scrape: 1 or 0.", registry=look
)


def own_counts() -> bytes:
    """What this process counted, in Prometheus' text form."""
    return generate_latest(registry)


def exposition(store: Store, at: datetime) -> bytes:
    """All metrics in Prometheus' text form; the database's figures are of `at`, or a few seconds older.

    Without the database this process's own counts are told all the same: they say what its callers meet meanwhile.
    """
    try:
        platform.look(store, at)
    except SQLAlchemyError:
        log.exception("the figures could not be read")
        database_up.set(0)
        return own_counts() + generate_latest(look)
    database_up.set(1)
    return own_counts() + generate_latest(look) + generate_latest(figures)


class Scraped:
    """Answers `GET /metrics` before a listener's application does, for whoever holds the scrapers' token, which opens nothing else.

    The token lies in a file that is read at each scrape: whoever replaces it has changed it. The request's host is not asked for:
    Prometheus calls processes by their addresses, and no browser holds the token.
    """

    def __init__(self, application: ASGIApp, token_file: Path, told: Callable[[], bytes]) -> None:
        self._application, self._token_file, self._told = application, token_file, told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One scrape, or what the application says."""
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("GET", "/metrics"):
            await self._application(scope, receive, send)
            return
        answer = await self._answer(Headers(scope=scope).get("authorization", ""))
        await answer(scope, receive, send)

    async def _answer(self, shown: str) -> Response:
        token = self._token_file.read_text().strip() if self._token_file.is_file() else ""
        if not token or not hmac.compare_digest(shown.encode(), f"Bearer {token}".encode()):
            refused = {"outcome": "refused", "reason": str(Reason.KEY_REFUSED)}
            return JSONResponse(refused, 401, headers={"WWW-Authenticate": "Bearer"})
        return Response(await anyio.to_thread.run_sync(self._told), media_type="text/plain; version=0.0.4")
