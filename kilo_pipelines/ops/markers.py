"""The platform's comment markers, under a key of its own."""

from __future__ import annotations

from kilo_pipelines.core.markers import Marker
from kilo_pipelines.store import Store


def marker_of(store: Store) -> Marker:
    """Markers under a key that is derived from the platform's encryption key."""
    return Marker(store.cipher.derive("comment-markers"))
