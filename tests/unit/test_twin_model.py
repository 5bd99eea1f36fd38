"""The scripted model reads what search tools print, and makes nothing up where they could not search."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kilo_twin.model import Conversation, places, uses_of

SCHEMA = json.dumps({"properties": {"exploitable": {}}})
BRIEF = f"Nonce: n\nResult path: /work/out/result.json\nPackage: twin-unpack\nPatched version: 1.4.3\nSchema:\n{SCHEMA}"


def analysed(output: str) -> dict[str, Any]:
    call = {"id": "c", "function": {"name": "grep", "arguments": json.dumps({"pattern": "x"})}}
    messages = [
        {"role": "user", "content": BRIEF},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": output},
    ]
    return Conversation({"messages": messages, "tools": [{"function": {"name": "grep"}}]}).result()


@pytest.mark.parametrize(
    "output",
    [
        "./src/search.js:3:const { unpack } = require('twin-unpack');",
        "Found 1 matches\n/work/repo/src/search.js:\n  Line 3: const { unpack } = require('twin-unpack');\n",
    ],
)
def test_places_are_read_from_either_form(output: str) -> None:
    assert places(output) == [{"path": "src/search.js", "line": 3}]
    assert (analysed(output)["exploitable"], analysed(output)["action"]) == (True, "open_pr")


def test_a_search_without_hits_tells_that_nobody_uses_it() -> None:
    assert (analysed("No files found")["exploitable"], analysed("No files found")["action"]) == (False, "dismiss")


@pytest.mark.parametrize("output", ["", "The user has specified a rule which prevents you from this", "ripgrep execution failed"])
def test_a_search_that_was_denied_or_failed_tells_nothing(output: str) -> None:
    assert (analysed(output)["exploitable"], analysed(output)["action"]) == ("unknown", "manual_review")


def test_what_is_looked_for_is_what_the_result_says_was_looked_for() -> None:
    assert analysed("No files found")["search"] == uses_of("twin-unpack")[:10]
