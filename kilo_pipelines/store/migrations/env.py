"""Alembic's environment: runs inside the connection that `store.migrate` hands over, under its advisory lock."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
