"""What watches the platform names things that exist: metrics, alerts, their places in the runbook, commands in the docs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import anyio
import click
import httpx
import pytest
import yaml
from prometheus_client.metrics_core import Metric

from kilo_pipelines.cli import reference
from kilo_pipelines.cli.main import main
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.ingress import metrics
from kilo_pipelines.ingress.application import Ingress, public_application
from kilo_pipelines.store import Cipher, Store
from tests.support.ingress import OneSecret

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "observability.md").read_text()
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "kilo-pipelines.json").read_text())
# Words of the query language and of Prometheus itself; what else looks like a name in an expression is taken for a metric.
LANGUAGE = {"sum", "min", "max", "by", "rate", "increase", "histogram_quantile", "absent", "and", "or", "le", "up"}


def _families() -> list[Metric]:
    return [one for registry in (metrics.registry, metrics.look, metrics.figures) for one in registry.collect()]


def _series() -> dict[str, set[str]]:
    """Every name that a scrape may show, with its documented labels."""
    kinds = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    rows = dict(re.findall(r"^\| `(kilo_[a-z_]+)` \|([^|]*)\|", PAGE, re.MULTILINE))
    return {
        family.name + ending: {*re.findall(r"`([a-z_]+)`", rows[_documented(family)]), *(["le"] if ending == "_bucket" else [])}
        for family in _families()
        for ending in kinds[family.type]
    }


def _documented(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


def _names(expression: str) -> set[str]:
    """Metrics of an expression, by a plain look: strings, labels, numbers and the language's own words are taken out."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(r"by\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"[a-z_][a-z_0-9]*", bare)) - LANGUAGE


def _expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    yield from (target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", []))


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    names = {_documented(family) for family in _families()}
    assert set(re.findall(r"^\| `(kilo_[a-z_]+)`", PAGE, re.MULTILINE)) == names


def test_units_stand_in_names_and_no_label_names_an_owner() -> None:
    for family in _families():
        assert family.type != "histogram" or family.name.endswith("_seconds")
        assert not re.search(r"milli|_ms$|_minutes", family.name)
    labels = {label for family in _families() for sample in family.samples for label in sample.labels}
    documented = set(re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| `kilo_[a-z_]+` \|([^|]*)\|", PAGE, re.MULTILINE))))
    assert not (labels | documented) & {"owner", "owner_id", "repository", "subject", "item", "session", "login"}


def test_a_public_listener_by_itself_tells_its_own_counts_and_asks_no_database(tmp_path: Path) -> None:
    token = tmp_path / "metrics-token"
    token.write_text("scraped\n")
    nowhere = "postgresql+psycopg://nobody@/nothing"  # engines connect at their first use: never here
    store = Store(nowhere, nowhere, Cipher({"00000000": bytes(32)}, "00000000"), SystemClock())
    listener = metrics.Scraped(
        public_application(Ingress(store, OneSecret(None), frozenset({"localhost"}))), token, metrics.own_counts
    )

    async def scrape(shown: str) -> httpx.Response:
        transport = httpx.ASGITransport(listener)
        async with httpx.AsyncClient(transport=transport, base_url="http://10.1.2.3:8080") as client:
            return await client.get("/metrics", headers={"Authorization": f"Bearer {shown}"})

    told = anyio.run(scrape, "scraped")
    assert (told.status_code, "kilo_deliveries_total" in told.text, "kilo_schema_info" in told.text) == (200, True, False)
    token.write_text("another")
    assert anyio.run(scrape, "scraped").status_code == 401, "a token that was replaced has ended"
    token.unlink()
    assert anyio.run(scrape, "").status_code == anyio.run(scrape, "another").status_code == 401


@pytest.mark.parametrize("expression", sorted(set(_expressions())))
def test_every_expression_asks_for_metrics_that_exist(expression: str) -> None:
    series, names = _series(), _names(expression)
    assert names <= set(series) and (names or "up{" in expression)
    labels = {label for found in re.findall(r"by\s*\(([^)]*)\)", expression) for label in re.split(r",\s*", found)}
    labels |= {label for found in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"([a-z_]+)\s*=", found)}
    assert not names or labels <= set().union(*(series[name] for name in names)) | ({"le"} if "_bucket" in expression else set())


def test_an_expression_of_an_unknown_metric_would_be_seen() -> None:
    assert _names('sum by (x) (rate(kilo_unknown_total{a="kilo_live"}[5m])) > 0.5 and kilo_live') == {
        "kilo_unknown_total",
        "kilo_live",
    }


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) and DASHBOARD["uid"] and DASHBOARD["schemaVersion"] >= 36
    assert [one["name"] for one in DASHBOARD["templating"]["list"]] == ["datasource"]
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def _anchors(page: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_leads_to_its_place_in_the_runbook_which_names_it(rule: dict[str, dict[str, str]]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor in _anchors(page) and rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")
    section = re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)
    (place,) = [one for one in section if re.sub(r"[^a-z0-9 -]", "", one.split("\n")[0].lower()).replace(" ", "-") == anchor]
    assert f"`{rule['alert']}`" in place, "who follows the link finds the alert's name"


def test_links_within_the_docs_lead_somewhere() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for target, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)(#[a-z0-9-]+)?\)", page.read_text()):
            path = (page.parent / target).resolve() if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor and path.suffix == ".md":
                assert anchor[1:] in _anchors(str(path.relative_to(ROOT))), f"{page.name}: {target}{anchor}"


@pytest.mark.parametrize("page", reference.pages())
def test_generated_tables_are_those_of_the_code(page: str) -> None:
    """`make docs` writes them."""
    text = (ROOT / page).read_text()
    assert reference.written(page, text) == text


def test_a_page_that_lost_its_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="must stand there once"):
        reference.written("docs/settings.md", "no table")


def _command(words: list[str]) -> str | None:
    """What is wrong with a command line of the docs, None when nothing is."""
    group: click.Command = main
    while words and isinstance(group, click.Group):
        if words[0].startswith("-"):
            break
        if words[0] not in group.commands:
            return f"no command {words[0]}"
        group = group.commands[words.pop(0)]
    options = {name for one in group.params for name in one.opts} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word.rstrip(",") not in options]
    return f"no option {unknown}" if unknown else None


def test_every_command_in_the_docs_exists_with_its_options() -> None:
    assert (
        _command(["items", "nothing"]) and _command(["items", "list", "--nothing"]) and not _command(["items", "list", "--json"])
    )
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if "decisions" in page.parts:
            continue
        for span in re.findall(r"`(?:\.venv/bin/)?kilo-pipelines ([^`]+)`", " ".join(page.read_text().split())):
            wrong = _command([word for word in span.replace("…", " ").split() if word not in ("\\|", "|")])
            found += [f"{page.name}: {span}: {wrong}"] if wrong else []
    assert found == []
