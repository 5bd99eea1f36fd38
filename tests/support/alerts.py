"""Raw Dependabot alerts in GitHub's shape, for tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

START = datetime(2026, 1, 5, 8, 0, tzinfo=UTC)
SEVERITIES = ("critical", "high", "medium", "low")


def alert(number: int, /, **more: Any) -> dict[str, Any]:
    """One open alert; `more` replaces fields by dotted name, as `{"security_advisory.severity": "low"}`."""
    created = START + timedelta(hours=number % 500)
    severity = SEVERITIES[number % 4]
    found: dict[str, Any] = {
        "number": number,
        "state": "open",
        "dependency": {
            "package": {"ecosystem": "npm", "name": f"package-{number % 300}"},
            "manifest_path": "package-lock.json",
            "scope": "runtime",
        },
        "security_advisory": {
            "ghsa_id": f"GHSA-aaaa-{number % 10_000:04d}-cccc",
            "cve_id": f"CVE-2026-{number:05d}",
            "summary": f"A defect in package-{number % 300}",
            "description": "Crafted input makes the parser run for a long time.",
            "severity": severity,
            "cvss": {"score": 7.5, "vector_string": None},
            "cwes": [{"cwe_id": "CWE-400", "name": "Uncontrolled resource consumption"}],
        },
        "security_vulnerability": {
            "package": {"ecosystem": "npm", "name": f"package-{number % 300}"},
            "severity": severity,
            "vulnerable_version_range": "< 2.0.1",
            "first_patched_version": {"identifier": "2.0.1"},
        },
        "url": f"https://api.github.com/repos/octo/demo/dependabot/alerts/{number}",
        "html_url": f"https://github.com/octo/demo/security/dependabot/{number}",
        "created_at": _text(created),
        "updated_at": _text(created),
        "dismissed_at": None,
        "dismissed_by": None,
        "dismissed_reason": None,
        "dismissed_comment": None,
        "fixed_at": None,
        "auto_dismissed_at": None,
    }
    for path, value in more.items():
        *way, last = path.split(".")
        place = found
        for name in way:
            place = place[name]
        place[last] = value
    return found


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
