"""How an owner stands against its limits, within the caller's transaction: budgets, authors, repetitions, suggest-only."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Connection

from kilo_pipelines.core import limits
from kilo_pipelines.core.limits import Amount, Budget, LimitsConfig, Standing, day_of
from kilo_pipelines.core.rates import Bucket, Rate, full, take
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store.database import changed, one, rows

# How long automatic starts of a subject are looked back on: a loop turns many times in a day, a busy pull request doesn't.
STARTS_WITHIN = timedelta(hours=24)
# What more money or tokens may let go on.
BUDGET_REASONS = (
    Reason.BUDGET_ZERO,
    Reason.BUDGET_RESERVED,
    Reason.BUDGET_EXHAUSTED,
    Reason.PRICE_UNKNOWN,
    Reason.LIMITS_INVALID,
)
# Waiting items of a service that are put off together when its day is spent: each would cost a run of its own to learn that.
TOGETHER = 1_000


def read_limits(connection: Connection, owner_id: UUID) -> LimitsConfig | None:
    """The owner's limits under the operator's cap; None when what is stored of either can't be read: then nothing is spent."""
    own = own_limits(connection, owner_id)
    try:
        cap = Budget.model_validate(_config(connection, owner_id, limits.CAP))
    except ValidationError:
        return None
    return own.under(cap) if own is not None else None


def own_limits(connection: Connection, owner_id: UUID) -> LimitsConfig | None:
    """What the owner says itself, the defaults when it said nothing; None when that can't be read."""
    try:
        return LimitsConfig.model_validate(_config(connection, owner_id, limits.SETTINGS))
    except ValidationError:
        return None


def _config(connection: Connection, owner_id: UUID, service: str) -> dict[str, Any]:
    sql = "select config from service_configs where owner_id = :owner and service = :service"
    row = one(connection, sql, owner=owner_id, service=service)
    return row["config"] if row else {}


