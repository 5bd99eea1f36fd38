"""Prometheus metrics of the ingress; documented in docs/ingress.md, and a test holds both lists together."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

registry = CollectorRegistry()

deliveries = Counter("kilo_deliveries", "Webhook deliveries by outcome or reason.", ["outcome"], registry=registry)
signatures = Counter(
    "kilo_webhook_signatures", "Webhooks by the secret that signed them: current, previous.", ["secret"], registry=registry
)
callbacks = Counter("kilo_callbacks", "Session callbacks by outcome.", ["outcome"], registry=registry)
answer_seconds = Histogram(
    "kilo_answer_seconds",
    "Time from the first byte of a webhook to its answer.",
    registry=registry,
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
)
live = Gauge("kilo_live", "Live rows by what and state.", ["what", "state"], registry=registry)
counted = Gauge("kilo_counted", "Counted oddities, such as late writes that changed nothing.", ["name"], registry=registry)
