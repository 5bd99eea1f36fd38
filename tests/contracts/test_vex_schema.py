"""VEX documents against CycloneDX's published JSON schema (npm `@cyclonedx/cyclonedx-library`), and what they say of a finding."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from referencing import Registry
from referencing.jsonschema import DRAFT7

from kilo_pipelines.services.security import vex
from kilo_pipelines.services.security.analysis import snapshot_of

SCHEMAS = Path(__file__).parents[2] / ".cache/openapi/node_modules/@cyclonedx/cyclonedx-library/res/schema"
NOW = datetime(2026, 6, 15, 12, 30, tzinfo=UTC)
OWNER = UUID(int=1)


@cache
def validator() -> Draft7Validator:
    assert SCHEMAS.exists(), "CycloneDX's schema is missing: run `make deps`"
    found = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.schema.json")}
    wanted = ("spdx.SNAPSHOT.schema.json", "jsf-0.82.SNAPSHOT.schema.json")
    # The schema names its neighbours relative to its own id.
    registry = Registry().with_resources(
        [(f"http://cyclonedx.org/schema/{name}", DRAFT7.create_resource(found[name])) for name in wanted]
    )
    return Draft7Validator(found["bom-1.6.SNAPSHOT.schema.json"], registry=registry)


def finding(number: int = 1, **more: Any) -> Any:
    """A stored finding with as much as a statement asks of it."""
    facts = {
        "id": UUID(int=number),
        "repository_id": 7,
        "source": "dependabot",
        "source_id": str(number),
        "severity": "high",
        "ghsa_id": "GHSA-aaaa-bbbb-cccc",
        "cve_id": "CVE-2026-00001",
        "package_name": "left",
        "package_ecosystem": "npm",
        "manifest_path": "package-lock.json",
        "dependency_scope": "runtime",
        "vulnerable_version_range": "< 2.0.1",
        "patched_version": "2.0.1",
        "title": "A defect",
        "description": "d",
        "cwe_ids": ["CWE-400"],
        "cvss_score": 7.5,
        "html_url": "https://github.com/octo/demo/security/dependabot/1",
        "status": "open",
        "upstream_state": "open",
        "upstream_reason": None,
        "disposition": None,
        "disposition_reason": None,
        "disposition_at": None,
        "detected_at": NOW - timedelta(days=9),
        "source_updated_at": NOW - timedelta(days=8),
        "fixed_at": None,
        "dismissed_at": None,
        "auto_dismissed_at": None,
    }
    return SimpleNamespace(**{**facts, **more})


def analysed(one: Any, exploitable: object, **more: Any) -> Any:
    """A completed deep analysis of a finding as it stands."""
    deep = {"exploitable": exploitable, "reasoning": "canary-reasoning", "summary": "canary-summary"}
    return SimpleNamespace(**{"snapshot": snapshot_of(one), "deep": deep, "completed_at": NOW - timedelta(days=2), **more})


def dismissed(reason: str | None, **more: Any) -> Any:
    return finding(
        status="ignored", disposition="dismissed", disposition_reason=reason, disposition_at=NOW - timedelta(days=3), **more
    )


@pytest.mark.parametrize(
    ("one", "exploitable", "state", "justification", "response"),
    [
        (finding(), None, "in_triage", None, None),
        (finding(), True, "exploitable", None, ["update"]),
        (finding(patched_version=None), True, "exploitable", None, None),
        (finding(), False, "not_affected", "code_not_reachable", None),
        (finding(), "unknown", "in_triage", None, None),
        (finding(status="fixed", fixed_at=NOW), True, "resolved", None, None),
        (dismissed("not_used"), None, "not_affected", "code_not_reachable", None),
        (dismissed("not_used"), False, "not_affected", "code_not_reachable", None),
        (dismissed("not_used"), True, "exploitable", None, ["update"]),
        (dismissed("inaccurate"), None, "false_positive", None, None),
        (dismissed("tolerable_risk"), None, "exploitable", None, ["will_not_fix"]),
        (dismissed("no_bandwidth"), None, "exploitable", None, ["will_not_fix"]),
        (dismissed("fix_started"), None, "exploitable", None, ["update"]),
        (dismissed("because"), None, "in_triage", None, None),
        (finding(status="ignored", upstream_state="dismissed", upstream_reason="not_used", dismissed_at=NOW), True, "not_affected", "code_not_reachable", None),
        (finding(status="ignored", upstream_state="auto_dismissed", auto_dismissed_at=NOW), None, "in_triage", None, None),
    ],
)  # fmt: skip
def test_a_statement_follows_from_status_dismissal_and_analysis(
    one: Any, exploitable: object, state: str, justification: str | None, response: list[str] | None
) -> None:
    """A dismissal stands unless a later analysis found a way to exploit it: the last two dismissed ones are from after it."""
    analyses = {} if exploitable is None else {one.id: analysed(one, exploitable)}
    (told,) = json.loads(vex.document(OWNER, [one], analyses, {7: "octo/demo"}))["vulnerabilities"]
    assert (told["analysis"]["state"], told["analysis"].get("justification"), told["analysis"].get("response")) == (
        state,
        justification,
        response,
    )


@pytest.mark.parametrize("exploitable", [True, False])
def test_an_analysis_of_other_facts_says_nothing(exploitable: bool) -> None:
    one = finding()
    old = analysed(finding(vulnerable_version_range="< 1.0"), exploitable)
    assert vex.statement_of(one, old).status == "under_investigation"


def test_a_shallow_analysis_is_no_evidence() -> None:
    one = finding()
    assert vex.statement_of(one, analysed(one, False, deep=None)).status == "under_investigation"


def test_superseded_findings_are_spoken_for() -> None:
    both = [finding(1, status="ignored", disposition="superseded"), finding(2)]
    told = json.loads(vex.document(OWNER, both, {}, {7: "octo/demo"}))
    assert [one["bom-ref"] for one in told["vulnerabilities"]] == [f"finding:{UUID(int=2)}"]


def together(*alike: Any, analyses: dict[UUID, Any] | None = None) -> list[Any]:
    found: list[Any] = json.loads(vex.document(OWNER, alike, analyses or {}, {7: "octo/demo"}))["vulnerabilities"]
    return found


def test_a_component_is_spoken_of_once_for_each_vulnerability_and_never_better_than_its_worst_place() -> None:
    """One package in two manifests, reached from one of them; and one that was fixed and is back."""
    safe, reached = finding(1, manifest_path="a/package-lock.json"), finding(2, manifest_path="b/package-lock.json")
    (told,) = together(safe, reached, analyses={safe.id: analysed(safe, False), reached.id: analysed(reached, True)})
    assert told["bom-ref"] == f"finding:{reached.id}" and told["analysis"]["state"] == "exploitable"
    assert [one["value"] for one in told["properties"]] == ["a/package-lock.json", "b/package-lock.json"]
    (told,) = together(finding(1, status="fixed", fixed_at=NOW), finding(2, vulnerable_version_range="< 3"))
    assert told["analysis"]["state"] == "in_triage"
    assert [one["range"] for one in told["affects"][0]["versions"]] == ["vers:npm/<2.0.1", "vers:npm/<3"]
    (told,) = together(finding(1, status="fixed", fixed_at=NOW), dismissed("not_used", number=2))
    assert told["analysis"]["state"] == "not_affected"
    assert len(together(finding(1), finding(2, cve_id="CVE-2026-00002"), finding(3, package_name="right"))) == 3


words = st.text(st.characters(codec="utf-8"), max_size=30)
findings = st.lists(
    st.builds(
        finding,
        number=st.integers(1, 10**6),
        repository_id=st.integers(1, 3),
        severity=st.sampled_from(["critical", "high", "medium", "low"]),
        cve_id=st.none() | words | st.just("CVE-2026-1"),
        ghsa_id=st.none() | words | st.just("GHSA-aaaa-bbbb-cccc"),
        package_name=words
        | st.just("left")
        | st.sampled_from(["@scope/name", "github.com/a/b", "org.x:y", "a/../b", "?q#f@1", " "]),
        package_ecosystem=words | st.sampled_from(["npm", "pip", "maven", "go", "actions", "NPM"]),
        manifest_path=words,
        vulnerable_version_range=st.none() | words | st.sampled_from([">= 1.0, < 2.0", "= 3", "<1||>2"]),
        patched_version=st.none() | words,
        title=words,
        cwe_ids=st.lists(words | st.sampled_from(["CWE-79", "CWE-0", "CWE-79"]), max_size=3),
        cvss_score=st.none() | st.floats(0, 10),
        html_url=st.none() | st.just("https://github.com/x"),
        status=st.sampled_from(["open", "fixed", "ignored"]),
        upstream_reason=st.none() | st.sampled_from(["not_used", "inaccurate", "tolerable_risk"]),
    ),
    max_size=4,
    unique_by=lambda one: one.id,
)


@settings(max_examples=40, deadline=None)
@given(findings, st.randoms(use_true_random=False), st.sampled_from([True, False, "unknown"]))
def test_every_document_follows_the_schema_and_is_the_same_for_the_same_findings(
    made: list[Any], chance: random.Random, exploitable: object
) -> None:
    analyses = {one.id: analysed(one, exploitable) for one in made[:2]}
    names = {1: "octo/demo", 2: "Octo/ä b"}
    told = vex.document(OWNER, made, analyses, names)
    document = json.loads(told)
    validator().validate(document)
    shuffled = chance.sample(made, len(made))
    assert vex.document(OWNER, shuffled, analyses, names) == told
    assert "canary" not in told.decode()
    refs = [one["bom-ref"] for one in document["components"]]
    refs += [inner["bom-ref"] for one in document["components"] for inner in one["components"]]
    assert len(set(refs)) == len(refs)
    spoken = [(one["id"], one["affects"][0]["ref"]) for one in document["vulnerabilities"]]
    assert {ref for _, ref in spoken} <= set(refs) and len(set(spoken)) == len(spoken)


def test_the_validator_refuses_what_is_none() -> None:
    """The schema's own proof."""
    document = json.loads(vex.document(OWNER, [finding()], {}, {}))
    document["vulnerabilities"][0]["analysis"]["state"] = "affected"
    assert not validator().is_valid(document)


