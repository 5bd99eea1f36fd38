"""Owners, their integrations, repositories and settings; lists of reviews."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.core.effects import EffectKind
from kilo_pipelines.core.limits import SPENDING_SETTINGS
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.work import SETTINGS_OF
from kilo_pipelines.store import system_statements as system
from kilo_pipelines.store.database import Database, changed, notify, one, rows
from kilo_pipelines.store.queue import audit, end_item, owner_of_item
from kilo_pipelines.store.rows import Claimed, Integration, Owner, Repository, ReviewRow, ServiceConfig, SyncTarget
from kilo_pipelines.store.standing import BUDGET_REASONS, wait_for_claims, wake


class AmbiguousInstallationError(Exception):
    """More than one owner holds this installation: nothing may be done for either (invariant 9)."""


class StaleRevisionError(Exception):
    """The settings were changed by somebody else since they were read."""


class Owners:
    """Owners and what they own."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def create(self, kind: str, name: str, plan: str = "default") -> Owner:
        """A new owner with an immutable id."""
        owner = Owner(uuid4(), kind, name, plan, True)
        with self._database.system() as connection:
            changed(
                connection,
                system.NEW_OWNER.sql,
                id=owner.id,
                kind=kind,
                name=name,
                plan=plan,
            )
        return owner

    def all(self) -> list[Owner]:
        """Every owner, oldest first."""
        with self._database.system() as connection:
            return [Owner(**row) for row in rows(connection, system.OWNERS.sql)]

    def connect(
        self, owner_id: UUID, *, provider: str, installation_id: int, account: str, repositories: list[Repository], actor: str
    ) -> UUID:
        """Connects an installation that the provider confirmed, with its repositories; the integration's id."""
        integration_id = uuid4()
        with self._database.owner(owner_id) as connection:
            known = one(
                connection,
                "select id from integrations where owner_id = :owner and provider = :provider and installation_id = :installation",
                owner=owner_id,
                provider=provider,
                installation=installation_id,
            )
            if known:
                integration_id = known["id"]
                changed(
                    connection,
                    "update integrations set disconnected_at = null, suspended_at = null, account = :account where owner_id = :owner and id = :id",
                    owner=owner_id,
                    id=integration_id,
                    account=account,
                )
            else:
                changed(
                    connection,
                    "insert into integrations (owner_id, id, provider, installation_id, account) values (:owner, :id, :provider, :installation, :account)",
                    owner=owner_id,
                    id=integration_id,
                    provider=provider,
                    installation=installation_id,
                    account=account,
                )
            self._add(connection, owner_id, integration_id, repositories)
            audit(
                connection,
                owner_id,
                actor,
                "integration.connect",
                str(integration_id),
                {"installation": installation_id},
                self._clock.now(),
            )
        return integration_id

    @staticmethod
    def _add(connection: Any, owner_id: UUID, integration_id: UUID, repositories: list[Repository]) -> None:
        for repository in repositories:
            changed(
                connection,
                "insert into repositories (owner_id, integration_id, external_id, full_name, default_branch, private)"
                " values (:owner, :integration, :external_id, :full_name, :default_branch, :private)"
                " on conflict (owner_id, external_id) do update set full_name = excluded.full_name, default_branch = excluded.default_branch,"
                " private = excluded.private, integration_id = excluded.integration_id, removed_at = null",
                owner=owner_id,
                integration=integration_id,
                **vars(repository),
            )

    def change_repositories(self, integration: Integration, *, added: list[Repository], removed: list[int]) -> None:
        """Keeps the cached list in step with the provider's events."""
        with self._database.owner(integration.owner_id) as connection:
            self._add(connection, integration.owner_id, integration.id, added)
            for external_id in removed:
                changed(
                    connection,
                    "update repositories set removed_at = :now where owner_id = :owner and integration_id = :integration and external_id = :id",
                    owner=integration.owner_id,
                    integration=integration.id,
                    id=external_id,
                    now=self._clock.now(),
                )
                self._end_work(connection, integration.owner_id, integration.id, external_id)

    def rename(self, owner_id: UUID, external_id: int, full_name: str) -> None:
        """A known repository has another name now; its id is what it is known by."""
        with self._database.owner(owner_id) as connection:
            changed(
                connection,
                "update repositories set full_name = :name where owner_id = :owner and external_id = :id and full_name <> :name",
                owner=owner_id,
                id=external_id,
                name=full_name,
            )

    def _end_work(self, connection: Any, owner_id: UUID, integration_id: UUID, external_id: int | None = None) -> None:
        """What left an owner is worked on no more: a waiting or running session would read what may be somebody else's by now."""
        live = rows(
            connection,
            "select w.id from work_items w join repositories r on r.owner_id = w.owner_id and r.external_id = w.repository_id"
            " where w.owner_id = :owner and w.ended_at is null and r.integration_id = :integration"
            " and r.external_id = coalesce(:id, r.external_id) order by w.id for update of w",
            owner=owner_id,
            integration=integration_id,
            id=external_id,
        )
        for item in live:
            end_item(
                connection,
                owner_id=owner_id,
                item_id=item["id"],
                state="cancelled",
                reason=Reason.OWNER_CHANGED,
                now=self._clock.now(),
                announced=False,
            )

    def set_suspended(self, integration: Integration, suspended: bool) -> None:
        """GitHub suspended or unsuspended the installation."""
        with self._database.owner(integration.owner_id) as connection:
            changed(
                connection,
                "update integrations set suspended_at = :at where owner_id = :owner and id = :id",
                owner=integration.owner_id,
                id=integration.id,
                at=self._clock.now() if suspended else None,
            )

    def disconnect(self, owner_id: UUID, integration_id: UUID) -> None:
        """The installation is gone: nothing of this integration is worked on any more."""
        with self._database.owner(owner_id) as connection:
            changed(
                connection,
                "update integrations set disconnected_at = :now where owner_id = :owner and id = :id",
                owner=owner_id,
                id=integration_id,
                now=self._clock.now(),
            )
            self._end_work(connection, owner_id, integration_id)

    def by_installation(self, provider: str, installation_id: int) -> Integration | None:
        """The one integration of an installation; AmbiguousInstallationError when several owners hold it."""
        with self._database.system() as connection:
            found = rows(connection, system.INTEGRATION_BY_INSTALLATION.sql, provider=provider, installation=installation_id)
        only = _only(installation_id, [Integration(**row) for row in found])
        if isinstance(only, AmbiguousInstallationError):
            raise only
        return only

    def by_installations(
        self, provider: str, installation_ids: Sequence[int]
    ) -> list[Integration | AmbiguousInstallationError | None]:
        """`by_installation` for several at once; the refusal of an ambiguous one is its answer."""
        with self._database.system_statement() as connection:
            found = rows(
                connection, system.INTEGRATIONS_BY_INSTALLATION.sql, provider=provider, installations=list(set(installation_ids))
            )
        of: dict[int, list[Integration]] = {}
        for row in found:
            of.setdefault(row["installation_id"], []).append(Integration(**row))
        return [_only(one, of.get(one, [])) for one in installation_ids]

    def integrations(self, owner_id: UUID) -> list[dict[str, Any]]:
        """An owner's integrations with their repositories."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select i.id, i.provider, i.installation_id, i.account, (i.suspended_at is not null) as suspended,"
                " (i.disconnected_at is not null) as disconnected, coalesce(array_agg(r.full_name order by r.full_name)"
                " filter (where r.removed_at is null and r.full_name is not null), '{}') as repositories"
                " from integrations i left join repositories r on r.owner_id = i.owner_id and r.integration_id = i.id"
                " where i.owner_id = :owner group by i.owner_id, i.id order by i.created_at",
                owner=owner_id,
            )
        return [dict(row) for row in found]

    def repository_ids(self, integration: Integration) -> set[int]:
        """Repositories that an integration has."""
        with self._database.owner(integration.owner_id) as connection:
            found = rows(
                connection,
                "select external_id from repositories where owner_id = :owner and integration_id = :integration and removed_at is null",
                owner=integration.owner_id,
                integration=integration.id,
            )
        return {row["external_id"] for row in found}

    def repository(self, owner_id: UUID, external_id: int) -> Repository | None:
        """One repository of an owner."""
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select external_id, full_name, default_branch, private from repositories where owner_id = :owner and external_id = :id",
                owner=owner_id,
                id=external_id,
            )
        return Repository(**row) if row else None

    def repositories(self, owner_id: UUID) -> list[dict[str, Any]]:
        """An owner's repositories by name, those that left its installations, too."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select r.external_id as repository_id, r.full_name, r.default_branch, r.private, r.integration_id, i.provider, i.installation_id,"
                " (r.removed_at is null and i.disconnected_at is null and i.suspended_at is null) as within_reach from repositories r"
                " join integrations i on i.owner_id = r.owner_id and i.id = r.integration_id where r.owner_id = :owner order by r.full_name",
                owner=owner_id,
            )
        return [dict(row) for row in found]

    def sync_targets(self, owner_id: UUID) -> list[SyncTarget]:
        """Repositories of the owner's working installations, the longest not asked for first: a sync that ran out of time goes on there.

        A repository that fails slowly was asked for, too: it stands at the end next time and takes nobody's turn.
        """
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select r.external_id as repository_id, r.full_name, i.installation_id, i.id as integration_id,"
                " max(s.not_before) filter (where s.outcome = :refused) over (partition by i.id) as refused_until from repositories r"
                " join integrations i on i.owner_id = r.owner_id and i.id = r.integration_id"
                " left join repository_syncs s on s.owner_id = r.owner_id and s.repository_id = r.external_id"
                " where r.owner_id = :owner and r.removed_at is null and i.provider = 'github' and i.suspended_at is null"
                " and i.disconnected_at is null order by s.attempted_at nulls first, r.external_id",
                owner=owner_id,
                refused=Reason.PROVIDER_AUTH,
            )
        return [SyncTarget(**row) for row in found]

    def config(self, owner_id: UUID, service: str) -> ServiceConfig | None:
        """An owner's settings of a service."""
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select config, enabled, revision, action_required from service_configs where owner_id = :owner and service = :service",
                owner=owner_id,
                service=service,
            )
        return ServiceConfig(**row) if row else None

    def services(self, owner_id: UUID) -> list[dict[str, Any]]:
        """An owner's services: on or off, and what each waits for."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection,
                "select c.service, c.enabled, c.revision, coalesce(c.action_required, (select b.action_required from service_blocks b"
                "   where b.owner_id = c.owner_id and b.action_required is not null"
                "     and coalesce(cast(:settings_of as jsonb) ->> b.service, b.service) = c.service order by b.service, b.call limit 1)) as action_required"
                " from service_configs c where c.owner_id = :owner and c.service <> all(:settings) order by c.service",
                owner=owner_id,
                settings=list(SPENDING_SETTINGS),
                settings_of=json.dumps(SETTINGS_OF),
            )
        return [dict(row) for row in found]

    def enable_service(self, owner_id: UUID, service: str, enabled: bool, *, actor: str) -> bool:
        """A person switches a service on (which clears what it waited for) or off; False when the owner has no such service."""
        with self._database.owner(owner_id) as connection:
            done = changed(
                connection,
                "update service_configs set enabled = :enabled, action_required = case when :enabled then null else action_required end,"
                " revision = revision + 1, updated_at = :now where owner_id = :owner and service = :service",
                now=self._clock.now(),
                owner=owner_id,
                service=service,
                enabled=enabled,
            )
            if done and enabled:
                changed(
                    connection,
                    "update service_blocks set times = 0, blocked_until = :now, action_required = null where owner_id = :owner"
                    " and coalesce(cast(:settings_of as jsonb) ->> service, service) = :service",
                    owner=owner_id,
                    service=service,
                    settings_of=json.dumps(SETTINGS_OF),
                    now=self._clock.now(),
                )
            if done:
                audit(
                    connection,
                    owner_id,
                    actor,
                    "service.enable" if enabled else "service.disable",
                    service,
                    {},
                    self._clock.now(),
                )
                notify(connection, f"service:{service}")
        return bool(done)

    def put_config(
        self, owner_id: UUID, service: str, config: dict[str, Any], *, enabled: bool, expected_revision: int, actor: str
    ) -> int:
        """Compare-and-set of validated settings (revision 0: none yet); the new revision or StaleRevisionError."""
        with self._database.owner(owner_id) as connection:
            if service in SPENDING_SETTINGS:
                # A claim that has read the old ones puts its item off: that has to be there when what waits is woken.
                wait_for_claims(connection, f"limits:{owner_id}")
            row = one(
                connection,
                "insert into service_configs (owner_id, service, config, enabled, updated_at) select :owner, :service, cast(:config as jsonb), :enabled, :now"
                " where :expected = 0 on conflict do nothing returning revision"
                if expected_revision == 0
                else "update service_configs set config = cast(:config as jsonb), enabled = :enabled, revision = revision + 1, updated_at = :now"
                " where owner_id = :owner and service = :service and revision = :expected returning revision",
                now=self._clock.now(),
                owner=owner_id,
                service=service,
                config=json.dumps(config),
                enabled=enabled,
                expected=expected_revision,
            )
            if row is None:
                raise StaleRevisionError(f"settings of {service} are not at revision {expected_revision}")
            audit(
                connection,
                owner_id,
                actor,
                "config.put",
                service,
                {"revision": row["revision"], "enabled": enabled},
                self._clock.now(),
            )
            if service in SPENDING_SETTINGS and wake(connection, owner_id, BUDGET_REASONS, self._clock.now()):
                notify(connection, f"service:{service}")
        return int(row["revision"])

    def models(self, owner_id: UUID) -> list[str]:
        """The models that the owner was allowed by name; none: only the platform's default one."""
        with self._database.owner(owner_id) as connection:
            found = rows(
                connection, "select model from owner_models where owner_id = :owner and allowed order by model", owner=owner_id
            )
        return [row["model"] for row in found]

    def allow_model(self, owner_id: UUID, model: str, allowed: bool, *, actor: str) -> None:
        """Lets an owner use a model, or not any more."""
        with self._database.owner(owner_id) as connection:
            changed(
                connection,
                "insert into owner_models (owner_id, model, allowed, updated_at) values (:owner, :model, :allowed, :now)"
                " on conflict (owner_id, model) do update set allowed = excluded.allowed, updated_at = excluded.updated_at",
                owner=owner_id,
                model=model,
                allowed=allowed,
                now=self._clock.now(),
            )
            audit(connection, owner_id, actor, "model.allow" if allowed else "model.forbid", model, {}, self._clock.now())


