"""`drain`: before an upgrade, nothing new is begun and what runs may end."""

from __future__ import annotations

import sys
import time

import click

from kilo_pipelines.cli.common import OPERATOR, as_json, open_store, show

# The reason that `drain` gives its pause, by which a person knows it again.
REASON = "drained for an upgrade"
LOOK_SECONDS = 1.0


@click.command()
@click.option(
    "--seconds", default=600.0, show_default=True, type=click.FloatRange(min=0), help="How long what runs may take to end."
)
@as_json
def drain(seconds: float, plain: bool) -> None:
    """Pauses everything and waits for what runs; exit status 1 when something is left then. `resume` goes on after the upgrade."""
    _, store = open_store(plain)
    if store.queue.pause_reason() is None:
        store.queue.switch("all", "pause", REASON, actor=OPERATOR)
    deadline = time.monotonic() + seconds
    while True:
        left = {what: count for what, count in store.handover.busy().items() if count}
        if not left or time.monotonic() >= deadline:
            break
        time.sleep(LOOK_SECONDS)

    def text() -> str:
        if not left:
            return "drained: nothing runs; stop the processes, upgrade, start, `kilo-pipelines resume`"
        what = ", ".join(f"{count} {name}" for name, count in left.items())
        return f"left after {seconds:.0f} s: {what}; stopped now, they are begun again after the upgrade"

    show(plain, {"drained": not left, "left": left}, text)
    sys.exit(1 if left else 0)


COMMANDS = (drain,)
