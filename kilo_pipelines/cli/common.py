"""What every command shares: JSON or text, honest exit codes, the store of a running platform."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from kilo_pipelines.cli import setup, supervisor
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.settings import Settings, SettingsError
from kilo_pipelines.store import Store
from kilo_pipelines.store.crypto import CipherError

# The actor that audit events name for commands of this machine's operator.
OPERATOR = "operator"

as_json = click.option("--json", "plain", is_flag=True, help="Prints one JSON document instead of text.")


def show(plain: bool, value: Any, text: Callable[[], str]) -> None:
    """The answer of a command."""
    click.echo(json.dumps(value, default=str) if plain else text())


def end(plain: bool, message: str, code: int = 1, *, reason: Reason | None = None) -> NoReturn:
    """Ends a command that could not do what was asked."""
    if plain:
        click.echo(json.dumps({"error": message, **({"reason": reason} if reason else {})}))
    else:
        click.echo(f"kilo-pipelines: {message}", err=True)
    sys.exit(code)


def open_store(plain: bool) -> tuple[Settings, Store]:
    """Settings and store of the platform that runs; ends the command when none does."""
    settings = Settings()
    if not supervisor.is_running(settings) and not settings.database_is_elsewhere():
        end(plain, f"the platform of {settings.home} isn't running: start it with `kilo-pipelines up`")
    try:
        return settings, setup.open_store(settings)
    except (SettingsError, CipherError) as failure:
        end(plain, str(failure))
