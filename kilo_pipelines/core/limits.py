"""What an owner may spend in a day, what one session is granted of it, and whose settings say so. Pure; money is in micro-USD.

A day is a UTC day: one clock for the ledger, the budget and whoever reads both. A price in USD per million tokens is, number for
number, micro-USD per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_CEILING, Decimal
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from kilo_pipelines.core.reasons import Reason

# Under which name an owner's limits stand beside the settings of its services.
SETTINGS = "limits"
# And what the operator lets it spend at most, which its own limits don't lift.
CAP = "cap"
# Both hold from the start, are no services, and are never off.
SPENDING_SETTINGS = (SETTINGS, CAP)
# Services that call a model; the others (dismissals, notices, syncs) spend nothing and meet no budget.
SPENDING = frozenset({"code_review", "security_analysis", "remediation"})
Spender = Literal["code_review", "security_analysis", "remediation"]
MICRO = 1_000_000

# What one session may use at most, in plus out, when its owner says nothing: four times what the largest review of the corpus took.
SESSION_TOKENS = 2_000_000
# With less a session can't read a small diff and answer (brief, tools and some turns): it would burn the rest of a day for nothing.
LEAST_TOKENS = 20_000


class Price(BaseModel):
    """What a model costs, in USD per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Decimal = Field(ge=0, description="tokens that are sent")
    output: Decimal = Field(ge=0, description="tokens that are answered")
    cached: Decimal | None = Field(default=None, ge=0, description="sent tokens that the provider had; unset: as any others")

    def worst(self, tokens: int) -> int:
        """Micro-USD of so many tokens, whichever way they go."""
        return _up(tokens * max(self.input, self.output))


@dataclass(frozen=True)
class Usage:
    """Tokens of one meter since it began; `cached` of them are among `tokens_in`."""

    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = 0

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


def cost(price: Price, usage: Usage) -> int:
    """Micro-USD, rounded up: a ledger may not tell less than the bill."""
    cached = min(usage.cached, usage.tokens_in)
    dear = price.input if price.cached is None else price.cached
    return _up((usage.tokens_in - cached) * price.input + cached * dear + usage.tokens_out * price.output)


def _up(value: Decimal) -> int:
    return int(value.to_integral_value(ROUND_CEILING))


def day_of(now: datetime) -> date:
    """The UTC day of a moment."""
    return now.astimezone(UTC).date()


def next_day(now: datetime) -> datetime:
    """When the next UTC day begins, and with it a new budget."""
    return datetime.combine(day_of(now) + timedelta(days=1), time(), UTC)


Login = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,100}(\[bot\])?$")]
Usd = Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=6)]


class Budget(BaseModel):
    """What may be spent in a UTC day. Unset: no bound; zero: nothing runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int | None = Field(default=None, ge=0, le=10**15)
    usd: Usd | None = None

    @property
    def micro_usd(self) -> int | None:
        return None if self.usd is None else int(self.usd * MICRO)

    @property
    def is_set(self) -> bool:
        return self.tokens is not None or self.usd is not None

    @property
    def is_zero(self) -> bool:
        return self.tokens == 0 or self.usd == 0


class LimitsConfig(BaseModel):
    """An owner's limits (`budgets set`); unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    daily: Budget = Field(default=Budget(), description="What the owner may spend in a UTC day, over all services.")
    services: dict[Spender, Budget] = Field(default={}, description="What single services may spend of it.")
    warn_percent: int = Field(default=80, ge=1, le=100, description="Share of a budget at which the owner is warned, once a day.")
    session_tokens: int | None = Field(
        default=None, ge=1_000, le=100_000_000, description="Tokens of one session at most; unset: 2,000,000."
    )
    session_usd: Usd | None = Field(default=None, gt=0, description="USD of one session at most; needs a price of its model.")
    suggest_only: list[Literal["all", "code_review", "dismissal", "remediation"]] = Field(
        default=[], description="Services that write nothing outside until a person approves it."
    )
    outsiders: Literal["approve", "review", "skip"] = Field(
        default="approve",
        description="Pull requests from forks or of authors without write access: wait for `/ok-to-test`, are reviewed, or are left.",
    )
    allowed_bots: list[Login] = Field(
        default=[], max_length=50, description="Bots whose pull requests are reviewed although bots are left alone."
    )
    author_starts_per_hour: float = Field(
        default=60, gt=0, le=10_000, description="Automatic starts of one author in one repository, on the long run."
    )
    author_burst: int = Field(default=100, ge=1, le=10_000, description="Automatic starts of one author at once.")
    push_debounce_seconds: float = Field(
        default=5, ge=0, le=600, description="A push onto work under way waits so long for the next one."
    )
    automation_starts: int = Field(
        default=40, ge=1, le=10_000, description="Automatic starts of one subject within 24 hours; then people start it."
    )

    @model_validator(mode="after")
    def _plain(self) -> Self:
        """A service's budget above the owner's would be a promise that the owner's takes back."""
        for name, budget in self.services.items():
            for kind in ("tokens", "usd"):
                mine, whole = getattr(budget, kind), getattr(self.daily, kind)
                if mine is not None and whole is not None and mine > whole:
                    raise ValueError(f"services.{name}.{kind} is above daily.{kind}")
        return self

    def under(self, cap: Budget) -> LimitsConfig:
        """The same, with no more for the day than the operator's cap."""
        tokens = [one for one in (self.daily.tokens, cap.tokens) if one is not None]
        usd = [one for one in (self.daily.usd, cap.usd) if one is not None]
        return self.model_copy(update={"daily": Budget(tokens=min(tokens, default=None), usd=min(usd, default=None))})

    def scopes(self, service: str) -> list[tuple[str, Budget]]:
        """The budgets that work of a service meets, by scope: the owner's whole (``), then the service's own."""
        own = next((budget for name, budget in self.services.items() if name == service), Budget())
        return [(scope, budget) for scope, budget in (("", self.daily), (service, own)) if budget.is_set]


