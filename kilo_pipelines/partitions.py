"""Partitions: owners by their immutable id. A partition is never deleted when an owner is disabled, only on erasure."""

from __future__ import annotations

from dagster import DynamicPartitionsDefinition

OWNERS_NAME = "owners"
OWNERS = DynamicPartitionsDefinition(name=OWNERS_NAME)
