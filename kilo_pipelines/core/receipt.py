"""The capability receipt of a session: whose text it will see and which rights it therefore has, decided before it starts (goals, N8).

Rule of two (threats, rule 7): a session has at most two of {text by somebody without write access, secrets, effects that nobody
with write access approved}. Two of the pairs are refused, too: secrets never meet outsiders' text, and what writes to a repository
never follows an outsider's words unless somebody who may write has approved them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from kilo_pipelines.core.reasons import Reason

# `platform`: ours. `member`: somebody who may write to the repository, its default branch included. `advisory`: a database of
# advisories, which anybody may propose texts to and its keepers review. `outsider`: anybody.
Source = Literal["platform", "member", "advisory", "outsider"]


class Receipt(BaseModel):
    """What one session may see and do. Stored with it and shown; made of facts that the platform itself established."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: list[Source] = Field(min_length=1, description="whose text it sees")
    holds_secrets: bool = Field(description="secrets of a profile are in its sandbox")
    effects: bool = Field(description="something is written outside because of its result")
    approved_by: str | None = Field(default=None, description="who with write access asked for or approved exactly this")
    writes: bool = Field(description="it changes files that are pushed")
    network: Literal["none", "model", "registries", "open"]
    model: str
    turns: int
    tokens: int
    micro_usd: int | None = Field(default=None, description="None: money isn't counted")
    seconds: float
    evidence: Literal["observed", "reported"]
    sandbox: str = Field(min_length=1, description="what holds it: `bwrap`, `none` (offline twin), `hosted`")

    @property
    def outsiders_text(self) -> bool:
        """Whether somebody without write access wrote any of what it sees."""
        return "outsider" in self.text or "advisory" in self.text

    @property
    def unapproved(self) -> bool:
        """Whether it has effects that nobody with write access approved."""
        return (self.effects or self.writes) and self.approved_by is None


def violation(receipt: Receipt) -> Reason | None:
    """Why a session with these capabilities may not start; None when it may."""
    if receipt.outsiders_text and receipt.holds_secrets and receipt.unapproved:
        return Reason.RULE_OF_TWO
    if receipt.outsiders_text and receipt.holds_secrets:
        return Reason.SECRETS_MEET_OUTSIDERS
    if receipt.writes and receipt.unapproved and "outsider" in receipt.text:
        return Reason.WRITE_UNAPPROVED
    # A network that goes anywhere takes out whatever a session can see.
    if receipt.network == "open" and (receipt.holds_secrets or receipt.outsiders_text):
        return Reason.RULE_OF_TWO
    return None
