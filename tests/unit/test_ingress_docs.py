"""docs/ingress.md names every route, and no others."""

from __future__ import annotations

import re
from pathlib import Path

from kilo_pipelines.core.clock import SystemClock
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.ingress.application import Ingress, admin_application, public_application
from kilo_pipelines.ingress.door import Door
from kilo_pipelines.ingress.operators import Operators
from kilo_pipelines.ingress.setup_github import SetupDesk
from kilo_pipelines.settings import Settings
from kilo_pipelines.store import Cipher, Store
from tests.support.ingress import OneSecret

PAGE = (Path(__file__).parents[2] / "docs" / "ingress.md").read_text()


def test_every_route_is_documented_and_every_documented_route_exists() -> None:
    nowhere = "postgresql+psycopg://nobody@/nothing"  # engines connect at their first use: never here
    store = Store(nowhere, nowhere, Cipher({"00000000": bytes(32)}, "00000000"), SystemClock())
    ingress = Ingress(store, OneSecret(None), frozenset({"localhost"}))
    operators = Operators(Path("nowhere"), Path("nowhere"), SystemClock())
    door = Door(operators, Path("nowhere"), Settings().dagster_prefix, frozenset())
    served = {
        (method, route.path)
        for application in (
            public_application(ingress),
            admin_application(ingress, [*SetupDesk(store, Settings, SystemClock()).routes(), *door.routes()]),
        )
        for route in application.routes
        for method in (getattr(route, "methods", None) or {"WEBSOCKET"}) - {"HEAD"}
    }
    served.add(("GET", "/metrics"))  # answered before either application
    documented = set(re.findall(r"^\| (GET|POST|PUT|DELETE|WEBSOCKET) \| `(/[^`]*)`", PAGE, re.MULTILINE))
    assert documented == served


def test_every_reason_on_the_page_exists() -> None:
    rows = [row for row in PAGE.splitlines() if re.match(r"\|.*\| \d{3}", row)]
    named = {name for row in rows for name in re.findall(r"`([a-z]+_[a-z_]+)`", row)} - {"pull_request", "security_sync"}
    assert named <= set(Reason)
