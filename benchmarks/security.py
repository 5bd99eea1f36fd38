"""The Security Agent's tables: 10,000 alerts upserted and read again unchanged, a million findings' deadlines and compliance.

At the level of store and assets, over a real PostgreSQL with policies and audit on; no provider is asked. The million is written by
SQL as a first sync would have left it, and computed in a process of its own, whose memory is measured.

Baselines of the same run: the alerts' JSON copied into one column of a plain table, page by page, each page a commit; and one pass
of PostgreSQL itself over the million (`sum` of all deadlines by severity).
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from benchmarks.homes import Server, Tenant, server
from benchmarks.results import Machine, Row, database_conditions, keep_raw
from kilo_pipelines.assets.security import compliance_table, recompute
from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.ops.findings import policy_for
from kilo_pipelines.ops.security_sync import SOURCE, AlertTaker
from kilo_pipelines.schedules import owner_chunks
from kilo_pipelines.services.security.config import SERVICE, SecurityConfig
from kilo_pipelines.services.security.sla import SlaPolicy
from kilo_pipelines.settings import write_secret
from kilo_pipelines.store import Cipher, Store

ALERTS = 10_000
PAGE = 100
MILLION = 1_000_000
SEVERITIES = ("critical", "high", "medium", "low")


def run(*, quick: bool = False) -> list[Row]:
    """Upsert, the same again, then the million."""
    machine = Machine()
    alerts, findings = (500, 20_000) if quick else (ALERTS, MILLION)
    with server() as database:
        settings = database_conditions(database.postgres.admin_url)
        tenant = Tenant.create(database.store, 1)
        store, owner = database.store, tenant.owner
        store.owners.put_config(owner, SERVICE, {}, enabled=True, expected_revision=0, actor="benchmark")
        policy = policy_for(store, owner, SecurityConfig(), actor="benchmark")
        pages = [[_alert(number) for number in range(start, start + PAGE)] for start in range(1, alerts + 1, PAGE)]
        plain = _plain(database, pages)
        store.findings.begin_sync(owner, tenant.repository)
        upsert, written = _sync(store, tenant, policy, pages)
        again, rewritten = _sync(store, tenant, policy, pages)
        many = Tenant.create(database.store, 2)
        store.owners.put_config(many.owner, SERVICE, {}, enabled=True, expected_revision=0, actor="benchmark")
        policy_for(store, many.owner, SecurityConfig(), actor="benchmark")
        _seed(database, many, findings)
        one_pass = _one_pass(database, many.owner)
        steady = _measured(database, many.owner, "default")
        changed = _measured(database, many.owner, "strict")
    keep_raw("security", {"upsert": upsert, "again": again, "steady": steady, "changed": changed})
    if written != alerts:
        raise RuntimeError(f"{written} of {alerts} alerts were written")
    common = machine.conditions(settings)
    million = {"samples": {"findings": findings, "passes": 1}, "all_deadlines_change_s": round(changed["seconds"], 2)}
    return [
        Row(
            "alerts_10000_upsert_s",
            upsert,
            plain,
            common
            | {"samples": {"alerts": alerts, "pages": len(pages)}, "with": "validation, history, SLA and audit; a page a commit"},
        ),
        Row(
            "resync_10000_rows_written",
            float(rewritten),
            float(alerts),
            common | {"samples": {"alerts": alerts}, "seconds": round(again, 3), "baseline": "rows of the first sync"},
        ),
        Row(
            "sla_1000000_s", steady["seconds"], one_pass, common | million | {"kept": "no deadline changes; compliance included"}
        ),
        Row("sla_1000000_mb", steady["mb"], 300.0, common | million | {"baseline": "the goal; whole process, imports included"}),
        Row(
            "sync_1000_owners_runs",
            float(len(owner_chunks("security_sync", "sync_owners", [str(UUID(int=number)) for number in range(1_000)], "now"))),
            1_000.0,
            common | {"samples": {"owners": 1_000}, "baseline": "one run an owner"},
        ),
    ]


def _alert(number: int) -> dict[str, Any]:
    severity = SEVERITIES[number % 4]
    moment = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=number % 5_000)).strftime("%Y-%m-%dT%H:%M:%SZ")
    package = {"ecosystem": "npm", "name": f"package-{number % 700}"}
    return {
        "number": number,
        "state": "open" if number % 3 else "fixed",
        "dependency": {"package": package, "manifest_path": "package-lock.json", "scope": "runtime"},
        "security_advisory": {
            "ghsa_id": f"GHSA-{number:04d}",
            "cve_id": f"CVE-2026-{number}",
            "summary": f"A defect in package-{number % 700}",
            "description": "Crafted input makes it run for a long time. " * 40,
            "severity": severity,
            "cvss": {"score": 7.5, "vector_string": None},
            "cwes": [{"cwe_id": "CWE-400", "name": "Uncontrolled resource consumption"}],
        },
        "security_vulnerability": {
            "package": package,
            "severity": severity,
            "vulnerable_version_range": "< 2.0.1",
            "first_patched_version": {"identifier": "2.0.1"},
        },
        "html_url": f"https://github.com/octo/demo/security/dependabot/{number}",
        "created_at": moment,
        "updated_at": moment,
        "fixed_at": None if number % 3 else moment,
    }


def _plain(database: Server, pages: list[list[dict[str, Any]]]) -> float:
    with psycopg.connect(database.logins["migrator"].replace("+psycopg", "")) as connection:
        connection.execute("create table benchmark_plain (id bigserial primary key, body jsonb)")
        connection.commit()
        began = time.perf_counter()
        for page in pages:
            with connection.cursor().copy("copy benchmark_plain (body) from stdin") as copy:
                for one in page:
                    copy.write_row([json.dumps(one)])
            connection.commit()
        seconds = time.perf_counter() - began
        connection.execute("drop table benchmark_plain")
    return seconds


def _sync(store: Store, tenant: Tenant, policy: SlaPolicy, pages: list[list[dict[str, Any]]]) -> tuple[float, int]:
    """Seconds and finding rows written."""
    began, written = time.perf_counter(), 0
    taker = AlertTaker(tenant.owner, tenant.repository, policy, first_sync=True)
    for number, page in enumerate(pages):
        good, _ = taker.sort(page)
        done = store.findings.apply_page(tenant.owner, tenant.repository, SOURCE, good, taker.decide, cursor=f"page-{number}")
        written += done.rows_written
    return time.perf_counter() - began, written


def _seed(database: Server, tenant: Tenant, findings: int) -> None:
    """Findings, history and deadlines as a first sync would have left them: two thirds open, one third fixed, one in fifty raised."""
    with psycopg.connect(database.logins["migrator"].replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("select set_config('kilo.owner_id', %s, false)", (str(tenant.owner),))
        for table in ("findings", "finding_events", "finding_sla"):
            connection.execute(f"alter table {table} no force row level security".encode())
        names = {"owner": tenant.owner, "repository": tenant.repository, "n": findings}
        connection.execute(
            """
