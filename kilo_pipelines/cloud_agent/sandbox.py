"""The sandbox: bubblewrap with an allow-list of binds, an own network, an own uid where we have root (threats, rule 3).

Inside: /usr (read-only), a minimal /etc, /work/{repo,out,home}, /run/model.sock and nothing else of the machine.
docs/sandbox.md enumerates what each mode guarantees.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from kilo_pipelines.cloud_agent.protocol import SessionLimits

# Uids of sessions when we are root: far from users and from the ranges of containers (100000-165535 is subuid's default).
UID_BASE = 730_000
UID_RANGE = 10_000
OPEN_FILES = 4_096
# A session's CPU time, summed over one process: a review that computes for an hour is a miner.
CPU_SECONDS = 3_600
TMP_BYTES = 2**30  # memory of the machine: a session's /tmp is a tmpfs
PYTHON_INSIDE = "/opt/python"

_LOAD, _AND, _JUMP_EQUAL, _JUMP_GREATER, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_AUDIT_ARCH_X86_64, _X32_BIT, _CLONE_NEWUSER = 0xC000003E, 0x40000000, 0x10000000
_CLONE, _UNSHARE, _SETNS, _CLONE3 = 56, 272, 308, 435


def seccomp_filter() -> bytes:
    """A BPF program that refuses new user namespaces (the door to most kernel exploits); x86-64, like the agent's binary.

    clone3 can't be inspected, so it is "not implemented": every C library then uses clone.
    """
    program = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_GREATER, 8, 0, _X32_BIT),
        (_JUMP_EQUAL, 7, 0, _SETNS),
        (_JUMP_EQUAL, 7, 0, _CLONE3),
        (_JUMP_EQUAL, 1, 0, _CLONE),
        (_JUMP_EQUAL, 0, 3, _UNSHARE),
        (_LOAD, 0, 0, 16),
        (_AND, 0, 0, _CLONE_NEWUSER),
        (_JUMP_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ENOSYS),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in program)


class SandboxUnavailableError(Exception):
    """This machine can't make the sandbox; the message says what to do."""


@dataclass(frozen=True)
class SandboxReport:
    """What `doctor` shows: the mode, what it guarantees, what is missing with its remedy."""

    mode: str
    ok: bool
    guarantees: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SandboxSpec:
    """One process tree in the sandbox. Paths on the left are the machine's, on the right inside."""

    argv: list[str]
    env: dict[str, str]
    cwd: str
    limits: SessionLimits
    readonly: dict[Path, str] = field(default_factory=dict)
    writable: dict[Path, str] = field(default_factory=dict)
    uid: int | None = None


