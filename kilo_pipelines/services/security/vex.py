"""Findings as a CycloneDX 1.6 VEX document (docs/decisions/0018-vex-format.md): what each one means for whoever uses the repositories.

The same findings give the same bytes: ids come from findings, times from their data. No sentence of a model or a person is passed on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote
from uuid import UUID, uuid5

from kilo_pipelines.services.security.analysis import is_fresh
from kilo_pipelines.services.security.report import told

# Of the documents' serial numbers; made once, by chance.
NAMESPACE = UUID("5f1c7d0e-6a43-4a0b-9a53-0f4f9a3a7c11")
MEDIA_TYPE = "application/vnd.cyclonedx+json; version=1.6"

Status = Literal["affected", "not_affected", "false_positive", "fixed", "under_investigation"]
# CycloneDX's words for them (analysis.state).
STATE: dict[Status, str] = {
    "affected": "exploitable",
    "not_affected": "not_affected",
    "false_positive": "false_positive",
    "fixed": "resolved",
    "under_investigation": "in_triage",
}
# Of several statements about one vulnerability in one component the worst is made: it holds somewhere in it.
_WORST: tuple[Status, ...] = ("affected", "under_investigation", "not_affected", "false_positive", "fixed")
# Dependabot's ecosystems as types of package URLs; one that isn't here is `generic`.
_PURL_TYPES = {
    "actions": "githubactions",
    "composer": "composer",
    "erlang": "hex",
    "go": "golang",
    "maven": "maven",
    "npm": "npm",
    "nuget": "nuget",
    "pip": "pypi",
    "pub": "pub",
    "rubygems": "gem",
    "rust": "cargo",
    "swift": "swift",
}
_BOUND = re.compile(r"(<=|>=|<|>|=)\s*([0-9A-Za-z][0-9A-Za-z.+!_~-]{0,99})")
_SOURCES = {"CVE": ("NVD", "https://nvd.nist.gov/vuln/detail/"), "GHSA": ("GitHub Advisories", "https://github.com/advisories/")}


@dataclass(frozen=True)
class Statement:
    """What is said of one finding, and since when."""

    status: Status
    detail: str
    at: datetime
    justification: str | None = None
    response: str | None = None


def purl_of(ecosystem: str, name: str) -> str:
    """The package URL of a package, without a version: the source doesn't tell which one is used."""
    kind = _PURL_TYPES.get(ecosystem.lower(), "generic")
    if kind == "pypi":
        name = re.sub(r"[-_.]+", "-", name).lower()
    if kind == "maven":
        name = name.replace(":", "/", 1)
    parts = [quote(part, safe="") for part in name.split("/") if part not in ("", ".", "..")]
    return f"pkg:{kind}/{'/'.join(parts) or 'unnamed'}"


def range_of(ecosystem: str, versions: str | None) -> str | None:
    """The source's version range as `vers`; None for what has another form."""
    parts = [part.strip() for part in (versions or "").split(",")]
    bounds = [_BOUND.fullmatch(part) for part in parts]
    if not all(bounds):
        return None
    kind = _PURL_TYPES.get(ecosystem.lower(), "generic")
    said = [(one[1], quote(one[2], safe=".-_~!")) for one in bounds if one]
    return f"vers:{kind}/" + "|".join(version if sign == "=" else sign + version for sign, version in said)


def statement_of(finding: Any, analysis: Any | None) -> Statement:
    """What we say of a finding, from its status, the reason of its dismissal and its newest completed analysis.

    A dismissal is a person's word and stands, unless a later analysis of the present facts found a way to exploit it.
    """
    fresh = analysis is not None and is_fresh(analysis.snapshot, finding)
    deep: Mapping[str, Any] = (fresh and analysis is not None and analysis.deep) or {}
    analysed: datetime = analysis.completed_at if analysis is not None and deep else finding.source_updated_at
    if finding.status == "fixed":
        return Statement("fixed", "The source reports it as fixed.", finding.fixed_at or finding.source_updated_at)
    decided = _decided(finding) if finding.status == "ignored" else None
    if deep.get("exploitable") is True and (decided is None or analysed > decided.at):
        response = "update" if finding.patched_version else None
        return Statement("affected", "A way to exploit it was found in the repository.", analysed, response=response)
    if decided is not None:
        return decided
    if deep.get("exploitable") is False:
        detail = "An analysis of the repository found no way to the vulnerable code."
        return Statement("not_affected", detail, analysed, justification="code_not_reachable")
    detail = "An analysis of the repository could not decide it." if deep else "The repository has not been analysed for it."
    return Statement("under_investigation", detail, analysed)


def _decided(finding: Any) -> Statement:
    """The meaning of a dismissal, here or at the source."""
    if finding.disposition is not None:
        reason, at = finding.disposition_reason, finding.disposition_at
    else:
        reason = finding.upstream_reason
        at = finding.dismissed_at or finding.auto_dismissed_at or finding.source_updated_at
    if reason == "not_used":
        return Statement("not_affected", "The vulnerable code is not used.", at, justification="code_not_reachable")
    if reason == "inaccurate":
        return Statement("false_positive", "The alert doesn't apply to this repository.", at)
    if reason == "fix_started":
        return Statement("affected", "A fix has been started.", at, response="update")
    if reason in ("tolerable_risk", "no_bandwidth"):
        known = {"tolerable_risk": "The risk is accepted.", "no_bandwidth": "Nobody works on it at present."}
        return Statement("affected", known[reason], at, response="will_not_fix")
    return Statement("under_investigation", "It was dismissed without a reason that says whether it can be exploited.", at)


