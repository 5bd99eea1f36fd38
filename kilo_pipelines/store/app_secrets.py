"""The GitHub App's secrets at rest: one sealed file of the home (docs/decisions/0028).

Holds: private key, client secret and the webhook secrets that are valid now, sealed under the platform's key file, so that a stolen
copy of the secrets without that key opens nothing. Plain files of older homes, or that a person put there, win until the next start
seals them. Does not belong here: what the secrets are used for; the model's key, which only the model proxy holds, and it holds no
other key.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kilo_pipelines.settings import Settings, private_dir, write_secret
from kilo_pipelines.store.crypto import Cipher, CipherError

_CONTEXT = "github-app"
# How long the secret before stays valid when nothing signed with the new one arrives: a day's deliveries may be repeated by hand.
OVERLAP = timedelta(hours=24)
# And after the first delivery that was signed with the new one: GitHub gives up on an answer after 10 s, so nothing is on its way.
AFTER_SEEN = timedelta(minutes=10)


class WebhookSecret(BaseModel):
    """One value that webhooks may be signed with. `id` names it where the value must not be shown."""

    model_config = ConfigDict(frozen=True)

    id: str
    value: str
    made_at: datetime | None = None
    seen_at: datetime | None = Field(default=None, description="first delivery signed with it; kept for the newest one only")
    until: datetime | None = Field(default=None, description="not valid any more from then on; None: the present one")

    def __repr__(self) -> str:
        return f"WebhookSecret({self.id})"


class AppSecrets(BaseModel):
    """All of them. The newest webhook secret comes first; at most two are valid at a time."""

    model_config = ConfigDict(frozen=True)

    client_id: str | None = None
    client_secret: str | None = None
    private_key: str | None = None
    webhook_secrets: tuple[WebhookSecret, ...] = ()

    def __repr__(self) -> str:
        return "AppSecrets(…)"

    def valid(self, now: datetime) -> tuple[WebhookSecret, ...]:
        """The webhook secrets that are valid at this moment."""
        return tuple(one for one in self.webhook_secrets if one.until is None or now < one.until)


def read(settings: Settings) -> AppSecrets:
    """The secrets as they are now; CipherError when the sealed file can't be opened."""
    held = _sealed(settings)
    key, secret = settings.github_private_key_file, settings.webhook_secret_file
    if key.exists():
        held = held.model_copy(update={"private_key": key.read_text()})
    if secret.exists():
        value = secret.read_text().strip()
        held = held.model_copy(update={"webhook_secrets": (WebhookSecret(id="file", value=value),) if value else ()})
    return held


def _sealed(settings: Settings) -> AppSecrets:
    try:
        content = settings.github_app_file.read_text()
    except FileNotFoundError:
        return AppSecrets()
    try:
        opened = Cipher.from_file(settings.encryption_key_file).open(bytes.fromhex(content), _CONTEXT)
        return AppSecrets.model_validate_json(opened)
    except (ValueError, ValidationError):
        raise CipherError(f"{settings.github_app_file} is damaged") from None


def update(settings: Settings, change: Callable[[AppSecrets], AppSecrets]) -> AppSecrets:
    """Changes the sealed secrets, one writer at a time; plain files that are there are sealed with them and go."""
    with _one_writer(settings):
        changed = change(read(settings))
        sealed = Cipher.from_file(settings.encryption_key_file).seal(changed.model_dump_json(), _CONTEXT)
        write_secret(settings.github_app_file, sealed.hex())
        for plain in (settings.github_private_key_file, settings.webhook_secret_file):
            with suppress(PermissionError):  # a mounted file that nobody may remove goes on to be read
                plain.unlink(missing_ok=True)
        return changed


def state(settings: Settings) -> tuple[int, ...]:
    """When the files were changed, by which a process knows that it must read them anew."""
    return tuple(map(_changed, (settings.github_app_file, settings.github_private_key_file, settings.webhook_secret_file)))


def adopt(settings: Settings) -> None:
    """Seals plain files; nothing to do where there are none. And seals under the present key what an older one sealed."""
    plain = settings.github_private_key_file.exists() or settings.webhook_secret_file.exists()
    if plain or (settings.github_app_file.exists() and _old_key(settings)):
        update(settings, _named)


def _old_key(settings: Settings) -> bool:
    key_id = settings.github_app_file.read_text()[: 2 * len(Cipher.from_file(settings.encryption_key_file).current)]
    return key_id != Cipher.from_file(settings.encryption_key_file).current.hex()


def _named(held: AppSecrets) -> AppSecrets:
    """A value out of a file gets a name of its own, by which its deliveries are counted."""
    named = tuple(one if one.id != "file" else one.model_copy(update={"id": new_id()}) for one in held.webhook_secrets)
    return held.model_copy(update={"webhook_secrets": named})


def new_id() -> str:
    """A name for a webhook secret that says nothing about its value."""
    return secrets.token_hex(4)


def rotated(held: AppSecrets, value: str, now: datetime) -> AppSecrets:
    """With a new webhook secret; the one before stays valid for `OVERLAP`, older ones go at once.

    While a rotation isn't over (nothing signed with the new value arrived), the same new value goes on.
    """
    present = held.valid(now)
    if len(present) > 1 and present[0].seen_at is None:
        return held
    new = WebhookSecret(id=new_id(), value=value, made_at=now)
    before = tuple(one.model_copy(update={"until": now + OVERLAP}) for one in present[:1])
    return held.model_copy(update={"webhook_secrets": (new, *before)})


def seen(held: AppSecrets, secret_id: str, now: datetime) -> AppSecrets:
    """A delivery was signed with this secret: if it is the newest, the one before goes soon."""
    if not held.webhook_secrets or held.webhook_secrets[0].id != secret_id or held.webhook_secrets[0].seen_at is not None:
        return held
    newest, *others = held.webhook_secrets
    soon = now + AFTER_SEEN
    ending = tuple(one.model_copy(update={"until": min(one.until or soon, soon)}) for one in others if one in held.valid(now))
    return held.model_copy(update={"webhook_secrets": (newest.model_copy(update={"seen_at": now}), *ending)})


class WebhookSecrets:
    """The valid webhook secrets for a process that checks signatures: read anew after their files changed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._state: tuple[int, ...] = ()
        self._held = AppSecrets()
        self._noted: set[str] = set()

    def valid(self, now: datetime) -> tuple[WebhookSecret, ...]:
        """The valid ones, the newest first; empty when there are none. CipherError when they can't be opened."""
        now_state = state(self._settings)
        if now_state != self._state:
            # What is kept in the listener's memory is what it needs; the private key isn't.
            self._held = AppSecrets(webhook_secrets=read(self._settings).webhook_secrets)
            self._state = now_state
        return self._held.valid(now)

    def seen(self, secret: WebhookSecret, now: datetime) -> None:
        """Notes the first delivery that the newest secret signed; tried once a process. OSError, CipherError where it can't be written."""
        if secret.until is None and secret.seen_at is None and secret.id not in self._noted:
            self._noted.add(secret.id)
            update(self._settings, lambda held: seen(held, secret.id, now))


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@contextmanager
def _one_writer(settings: Settings) -> Iterator[None]:
    private_dir(settings.secrets_dir)
    descriptor = os.open(settings.secrets_dir / ".github-app.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