insert into findings (owner_id, id, repository_id, source, source_id, severity, package_name, package_ecosystem, manifest_path, title,
    description, cwe_ids, upstream_state, fingerprint, detected_at, source_updated_at, fixed_at, first_seen_at, changed_at)
select %(owner)s, gen_random_uuid(), %(repository)s, 'dependabot', g::text, (array['critical', 'high', 'medium', 'low'])[1 + g %% 4],
    'package-' || g %% 5000, 'npm', 'package-lock.json', 'A defect', 'Words', '{}', case g %% 3 when 0 then 'fixed' else 'open' end, g::text,
    timestamptz '2025-06-01' + g %% 500 * interval '1 day', now(),
    case g %% 3 when 0 then timestamptz '2025-06-01' + (g %% 500 + g %% 60) * interval '1 day' end, now(), now()
from generate_series(1, %(n)s) g
""",
            names,
        )
        connection.execute(
            """
insert into finding_events (owner_id, finding_id, at, kind, severity, reconstructed, event_key, recorded_at)
select owner_id, id, detected_at, 'opened', severity, true, id || ':o', now() from findings where owner_id = %(owner)s
union all select owner_id, id, fixed_at, 'fixed', null, true, id || ':f', now() from findings where owner_id = %(owner)s and fixed_at is not null
union all select owner_id, id, detected_at + interval '1 day', 'severity', 'critical', true, id || ':s', now() from findings
    where owner_id = %(owner)s and source_id::int %% 50 = 1 and severity <> 'critical'
""",
            names,
        )
        for table in ("findings", "finding_events", "finding_sla"):
            connection.execute(f"alter table {table} force row level security".encode())
        connection.execute("analyze")
    policy = SlaPolicy.of_stored(*(database.store.findings.policy(tenant.owner) or (0, {})))
    recompute(database.store, tenant.owner, policy, datetime.now(UTC))
    with psycopg.connect(database.postgres.admin_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("checkpoint")


def _one_pass(database: Server, owner: UUID) -> float:
    with database.store.database.owner(owner) as connection:
        began = time.perf_counter()
        connection.exec_driver_sql(
            "select f.severity, count(*), sum(extract(epoch from s.due_at)) from findings f join finding_sla s"
            " on s.owner_id = f.owner_id and s.finding_id = f.id group by f.severity"
        ).all()
        return time.perf_counter() - began


def _measured(database: Server, owner: UUID, preset: str) -> dict[str, float]:
    """One pass in a process of its own: seconds and its largest size in MB."""
    logins = database.logins
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_pass, logins["app"], logins["system"], owner, preset).result(timeout=900)


def _pass(app: str, system: str, owner: UUID, preset: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as home:
        key = Path(home) / "key"
        write_secret(key, Cipher.new_key_file())
        store = Store(app, system, Cipher.from_file(key), SystemClock())
    policy = policy_for(store, owner, SecurityConfig.model_validate({"sla_preset": preset}), actor="benchmark")
    began = time.perf_counter()
    recompute(store, owner, policy, datetime.now(UTC))
    compliance_table(store, owner, datetime.now(UTC))
    seconds = time.perf_counter() - began
    # Not `ru_maxrss`: a process inherits its parent's there.
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return {"seconds": seconds, "mb": int(peak.split()[1]) / 1024}
