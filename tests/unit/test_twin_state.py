"""The twin's one file under many hands: its API and its control calls save at the same time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kilo_twin.state import Twin


def test_saving_from_many_threads_loses_nothing(tmp_path: Path) -> None:
    twin = Twin(tmp_path, "http://localhost:1")
    twin.data["padding"] = "x" * 200_000

    def save(number: int) -> None:
        twin.data[f"n{number}"] = number
        twin.save()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(200)))
    kept = json.loads((tmp_path / "state.json").read_text())
    assert all(kept[f"n{number}"] == number for number in range(200))
