"""The ledger of what models cost: each meter counts once, by UTC day, owner, service and model."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import Connection

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.limits import CAP, Amount, Budget, Grant, LimitsConfig, Price, Usage, cost, day_of, is_near
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one, rows
from kilo_pipelines.store.queue import audit
from kilo_pipelines.store.rows import Claimed
from kilo_pipelines.store.standing import day_rows, mark, read_limits, standings


class Spend:
    """What was spent, and how that stands against the budgets."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def record(
        self,
        owner_id: UUID,
        meter: str,
        *,
        item_id: UUID,
        session_id: UUID | None,
        service: str,
        model: str,
        usage: Usage,
        price: Price | None,
    ) -> int:
        """Brings the ledger up to what a meter shows; how many tokens were new.

        A meter only grows, and the same reading twice counts once, whoever brings it and in whatever order. What is new belongs to the
        day on which it is told, so that a session over midnight is on both days; the item's reservation shrinks by as much.
        """
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            changed(
                connection,
                "insert into spend_entries (owner_id, meter, item_id, session_id, service, model, first_at, last_at)"
                " values (:owner, :meter, :item, :session, :service, :model, :now, :now) on conflict do nothing",
                owner=owner_id,
                meter=meter,
                item=item_id,
                session=session_id,
                service=service,
                model=model,
                now=now,
            )
            known = one(
                connection,
                "select * from spend_entries where owner_id = :owner and meter = :meter for update",
                owner=owner_id,
                meter=meter,
            )
            assert known is not None  # noqa: S101  # it was just made, and entries are never deleted
            total = Usage(
                max(known["tokens_in"], usage.tokens_in),
                max(known["tokens_out"], usage.tokens_out),
                max(known["tokens_cached"], usage.cached),
            )
            money = max(known["micro_usd"], cost(price, total)) if price is not None else known["micro_usd"]
            new = total.tokens - known["tokens_in"] - known["tokens_out"]
            if not new and money == known["micro_usd"]:
                return 0
            self._add(connection, known, total, money, priced=price is not None, now=now)
            self._warn(connection, owner_id, known["service"])
        return int(new)

    @staticmethod
    def _add(connection: Connection, known: Any, total: Usage, money: int, *, priced: bool, now: Any) -> None:
        new = {
            "sent": total.tokens_in - known["tokens_in"],
            "answered": total.tokens_out - known["tokens_out"],
            "cached": total.cached - known["tokens_cached"],
            "micro": money - known["micro_usd"],
        }
        changed(
            connection,
            "update spend_entries set tokens_in = :sent, tokens_out = :answered, tokens_cached = :cached, micro_usd = :micro, last_at = :now"
            " where owner_id = :owner and meter = :meter",
            owner=known["owner_id"],
            meter=known["meter"],
            sent=total.tokens_in,
            answered=total.tokens_out,
            cached=total.cached,
            micro=money,
            now=now,
        )
        changed(
            connection,
            "update work_items set reserved_tokens = greatest(0, reserved_tokens - :tokens),"
            " reserved_micro_usd = greatest(0, reserved_micro_usd - :micro) where owner_id = :owner and id = :item"
            " and (session_id = :session or (cast(:session as uuid) is null and session_id is null))",
            owner=known["owner_id"],
            item=known["item_id"],
            session=known["session_id"],
            tokens=new["sent"] + new["answered"],
            micro=new["micro"],
        )
        changed(
            connection,
            "insert into spend_days as d (owner_id, day, service, model, tokens_in, tokens_out, tokens_cached, micro_usd, unpriced_tokens, last_at)"
            " values (:owner, :day, :service, :model, :sent, :answered, :cached, :micro, :unpriced, :now)"
            " on conflict (owner_id, day, service, model) do update set tokens_in = d.tokens_in + excluded.tokens_in,"
            " tokens_out = d.tokens_out + excluded.tokens_out, tokens_cached = d.tokens_cached + excluded.tokens_cached,"
            " micro_usd = d.micro_usd + excluded.micro_usd, unpriced_tokens = d.unpriced_tokens + excluded.unpriced_tokens,"
            " last_at = excluded.last_at",
            owner=known["owner_id"],
            day=day_of(now),
            service=known["service"],
            model=known["model"],
            unpriced=0 if priced else new["sent"] + new["answered"],
            now=now,
            **new,
        )

    def _warn(self, connection: Connection, owner_id: UUID, service: str) -> None:
        """Says once a day that a budget is near its end."""
        now = self._clock.now()
        config = read_limits(connection, owner_id)
        if config is None:
            return
        scopes = config.scopes(service)
        for (scope, budget), standing in zip(scopes, standings(connection, owner_id, scopes, now), strict=True):
            if is_near(budget, standing.spent, config.warn_percent) and mark(connection, owner_id, scope, "warned", now):
                told = {"percent": config.warn_percent, "tokens": standing.spent.tokens, "micro_usd": standing.spent.micro_usd}
                audit(connection, owner_id, "platform", "budget.warning", scope or "all services", told, now)

    def left(self, claim: Claimed) -> Grant | None:
        """What a claimed item still holds of its grant after what it spent since; None where nothing was granted."""
        if claim.granted is None:
            return None
        with self._database.owner(claim.owner_id) as connection:
            row = one(
                connection,
                "select reserved_tokens, reserved_micro_usd from work_items where owner_id = :owner and id = :item and fence = :fence",
                owner=claim.owner_id,
                item=claim.item_id,
                fence=claim.fence,
            )
        if row is None:
            return claim.granted
        money = row["reserved_micro_usd"] if claim.granted.micro_usd is not None else None
        return replace(claim.granted, tokens=row["reserved_tokens"], micro_usd=money)

    def of_session(self, owner_id: UUID, session_id: UUID) -> Amount:
        """What all launches of a session cost so far."""
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select coalesce(sum(tokens_in + tokens_out), 0) as tokens, coalesce(sum(micro_usd), 0) as micro_usd from spend_entries e"
                " join sessions s on s.owner_id = e.owner_id and s.id = e.session_id"
                " where s.owner_id = :owner and s.id = :session and e.item_id = s.item_id",
                owner=owner_id,
                session=session_id,
            )
        return Amount(int(row["tokens"]), int(row["micro_usd"])) if row else Amount()

    def of_owner(self, owner_id: UUID, days: int = 1) -> list[dict[str, Any]]:
        """The ledger of the last days (UTC, today among them), newest first: by day, service and model."""
        since = day_of(self._clock.now()) - timedelta(days=days - 1)
        with self._database.owner(owner_id) as connection:
            return day_rows(connection, owner_id, since)

    def of_item(self, owner_id: UUID, item_id: UUID) -> list[dict[str, Any]]:
        """What one item cost, by meter."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select meter, session_id, model, tokens_in, tokens_out, tokens_cached, micro_usd, first_at, last_at from spend_entries"
                " where owner_id = :owner and item_id = :item order by first_at, meter",
                owner=owner_id,
                item=item_id,
            )
        return [dict(row) for row in found]

    def standing(self, owner_id: UUID) -> list[dict[str, Any]]:
        """Each budget of an owner: what it allows, what of it is spent today and held by running work, and whether that was told."""
        now = self._clock.now()
        with self._database.owner(owner_id) as connection:
            config = read_limits(connection, owner_id) or LimitsConfig(daily=Budget(tokens=0))
            named = [("", config.daily), *((str(name), budget) for name, budget in config.services.items())]
            scopes = [(scope, budget) for scope, budget in named if budget.is_set]
            found = standings(connection, owner_id, scopes, now)
            marks = rows(
                connection,
                "select scope, level from budget_marks where owner_id = :owner and day = :day",
                owner=owner_id,
                day=day_of(now),
            )
        return [
            {
                "scope": scope or "all",
                "tokens": budget.tokens,
                "micro_usd": budget.micro_usd,
                "spent_tokens": one.spent.tokens,
                "spent_micro_usd": one.spent.micro_usd,
                "reserved_tokens": one.reserved.tokens,
                "reserved_micro_usd": one.reserved.micro_usd,
                "told": sorted(row["level"] for row in marks if row["scope"] == scope),
            }
            for (scope, budget), one in zip(scopes, found, strict=True)
        ]

    def owners_today(self) -> list[UUID]:
        """Owners that spent something today or yesterday: a day's last figures are seen after it ended, too."""
        with self._database.system() as connection:
            found = rows(connection, system.SPENDING_OWNERS.sql, since=day_of(self._clock.now()) - timedelta(days=1))
        return [row["owner_id"] for row in found]

    def gauges(self) -> list[dict[str, Any]]:
        """Today's spend over all owners, by service and model."""
        with self._database.system() as connection:
            return [dict(row) for row in rows(connection, system.SPEND_GAUGES.sql, day=day_of(self._clock.now()))]

    def stopped(self) -> list[tuple[str, str, Reason]]:
        """Whose settings let nothing run that asks a model: the owner's name, the scope, `budget_zero` or `limits_invalid`."""
        with self._database.system() as connection:
            found = rows(connection, system.LIMITS_OF_OWNERS.sql)
        stopped = []
        for row in found:
            try:
                if row["service"] == CAP:
                    named: list[tuple[str, Budget]] = [("the operator's cap", Budget.model_validate(row["config"]))]
                else:
                    config = LimitsConfig.model_validate(row["config"])
                    named = [("all services", config.daily), *config.services.items()]
            except ValidationError:
                stopped.append((row["owner"], row["service"], Reason.LIMITS_INVALID))
                continue
            stopped += [(row["owner"], scope, Reason.BUDGET_ZERO) for scope, budget in named if budget.is_zero]
        return stopped

    def over_budget(self) -> list[dict[str, Any]]:
        """Owners past a budget of today whose work spends all the same; what was spent before a budget was lowered is no fault."""
        now = self._clock.now()
        values = {"day": day_of(now), "since": now - timedelta(minutes=10), "limit": 100}
        with self._database.system() as connection:
            return [dict(row) for row in rows(connection, system.OVER_BUDGET.sql, **values)]
