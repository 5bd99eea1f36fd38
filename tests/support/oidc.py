"""The operators' door with a login at the twin's issuer, in this process; a browser that goes through it one step at a time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from html import unescape
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import httpx
from starlette.applications import Starlette

from kilo_pipelines.core.clock import Clock
from kilo_pipelines.ingress.__main__ import make_door
from kilo_pipelines.settings import Settings
from tests.support.http import HTTP
from tests.support.twin import Twin

T = TypeVar("T")
ADMIN = "http://127.0.0.1:8081"


class Browser:
    """One browser before the door. What the twin is asked goes over the wire, also by the door."""

    def __init__(self, twin: Twin, home: Path, clock: Clock, **more: Any) -> None:
        self.twin = twin
        chosen = {
            "oidc_issuer": f"http://localhost:{twin.port}/oidc",
            "oidc_client_id": "kilo-public",
            "oidc_operators": "ada@acme.test",
            **more,
        }
        self.settings = Settings(home=home, **chosen)
        self.runner = asyncio.Runner()
        self.restart(clock)
        self.cookies = httpx.Cookies()

    def restart(self, clock: Clock, **more: Any) -> None:
        """The door anew over the same home, with other settings where some are named."""
        self.settings = self.settings.model_copy(update=more)
        door = make_door(self.settings, frozenset({ADMIN, "https://kilo.example"}), clock)
        self.transport = httpx.ASGITransport(Starlette(routes=door.routes()))

    def ask(self, method: str, path: str, origin: str = ADMIN, **more: Any) -> httpx.Response:
        """One request of a page of ours; cookies as a browser keeps them."""
        headers = {"accept": "text/html", **({"origin": origin} if method == "POST" else {}), **more.pop("headers", {})}

        async def sent() -> httpx.Response:
            async with httpx.AsyncClient(transport=self.transport, base_url=origin, cookies=self.cookies) as client:
                return await client.request(method, path, headers=headers, **more)

        answer = self.run(sent())
        self.cookies.update(answer.cookies)
        for line in answer.headers.get_list("set-cookie"):
            if re.search(r"max-age=0", line, re.IGNORECASE):
                for one in [one for one in self.cookies.jar if one.name == line.partition("=")[0]]:
                    self.cookies.jar.clear(one.domain, one.path, one.name)
        return answer

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def begin(self, landing: str = "/dagster/runs") -> str:
        """Presses the button; the address of the issuer to which it leads."""
        answer = self.ask("POST", "/login/oidc", data={"next": landing})
        assert answer.status_code == 303, answer.text
        return answer.headers["location"]

    def choose(self, address: str, person: str) -> str:
        """At the issuer: who one is. The path and query with which the issuer sends the browser back."""
        asked = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        answer = HTTP.post(f"http://localhost:{self.twin.port}/oidc/authorize", data={**asked, "person": person})
        assert answer.status_code == 303, answer.text
        return answer.headers["location"].removeprefix(ADMIN)

    def log_in(self, person: str = "ada", landing: str = "/dagster/runs") -> httpx.Response:
        """The whole way; the page at its end."""
        return self.ask("GET", self.choose(self.begin(landing), person))

    @property
    def inside(self) -> bool:
        """Whether the door knows this browser."""
        return self.ask("GET", "/session").status_code == 200

    def close(self) -> None:
        self.runner.close()


def reason_of(page: httpx.Response) -> str:
    """The reason code on a page."""
    found = re.search(r"Reason: <code>(\w+)</code>", unescape(page.text))
    return found[1] if found else ""
