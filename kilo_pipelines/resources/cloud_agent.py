"""The Cloud Agent, self-hosted and hosted, as a Dagster resource."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from dagster import ConfigurableResource

from kilo_pipelines.cloud_agent.adapters import AgentAdapter
from kilo_pipelines.cloud_agent.adapters.kilo import KiloAdapter
from kilo_pipelines.cloud_agent.adapters.scripted import ScriptedAdapter
from kilo_pipelines.cloud_agent.git import GitError
from kilo_pipelines.cloud_agent.hosted import HostedClient, client_of
from kilo_pipelines.cloud_agent.install import installed, package_directory
from kilo_pipelines.cloud_agent.model_proxy import control_socket
from kilo_pipelines.cloud_agent.protocol import RepositoryRef, SessionLimits, SessionOutcome, SessionSpec
from kilo_pipelines.cloud_agent.proxy_client import ProxyError, ask
from kilo_pipelines.cloud_agent.runner import RunnerConfig, SelfHostedRunner
from kilo_pipelines.cloud_agent.sandbox import Sandbox, SandboxUnavailableError, Unsandboxed
from kilo_pipelines.cloud_agent.tree import Ground, Read, read_tree
from kilo_pipelines.core.limits import Ask, Grant, Price, Usage
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.receipt import Receipt, Source
from kilo_pipelines.providers.github import BranchHead, ProviderError, PullState
from kilo_pipelines.settings import Settings, current

CALLBACK_SECONDS = 10  # contract A9


@dataclass(frozen=True)
class ModelAnswer:
    """The arguments with which a model called the tool, as text; None when it didn't, with a `reason` when it wasn't heard at all."""

    arguments: str | None
    reason: Reason | None
    # What it cost; None when the proxy itself didn't answer.
    meter: str | None = None
    usage: Usage = Usage()  # noqa: RUF009  # frozen


def sandbox_of(settings: Settings) -> Sandbox:
    """The sandbox of this host; without one only beside the offline twin (threats, rule 25)."""
    if settings.sandbox == "none":
        if not settings.offline:
            raise SandboxUnavailableError("KILO_SANDBOX=none works only with the offline twin: unset it")
        return Unsandboxed()
    return Sandbox.find(package_directory())


def read_branch(
    owner_id: UUID, at: BranchHead, token: str, reads: Sequence[Read], seconds: float
) -> tuple[str, list[Ground | Reason]]:
    """The default branch's commit and what each read found, or why it found nothing (`cloud_agent.tree.read_tree`).

    ProviderError when the branch can't be read.
    """
    where = (current().repos_dir, owner_id, at.repository_id, at.clone_url, at.default_branch, token)
    try:
        commit, found = read_tree(*where, reads, seconds)
    except GitError as failure:
        raise ProviderError(failure.reason, retryable=failure.reason is Reason.FETCH_FAILED, detail=failure.detail) from None
    return commit, [one.reason if isinstance(one, GitError) else one for one in found]


class CloudAgentResource(ConfigurableResource[None]):
    """Builds session specs, runs sessions on this host, calls back."""

    def lease_seconds(self) -> float:
        """How long a claim stands without a heartbeat."""
        return current().lease_seconds

    def heartbeat_seconds(self) -> float:
        """How often a session extends its lease."""
        return current().heartbeat_seconds

    def cap_seconds(self) -> float:
        """Hard cap of a session."""
        return current().session_cap_seconds

    def details_url(self, run_id: str) -> str | None:
        """The run's page; only a public address may stand on a pull request, and the twin's reader is on this machine."""
        settings = current()
        return f"{settings.dagster_url}/runs/{run_id}" if settings.offline else None

    def is_hosted(self) -> bool:
        """Whether reviews go to the hosted Cloud Agent."""
        return current().agent == "hosted"

    def needs(self, *models: str | None) -> Ask:
        """What work that asks these models (None: the platform's) would use: at the price of the dearest, unknown when one's is."""
        settings = current()
        names = [one or settings.model for one in models]
        prices = [settings.model_prices[one] for one in names if one in settings.model_prices]
        if len(prices) < len(names):
            return Ask(names[0])
        return Ask(names[0], price=Price(input=max(one.input for one in prices), output=max(one.output for one in prices)))

    def price(self, model: str | None) -> Price | None:
        """What a model (None: the platform's) costs; None when nobody knows."""
        settings = current()
        return settings.model_prices.get(model or settings.model)

    def receipt(self, spec: Mapping[str, Any], *, text: list[Source], effects: bool, approved_by: str | None = None) -> Receipt:
        """What the session of a spec may see and do; `text`, `effects` and `approved_by` are its service's to know."""
        session = SessionSpec.model_validate(spec)
        # Of a hosted agent's surroundings nothing is known but that its service gives it a network.
        hosted = session.agent == "hosted"
        return Receipt(
            text=text,
            # Sessions have no profiles yet: the sandbox's environment is built from an allow-list without a secret.
            holds_secrets=False,
            effects=effects,
            approved_by=approved_by,
            writes=session.writes,
            network="open" if hosted else "registries" if session.registries else "model",
            model=session.model,
            turns=session.limits.turns,
            tokens=session.limits.tokens,
            micro_usd=session.limits.micro_usd,
            seconds=session.limits.hard_cap_s,
            evidence="reported" if hosted else "observed",
            sandbox="hosted" if hosted else current().sandbox,
        )

    def spec(
        self, session_id: UUID, owner_id: UUID, pull: PullState, task: dict[str, Any], granted: Grant | None
    ) -> dict[str, Any]:
        """What a session works on, within what its claim was granted."""
        return self._spec(
            granted,
            session_id=session_id,
            owner_id=owner_id,
            service="code_review",
            repository=RepositoryRef(
                provider="github",
                external_id=pull.repository_id,
                full_name=pull.full_name,
                clone_url=pull.clone_url,
                default_branch=pull.default_branch,
            ),
            pull_number=pull.number,
            base_ref=pull.base_ref,
            base_sha=pull.base_sha,
            head_sha=pull.head_sha,
            checkout_ref=f"refs/pull/{pull.number}/head",
            task=task,
        )

    def branch_spec(
        self,
        session_id: UUID,
        owner_id: UUID,
        service: str,
        at: BranchHead,
        task: dict[str, Any],
        granted: Grant | None,
        *,
        model: str | None,
        **write: Any,
    ) -> dict[str, Any]:
        """What a session on a branch's head works on; `write` is what a write session may do (`SessionSpec`), none reads only."""
        return self._spec(
            granted,
            session_id=session_id,
            owner_id=owner_id,
            service=service,
            repository=RepositoryRef(
                provider="github",
                external_id=at.repository_id,
                full_name=at.full_name,
                clone_url=at.clone_url,
                default_branch=at.default_branch,
            ),
            pull_number=None,
            base_ref=at.default_branch,
            base_sha=at.head_sha,
            head_sha=at.head_sha,
            checkout_ref=f"refs/heads/{at.default_branch}",
            task=task,
            **({"model": model} if model is not None else {}),
            **write,
        )

    @staticmethod
    def _spec(granted: Grant | None, **values: Any) -> dict[str, Any]:
        settings = current()
        limits = SessionLimits(
            silence_s=settings.session_silence_seconds,
            hard_cap_s=settings.session_cap_seconds,
            price=settings.model_prices.get(values.get("model", settings.model)),
        )
        if granted is not None:
            limits = limits.model_copy(update=asdict(granted))
        return SessionSpec(**{"agent": settings.agent, "model": settings.model, "limits": limits, **values}).model_dump(
            mode="json"
        )

    def may_use(self, model: str | None, allowed: Sequence[str]) -> bool:
        """Whether an owner's work may name this model: the platform's default, or one of its others that the owner was allowed."""
        settings = current()
        return model in (None, settings.model) or (model in allowed and model in settings.all_models)

    def ask(self, question: dict[str, Any], *, model: str | None, seconds: float, max_tokens: int) -> ModelAnswer:
        """Asks a model one structured question (`messages`, `tool`) through the model proxy, which alone holds the key.

        Without an answer there is a reason: `model_unreachable` may pass, `insufficient_credits` and `model_refused` need somebody.
        """
        settings = current()
        whole = {**question, "model": model or settings.model, "seconds": seconds, "max_tokens": max_tokens}
        try:
            answer = ask(control_socket(settings), whole)
        except ProxyError:
            return ModelAnswer(None, Reason.MODEL_UNREACHABLE)
        used = Usage(answer.get("tokens_in", 0), answer.get("tokens_out", 0), answer.get("cached", 0))
        return ModelAnswer(
            answer.get("arguments"), Reason(answer["reason"]) if "reason" in answer else None, answer.get("meter"), used
        )

    def runner(self, agent: str) -> SelfHostedRunner:
        """A runner for one agent program."""
        settings = current()
        adapter: AgentAdapter = (
            KiloAdapter(package_directory()) if agent == "kilo" else ScriptedAdapter(settings.scripted_behaviour)
        )
        config = RunnerConfig(
            settings.repos_dir, settings.work_dir, control_socket(settings), lambda: sandbox_of(settings), settings.registries
        )
        return SelfHostedRunner(config, adapter)

    def hosted(self) -> HostedClient:
        """The hosted service's client; CloudAgentError `agent_unavailable` while address, token or key are missing."""
        return client_of(current())

    def hosted_callback(self, session_id: UUID, token: str) -> tuple[str, str] | None:
        """Where the hosted service tells that a turn ended, and with which token; None: it is polled.

        The token goes over TLS or not at all; beside the offline twin it stays on this machine.
        """
        settings = current()
        origin = settings.public_origin or settings.public_url
        if not settings.offline and not origin.startswith("https://"):
            return None
        return f"{origin}/callbacks/sessions/{session_id}", token

    def hosted_organization(self) -> str | None:
        """The organization that hosted sessions are charged to."""
        return current().cloud_agent_organization

    def hosted_poll(self) -> timedelta:
        """How long until a hosted session is looked at again without a callback."""
        return timedelta(seconds=current().cloud_agent_poll_seconds)

    def repositories(self) -> Path:
        """Where the platform's bare repositories lie."""
        return current().repos_dir

    def agent_ready(self, agent: str) -> bool:
        """Whether the agent's program is installed."""
        return agent != "kilo" or installed()

    def call_back(self, session_id: UUID, token: str, outcome: SessionOutcome) -> int:
        """Tells the ingress that a session ended; HTTP status, 0 when nobody answered. The stored row is the truth."""
        settings = current()
        body = {
            "sessionId": str(session_id),
            "cloudAgentSessionId": str(session_id),
            "status": str(outcome.status),
            "errorMessage": outcome.reason,
            "idempotencyKey": str(session_id),
        }
        try:
            answer = httpx.post(
                f"{settings.callback_url}/callbacks/sessions/{session_id}",
                json=body,
                headers={"x-callback-token": token},
                timeout=CALLBACK_SECONDS,
                trust_env=False,
            )
        except httpx.HTTPError:
            return 0
        return answer.status_code
