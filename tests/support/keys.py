"""API keys for tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from kilo_pipelines.store import Store


def api_key(store: Store, role: str, owner_id: UUID | None = None, *, person_id: UUID | None = None) -> str:
    """A key's value; an owner's lives for a decade, beyond every clock that a test moves."""
    ends = None if owner_id is None else datetime.now(UTC) + timedelta(days=3_650)
    made = store.api_keys.create(role, owner_id, expires_at=ends, person_id=person_id, name=role, actor="test")
    assert made is not None
    return made.value