def lock_budget(connection: Connection, owner_id: UUID) -> None:
    """Claims against the budgets of one owner happen one after the other, until commit."""
    connection.exec_driver_sql("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"budget:{owner_id}",))


def claims_under_way(connection: Connection, *scopes: str) -> None:
    """Until commit, whoever waits for the claims of one of these scopes (`owner:…`, `service:…`, `all`, `limits:…`) waits for this one."""
    sql = "select pg_advisory_xact_lock_shared(hashtextextended('claims:' || scope, 0)) from unnest(%s::text[]) as scope"
    connection.exec_driver_sql(sql, (list(scopes),))


def wait_for_claims(connection: Connection, scope: str) -> None:
    """Waits for the claims under way in a scope; those that come meanwhile wait, until commit. Claims don't wait for each other."""
    connection.exec_driver_sql("select pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"claims:{scope}",))


def standings(connection: Connection, owner_id: UUID, scopes: Sequence[tuple[str, Budget]], now: datetime) -> list[Standing]:
    """Each budget with what of it is spent today, and what running work holds; as one statement sees them.

    Work holds its reservation from its claim until its session has ended: one that was cancelled still spends until it stops.
    """
    if not scopes:
        return []
    found = rows(
        connection,
        "select 'spent' as what, service, sum(tokens_in + tokens_out) as tokens, sum(micro_usd) as micro_usd from spend_days"
        " where owner_id = :owner and day = :day group by service"
        " union all select 'reserved', service, sum(reserved_tokens), sum(reserved_micro_usd) from work_items where owner_id = :owner and id in ("
        "   select id from work_items where owner_id = :owner and state in ('starting', 'running')"
        "   union select item_id from sessions where owner_id = :owner and ended_at is null) group by service",
        owner=owner_id,
        day=day_of(now),
    )

    def total(what: str, scope: str) -> Amount:
        mine = [row for row in found if row["what"] == what and scope in ("", row["service"])]
        return Amount(sum(int(row["tokens"]) for row in mine), sum(int(row["micro_usd"]) for row in mine))

    return [Standing(budget, total("spent", scope), total("reserved", scope)) for scope, budget in scopes]


def mark(connection: Connection, owner_id: UUID, scope: str, level: str, now: datetime) -> bool:
    """Notes once a day that a budget is near its end (`warned`) or there (`exhausted`); whether this was the first time."""
    return bool(
        changed(
            connection,
            "insert into budget_marks (owner_id, day, scope, level, at) values (:owner, :day, :scope, :level, :now) on conflict do nothing",
            owner=owner_id,
            day=day_of(now),
            scope=scope,
            level=level,
            now=now,
        )
    )


def put_off_service(connection: Connection, owner_id: UUID, service: str, reason: str, until: datetime) -> None:
    """What else of a service waits for a start learns of its spent day here; what somebody is claiming now does so by itself."""
    changed(
        connection,
        "update work_items set not_before = :until, reason = :reason, offer_until = null where owner_id = :owner and id in ("
        " select id from work_items where owner_id = :owner and service = :service and state = 'waiting' and not_before < :until"
        " limit :most for update skip locked)",
        owner=owner_id,
        service=service,
        reason=reason,
        until=until,
        most=TOGETHER,
    )


def wake(connection: Connection, owner_id: UUID, reasons: Sequence[str], now: datetime, subject_key: str | None = None) -> int:
    """What waits for one of these reasons (of one subject) is looked at again now; how many items."""
    return changed(
        connection,
        "update work_items set not_before = :now, offer_until = null where owner_id = :owner and state = 'waiting' and reason = any(:reasons)"
        " and (cast(:subject as text) is null or subject_key = :subject) and not_before > :now",
        owner=owner_id,
        reasons=[str(one) for one in reasons],
        subject=subject_key,
        now=now,
    )


def automatic_starts(connection: Connection, owner_id: UUID, service: str, subject_key: str, now: datetime) -> int:
    """How often automation started this subject lately, sessions or not."""
    row = one(
        connection,
        "select count(*) as n from work_items w join attempts a on a.owner_id = w.owner_id and a.item_id = w.id"
        " where w.owner_id = :owner and w.service = :service and w.subject_key = :subject and not w.by_person and a.started_at > :since",
        owner=owner_id,
        service=service,
        subject=subject_key,
        since=now - STARTS_WITHIN,
    )
    return int(row["n"]) if row else 0


def take_author(
    connection: Connection, owner_id: UUID, repository_id: int, author: str, rate: Rate, now: datetime
) -> datetime | None:
    """One start of an author in a repository; None when it may be, else when (threats, rule 21)."""
    place = {"owner": owner_id, "repository": repository_id, "author": author}
    fresh = full(rate, now)
    row = one(
        connection,
        # The update changes nothing and locks the row, which the sweep of old ones then leaves alone.
        "insert into author_buckets (owner_id, repository_id, author, tokens, refilled_at)"
        " values (:owner, :repository, :author, :tokens, :refilled)"
        " on conflict (owner_id, repository_id, author) do update set author = excluded.author returning tokens, refilled_at",
        **place,
        tokens=fresh.tokens,
        refilled=fresh.refilled_at,
    )
    assert row is not None  # noqa: S101  # an upsert returns its row
    taken = take(Bucket(**row), rate, 1, now)
    changed(
        connection,
        "update author_buckets set tokens = :tokens, refilled_at = :refilled"
        " where owner_id = :owner and repository_id = :repository and author = :author",
        **place,
        tokens=taken.bucket.tokens,
        refilled=taken.bucket.refilled_at,
    )
    return taken.wait_until


def suggests_only(connection: Connection, owner_id: UUID, service: str) -> bool:
    """Whether the platform, the operator or the owner lets this service only suggest."""
    row = one(
        connection,
        "select exists (select 1 from switches where scope in ('suggest:all', :service_scope, :owner_scope))"
        " or exists (select 1 from service_configs where owner_id = :owner and service = :limits"
        "   and (config -> 'suggest_only') ?| array['all', :service]) as held",
        owner=owner_id,
        service_scope=f"suggest:service:{service}",
        owner_scope=f"suggest:owner:{owner_id}",
        limits=limits.SETTINGS,
        service=service,
    )
    return bool(row and row["held"])


def day_rows(connection: Connection, owner_id: UUID, since: Any) -> list[dict[str, Any]]:
    """An owner's ledger by day, service and model, the newest day first."""
    return [
        dict(row)
        for row in rows(
            connection,
            "select day, service, model, tokens_in, tokens_out, tokens_cached, micro_usd, unpriced_tokens from spend_days"
            " where owner_id = :owner and day >= :since order by day desc, service, model",
            owner=owner_id,
            since=since,
        )
    ]
