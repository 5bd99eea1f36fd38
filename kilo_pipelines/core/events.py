"""Which of the provider's events are taken, and for what. Everything else is stored as settled and missed by nobody."""

from __future__ import annotations

# Events that a service admits.
ADMITTED = frozenset({"pull_request", "issue_comment", "dependabot_alert"})
# Events of an installation and of its repositories: they change the integration itself.
LIFECYCLE = frozenset({"installation", "installation_repositories", "repository"})
