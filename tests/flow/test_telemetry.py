"""One pull request through the whole platform: a single trace over all processes, JSON in every log, figures at a scrape."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from uuid import UUID

import pytest

from kilo_pipelines.settings import write_secret
from tests.support.http import HTTP
from tests.support.otlp import Collector, Seen, collector
from tests.support.platform import RunningPlatform

CANARY = "canary-of-the-collector-7d1f"
# Texts of the twin's world that a span must never carry: titles, names, branches, file names.
WORLD = ("acme", "octo", "feature", "refs/", ".py", "http", "Bearer")


@pytest.fixture(scope="module")
def spans() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def platform(spans: Collector) -> Iterator[RunningPlatform]:
    def before_the_start(one: RunningPlatform) -> None:
        write_secret(one.home / "secrets" / "otlp-headers", f"x-collector-token: {CANARY}\n")

    settings = {"KILO_OTLP_ENDPOINT": spans.endpoint, "KILO_LOG_FORMAT": "json", "KILO_LOG_LEVEL": "INFO"}
    found = RunningPlatform("honest", prepare=before_the_start, **settings)
    yield found
    found.close()


@pytest.fixture(scope="module")
def trace(platform: RunningPlatform, spans: Collector) -> list[Seen]:
    """The spans of one planted pull request, from its webhook on."""
    pull = platform.control("open-pull", kind="planted")
    row = platform.settled(pull)

    def whole() -> list[Seen] | None:
        own = {one.trace for one in spans.spans if one.facts.get("kilo.item") == str(row.item_id)}
        found = [one for one in spans.spans if one.trace in own]
        applied = [one for one in found if one.name == "effect" and one.facts.get("kilo.outcome") == "applied"]
        intended = platform.store.outbox.of_item(row.item_id)
        return found if intended and len(applied) >= len(intended) and any(one.name == "delivery" for one in found) else None

    return platform.wait(whole, 30)


def _one(trace: list[Seen], name: str) -> Seen:
    (found,) = [one for one in trace if one.name == name]
    return found


def test_the_way_from_the_delivery_to_each_effect_is_one_trace(trace: list[Seen], platform: RunningPlatform) -> None:
    """Each span lies below the one that caused it, over six processes."""
    assert len({one.trace for one in trace}) == 1
    by_id = {one.id: one for one in trace}
    assert all(one.parent in by_id for one in trace if one.parent), "no span without the one above it"
    root = [one for one in trace if not one.parent]
    assert [one.name for one in root] == ["delivery"] and root[0].process == "ingress"

    def above(one: Seen) -> str:
        return by_id[one.parent].name

    expected = {
        "verify": "delivery",
        "store": "delivery",
        "admit": "delivery",
        "wait": "admit",
        "launch_reviews": "admit",
        "claim": "launch_reviews",
        "session": "launch_reviews",
        "fetch": "session",
        "diff": "session",
        "check_out": "session",
        "agent": "session",
        "model_call": "session",
        "settle_reviews": "admit",
    }
    for name, parent in expected.items():
        assert {above(one) for one in trace if one.name == name} == {parent}, name
    effects = Counter((one.facts["kilo.kind"], above(one)) for one in trace if one.name == "effect")
    assert {kind for kind, _ in effects} >= {"github.check_run", "github.review", "github.summary_comment"}
    assert {parent for _, parent in effects} <= {"admit", "launch_reviews", "settle_reviews"}
    assert ("github.review", "settle_reviews") in effects
    assert {one.process for one in trace} == {"ingress", "dagster-code", "worker-dispatch", "worker-agents", "model-proxy"}


def test_a_span_says_whose_work_it_was_how_it_went_and_nothing_from_outside(trace: list[Seen], spans: Collector) -> None:
    session, calls = _one(trace, "session"), [one for one in trace if one.name == "model_call"]
    assert session.facts["kilo.turns"] >= 1 and session.facts["kilo.tokens_in"] > 0
    assert sum(one.facts["kilo.tokens_in"] for one in calls) == session.facts["kilo.tokens_in"]
    assert _one(trace, "delivery").facts["kilo.outcome"] == "stored" and _one(trace, "claim").facts["kilo.outcome"] == "claimed"
    wait = _one(trace, "wait")
    assert 0 <= wait.end - wait.start < 60e9
    for one in spans.spans:
        for name, value in one.facts.items():
            known = isinstance(value, int) or re.fullmatch(r"[a-z0-9_.-]+|[A-Z][A-Za-z]+Error", value)
            assert known, (one.name, name, value)
    everything = b"".join(spans.bodies).decode("latin-1")
    assert not [word for word in (*WORLD, CANARY) if word in everything]
    assert all(one["x-collector-token"] == CANARY for one in spans.headers)


def test_every_line_of_our_processes_is_json_with_its_ids_and_without_secrets(
    trace: list[Seen], platform: RunningPlatform
) -> None:
    ours = ("ingress", "model-proxy", "dagster-code", "dagster-daemon", "dagster-ui")
    ours += ("worker-dispatch", "worker-maintenance", "worker-agents")
    seen = set()
    session = UUID(str(_one(trace, "session").facts["kilo.session"]))
    secrets = [path.read_text().strip() for path in (platform.home / "secrets").iterdir() if path.is_file()]
    for name in ours:
        text = (platform.settings.logs_dir / f"{name}.log").read_text()
        assert not [one for one in [*secrets, CANARY] if len(one) > 12 and one in text]
        for line in text.splitlines():
            event = json.loads(line)
            assert event["process"] == name and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{6}Z", event["time"])
            seen.add((name, event.get("session"), event.get("trace_id")))
    assert ("worker-agents", str(session), _one(trace, "session").trace) in seen
    merged = (platform.settings.logs_dir / "platform.log").read_text()
    assert '{"time"' not in merged and f"session {session}" in merged


def test_a_scrape_tells_of_every_process(trace: list[Seen], platform: RunningPlatform) -> None:
    token = platform.settings.metrics_token_file.read_text().strip()
    answer = HTTP.get(f"{platform.settings.admin_url}/metrics", headers={"authorization": f"Bearer {token}"})
    values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(values['kilo_claims_total{outcome="claimed",service="code_review"}']) >= 1
    assert float(values['kilo_heartbeat_age_seconds{name="recovery"}']) < 60
    assert float(values['kilo_heartbeat_age_seconds{name="work"}']) < 60
    assert float(values['kilo_http_responses_total{listener="public",status="202"}']) >= 1
    assert 'kilo_schema_info{revision="0020"}' in values and 'kilo_agent_places{host="' in answer.text
    assert str(platform.owner) not in answer.text
