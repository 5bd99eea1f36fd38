"""Why something that was asked for isn't done."""

from __future__ import annotations

from dataclasses import dataclass

from kilo_pipelines.core.reasons import Reason


@dataclass(frozen=True)
class Refusal:
    """A reason, and what of the request it is about."""

    reason: Reason
    detail: str
