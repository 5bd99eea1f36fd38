"""One finding of a look at the platform, as `doctor` and the set-up page show it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One finding; `code` names the fault where `ok` is false."""

    name: str
    code: str
    ok: bool
    found: str
    remedy: str
    required: bool = True
