"""When one set of processes gives work over to another: an upgrade that drains, a backup that is restored.

Does not belong here: files and programs of a backup (cli/backup.py), schema changes (migrate.py).
"""

from __future__ import annotations

from datetime import datetime

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import DELIVERY, Delivery
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, one, rows

# More than any item was claimed between a backup and the end of the platform that it was made of: what that one still knows is old.
FENCE_STEP = 1_000


class Handover:
    """Over all owners: what is in hands at the moment, and what becomes of it when those hands are gone."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def busy(self) -> dict[str, int]:
        """What living processes hold at the moment: sessions, claims, effects. Whose lease is over is held by nobody."""
        with self._database.system() as connection:
            row = one(connection, system.BUSY.sql, now=self._clock.now())
        assert row is not None  # noqa: S101  # counts always answer
        return dict(row)

    def restored(self, taken_at: datetime) -> dict[str, int]:
        """Puts a database that is older than the world into a state from which recovery goes on; how many rows of what.

        Every hold is over and every fence raised, so that nothing of the lost platform counts and nothing runs beside it. Messages
        that may be sent once only and were still to be sent at the backup end `unknown`: the lost platform may have sent them.
        Everything is paused: only a person knows that the lost platform is dead. Repeating it changes nothing but fences.
        """
        now = self._clock.now()
        once = [str(kind) for kind, delivery in DELIVERY.items() if delivery is Delivery.AT_MOST_ONCE]
        with self._database.system() as connection:
            counts = {
                "items": changed(connection, system.RESTORED_ITEMS.sql, now=now, step=FENCE_STEP),
                "sessions": changed(connection, system.RESTORED_SESSIONS.sql, now=now, step=FENCE_STEP),
                "effects": changed(connection, system.RESTORED_EFFECTS.sql, now=now, step=FENCE_STEP),
                "unknown": changed(connection, system.RESTORED_ONCE.sql, now=now, once=once, reason=Reason.RESTORED),
            }
            changed(connection, system.NO_HOSTS.sql)
            if not rows(connection, system.PAUSE.sql):
                reason = f"restored from a backup of {taken_at:%Y-%m-%d %H:%M:%S} UTC"
                changed(connection, system.SET_SWITCH.sql, scope="all", kind="pause", reason=reason, actor="operator")
        return counts
