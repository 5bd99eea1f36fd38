"""From inside the sandbox: what it can see and reach, enumerated by an agent that looks for everything (threats, rules 3-5)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kilo_pipelines.cloud_agent import workspace as workspaces
from kilo_pipelines.cloud_agent.adapters.scripted import ScriptedAdapter
from kilo_pipelines.cloud_agent.install import package_directory
from kilo_pipelines.cloud_agent.protocol import SessionLimits
from kilo_pipelines.cloud_agent.sandbox import Sandbox, SandboxSpec
from kilo_pipelines.cloud_agent.workspace import ResultFileError, Workspace
from tests.support.sessions import SessionWorld

CANARY = "canary-platform-secret-77"


@pytest.fixture(scope="module")
def report() -> Iterator[dict[str, Any]]:
    """What the exploring agent wrote down before its result was refused."""
    os.environ["PLATFORM_CANARY"] = CANARY
    world = SessionWorld()
    seen: list[bytes] = []
    original = Workspace.read_result

    def keep(self: Workspace, limit: int) -> bytes | None:
        content = original(self, limit)
        if content:
            seen.append(content)
        return content

    workspaces.Workspace.read_result = keep  # type: ignore[method-assign]
    try:
        world.run(world.spec(world.control("open-pull", kind="clean")), ScriptedAdapter("explore"))
    finally:
        workspaces.Workspace.read_result = original  # type: ignore[method-assign]
        world.close()
        del os.environ["PLATFORM_CANARY"]
    yield json.loads(seen[0])


def test_only_the_allow_list_is_visible(report: dict[str, Any]) -> None:
    assert set(report["root"]) <= {
        "bin",
        "dev",
        "etc",
        "lib",
        "lib32",
        "lib64",
        "opt",
        "proc",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr",
        "work",
    }
    for place in ("/home", "/root", "/var", "/mnt", "/srv"):
        assert place not in report["mounts"] and place.strip("/") not in report["root"]


def test_the_environment_holds_nothing_of_ours(report: dict[str, Any]) -> None:
    assert set(report["environment"]) <= {
        "HOME",
        "PATH",
        "LANG",
        "AGENT_BASE_URL",
        "AGENT_MODEL",
        "PWD",
        "LC_CTYPE",
        "SHLVL",
        "_",
    }
    assert CANARY not in json.dumps(report)


def test_the_one_socket_is_the_only_way_out(report: dict[str, Any]) -> None:
    assert report["sockets"] == ["/run/model.sock"]
    assert report["host_loopback"] != "connected" and report["internet"] != "connected"
    assert {name.strip() for name in report["interfaces"] if name.strip() and "|" not in name} <= {"lo", "Inter-", "face"}


def test_processes_and_descriptors_of_others_are_not_there(report: dict[str, Any]) -> None:
    assert len(report["processes"]) <= 8
    assert all(not one.startswith(("/root", "/home", "/var")) for one in report["descriptors"])


def test_no_privilege_is_left_and_none_can_be_made(report: dict[str, Any]) -> None:
    capabilities = {line.split(":")[0]: line.split()[1] for line in report["capabilities"]}
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(capabilities[name], 16) == 0, name
    assert capabilities["NoNewPrivs"] == "1"
    assert report["user_namespace"] != "made"
    assert report["groups"] in ([], [report["gid"]])


def test_only_the_sessions_own_directories_are_writable(report: dict[str, Any]) -> None:
    for path in report["writable"]:
        assert path.startswith(("/work/repo", "/work/out", "/work/home", "/run/model.sock")) or path in (
            "/work",
            "/run",
            "/opt",
        ), path


@pytest.mark.skipif(os.getuid() != 0, reason="an own uid per session needs root; as a user the user's own uid is mapped")
def test_as_root_each_session_has_its_own_unprivileged_uid(report: dict[str, Any]) -> None:
    assert report["uid"] >= 730_000 and report["gid"] == report["uid"]


def _spawn(script: str, tmp_path: Path, **limits: Any) -> tuple[int, str]:
    sandbox = Sandbox.find(package_directory())
    uid = sandbox.session_uid(7)
    out = tmp_path / "out"
    out.mkdir()
    if uid is not None:
        os.chown(out, uid, uid)
    spec = SandboxSpec(
        ["/bin/sh", "-c", script], {"PATH": "/usr/bin:/bin"}, "/", SessionLimits(**limits), writable={out: "/work/out"}, uid=uid
    )
    process = sandbox.spawn(spec, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = process.popen.communicate(timeout=60)
    return process.popen.returncode, output.decode()


def test_programs_find_the_little_of_etc_that_they_need(tmp_path: Path) -> None:
    """git and node fail on a configuration that they may not look for; that there is none is fine."""
    status, output = _spawn("cd /work/out && git init -q . && git status -s && cat /etc/ssl/openssl.cnf", tmp_path)
    assert status != 0 and "No such file" in output and "ermission denied" not in output


def test_file_size_is_bounded(tmp_path: Path) -> None:
    status, _ = _spawn("head -c 20000000 /dev/zero > /work/out/big", tmp_path, file_bytes=1_000_000)
    assert status != 0 and (tmp_path / "out" / "big").stat().st_size <= 1_000_000


def test_memory_is_bounded(tmp_path: Path) -> None:
    status, output = _spawn(
        "awk 'BEGIN { s = \"x\"; for (i = 0; i < 40; i++) s = s s; print length(s) }'", tmp_path, memory_bytes=200_000_000
    )
    assert status != 0, output


@pytest.mark.skipif(os.getuid() != 0, reason="processes are bounded per uid, and only root gives a session its own")
def test_the_number_of_processes_is_bounded(tmp_path: Path) -> None:
    _, output = _spawn("for i in $(seq 200); do sleep 5 & done; echo started", tmp_path, processes=20)
    assert "annot fork" in output or "unavailable" in output.lower()


def _workspace(tmp_path: Path) -> Workspace:
    from uuid import uuid4

    found = Workspace(tmp_path, uuid4())
    found.create(None)
    return found


def test_a_result_is_a_small_regular_file_with_one_link(tmp_path: Path) -> None:
    found = _workspace(tmp_path)
    result = found.out / "result.json"
    assert found.read_result(100) is None
    result.write_text("{}")
    assert found.read_result(100) == b"{}"
    with pytest.raises(ResultFileError):
        found.read_result(1)
    os.link(result, found.out / "second")
    with pytest.raises(ResultFileError):
        found.read_result(100)
    for make in (lambda: result.symlink_to("/etc/passwd"), lambda: os.mkfifo(result), result.mkdir):
        found.clear_result()
        make()
        with pytest.raises(ResultFileError):
            found.read_result(100)
    found.remove()
    assert not found.root.exists()


def test_an_output_directory_replaced_by_a_link_is_not_followed(tmp_path: Path) -> None:
    found = _workspace(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "result.json").write_text("{}")
    found.out.rmdir()
    found.out.symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match=r"Not a directory|Too many"):
        found.read_result(100)
    found.remove()
    assert (tmp_path / "secret" / "result.json").exists()
