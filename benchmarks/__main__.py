"""`python -m benchmarks [NAME ...]`: runs groups of benchmarks (all without a name) and merges their rows into results.json."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import time
import traceback

from benchmarks import results
from benchmarks.registry import FIGURES, GROUPS, group_of


def main() -> int:
    """0 when every chosen group yielded its figures. A missed target is reported in the table, not by the status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"figures or groups: {', '.join([*GROUPS, *FIGURES])}")
    parser.add_argument("--quick", action="store_true", help="a short rehearsal of the harness; writes no results")
    arguments = parser.parse_args()
    try:
        chosen = list(dict.fromkeys(group_of(name) for name in arguments.name)) or list(GROUPS)
    except KeyError as failure:
        parser.error(str(failure.args[0]))
    failed = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a platform that was started must be stopped
    for group in chosen:
        started = time.monotonic()
        print(f"== {group}", file=sys.stderr, flush=True)
        try:
            rows = importlib.import_module(f"benchmarks.{group}").run(quick=arguments.quick)
        except Exception:  # noqa: BLE001  # the other groups still run; the status tells
            traceback.print_exc()
            failed.append(group)
            continue
        if not arguments.quick:
            results.merge(rows)
        for row in rows:
            print(json.dumps(row.plain()), flush=True)
        print(f"   {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
