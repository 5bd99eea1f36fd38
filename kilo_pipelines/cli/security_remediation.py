"""`kilo-pipelines security remediate` and `remediations`: pull requests that end findings."""

from __future__ import annotations

from typing import NoReturn
from uuid import UUID

import click

from kilo_pipelines.acts.remediation import admit, remediate_all
from kilo_pipelines.cli.common import OPERATOR, as_json, end, open_store, show
from kilo_pipelines.cli.security import finding_of, owner_of, owner_option, security
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.store import RemediationRow, Store


@security.command("remediate")
@click.argument("finding", type=click.UUID, required=False)
@click.option("--retry", is_flag=True, help="Once more after one that failed, was cancelled, was blocked or changed nothing.")
@click.option("--bulk", is_flag=True, help="Every open finding of the owner that its settings let through.")
@owner_option
@as_json
def security_remediate(finding: UUID | None, retry: bool, bulk: bool, owner: UUID | None, plain: bool) -> None:
    """Has a pull request opened that ends a finding; the item that does it is watched with `security remediations`."""
    if bulk == (finding is not None) or (bulk and retry) or (finding is not None and owner is not None):
        end(plain, "name a finding, or say --bulk, for which there is no --retry; --owner belongs to --bulk", 2)
    _, store = open_store(plain)
    if finding is not None:
        _one(store, finding, retry, plain)
    else:
        _all(store, owner_of(store, owner, plain), plain)


def _one(store: Store, finding: UUID, retry: bool, plain: bool) -> None:
    row = finding_of(store, finding, plain)
    answer = admit(store, row.owner_id, row.id, origin="manual", actor=OPERATOR, role="owner", retry=retry)
    if isinstance(answer, Reason):
        _refused(answer, plain)
    show(plain, {"item": answer}, lambda: f"waiting as item {answer}")


def _all(store: Store, owner: UUID, plain: bool) -> None:
    done = remediate_all(store, owner, actor=OPERATOR, role="owner")
    if isinstance(done, Reason):
        _refused(done, plain)
    skipped = dict(done.skipped.most_common())
    lines = [f"{done.scanned} open findings, {len(done.admitted)} remediations", *(f"{n} {why}" for why, n in skipped.items())]
    show(plain, {**vars(done), "skipped": skipped}, lambda: "\n".join(lines))


def _refused(reason: Reason, plain: bool) -> NoReturn:
    meaning, remedy = MEANING[reason]
    end(plain, f"not remediated: {meaning} {remedy} ({reason})")


@security.command("remediations")
@owner_option
@click.option("--limit", default=50, show_default=True)
@as_json
def security_remediations(owner: UUID | None, limit: int, plain: bool) -> None:
    """Lists remediations with their pull requests, the newest first."""
    _, store = open_store(plain)
    found = store.remediations.of_owner(owner_of(store, owner, plain), limit=limit)
    show(plain, [vars(one) for one in found], lambda: "\n".join(map(_line, found)) or "no remediations")


def _line(one: RemediationRow) -> str:
    pull = f"{one.pull_url} {one.pull_state or 'open'}" if one.pull_url else "no pull request"
    if one.confirmed_at is not None:
        pull += ", confirmed"
    elif one.set_aside_at is not None:
        pull += ", its findings dismissed"
    elif one.flagged_at is not None:
        pull += f", NOT confirmed by {one.syncs_since_merge} syncs"
    why = f" ({one.reason})" if one.reason else ""
    return f"{one.item_id}  {one.origin:<9} {one.state}{why}  {len(one.findings)} findings  {pull}"