@dataclass(frozen=True)
class Amount:
    """Tokens and micro-USD."""

    tokens: int = 0
    micro_usd: int = 0


@dataclass(frozen=True)
class Standing:
    """A budget with what of it is spent, and what running work holds of it beyond that."""

    budget: Budget
    spent: Amount
    reserved: Amount


@dataclass(frozen=True)
class Ask:
    """What work would use: of which model, so many tokens at most, at that price (None: nobody knows it)."""

    model: str = ""
    tokens: int = SESSION_TOKENS
    price: Price | None = None


@dataclass(frozen=True)
class Grant:
    """What one session may use. It is reserved in whole at the claim; `micro_usd` is None where no money is counted.

    `cut`: the day's budget made it less than a session of this owner has on other days.
    """

    tokens: int
    micro_usd: int | None
    cut: bool = False


def grant(standings: Sequence[Standing], ask: Ask, config: LimitsConfig) -> Grant | Reason:
    """What a claim may give, or why it may give nothing.

    All that is left at most: what is granted is reserved, so that spent plus reserved never exceeds a budget, however many claim
    at once. Estimates would let more run beside each other and turn the stop into a wish. `budget_reserved` passes when running
    work ends, `budget_exhausted` with the day.
    """
    if any(one.budget.is_zero for one in standings):
        return Reason.BUDGET_ZERO
    money = [(one.budget.micro_usd, one.spent.micro_usd, one.reserved.micro_usd) for one in standings]
    whole = min(ask.tokens, config.session_tokens or ask.tokens)
    tokens = _most(whole, [(one.budget.tokens, one.spent.tokens, one.reserved.tokens) for one in standings], LEAST_TOKENS)
    if isinstance(tokens, Reason):
        return tokens
    if config.session_usd is None and all(bound is None for bound, _, _ in money):
        return Grant(tokens, None, tokens < whole)
    if ask.price is None:
        return Reason.PRICE_UNKNOWN
    worst = ask.price.worst(tokens)
    session = worst if config.session_usd is None else min(worst, int(config.session_usd * MICRO))
    micro_usd = _most(session, money, ask.price.worst(LEAST_TOKENS))
    if isinstance(micro_usd, Reason):
        return micro_usd
    return Grant(tokens, micro_usd, tokens < whole or micro_usd < session)


def _most(wanted: int, bounds: Sequence[tuple[int | None, int, int]], least: int) -> int | Reason:
    """`wanted`, or what every bound (budget, spent, reserved) leaves of it, where that is worth a start."""
    found = wanted
    for budget, spent, reserved in bounds:
        if budget is None:
            continue
        needed = min(least, budget, wanted)
        if budget - spent < needed or budget <= spent:
            return Reason.BUDGET_EXHAUSTED
        if budget - spent - reserved < max(needed, 1):
            return Reason.BUDGET_RESERVED
        found = min(found, budget - spent - reserved)
    return found


def is_near(budget: Budget, spent: Amount, percent: int) -> bool:
    """Whether so many percent of a budget, of its tokens or of its money, are spent."""
    pairs = ((budget.tokens, spent.tokens), (budget.micro_usd, spent.micro_usd))
    return any(bound is not None and used * 100 >= bound * percent for bound, used in pairs)
