"""Rotation of the encryption key: a new key seals from now on, what the old ones sealed is sealed anew, unused ones go.

The first key always stays: the HMAC of our markers is derived from it, and markers on a provider's pages live for years.
"""

from __future__ import annotations

from sqlalchemy import Connection

from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.crypto import Cipher
from kilo_pipelines.store.database import Database, changed, rows

# Values of one transaction.
BATCH = 500


class Keys:
    """What lies sealed in the database, over all owners."""

    def __init__(self, database: Database, cipher: Cipher) -> None:
        self._database = database
        self._cipher = cipher

    def in_use(self) -> set[str]:
        """Ids of the keys that values in the database are sealed with."""
        with self._database.system() as connection:
            return {row["key"] for row in rows(connection, system.KEYS_IN_USE.sql)}

    def reseal(self) -> int:
        """Seals everything under the current key; how many values. Interrupted, it goes on where it stopped."""
        total = 0
        while True:
            with self._database.system() as connection:
                found = rows(connection, system.SESSIONS_TO_RESEAL.sql, current=self._cipher.current, limit=BATCH)
            if not found:
                return total
            for row in found:
                with self._database.owner(row["owner_id"]) as connection:
                    total += self._reseal(connection, row)

    def _reseal(self, connection: Connection, row: object) -> int:
        held = dict(row)  # type: ignore[call-overload]
        sealed, context = bytes(held["callback_token"]), f"callback:{held['id']}"
        return changed(
            connection,
            "update sessions set callback_token = :fresh where owner_id = :owner and id = :id and callback_token = :sealed",
            owner=held["owner_id"],
            id=held["id"],
            sealed=sealed,
            fresh=self._cipher.seal(self._cipher.open(sealed, context), context),
        )
