"""Whether the GitHub App is as the platform needs it: its key, clock, webhook, permissions and installations, check by check.

Holds: what is asked of GitHub and which fault each answer is. Does not belong here: who holds an installation (the caller says), how
checks are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from kilo_pipelines.core.checks import Check
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.providers.github_permissions import Missing, missing
from kilo_pipelines.providers.github_setup import (
    SKEW_SECONDS,
    AppFacts,
    GitHubAppView,
    GitHubSetup,
    HookConfig,
    InstallationFacts,
    SetupError,
)


@dataclass(frozen=True)
class Holder:
    """Whose an installation is, and which services are on there."""

    owner: str
    services: frozenset[str]


def look(
    github: GitHubSetup,
    app_id: int,
    private_key: str,
    webhook_url: str,
    holders: Mapping[int, Holder],
    *,
    again: float = 0.0,
    only: int | None = None,
) -> list[Check]:
    """All checks of the App; what can't be asked because of an earlier fault is left out.

    `again`: seconds for which a delivery that failed is sent once more and waited for; 0 only reads. `only`: the one installation that
    is told of; others are other people's.
    """
    try:
        view = github.as_app(app_id, private_key)
        app = view.app()
    except SetupError as failure:
        return [_failed("github app", failure)]
    services: frozenset[str] = frozenset().union(*(one.services for one in holders.values()))
    checks = [
        Check("github app", str(Reason.APP_KEY_REFUSED), True, f"{app.name} ({app.slug}), id {app.id}", ""),
        _clock(github.skew),
        _app_permissions(app, github.app_page(app), services),
        _asked("webhook address", lambda: _address(view.hook(), webhook_url)),
        _asked("webhook reached", lambda: _reached(view, again)),
    ]
    try:
        installations = view.installations()
    except SetupError as failure:
        return [*checks, _failed("installations", failure)]
    if not installations:
        checks.append(_fault("installations", Reason.INTEGRATION_UNKNOWN, "the App is installed nowhere", required=False))
    if only is not None:
        installations = [one for one in installations if one.id == only]
        holders = {number: holder for number, holder in holders.items() if number == only}
    there = {one.id for one in installations}
    gone = [
        _fault(f"installation {number}", Reason.INSTALLATION_GONE, f"owner {holder.owner} has it connected", required=False)
        for number, holder in sorted(holders.items())
        if number not in there
    ]
    return [*checks, *(check for one in installations for check in _installation(one, holders.get(one.id))), *gone]


def _asked(name: str, ask: Callable[[], Check]) -> Check:
    try:
        return ask()
    except SetupError as failure:
        return _failed(name, failure)


def _failed(name: str, failure: SetupError) -> Check:
    late = failure.reason is Reason.WEBHOOK_NOT_SEEN_YET  # nothing is wrong yet
    return _fault(name, failure.reason, failure.detail or MEANING[failure.reason][0], required=not late)


def _fault(name: str, reason: Reason, found: str, remedy: str = "", *, required: bool = True) -> Check:
    return Check(name, str(reason), False, found, remedy or MEANING[reason][1], required)


def _clock(skew: float | None) -> Check:
    if skew is None:
        return Check("clock", str(Reason.CLOCK_SKEW), True, "GitHub told no time", "", required=False)
    found = f"{skew:+.0f} s from GitHub's"
    return Check("clock", str(Reason.CLOCK_SKEW), abs(skew) <= SKEW_SECONDS, found, MEANING[Reason.CLOCK_SKEW][1])


def _app_permissions(app: AppFacts, page: str, services: Collection[str]) -> Check:
    lacking = missing(services, app.permissions, app.events)
    code = Reason.APP_PERMISSION_MISSING
    if not lacking:
        return Check("app permissions", str(code), True, "all that the services in use need", "")
    return _fault(
        "app permissions", code, _words(lacking), f"add them at {page}/permissions; every installation must then accept them"
    )


def _words(lacking: Collection[Missing]) -> str:
    return "; ".join(f"{one.service} needs {one.kind} {one.name}: {one.wanted}, has {one.held}" for one in lacking)


def _address(hook: HookConfig, webhook_url: str) -> Check:
    code = Reason.WEBHOOK_ADDRESS_DIFFERS
    wrong = []
    if hook.url != webhook_url:
        wrong.append(f"it leads to {hook.url or 'nowhere'}, this platform's is {webhook_url}")
    if hook.content_type != "json":
        wrong.append(f"its content type is {hook.content_type or 'form'}")
    if str(hook.insecure_ssl) not in ("0", "0.0", ""):
        wrong.append("GitHub doesn't verify the certificate")
    return _fault("webhook address", code, "; ".join(wrong)) if wrong else Check("webhook address", str(code), True, hook.url, "")


def _reached(view: GitHubAppView, again: float) -> Check:
    found = view.reached(again=again > 0, seconds=again)
    return Check("webhook reached", str(Reason.WEBHOOK_UNREACHED), True, found, "")


def _installation(one: InstallationFacts, holder: Holder | None) -> Iterator[Check]:
    name = f"installation {one.account.login}"
    if one.suspended_at is not None:
        yield _fault(
            name, Reason.INTEGRATION_SUSPENDED, f"suspended since {one.suspended_at:%Y-%m-%d}", f"unsuspend it at {one.html_url}"
        )
        return
    if holder is None:
        remedy = f"connect it: `kilo-pipelines setup github --installation {one.id}`"
        yield _fault(name, Reason.INTEGRATION_UNKNOWN, "no owner has connected it", remedy, required=False)
        return
    organization = one.target_type == "Organization"
    lacking = missing(holder.services, one.permissions, one.events, organization=organization)
    if not lacking:
        services = ", ".join(sorted(holder.services))
        found = f"grants what {services} needs" if services else "no service is on"
        yield Check(name, str(Reason.PERMISSION_MISSING), True, f"owner {holder.owner}, {found}", "")
        return
    page = f"{one.html_url}/permissions/update"
    yield _fault(name, Reason.PERMISSION_MISSING, _words(lacking), f"an owner of {one.account.login} accepts them at {page}")