def test_another_content_or_owner_is_another_document() -> None:
    serials = {
        json.loads(vex.document(owner, made, {}, {}))["serialNumber"]
        for owner, made in ((OWNER, [finding()]), (UUID(int=2), [finding()]), (OWNER, [finding(title="x")]), (OWNER, []))
    }
    assert len(serials) == 4


@pytest.mark.parametrize(
    ("ecosystem", "name", "purl"),
    [
        ("npm", "@scope/left-pad", "pkg:npm/%40scope/left-pad"),
        ("pip", "Zope.Interface_x", "pkg:pypi/zope-interface-x"),
        ("maven", "org.apache:commons", "pkg:maven/org.apache/commons"),
        ("go", "github.com/a/b", "pkg:golang/github.com/a/b"),
        ("rubygems", "rails", "pkg:gem/rails"),
        ("other", "a?b#c@d", "pkg:generic/a%3Fb%23c%40d"),
        ("npm", "../..", "pkg:npm/unnamed"),
    ],
)
def test_package_urls(ecosystem: str, name: str, purl: str) -> None:
    assert vex.purl_of(ecosystem, name) == purl


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("< 2.0.1", "vers:npm/<2.0.1"),
        (">= 1.0, < 2.0", "vers:npm/>=1.0|<2.0"),
        ("= 3", "vers:npm/3"),
        ("", None),
        (None, None),
        ("< 1 || > 2", None),
        ("anything", None),
    ],
)
def test_version_ranges(said: str | None, told: str | None) -> None:
    assert vex.range_of("npm", said) == told
