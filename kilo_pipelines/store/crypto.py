"""Encrypted columns: AES-256-GCM under a key file with mode 0600 beside the database, never in it."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12  # GCM's own size
KEY_ID_BYTES = 4


class CipherError(Exception):
    """A value can't be opened: foreign key, wrong context or altered bytes."""


class Cipher:
    """Seals and opens small secrets. `context` binds a value to its row: moved elsewhere it doesn't open."""

    def __init__(self, keys: dict[str, bytes], current: str, file: Path | None = None) -> None:
        """`keys` in the order of their making: the first is the oldest. `file` is read again for a key that isn't known."""
        self._keys = {bytes.fromhex(key_id): key for key_id, key in keys.items()}
        self._current = bytes.fromhex(current)
        self._file = file

    @property
    def current(self) -> bytes:
        """Id of the key that seals."""
        return self._current

    def __repr__(self) -> str:
        return "Cipher(…)"

    @classmethod
    def from_file(cls, path: str | Path) -> Cipher:
        """Reads the key file; CipherError when it is missing, when others may read it, or when it is none."""
        file = Path(path)
        if not file.exists():
            raise CipherError(f"{file} is missing: start the platform once with `kilo-pipelines up`")
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise CipherError(f"{file} must have mode 0600")
        try:
            held = json.loads(file.read_text())
            return cls({key_id: bytes.fromhex(key) for key_id, key in held["keys"].items()}, held["current"], file)
        except (ValueError, KeyError, TypeError):
            raise CipherError(f"{file} is no key file: restore it from a backup") from None

    @staticmethod
    def new_key_file() -> str:
        """The content of a fresh key file with one key."""
        key_id = os.urandom(KEY_ID_BYTES).hex()
        return json.dumps({"current": key_id, "keys": {key_id: AESGCM.generate_key(256).hex()}})

    @staticmethod
    def rotated(content: str) -> str:
        """The key file's content with a new key that seals from now on."""
        held = json.loads(content)
        key_id = os.urandom(KEY_ID_BYTES).hex()
        return json.dumps({"current": key_id, "keys": {**held["keys"], key_id: AESGCM.generate_key(256).hex()}})

    @staticmethod
    def pruned(content: str, in_use: set[str]) -> str:
        """The content without keys that seal nothing any more; the first one stays, for `derive`."""
        held = json.loads(content)
        kept = {
            one: key for number, (one, key) in enumerate(held["keys"].items()) if number == 0 or one in in_use | {held["current"]}
        }
        return json.dumps({"current": held["current"], "keys": kept})

    @staticmethod
    def key_ids(content: str) -> tuple[str, list[str]]:
        """The current key's id and all ids, the oldest first."""
        held = json.loads(content)
        return held["current"], list(held["keys"])

    def seal(self, value: str, context: str) -> bytes:
        """Key id, nonce and ciphertext in one value."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = AESGCM(self._keys[self._current]).encrypt(nonce, value.encode(), context.encode())
        return self._current + nonce + sealed

    def open(self, sealed: bytes, context: str) -> str:
        """The value; CipherError when it can't be opened. A key that was made since this process began is read from the file."""
        key_id, nonce, rest = (
            sealed[:KEY_ID_BYTES],
            sealed[KEY_ID_BYTES : KEY_ID_BYTES + NONCE_BYTES],
            sealed[KEY_ID_BYTES + NONCE_BYTES :],
        )
        if key_id not in self._keys and self._file is not None:
            self._keys = self.from_file(self._file)._keys
        try:
            return AESGCM(self._keys[key_id]).decrypt(nonce, rest, context.encode()).decode()
        except (KeyError, InvalidTag) as failure:
            raise CipherError("the value can't be opened with the keys at hand") from failure

    def derive(self, purpose: str) -> bytes:
        """A 32-byte key for one purpose (HMAC markers), stable across key rotation: from the oldest key."""
        oldest = next(iter(self._keys.values()))
        return hmac.new(oldest, f"kilo-pipelines:{purpose}".encode(), hashlib.sha256).digest()
