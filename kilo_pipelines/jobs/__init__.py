"""Jobs: one a service and direction, named after the service; in-process, few ops, no outputs kept.

Holds: the wiring of ops into jobs and their tags. Does not belong here: what an op does, SQL, providers.
"""

from __future__ import annotations

from dagster import JobDefinition, in_process_executor, job

from kilo_pipelines import tags
from kilo_pipelines.ops.agent_session import run_agent_session
from kilo_pipelines.ops.code_review import launch_reviews, settle_reviews
from kilo_pipelines.ops.delivery_repair import repair_deliveries
from kilo_pipelines.ops.effects import apply_effects, apply_waiting_effects
from kilo_pipelines.ops.hosted_session import step_hosted_session
from kilo_pipelines.ops.items import settle_quietly
from kilo_pipelines.ops.security_analysis import launch_analyses, settle_analyses, sweep_analyses
from kilo_pipelines.ops.security_dismissal import apply_dismissals
from kilo_pipelines.ops.security_notices import send_notices, stage_notices
from kilo_pipelines.ops.security_remediation import launch_remediations, settle_remediations
from kilo_pipelines.ops.security_sync import sync_owners, sync_requested
from kilo_pipelines.ops.upkeep import remove_old, seal_audit

# Longer than any session's own cap by five minutes: Dagster's monitor is the last net, the runner's cap the first.
SESSION_MAX_RUNTIME_SECONDS = 1_800 + 300
# A chunk of owners, four at a time with eight minutes each at most, may take hours. At its end the next scheduled sync begins
# (schedules.SYNC_CRON), with the owners first that this one didn't come to.
SYNC_MAX_RUNTIME_SECONDS = 6 * 3_600


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH, tags.SERVICE: "code_review"},
    description="Claims waiting reviews, re-reads the pull request and launches an agent session for each.",
)
def code_review() -> None:
    apply_effects(start=launch_reviews())


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH, tags.SERVICE: "code_review"},
    description="Turns an ended session into a verdict, frees the slot and posts the review.",
)
def settle_code_review() -> None:
    apply_effects(start=settle_reviews())


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_AGENTS, tags.MAX_RUNTIME: str(SESSION_MAX_RUNTIME_SECONDS)},
    description="One self-hosted agent session: fetch, diff, sandbox, model proxy, result, callback.",
)
def agent_session() -> None:
    run_agent_session()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH},
    description="One step of a hosted agent session: prepare, initiate, read back, next message, interrupt or close.",
)
def hosted_session() -> None:
    step_hosted_session()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH},
    description="Applies effects that a run left behind: after a provider outage, a crash or a back-off.",
)
def outbox() -> None:
    apply_waiting_effects()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Seals the audit events and exports the chain's head.",
)
def audit_seal() -> None:
    seal_audit()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Removes what is older than its setting says.",
)
def retention() -> None:
    remove_old()


@job(
    executor_def=in_process_executor,
    tags={
        tags.QUEUE: tags.QUEUE_MAINTENANCE,
        tags.SERVICE: "security_agent",
        tags.MAX_RUNTIME: str(SYNC_MAX_RUNTIME_SECONDS),
    },
    description="Copies the Dependabot alerts of the named owners; each owner that was read whole is materialized.",
)
def security_sync() -> None:
    sync_owners()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE, tags.SERVICE: "security_agent"},
    description="Carries out the syncs that somebody asked for.",
)
def requested_security_sync() -> None:
    sync_requested()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH, tags.SERVICE: "remediation"},
    description="Claims waiting remediations and launches a session that may write for each.",
)
def remediation() -> None:
    apply_effects(start=launch_remediations())


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH, tags.SERVICE: "security_analysis"},
    description="Claims waiting analyses: the alert's metadata first, a session in the repository where that doesn't settle it.",
)
def security_analysis() -> None:
    launch_analyses()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH, tags.SERVICE: "security_analysis"},
    description="Turns an ended session into the analysis of its finding.",
)
def settle_security_analysis() -> None:
    settle_analyses()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE, tags.SERVICE: "security_agent"},
    description="Opens the analyses that are due and ends the waiting ones that aren't any more.",
)
def security_sweep() -> None:
    sweep_analyses()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH, tags.SERVICE: "remediation"},
    description="Turns a pushed change into a pull request, and frees the slot.",
)
def settle_remediation() -> None:
    apply_effects(start=settle_remediations())


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH, tags.SERVICE: "dismissal"},
    description="Claims waiting dismissals and dismisses findings here and at their source.",
)
def dismissal() -> None:
    apply_effects(start=apply_dismissals())


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH, tags.SERVICE: "notice"},
    description="Claims waiting notices and tells people of findings by mail, Slack and webhooks.",
)
def notice() -> None:
    apply_effects(start=send_notices())


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE, tags.SERVICE: "security_agent"},
    description="Opens the notices that people of the named owners are due.",
)
def security_notices() -> None:
    stage_notices()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_DISPATCH},
    description="Notes the ends of dismissals, notices and requested syncs that were cancelled or given up.",
)
def settle_quiet_items() -> None:
    settle_quietly()


@job(
    executor_def=in_process_executor,
    tags={tags.QUEUE: tags.QUEUE_MAINTENANCE},
    description="Finds webhooks that GitHub sent and that never came, and brings them in.",
)
def delivery_repair() -> None:
    repair_deliveries()


def default_jobs() -> list[JobDefinition]:
    """Every job of the platform."""
    return [
        code_review,
        settle_code_review,
        agent_session,
        hosted_session,
        outbox,
        audit_seal,
        retention,
        security_sync,
        security_analysis,
        settle_security_analysis,
        security_sweep,
        requested_security_sync,
        dismissal,
        notice,
        security_notices,
        remediation,
        settle_remediation,
        settle_quiet_items,
        delivery_repair,
    ]
