"""Bringing an integration in line with its installation as the provider tells it now.

For missed events of an installation: applied late and out of order they would undo newer ones, what the provider tells now never does.
"""

from __future__ import annotations

from collections.abc import Sequence

from kilo_pipelines.store import Integration, Repository, Store


def align(
    store: Store, integration: Integration, *, suspended: bool, repositories: Sequence[Repository], known: set[int]
) -> None:
    """The installation exists, with these repositories; repeating it changes nothing.

    `known`: what the integration had before the provider was asked, so that a repository that an event brought meanwhile stays. Of
    a suspended installation the provider shows no repositories: they stay as they are.
    """
    store.owners.set_suspended(integration, suspended)
    if not suspended:
        present = {one.external_id for one in repositories}
        store.owners.change_repositories(integration, added=list(repositories), removed=sorted(known - present))
