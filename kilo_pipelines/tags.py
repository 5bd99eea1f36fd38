"""The names of run tags: one module, so that the runs page, the launcher and the sensors mean the same thing.

At most eight `kilo/` tags a run; values are ids and repository names, never text from outside (design, section 5).
"""

from __future__ import annotations

from collections.abc import Mapping

OWNER = "kilo/owner"
SERVICE = "kilo/service"
REPOSITORY = "kilo/repository"
SUBJECT = "kilo/subject"
ITEM = "kilo/item"
SESSION = "kilo/session"
ATTEMPT = "kilo/attempt"
OUTCOME = "kilo/outcome"

ALL = (OWNER, SERVICE, REPOSITORY, SUBJECT, ITEM, SESSION, ATTEMPT, OUTCOME)

# How the launcher routes a run and finds its task again; the prefix keeps both off the runs page.
QUEUE = ".dagster/kilo-queue"
TASK = ".dagster/kilo-task"
# Each queue is served by one worker (design, section 10).
QUEUE_DISPATCH = "dispatch"
QUEUE_MAINTENANCE = "maintenance"
QUEUE_AGENTS = "agents"
QUEUES = (QUEUE_DISPATCH, QUEUE_MAINTENANCE, QUEUE_AGENTS)

MAX_RUNTIME = "dagster/max_runtime"

_BY_LABEL = {
    "owner": OWNER,
    "service": SERVICE,
    "repository": REPOSITORY,
    "subject": SUBJECT,
    "item": ITEM,
    "session": SESSION,
    "attempt": ATTEMPT,
}


def from_labels(labels: Mapping[str, object]) -> dict[str, str]:
    """Run tags from an offer's labels; unknown labels and empty values are left out."""
    return {_BY_LABEL[name]: str(value) for name, value in labels.items() if name in _BY_LABEL and value not in (None, "")}
