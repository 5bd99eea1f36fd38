"""Whether what an analysis says of a package's uses stands up to the repository.

"Not exploitable" is the answer that closes alerts and tells strangers not to worry, and the one that a session gives by itself when its
tools were denied or a text talked it out of looking. So it is believed only as far as the platform finds the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from kilo_pipelines.services.security.analysis import DeepAnalysis
from kilo_pipelines.services.security.dismissal import LOCK_FILES, MANIFESTS

# Where a package is named without being used.
_WORDS = (".md", ".rst")


def is_use(path: str) -> bool:
    """Whether a text in this file may be a use: everything but manifests, lock files and prose."""
    name = path.rpartition("/")[2]
    return name not in LOCK_FILES and name not in MANIFESTS and not name.endswith(_WORDS)


def is_contradicted(deep: DeepAnalysis, found: Collection[str] | None) -> bool:
    """Whether "not exploitable" stands against `found`: files in which the texts that it rests on occur, None when none were looked for.

    A use that the analysis names was looked at and judged; one that it doesn't name was not.
    """
    if deep.exploitable is not False:
        return False
    if found is None:
        return True
    named = {one.path.removeprefix("/work/repo/").removeprefix("./") for one in deep.locations}
    return any(is_use(path) and path not in named for path in found)


def believed(deep: DeepAnalysis, evidence: dict[str, Any] | None) -> DeepAnalysis:
    """The analysis as far as it is believed: a contradicted one decides nothing, and a person looks."""
    if not is_contradicted(deep, (evidence or {}).get("found")):
        return deep
    return deep.model_copy(update={"exploitable": "unknown", "action": "manual_review"})