class SandboxProcess:
    """A running sandbox; `kill` ends its whole process namespace."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen = popen

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self.popen.poll()

    def kill(self) -> None:
        """Ends bubblewrap and with it everything inside; returns when it is gone."""
        if self.popen.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


class Sandbox:
    """Spawns process trees with bubblewrap."""

    def __init__(self, bwrap: Path) -> None:
        self._bwrap = bwrap
        self.as_root = os.getuid() == 0

    @classmethod
    def find(cls, agent_package: Path) -> Sandbox:
        """bubblewrap of the machine, else the copy in the agent's package; SandboxUnavailableError without either."""
        found = shutil.which("bwrap")
        candidates = [Path(found)] if found else []
        candidates.append(agent_package / "bin" / "bwrap")
        for candidate in candidates:
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return cls(candidate)
        raise SandboxUnavailableError("bubblewrap is missing: run `make deps`, or install the package `bubblewrap`")

    def session_uid(self, number: int) -> int | None:
        """The uid of a session as root; None as an ordinary user, whose own uid is mapped."""
        return UID_BASE + number % UID_RANGE if self.as_root else None

    def command(self, spec: SandboxSpec, filter_fd: int) -> list[str]:
        """The whole argv; bubblewrap reads its seccomp filter from the descriptor and closes it."""
        argv = [str(self._bwrap), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        # As root no user namespace: the session's own uid must exist outside. As a user there is no way without one.
        argv += [] if self.as_root else ["--unshare-user"]
        argv += ["--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox", "--seccomp", str(filter_fd)]
        argv += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(TMP_BYTES), "--tmpfs", "/tmp"]  # noqa: S108  # inside the sandbox
        argv += ["--tmpfs", "/run", "--dir", "/work", "--dir", "/opt"]
        argv += ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64"):
            argv += self._root_directory(Path("/") / name)
        # Newer bubblewraps make what they must create 0700: then git and node fail on directories that they can't look into.
        for parent in ("/etc", "/etc/ssl"):
            argv += ["--perms", "0755", "--dir", parent]
        for existing in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl/certs"):
            argv += ["--ro-bind-try", existing, existing]
        base = Path(sys.base_prefix)
        if not base.is_relative_to("/usr"):
            argv += ["--ro-bind", str(base), PYTHON_INSIDE]
        for outside, inside in spec.readonly.items():
            argv += ["--ro-bind", str(outside), inside]
        for outside, inside in spec.writable.items():
            argv += ["--bind", str(outside), inside]
        for name, value in spec.env.items():
            argv += ["--setenv", name, value]
        argv += ["--chdir", spec.cwd]
        if spec.uid is not None:
            # bubblewrap needs the capabilities for the one step to the session's uid; setpriv drops all of them with it.
            argv += ["--cap-add", "ALL", "--"]
            argv += ["/usr/bin/setpriv", f"--reuid={spec.uid}", f"--regid={spec.uid}", "--clear-groups"]
            return [*argv, "--no-new-privs", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--", *spec.argv]
        return [*argv, "--", *spec.argv]

    @staticmethod
    def _root_directory(path: Path) -> list[str]:
        """/bin and its kin as they are: links into /usr, or directories of their own."""
        if path.is_symlink():
            return ["--symlink", str(path.readlink()), str(path)]
        return ["--ro-bind", str(path), str(path)] if path.is_dir() else []

    def spawn(
        self, spec: SandboxSpec, *, stdin: IO[bytes] | int, stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> SandboxProcess:
        """Starts it, in a session of its own. Must be called from the main thread: the parent-death signal is bound to it."""
        limits = spec.limits

        def bound() -> None:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))
            resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
            if spec.uid is not None:  # counted per uid, and this uid is this session's alone
                resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))

        filter_file = os.memfd_create("seccomp", 0)
        try:
            os.write(filter_file, seccomp_filter())
            os.lseek(filter_file, 0, os.SEEK_SET)
            popen = subprocess.Popen(
                self.command(spec, filter_file),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={},
                cwd="/",
                start_new_session=True,
                preexec_fn=bound,
                pass_fds=(filter_file,),
            )
        finally:
            os.close(filter_file)
        return SandboxProcess(popen)

    def seen(self, path: str, binds: dict[Path, str]) -> str:
        """A path as the sandboxed processes see it: the inside one."""
        del binds
        return path

    def require(self) -> None:
        """SandboxUnavailableError when the walls don't stand on this machine (21 ms)."""
        report = self.probe()
        if not report.ok:
            raise SandboxUnavailableError("; ".join(report.problems))

    def probe(self) -> SandboxReport:
        """Makes a sandbox once and looks whether its walls stand."""
        spec = SandboxSpec(
            argv=["/bin/sh", "-c", "id -u; ls /home /root /var 2>/dev/null | wc -l; cat /proc/net/dev | wc -l"],
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            limits=SessionLimits(),
            uid=self.session_uid(0),
        )
        mode = "root: own uid per session" if self.as_root else "user: own user namespace"
        try:
            process = self.spawn(spec, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            out, err = process.popen.communicate(timeout=20)
        except (OSError, subprocess.SubprocessError) as failure:
            return SandboxReport(mode, False, problems=[f"bubblewrap doesn't start: {failure}"])
        if process.popen.returncode:
            remedy = "allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1), or run as root"
            return SandboxReport(
                mode, False, problems=[f"bubblewrap fails: {err.decode(errors='replace').strip()[:300]}; {remedy}"]
            )
        uid, foreign, _ = out.decode().split()
        problems = [] if foreign == "0" else ["directories of the machine are visible inside"]
        guarantees = [
            "allow-listed files",
            "no network but one socket",
            "own process namespace",
            f"uid {uid} inside",
            "no new privileges",
        ]
        if self.as_root:
            guarantees.append("number of processes bounded")
        return SandboxReport(mode, not problems, guarantees, problems)


class Unsandboxed(Sandbox):
    """No walls at all: the same processes with the machine's own paths, for machines where bubblewrap can't run.

    Only for the offline twin, whose repositories and model are ours (threats, rule 25); one session at a time, because the
    relay's port is the machine's.
    """

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"))

    def session_uid(self, number: int) -> int | None:
        del number
        return None

    def seen(self, path: str, binds: dict[Path, str]) -> str:
        for outside, inside in sorted({**binds, Path(sys.base_prefix): PYTHON_INSIDE}.items(), key=lambda pair: -len(pair[1])):
            path = path.replace(inside, str(outside))
        return path

    def spawn(
        self, spec: SandboxSpec, *, stdin: IO[bytes] | int, stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> SandboxProcess:
        binds = spec.readonly | spec.writable
        popen = subprocess.Popen(
            [self.seen(word, binds) for word in spec.argv],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={name: self.seen(value, binds) for name, value in spec.env.items()},
            cwd=self.seen(spec.cwd, binds),
            start_new_session=True,
        )
        return SandboxProcess(popen)

    def require(self) -> None:
        """Nothing to look at: there are no walls."""


def python_inside() -> str:
    """The path of a Python interpreter inside the sandbox."""
    base = Path(sys.base_prefix)
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    root = str(base) if base.is_relative_to("/usr") else PYTHON_INSIDE
    return f"{root}/bin/{name}"
