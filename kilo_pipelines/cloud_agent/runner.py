"""The self-hosted runner: fetch, facts, brief, sandbox, result, evidence; one session from its spec to its outcome.

A write session goes on: the tree is finalised in a second sandbox, its change checked in quarantine, committed and pushed.

Runs in the main thread of its process (bubblewrap's parent-death signal is bound to it) and leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kilo_pipelines import failpoints
from kilo_pipelines.cloud_agent import facts, finalise, git, relay
from kilo_pipelines.cloud_agent.adapters import OUT, RELAY_PORT, RELAY_URL, REPO, RESULT_PATH, AgentAdapter
from kilo_pipelines.cloud_agent.protocol import PUSHED, Heartbeat, SessionControl, SessionOutcome, SessionSpec, SessionStatus
from kilo_pipelines.cloud_agent.proxy_client import ProxyClient, ProxyError
from kilo_pipelines.cloud_agent.registry_mirror import Mirror, MirrorError
from kilo_pipelines.cloud_agent.sandbox import Sandbox, SandboxProcess, SandboxSpec, SandboxUnavailableError, python_inside
from kilo_pipelines.cloud_agent.transcript import Transcript, bind, canonical
from kilo_pipelines.cloud_agent.workspace import CHECKOUT_SCRIPT, PACK_NAME, ResultFileError, Workspace
from kilo_pipelines.core import origins
from kilo_pipelines.core.changes import ABSENT, MAX_BYTES, MAX_FILES, PLAIN, Change, Refusal, commit_text, refusal_of
from kilo_pipelines.core.evidence import Evidence
from kilo_pipelines.core.limits import Usage
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.core.session import Brief, BriefPart, SearchingTask, SessionTask, WorkspaceFacts, WriteTask
from kilo_pipelines.core.text import one_line
from kilo_pipelines.telemetry import traces

WAIT_SECONDS = 0.25  # between two looks at the child and the heartbeat
CHECKOUT_SECONDS = 120
FINALISE_SECONDS = 240  # hashes the whole tree, up to 2 GB, and may be the second of its kind on a busy machine
ANSWER_BYTES = 4_096  # of a program in the sandbox: an object id, or a reason with a path
FINAL = "/work/final"
# Silence is measured at the proxy and at the agent's output; asking the proxy more often tells nothing new.
SILENCE_LOOK_SECONDS = 2.0
NONCE_BYTES = 16
# Longer lines of an agent's output are noise, and are read in pieces; a session with more lines is no review but an attack on
# our time and memory.
EVENT_BYTES = 2**20
MAX_EVENTS = 200_000
# Files with hits that are kept as evidence; with more of them nobody says that a package is not in use.
MAX_FOUND = 200
# A search of some gigabytes of objects; a longer one counts as none.
SEARCH_SECONDS = 60.0


@dataclass(frozen=True)
class RunnerConfig:
    """Where things lie on this host."""

    repositories: Path
    work_dir: Path
    proxy_socket: Path
    sandbox: Callable[[], Sandbox]
    registries: dict[str, str] = field(default_factory=dict)  # base address by name, of all package registries


class _EndedError(Exception):
    """The session ends here with this status and reason."""

    def __init__(self, status: SessionStatus, reason: str, detail: str | None = None) -> None:
        super().__init__(reason)
        self.status, self.reason, self.detail = status, reason, detail


class SelfHostedRunner:
    """Runs sessions of one agent program."""

    def __init__(self, config: RunnerConfig, adapter: AgentAdapter) -> None:
        self._config = config
        self._adapter = adapter

    def run(
        self,
        spec: SessionSpec,
        task: SessionTask,
        control: SessionControl,
        token: Callable[[], str],
        push_token: Callable[[], str],
        accepted: SessionOutcome | None = None,
    ) -> SessionOutcome:
        """The whole session. `token` mints a read-only repository token for the courier, `push_token` one that may write
        contents; it is asked at most once, when a checked commit is ready. `accepted`: what an earlier launch was about to push,
        and the outcome when it did. TypeError for a write session whose task can't say a commit's message.
        """
        if spec.writes and not isinstance(task, WriteTask):
            raise TypeError(f"{type(task).__name__} is no WriteTask")
        session = _Run(self._config, self._adapter, spec, task, control)
        try:
            if accepted is not None and session.has_pushed(accepted, token):
                return accepted
            return session.carry_out(token, push_token)
        except _EndedError as end:
            return SessionOutcome(
                status=end.status, reason=end.reason, detail=end.detail, result=session.result, evidence=session.evidence()
            )
        except git.GitError as failure:
            return SessionOutcome(
                status=SessionStatus.FAILED,
                reason=failure.reason,
                detail=failure.detail[:2_000],
                result=session.result,
                evidence=session.evidence() if session.result else None,
            )
        except (SandboxUnavailableError, ProxyError) as failure:
            reason = Reason.SANDBOX_UNAVAILABLE if isinstance(failure, SandboxUnavailableError) else failure.reason
            return SessionOutcome(status=SessionStatus.FAILED, reason=reason, detail=str(failure)[:2_000])
        finally:
            session.clean_up()


class _Run:
    def __init__(
        self, config: RunnerConfig, adapter: AgentAdapter, spec: SessionSpec, task: SessionTask, control: SessionControl
    ) -> None:
        self._config = config
        self._adapter = adapter
        self._spec = spec
        self._task = task
        self._control = control
        self._deadline = time.monotonic() + spec.limits.hard_cap_s
        self._workspace = Workspace(config.work_dir, spec.session_id)
        self._proxy = ProxyClient(config.proxy_socket, str(spec.session_id))
        self._process: SandboxProcess | None = None
        self._facts: WorkspaceFacts | None = None
        self._brief: Brief | None = None
        self._transcript = Transcript()
        self._uid: int | None = None
        self._result_path = RESULT_PATH
        self._mirror: Mirror | None = None
        self._results: list[dict[str, Any]] = []
        self._turns: list[int] = []
        self._found: list[str] | None = None
        # Meter and reading that the engine was told last.
        self._told: tuple[str, Usage] | None = None
        # The merged, validated and bound result, once there is one; a refused change doesn't take it away.
        self.result: dict[str, Any] | None = None

    def has_pushed(self, accepted: SessionOutcome, token: Callable[[], str]) -> bool:
        """Whether the provider's branch holds the commit that an earlier launch accepted."""
        assert accepted.result is not None  # noqa: S101  # nothing else is accepted
        pushed, ref = accepted.result[PUSHED], f"refs/heads/{self._spec.branch}"
        held = self._courier(token(), {"look": [ref]}, Reason.FETCH_FAILED).get(ref)
        if held is None or held != pushed["commit"]:
            return False
        self._control.event("pushed_before", {"branch": pushed["branch"], "commit": held[:12]})
        return True

    def carry_out(self, token: Callable[[], str], push_token: Callable[[], str]) -> SessionOutcome:
        sandbox = self._config.sandbox()
        sandbox.require()
        self._result_path = sandbox.seen(RESULT_PATH, self._writable())
        self._uid = sandbox.session_uid(self._spec.session_id.int)
        self._look()
        self._control.event("fetch_started", {"repository": self._spec.repository.full_name})
        with traces.span("fetch"):
            commits = facts.fetch(self._config.repositories, self._spec, token, self._look)
        self._look()
        bare = self._bare()
        with traces.span("diff") as span:
            self._facts = facts.read(self._config.repositories, self._spec, commits)
            span.set(files=len(self._facts.entries))
        self._control.event("diff_made", {"files": len(self._facts.entries), "diff": self._facts.diff_hash[:12]})
        nonces: list[str] = []
        nonce = secrets.token_hex(NONCE_BYTES)
        self._brief = self._task.compose(self._facts, nonce, self._result_path)
        if self._brief.refused is not None:
            raise _EndedError(SessionStatus.FAILED, self._brief.refused)
        with traces.span("check_out"):
            self._check_out(sandbox, bare)
        self._open_mirror()
        # A launch that was killed told of its last seconds to nobody.
        self._tell_spent(self._proxy.end())
        socket = self._proxy.register(
            model=self._spec.model,
            turns=self._spec.limits.turns,
            tokens=self._spec.limits.tokens,
            micro_usd=self._spec.limits.micro_usd,
            price=self._spec.limits.price,
            mirror=self._mirror.socket if self._mirror else None,
        )
        for number, part in enumerate(self._brief.parts, 1):
            nonces.append(nonce)
            self._control.event("part_started", {"part": number, "of": len(self._brief.parts), "files": len(part.covers)})
            with traces.span("agent", part=number, files=len(part.covers)) as span:
                result, turn = self._converse(sandbox, socket, part, nonce)
                span.set(turns=len(self._transcript.turns), requests=self._transcript.requests)
            self._results.append(result)
            self._turns.append(turn)
        self.result = self._task.merge(self._results)
        self._control.event("result_bound", {"turns": len(self._transcript.turns), "covered": len(self._transcript.covered)})
        self._close_mirror()
        if isinstance(self._task, SearchingTask):
            self._found = files_with(bare, self._facts.head_sha, self._task.searched(self.result))
        if isinstance(self._task, WriteTask) and self._spec.writes:
            message = self._task.commit_message(self.result)
            if message is not None:
                with traces.span("push"):
                    self._push(sandbox, bare, message, push_token)
        return SessionOutcome(status=SessionStatus.COMPLETED, result=self.result, evidence=self.evidence())

    # -- steps ---------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Heartbeat and hard cap; ends the session when either says so."""
        beat = self._control.beat()
        if beat is Heartbeat.CANCEL:
            raise _EndedError(SessionStatus.INTERRUPTED, Reason.INTERRUPTED)
        if beat is Heartbeat.LOST:
            raise _EndedError(SessionStatus.FAILED, Reason.SESSION_LOST)
        if time.monotonic() > self._deadline:
            raise _EndedError(SessionStatus.FAILED, Reason.SESSION_TIMEOUT)

    def _bare(self) -> Path:
        return facts.bare_of(self._config.repositories, self._spec)

    def _courier(self, token: str, wanted: dict[str, Any], lost: Reason) -> dict[str, str]:
        return facts.errand(self._bare(), self._spec.repository.clone_url, token, wanted, lost, self._look)

    def _check_out(self, sandbox: Sandbox, bare: Path) -> None:
        """The checkout, inside the sandbox, from a pack."""
        assert self._facts is not None  # noqa: S101
        self._workspace.create(self._uid)
        git.export_pack(bare, [self._facts.head_sha, self._facts.merge_base], self._workspace.inbox / "objects.pack")
        (self._workspace.inbox / "objects.pack").chmod(0o644)
        status, _, error = self._inside(
            sandbox,
            SandboxSpec(
                argv=["/bin/sh", "-c", CHECKOUT_SCRIPT],
                env={
                    "PATH": "/usr/bin:/bin",
                    "HOME": "/work/home",
                    "GIT_CONFIG_NOSYSTEM": "1",
                    "KILO_HEAD": self._facts.head_sha,
                    "KILO_BASE": self._facts.merge_base,
                },
                cwd="/work",
                limits=self._spec.limits,
                writable=self._writable(),
                readonly={self._workspace.inbox: "/work/in"},
                uid=self._uid,
            ),
            CHECKOUT_SECONDS,
        )
        if status != 0:
            raise _EndedError(SessionStatus.FAILED, Reason.CHECKOUT_FAILED, error.strip()[-500:])
        self._control.event("checked_out", {"head": self._facts.head_sha[:12]})

    def _inside(self, sandbox: Sandbox, spec: SandboxSpec, seconds: float) -> tuple[int, bytes, str]:
        """One of our own programs in the sandbox: its exit status, and what it said on stdout and stderr, shortened."""
        process = sandbox.spawn(spec, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._process = process
        until = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < until:
            self._look()
            time.sleep(WAIT_SECONDS / 5)
        process.kill()
        assert process.popen.stdout is not None and process.popen.stderr is not None  # noqa: S101  # asked for above
        with process.popen.stdout as stdout, process.popen.stderr as stderr:
            return process.popen.returncode, stdout.read(ANSWER_BYTES), stderr.read(2_000).decode(errors="replace")

    # -- write sessions ------------------------------------------------------------------------------------------------

    def _registries(self) -> dict[str, str]:
        """Base addresses of what the owner allows, of which the platform must know each."""
        unknown = sorted(set(self._spec.registries) - set(self._config.registries))
        if unknown:
            raise _EndedError(SessionStatus.FAILED, Reason.REGISTRY_UNKNOWN, ", ".join(unknown)[:200])
        return {name: self._config.registries[name] for name in self._spec.registries}

    def _open_mirror(self) -> None:
        registries = self._registries()
        if not registries:
            return
        name = hashlib.sha256(str(self._spec.session_id).encode()).hexdigest()[:16]
        try:
            self._mirror = Mirror(self._config.proxy_socket.parent / f"r-{name}.sock", RELAY_URL, registries)
        except MirrorError as failure:
            raise _EndedError(SessionStatus.FAILED, Reason.REGISTRY_MIRROR_FAILED, str(failure)) from None

    def _close_mirror(self) -> None:
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            self._control.event("packages_asked", asdict(mirror.close()))

    def _package_environment(self) -> dict[str, str]:
        """Where package managers ask; what they would ask besides packages, and what packages would run, is switched off."""
        found = {"npm_config_ignore_scripts": "true", "YARN_ENABLE_SCRIPTS": "false"} if self._spec.writes else {}
        if self._spec.writes:
            # Where there is no registry the first refusal is the answer: their retries take more than a minute.
            found |= {} if "npm" in self._spec.registries else {"npm_config_fetch_retries": "0"}
            found |= {} if "pypi" in self._spec.registries else {"PIP_RETRIES": "0"}
        if "npm" in self._spec.registries:
            found |= {"npm_config_registry": _mirrored("npm")}
            found |= dict.fromkeys(("npm_config_audit", "npm_config_fund", "npm_config_update_notifier"), "false")
        if "pypi" in self._spec.registries:
            found |= {"PIP_INDEX_URL": _mirrored("pypi"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return found

    def _push(self, sandbox: Sandbox, bare: Path, message: str, push_token: Callable[[], str]) -> None:
        """From the dead agent's tree to a new branch, which the result then tells. Ends the session with the reason of a refusal."""
        head, branch = self._spec.head_sha, self._spec.branch
        assert branch is not None and self.result is not None  # noqa: S101  # a write session has one, after its conversation
        tree = self._finalise(sandbox)
        try:
            pack = self._workspace.read_pack(git.MAX_PACK_BYTES)
        except ResultFileError as failure:
            raise _EndedError(SessionStatus.FAILED, Reason.CHANGE_PACK_REFUSED, str(failure)) from None
        change = git.Quarantine(bare, self._workspace.quarantine)
        files = change.read(pack or b"", tree, head)
        refusal = refusal_of(files, self._spec.allow_protected) or self._brought_in(change, files, tree)
        if refusal is not None:
            raise _EndedError(SessionStatus.FAILED, refusal.reason, refusal.detail)
        commit = change.commit(tree, head, commit_text(message))
        self._control.event("change_accepted", {"files": len(files), "commit": commit[:12]})
        told = {"branch": branch, "commit": commit, "parent": head, "files": [file.path for file in files]}
        result = self.result | {PUSHED: told}
        accepted = SessionOutcome(status=SessionStatus.COMPLETED, result=result, evidence=self.evidence())
        if not self._control.accepted(accepted):
            raise _EndedError(SessionStatus.FAILED, Reason.SESSION_LOST)
        self._look()
        errand = {"push": {"objects": str(change.directory), "commit": commit, "branch": branch}}
        self._courier(push_token(), errand, Reason.PUSH_FAILED)
        failpoints.reach("after", "push")
        self.result = result
        self._control.event("pushed", {"branch": branch, "commit": commit[:12]})

    def _brought_in(self, change: git.Quarantine, files: list[Change], tree: str) -> Refusal | None:
        """What a change of manifests and lock files would have installed, or run, that nobody chose."""
        hosts = {urlsplit(base).netloc.lower() for base in self._registries().values()}
        for file in files:
            if file.new_mode != ABSENT and origins.reads(file.path):
                old = change.content(self._spec.head_sha, file.path) if file.old_mode in PLAIN else None
                refusal = origins.refusal_in(file.path, old, change.content(tree, file.path), hosts)
                if refusal is not None:
                    return refusal
        return None

    def _finalise(self, sandbox: Sandbox) -> str:
        """The tree's id as the second sandbox tells it: without a credential, a network or the agent's repository."""
        self._workspace.create_final(self._uid)
        request = {
            "tree": REPO,
            "pack": "/work/in/objects.pack",
            "git": f"{FINAL}/git",
            "target": f"{FINAL}/{PACK_NAME}",
            "head": self._spec.head_sha,
            "addresses": {_mirrored(name): base for name, base in self._registries().items()},
            "files": MAX_FILES,
            "bytes": MAX_BYTES,
        }
        status, said, error = self._inside(
            sandbox,
            SandboxSpec(
                argv=[python_inside(), "-I", "/opt/finalise.py", json.dumps(request)],
                env={"PATH": "/usr/bin:/bin"},
                cwd="/work",
                limits=self._spec.limits,
                writable={self._workspace.final: FINAL},
                readonly={
                    self._workspace.repo: REPO,
                    self._workspace.inbox: "/work/in",
                    Path(finalise.__file__): "/opt/finalise.py",
                },
                uid=self._uid,
            ),
            FINALISE_SECONDS,
        )
        try:
            answer = json.loads(said) if status == 0 else {}
        except ValueError:
            answer = {}
        if isinstance(answer, dict) and isinstance(answer.get("tree"), str):
            return str(answer["tree"])
        refused = answer.get("refused") if isinstance(answer, dict) else None
        detail = str(answer["detail"]) if refused and "detail" in answer else "".join(error.strip().splitlines()[-1:])
        raise _EndedError(
            SessionStatus.FAILED, _FINALISED.get(str(refused), Reason.CHANGE_UNREADABLE), one_line(detail[-500:], 300)
        )

    def _writable(self) -> dict[Path, str]:
        return {self._workspace.repo: REPO, self._workspace.out: OUT, self._workspace.home: "/work/home"}

    def _converse(self, sandbox: Sandbox, socket: Path, part: BriefPart, nonce: str) -> tuple[dict[str, Any], int]:
        """One part: the agent, its result, at most one repair turn; the result and the turn that it is bound to."""
        self._workspace.clear_result()
        self._proxy.next_part(nonce, part.covers)
        self._agent(sandbox, socket, part.prompt)
        result, problems = self._result(nonce)
        if problems:
            self._control.event("repair_asked", {"problems": len(problems)})
            self._workspace.clear_result()
            self._agent(sandbox, socket, self._task.repair_prompt(problems, nonce, self._result_path))
            result, problems = self._result(nonce)
        if not self._transcript.turns:
            raise _EndedError(SessionStatus.FAILED, Reason.NO_TURNS)
        if result is None or problems:
            missing = problems == [_MISSING]
            raise _EndedError(
                SessionStatus.FAILED, Reason.RESULT_MISSING if missing else Reason.RESULT_INVALID, "; ".join(problems)[:500]
            )
        turn = bind(result, self._transcript.turns, nonce)
        if turn is None:
            raise _EndedError(SessionStatus.FAILED, Reason.RESULT_UNBOUND)
        return result, turn

    def _result(self, nonce: str) -> tuple[dict[str, Any] | None, list[str]]:
        try:
            content = self._workspace.read_result(self._spec.limits.result_bytes)
            if content is None:
                return None, [_MISSING]
            decoded = json.loads(content)
        except ResultFileError as failure:
            return None, [str(failure)]
        except (ValueError, RecursionError):
            return None, ["the result file is not JSON"]
        problems = self._task.validate(decoded, nonce)
        if isinstance(decoded, dict) and PUSHED in decoded:
            problems = [*problems, f"{PUSHED}: this field is the platform's"]
        return (decoded, problems) if isinstance(decoded, dict) else (None, problems or ["the result is not an object"])

    def _agent(self, sandbox: Sandbox, socket: Path, prompt: str) -> None:
        """One run of the agent program under the watchdogs; ends the session when the run was an error."""
        prompt_file = self._workspace.root / "prompt"
        output_file = self._workspace.root / "events"
        prompt_file.write_text(prompt, encoding="utf-8", errors="backslashreplace")
        prompt_file.chmod(0o600)
        argv = [python_inside(), "-I", "/opt/relay.py", str(RELAY_PORT), "/run/model.sock", "--", *self._adapter.argv()]
        spec = SandboxSpec(
            argv=argv,
            env=self._adapter.env(self._spec.model, writes=self._spec.writes) | self._package_environment(),
            cwd=REPO,
            limits=self._spec.limits,
            writable=self._writable() | {socket: "/run/model.sock"},
            readonly=self._adapter.readonly() | {Path(relay.__file__): "/opt/relay.py"},
            uid=self._uid,
        )
        started = time.monotonic()
        with (
            prompt_file.open("rb") as stdin,
            output_file.open("wb") as stdout,
            (self._workspace.root / "errors").open("wb") as stderr,
        ):
            self._process = sandbox.spawn(spec, stdin=stdin, stdout=stdout, stderr=stderr)
        self._control.event("agent_started", {"agent": f"{self._adapter.name} {self._adapter.version}"})
        try:
            self._watch(self._process, output_file)
        finally:
            # The whole namespace is gone before anything that it wrote is read.
            self._process.kill()
        self._transcript = self._proxy.transcript()
        events = _events(output_file)
        status = self._process.popen.returncode
        self._control.event(
            "agent_ended", {"exit": status, "turns": len(self._transcript.turns), "seconds": round(time.monotonic() - started, 1)}
        )
        if self._adapter.failed(status, events):
            reason = self._transcript.last_failure or Reason.AGENT_CRASHED
            detail = f"exit {status}; {_last_line(self._workspace.root / 'errors')}"
            raise _EndedError(SessionStatus.FAILED, reason, detail)

    def _watch(self, process: SandboxProcess, output_file: Path) -> None:
        """Waits for the end under heartbeat, hard cap and silence watchdog."""
        signs, since, look = (0, 0), time.monotonic(), 0.0
        while process.poll() is None:
            self._look()
            now = time.monotonic()
            if now - look >= SILENCE_LOOK_SECONDS:
                look = now
                transcript = self._proxy.transcript()
                self._tell_spent(transcript)
                seen = (output_file.stat().st_size, transcript.requests)
                if seen != signs:
                    signs, since = seen, now
                elif now - since > self._spec.limits.silence_s:
                    raise _EndedError(SessionStatus.FAILED, Reason.SESSION_SILENT)
            try:
                process.popen.wait(WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                continue

    def _tell_spent(self, transcript: Transcript | None) -> None:
        if transcript is None:
            return
        reading = (transcript.meter, Usage(transcript.tokens_in, transcript.tokens_out, transcript.cached))
        if reading[1].tokens and reading != self._told and self._control.spent(*reading):
            self._told = reading

    # -- evidence and the end ------------------------------------------------------------------------------------------

    def evidence(self) -> Evidence | None:
        """The record of what was sent and what the result is bound to; None before the diff was made."""
        bound = self._results if self.result is not None else []
        if self._facts is None:
            return None
        ledger = facts.ledger_of(self._facts, self._transcript.covered, self._brief.excluded if self._brief else {})
        digest = hashlib.sha256(canonical(bound).encode()).hexdigest() if bound else None
        return Evidence(
            evidence_class="observed",
            repository_id=self._spec.repository.external_id,
            pull_number=self._spec.pull_number,
            base_ref=self._spec.base_ref,
            merge_base=self._facts.merge_base,
            head=self._facts.head_sha,
            diff_hash=self._facts.diff_hash,
            turns=len(self._transcript.turns),
            ledger=ledger,
            result_sha256=digest,
            result_turns=self._turns if bound else [],
            agent=self._adapter.name,
            agent_version=self._adapter.version,
            model=self._spec.model,
            tokens_in=self._transcript.tokens_in,
            tokens_out=self._transcript.tokens_out,
            transcript_sha256=self._transcript.sha256 or None,
            policy_commit=self._facts.policy_commit,
            policy_truncated=self._facts.policy_truncated,
            found=self._found,
        )

    def clean_up(self) -> None:
        """The tree is dead, the socket closed, the directories gone."""
        if self._process is not None:
            self._process.kill()
        self._close_mirror()
        with suppress(ProxyError):  # the proxy is gone, its sockets and what it saw since the last look with it
            self._tell_spent(self._proxy.end())
        self._proxy.close()
        self._workspace.remove()


_MISSING = "the result file is missing"
_FINALISED = {"nested": Reason.CHANGE_NESTED_REPOSITORY, "too_large": Reason.CHANGE_TOO_LARGE}


def files_with(bare: Path, commit: str, texts: list[str]) -> list[str] | None:
    """Files of a commit that hold one of these texts; None when nothing was or could be looked for, or too many to name hold one."""
    if not texts:
        return None
    try:
        found = sorted({path for path, _ in git.lines_with(bare, commit, texts, SEARCH_SECONDS)})
    except git.GitError:
        return None
    # A cut list would speak for what was cut off.
    return found if len(found) <= MAX_FOUND else None


def _mirrored(name: str) -> str:
    """A registry's address inside the sandbox."""
    return f"{RELAY_URL}/registry/{name}/"


def _events(path: Path) -> Iterator[dict[str, object]]:
    """JSON objects of the agent's output, one a line; other lines are the agent's noise. Too many of them are an error."""
    with path.open("rb") as lines:
        for number, line in enumerate(iter(partial(lines.readline, EVENT_BYTES), b"")):
            if number >= MAX_EVENTS:
                yield {"type": "error"}
                return
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                yield event


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2_000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