def _only(installation_id: int, found: list[Integration]) -> Integration | AmbiguousInstallationError | None:
    if len(found) > 1:
        return AmbiguousInstallationError(f"installation {installation_id} belongs to {len(found)} owners")
    return found[0] if found else None


_REVIEW = (
    f"select r.owner_id, r.item_id, w.state, {system.WHY} as reason, w.attempt, w.session_id, s.state as session_state, w.run_id, s.run_id as session_run_id,"
    " r.full_name as repository, r.repository_id, r.pull_number, r.title, r.author, r.url, r.base_ref, r.head_ref, r.head_sha, r.verdict, r.evidence,"
    " w.created_at, w.ended_at from reviews r join work_items w on w.owner_id = r.owner_id and w.id = r.item_id"
    " left join sessions s on s.owner_id = w.owner_id and s.id = w.session_id where r.owner_id = :owner"
)


class Reviews:
    """Code reviews for people: lists, one, outcomes."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def of_owner(self, owner_id: UUID, *, limit: int = 50) -> list[ReviewRow]:
        """An owner's reviews, newest first."""
        with self._database.owner(owner_id) as connection:
            found = rows(connection, f"{_REVIEW} order by w.created_at desc, w.id limit :limit", owner=owner_id, limit=limit)
        return [ReviewRow(**row) for row in found]

    def get(self, item_id: UUID) -> ReviewRow | None:
        """One review by its item's id."""
        owner_id = owner_of_item(self._database, item_id)
        if owner_id is None:
            return None
        with self._database.owner(owner_id) as connection:
            row = one(connection, f"{_REVIEW} and r.item_id = :item", owner=owner_id, item=item_id)
        return ReviewRow(**row) if row else None

    def previous_head(self, owner_id: UUID, repository_id: int, pull_number: int, head_sha: str) -> str | None:
        """Head of the newest completed review of a pull request at another commit."""
        with self._database.owner(owner_id) as connection:
            row = one(
                connection,
                "select r.head_sha from reviews r join work_items w on w.owner_id = r.owner_id and w.id = r.item_id where r.owner_id = :owner"
                " and r.repository_id = :repository and r.pull_number = :pull and r.head_sha <> :head and w.state = 'completed'"
                " order by w.ended_at desc limit 1",
                owner=owner_id,
                repository=repository_id,
                pull=pull_number,
                head=head_sha,
            )
        return row["head_sha"] if row else None

    def reviewed_elsewhere(self, claim: Claimed, head: dict[str, Any]) -> bool:
        """Whether another item reviewed this head and base, and its word on the head's check still is the last one.

        The event that opened this item came late then. Where the check was opened again since (the base moved away and back, a
        repetition was superseded) the review is repeated, or nobody would close it; and so it is when a person asked for it.
        """
        if claim.details["trigger"] != "webhook":
            return False
        with self._database.owner(claim.owner_id) as connection:
            found = one(
                connection,
                "select 1 from work_items w join reviews r on r.owner_id = w.owner_id and r.item_id = w.id where w.owner_id = :owner"
                " and w.service = 'code_review' and w.subject_key = :subject and w.id <> :item and w.state = 'completed'"
                " and r.head_sha = :head and r.base_ref = :base and w.id = (select e.item_id from work_items o"
                "   join effects e on e.owner_id = o.owner_id and e.item_id = o.id where o.owner_id = :owner and o.service = 'code_review'"
                "   and o.subject_key = :subject and e.kind = :kind and e.payload ->> 'head_sha' = :head order by e.seq desc limit 1)",
                owner=claim.owner_id,
                subject=claim.subject_key,
                item=claim.item_id,
                head=head["head_sha"],
                base=head["base_ref"],
                kind=EffectKind.GITHUB_CHECK_RUN,
            )
        return found is not None

    def owners_with_news(self, minutes: int) -> list[UUID]:
        """Owners whose reviews moved within the last minutes."""
        with self._database.system() as connection:
            found = rows(connection, system.OWNERS_WITH_NEWS.sql, since=self._clock.now() - timedelta(minutes=minutes))
        return [row["owner_id"] for row in found]

    def outcomes(self, owner_id: UUID | str, days: int) -> list[dict[str, Any]]:
        """Reviews of the last days as flat rows for a table."""
        since = self._clock.now() - timedelta(days=days)
        reviews = self.of_owner(UUID(str(owner_id)), limit=10_000)
        return [_outcome(review) for review in reviews if review.created_at >= since]


def _outcome(review: ReviewRow) -> dict[str, Any]:
    verdict, evidence = review.verdict or {}, review.evidence or {}
    ledger = evidence.get("ledger", [])
    return {
        "repository": review.repository,
        "pull": review.pull_number,
        "head": review.head_sha[:12],
        "outcome": review.state if review.ended_at else "active",
        "reason": review.reason or "",
        "check": verdict.get("conclusion", ""),
        "findings": sum(verdict.get("counts", {}).values()),
        "covered": f"{sum(1 for entry in ledger if entry.get('sent_turn'))}/{len(ledger)}" if evidence else "",
        "seconds": (review.ended_at - review.created_at).total_seconds() if review.ended_at else None,
    }