def document(owner_id: UUID, findings: Iterable[Any], analyses: Mapping[UUID, Any], repositories: Mapping[int, str]) -> bytes:
    """The VEX document of these findings. A superseded finding is spoken for by its canonical one.

    Findings of one vulnerability in one package of a repository (in several manifests, or fixed once and back again) are one
    statement, the worst of theirs.
    """
    known = sorted((one for one in findings if one.disposition != "superseded"), key=lambda one: str(one.id))
    said = {one.id: statement_of(one, analyses.get(one.id)) for one in known}
    together: dict[tuple[str, str], list[Any]] = {}
    for one in known:
        together.setdefault((_name(one), _ref(one)), []).append(one)
    body = {
        "components": _components(known, repositories),
        "vulnerabilities": [_vulnerability(alike, said) for alike in together.values()],
    }
    newest = max((one.at for one in said.values()), default=datetime(1970, 1, 1, tzinfo=UTC))
    content = json.dumps(body, sort_keys=True, ensure_ascii=True)
    head = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE, f'{owner_id}:{content}')}",
        "version": 1,
        "metadata": {
            "timestamp": _text(newest),
            "tools": {"components": [{"type": "application", "name": "kilo-pipelines"}]},
        },
    }
    return json.dumps({**head, **body}, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _components(findings: Iterable[Any], repositories: Mapping[int, str]) -> list[dict[str, Any]]:
    """Repositories, each with its packages that are spoken of."""
    packages: dict[int, set[tuple[str, str]]] = {}
    for one in findings:
        packages.setdefault(one.repository_id, set()).add((one.package_ecosystem, one.package_name))
    return [
        {
            "type": "application",
            "bom-ref": f"repository:{repository_id}",
            "name": repositories.get(repository_id, str(repository_id)),
            "purl": purl_of_repository(repositories.get(repository_id, str(repository_id))),
            "components": [
                {
                    "type": "library",
                    "bom-ref": _bom_ref(repository_id, purl),
                    "name": told(name),
                    "purl": purl,
                }
                for purl, name in sorted({purl_of(ecosystem, name): name for ecosystem, name in sorted(used)}.items())
            ],
        }
        for repository_id, used in sorted(packages.items())
    ]


def purl_of_repository(full_name: str) -> str:
    """The package URL of a repository at GitHub."""
    return "pkg:github/" + "/".join(quote(part, safe="") for part in full_name.lower().split("/") if part)


def _bom_ref(repository_id: int, purl: str) -> str:
    return f"repository:{repository_id}/{purl}"


def _ref(finding: Any) -> str:
    """The component that a finding is about."""
    return _bom_ref(finding.repository_id, purl_of(finding.package_ecosystem, finding.package_name))


def _names(finding: Any) -> list[str]:
    return [one for one in (finding.cve_id, finding.ghsa_id) if one]


def _name(finding: Any) -> str:
    """What its vulnerability is called."""
    return (_names(finding) or [f"{finding.source}-{finding.repository_id}-{finding.source_id}"])[0]


def _vulnerability(alike: list[Any], statements: Mapping[UUID, Statement]) -> dict[str, Any]:
    """What is said of findings of one vulnerability in one component; among equally bad ones the newest statement is theirs."""
    finding = min(alike, key=lambda one: (_WORST.index(statements[one.id].status), -statements[one.id].at.timestamp()))
    said, names = statements[finding.id], _names(finding)
    analysis: dict[str, Any] = {"state": STATE[said.status], "detail": said.detail, "lastUpdated": _text(said.at)}
    if said.justification:
        analysis["justification"] = said.justification
    if said.response:
        analysis["response"] = [said.response]
    rating: dict[str, Any] = {"severity": finding.severity}
    if finding.cvss_score is not None:
        rating |= {"score": float(finding.cvss_score), "method": "other"}
    ranges = {range_of(one.package_ecosystem, one.vulnerable_version_range) for one in alike} - {None}
    affected: dict[str, Any] = {"ref": _ref(finding)}
    if ranges:
        affected["versions"] = [{"range": one, "status": "affected"} for one in sorted(map(str, ranges))]
    found: dict[str, Any] = {
        "bom-ref": f"finding:{finding.id}",
        "id": _name(finding),
        **({"source": _source(names[0])} if names and _source(names[0]) else {}),
        "references": [{"id": one, "source": _source(one)} for one in names[1:] if _source(one)],
        "ratings": [rating],
        "cwes": sorted({int(one[4:]) for one in finding.cwe_ids if re.fullmatch(r"CWE-[1-9][0-9]{0,5}", one)}),
        "description": told(finding.title),
        "created": _text(min(one.detected_at for one in alike)),
        "analysis": analysis,
        "affects": [affected],
        "properties": [{"name": "kilo:manifest", "value": one} for one in sorted({told(one.manifest_path) for one in alike})],
    }
    if finding.patched_version:
        found["recommendation"] = f"Update to {told(finding.patched_version)}."
    if finding.html_url:
        found["advisories"] = [{"url": finding.html_url}]
    return found


def _source(name: str) -> dict[str, str] | None:
    known = _SOURCES.get(name.split("-", 1)[0])
    return {"name": known[0], "url": known[1] + quote(name, safe="")} if known else None


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
