"""A backup of a platform at work, restored on a machine that has nothing: another home, another database cluster."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.http import HTTP
from tests.support.platform import RunningPlatform


@pytest.fixture(scope="module")
def platform() -> Iterator[RunningPlatform]:
    found = RunningPlatform("slow")
    yield found
    found.close()


def test_a_review_at_work_goes_on_in_a_restored_home_and_no_altered_file_is_restored(
    platform: RunningPlatform, tmp_path: Path
) -> None:
    pull = platform.control("open-pull", kind="planted")
    row = platform.at_work(pull)
    phrase, file = tmp_path / "phrase", tmp_path / "backup.tar"
    phrase.write_text("correct horse battery staple\n")
    code, made = platform.cli("backup", str(file), "--passphrase-file", str(phrase))
    assert code == 0 and made["bytes"] == file.stat().st_size, made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = file.read_bytes()
    for secret in ("encryption.key", "database.json", "github-app.sealed", "operator-api-key"):
        assert (platform.settings.secrets_dir / secret).read_bytes()[-40:-4] not in content
    platform.stop()

    home = Path(tempfile.mkdtemp(prefix="kilo-r-"))
    refused = _restorer(platform, home)
    for altered, phrase_text, why in (
        (content.replace(b'"schema": "0', b'"schema": "1', 1), None, "wrong passphrase, or the manifest was altered"),
        (_flipped(content, b"PGDMP"), None, "was altered"),
        (content, "incorrect horse battery", "wrong passphrase"),
        (b"no archive", None, "no backup"),
    ):
        (tmp_path / "altered.tar").write_bytes(altered)
        (tmp_path / "other").write_text(phrase_text or phrase.read_text())
        code, answer = refused(str(tmp_path / "altered.tar"), "--passphrase-file", str(tmp_path / "other"))
        assert code == 1 and why in answer["error"], answer
        assert not home.exists(), "a refused restore leaves nothing"
    code, answer = _restorer(platform, platform.home)(str(file), "--passphrase-file", str(phrase))
    assert code == 1 and "isn't empty" in answer["error"]

    code, answer = refused(str(file), "--passphrase-file", str(phrase))
    assert code == 0 and answer["reconciled"]["sessions"] >= 1, answer
    platform.env["KILO_HOME"] = str(home)
    restored = RunningPlatform(instead_of=platform)
    try:
        assert restored.cli("status")[0] == 0
        held = restored.store.sessions.get(row.session_id) if row.session_id else None
        assert held is not None and held.ended_at is None, "nothing goes on before a person says so"
        key = (platform.home / "secrets" / "operator-api-key").read_text()
        assert (
            HTTP.get(f"{restored.settings.admin_url}/api/v1/health", headers={"authorization": f"Bearer {key}"}).status_code
            == 200
        )
        assert restored.cli("resume")[0] == 0
        ended = restored.settled(pull, 120)
        assert (ended.item_id, ended.state, ended.reason, ended.attempt) == (row.item_id, "completed", "reviewed", 1)
        seen = restored.read(pull)
        assert len(seen["reviews"]) == len(seen["comments"]) == len(seen["check_runs"]) == 1
    finally:
        restored.close()


def _flipped(content: bytes, at: bytes) -> bytes:
    """One bit of a dump."""
    place = content.index(at) + 200
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _restorer(platform: RunningPlatform, home: Path) -> Any:
    def restore(*arguments: str) -> tuple[int, Any]:
        before = platform.env
        platform.env = before | {"KILO_HOME": str(home), "PATH": os.environ["PATH"]}
        try:
            return platform.cli("restore", *arguments)
        finally:
            platform.env = before

    return restore
