"""Prometheus metrics of the ingress; documented in docs/ingress.md, and a test holds both lists together."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

registry = CollectorRegistry()

deliveries = Counter("kilo_deliveries", "Webhook deliveries by outcome or reason.", ["outcome"], registry=registry)
callbacks = Counter("kilo_callbacks", "Session callbacks by outcome.", ["outcome"], registry=registry)
answer_seconds = Histogram(
    "kilo_answer_seconds",
    "Time from the first byte of a webhook to its answer.",
    registry=registry,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
live = Gauge("kilo_live", "Live rows by what and state.", ["what", "state"], registry=registry)
waiting = Gauge("kilo_waiting", "Waiting work items by service and reason.", ["service", "reason"], registry=registry)
spent_tokens = Gauge(
    "kilo_spent_tokens",
    "Tokens of this UTC day by service, model and direction.",
    ["service", "model", "direction"],
    registry=registry,
)
spent_usd = Gauge(
    "kilo_spent_usd",
    "USD of this UTC day by service and model, as far as prices are known.",
    ["service", "model"],
    registry=registry,
)
counted = Gauge("kilo_counted", "Counted oddities, such as late writes that changed nothing.", ["name"], registry=registry)
