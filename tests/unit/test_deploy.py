"""What lies under deploy/ is the platform that the program is: the same processes, settings, ports and secrets, and files that are valid."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kilo_pipelines.cli import roles, supervisor
from kilo_pipelines.cli.main import main
from kilo_pipelines.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
# The oldest release whose stable fields the manifests need (user namespaces of pods), and the newest that the schemas know.
KUBERNETES = ("1.33", kubernetes_validate.latest_version())
SETTINGS = {f"KILO_{name.upper()}" for name in Settings.model_fields}
OBJECTS = [
    pytest.param(path.name, one, id=f"{path.stem}-{one['kind']}-{one['metadata']['name']}")
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for one in yaml.safe_load_all(path.read_text())
]


def _workloads() -> list[dict[str, Any]]:
    return [one.values[1] for one in OBJECTS if one.values[1]["kind"] in ("Deployment", "StatefulSet", "Job")]


def _containers() -> list[dict[str, Any]]:
    """Those of our image."""
    found = [one for workload in _workloads() for one in workload["spec"]["template"]["spec"]["containers"]]
    return [one for one in found if one["image"] == "kilo-pipelines"]


def _compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def _ours() -> dict[str, dict[str, Any]]:
    return {name: one for name, one in _compose()["services"].items() if "kilo-pipelines" in one["image"]}


def _processes(commands: list[list[str]]) -> set[str]:
    assert all(command[0] in main.commands for command in commands), "every command exists"
    return {command[1] for command in commands if command[0] == "run"}


def _unit(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / name).read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = Settings(home=tmp_path, run_dir=tmp_path / "s")
    roles.write_secret(found.secrets_dir / "database.json", '{"dagster": "postgresql+psycopg2://x@y/dagster"}')
    roles.write_secret(found.broker_password_file, "x")
    return found


def test_supervisor_compose_kubernetes_and_systemd_start_the_same_processes(settings: Settings) -> None:
    children = [*supervisor.outer_processes(settings), *supervisor.dagster_processes(settings)]
    everywhere = {
        "supervisor": {child.name for child in children},
        "run": set(roles.ROLES),
        "compose": _processes([one["command"] for one in _ours().values()]),
        "kubernetes": _processes([one["args"] for one in _containers()]),
        "systemd": {
            name.removeprefix("kilo-pipelines@").removesuffix(".service")
            for words in _unit("kilo-pipelines.target")["Wants"]
            for name in words.split()
        },
    }
    assert len({frozenset(names) for names in everywhere.values()}) == 1, everywhere
    for child in children:
        assert roles.child_of(settings, child.name).argv == child.argv


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize(("file", "one"), OBJECTS)
def test_every_manifest_is_valid_in_the_strict_sense(file: str, one: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(one, version, strict=True)
    assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "kilo-pipelines", file


def test_every_setting_that_is_set_exists() -> None:
    named = {entry["name"] for one in _containers() for entry in one.get("env", [])}
    named |= set(next(one.values[1] for one in OBJECTS if one.values[1]["kind"] == "ConfigMap")["data"])
    named |= {name for one in _ours().values() for name in one["environment"]}
    for file in (DEPLOY / "Containerfile", DEPLOY / "platform.env.example", *(DEPLOY / "systemd").glob("*.service")):
        named |= set(re.findall(r"\b(KILO_[A-Z_]+)=", file.read_text()))
    assert named - {"KILO_IMAGE"} <= SETTINGS


def test_each_container_is_given_its_own_secrets_and_no_others() -> None:
    for one in _containers():
        name = "init" if one["args"] == ["init"] else one["args"][1]
        (mount,) = (m for m in one["volumeMounts"] if m["mountPath"] == "/run/kilo-secrets")
        assert mount["name"] == f"secrets-{name}" and mount["readOnly"]
    for service in _ours().values():
        name = service["command"][-1]
        assert [one for one in service["volumes"] if "secrets" in one] == [f"./secrets/{name}:/run/kilo-secrets:ro"]
    stored = {one.values[1]["metadata"]["name"] for one in OBJECTS if one.values[0] == "secrets.template.yaml"}
    used = {
        volume["secret"]["secretName"]
        for workload in _workloads()
        for volume in workload["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    }
    assert stored == used
    assert not any(
        "data" in one.values[1] or "stringData" in one.values[1] for one in OBJECTS if one.values[1]["kind"] == "Secret"
    )


def test_ports_are_those_of_the_settings_and_none_of_the_database_is_published() -> None:
    defaults = Settings.model_fields
    ports = {port["name"]: port["containerPort"] for one in _containers() for port in one.get("ports", [])}
    assert ports == {"public": defaults["public_port"].default, "admin": defaults["admin_port"].default}
    services = _compose()["services"]
    published = {name: one["ports"] for name, one in services.items() if "ports" in one}
    assert published == {"public": ["${KILO_PUBLISH:-127.0.0.1}:8080:8080"], "admin": ["127.0.0.1:8081:8081"]}
    assert services["postgres"]["networks"] == services["broker"]["networks"] == ["data"]
    assert _compose()["networks"]["data"] == {"internal": True}


def test_no_container_has_more_rights_than_it_needs_and_only_agents_have_a_wider_profile() -> None:
    for workload in _workloads():
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        for one in pod["containers"]:
            context = one["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]} and "privileged" not in context
            assert one["resources"]["limits"]["memory"]
            assert ("procMount" in context) == (one["name"] == "worker-agents")
    for name, service in {**_ours(), "broker": _compose()["services"]["broker"]}.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "privileged" not in service
        assert ("seccomp:unconfined" in service["security_opt"]) == (name == "worker-agents")
        assert "no-new-privileges:true" in service["security_opt"]


def test_what_shares_sockets_shares_a_directory_of_one_machine() -> None:
    """The code server asks nobody for a password: it is reached over a socket by its neighbours, never over the network."""
    engine = {"dagster-code", "dagster-daemon", "dagster-ui", "admin"}
    assert {name for name, one in _ours().items() if "engine:/run/kilo" in one["volumes"]} == engine
    pod = next(one for one in _workloads() if one["metadata"]["name"] == "kilo-engine")
    assert {one["name"] for one in pod["spec"]["template"]["spec"]["containers"]} == engine
    assert pod["spec"]["replicas"] == 1 and pod["spec"]["strategy"] == {"type": "Recreate"}
    with_agents = [one for one in _workloads() if one["metadata"]["name"] in ("kilo-worker-agents", "kilo-worker-dispatch")]
    for one in with_agents:
        assert any(container["name"] == "model-proxy" for container in one["spec"]["template"]["spec"]["containers"])


def test_everything_is_denied_but_what_is_named() -> None:
    policies = [one.values[1]["spec"] for one in OBJECTS if one.values[1]["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    components = {one["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] for one in _workloads()}
    named = set(
        re.findall(r"component(?:: |, operator: In, values: \[)([a-z, -]+)", (DEPLOY / "kubernetes/network.yaml").read_text())
    )
    assert {one.strip() for words in named for one in words.split(",")} <= components


def test_the_image_is_built_of_what_the_lock_names_and_does_not_run_as_root() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    assert "--require-hashes -" in text.replace("--no-compile ", "") and re.findall(r"^USER (.+)$", text, re.MULTILINE) == [
        "10001:10001"
    ]
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE}", "${BASE}"]
    assert "://" not in text, "no host is named"
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((DEPLOY.parent / name).exists() for name in source.split())
    kept = set((DEPLOY.parent / ".containerignore").read_text().split()) - {"*", "**/__pycache__"}
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert kept == {f"!{name}" for name in copied}
    assert (DEPLOY.parent / ".containerignore").read_text() == (DEPLOY.parent / ".dockerignore").read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for path in (DEPLOY / "systemd").rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(DEPLOY / "systemd")
            target.parent.mkdir(parents=True, exist_ok=True)
            # The program isn't installed where the units expect it.
            target.write_text(path.read_text().replace("/opt/kilo-pipelines/.venv/bin/kilo-pipelines", "/bin/true"))
    (tmp_path / "kilo-pipelines@worker-agents.service").write_text((tmp_path / "kilo-pipelines@.service").read_text())
    units = [str(path) for path in sorted(tmp_path.glob("*.*")) if path.is_file() and "@." not in path.name]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    assert done.returncode == 0 and "kilo-pipelines" not in done.stderr, done.stderr


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="no docker with compose is here",
)
def test_compose_understands_the_file(tmp_path: Path) -> None:
    (tmp_path / "platform.env").touch()
    shutil.copyfile(DEPLOY / "compose.yaml", tmp_path / "compose.yaml")
    done = subprocess.run(["docker", "compose", "config", "-q"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
def test_kustomize_builds_every_object() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len([one for one in OBJECTS if one.values[0] != "secrets.template.yaml"])
