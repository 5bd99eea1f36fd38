"""A home that wants to be set up: database and ingress of its own, no App, and a twin that plays an Enterprise Server."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from kilo_pipelines.settings import Settings
from tests.support.ingress import IngressWorld
from tests.support.twin import Twin


class SetupWorld(IngressWorld):
    """Not offline: the twin is to this home what GitHub is."""

    def __init__(self, twin_home: Path) -> None:
        self.twin = Twin(twin_home)
        super().__init__()
        self.stop_ingress()
        (self.home / "secrets" / "github-webhook-secret").unlink(missing_ok=True)
        (self.home / "secrets" / "github-app.sealed").unlink(missing_ok=True)
        (self.home / "config.env").write_text("KILO_OFFLINE=false\n")
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """Of the commands."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("KILO_")}
        ports = {"KILO_PUBLIC_PORT": str(self.public), "KILO_ADMIN_PORT": str(self.admin)}
        return {**kept, **ports, "KILO_HOME": str(self.home), "KILO_DATABASE_URL": "postgresql://given/elsewhere"}

    @property
    def settings(self) -> Settings:
        """As the home's own processes read them."""
        given = "postgresql://given/elsewhere"
        return Settings(home=self.home, public_port=self.public, admin_port=self.admin, database_url=given)

    def cli(self, *arguments: str, stdin: str = "") -> tuple[int, Any]:
        """Exit status and JSON of a command."""
        argv = [sys.executable, "-m", "kilo_pipelines.cli.main", *arguments, "--json"]
        done = subprocess.run(argv, env=self.environment, input=stdin, capture_output=True, text=True, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def link(self, **wanted: Any) -> str:
        """A fresh set-up link, as the command makes it."""
        web = f"http://localhost:{self.twin.port}"
        asked = {"web_url": web, "api_url": f"{web}/api/v3", "organization": "acme", "installation": None, "owner": None}
        return f"{self.page}?link={self.store.setup_links.make({**asked, 'new_app': False, **wanted})}"

    @property
    def page(self) -> str:
        """The set-up's own page."""
        return f"http://localhost:{self.admin}/setup/github"

    def close(self) -> None:
        """Ends everything."""
        super().close()
        self.twin.stop()


class Person:
    """A browser without a screen: follows redirects, fills in forms, is somebody at GitHub."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.http = httpx.Client(follow_redirects=True, trust_env=False, timeout=60)

    def go(self, address: str) -> httpx.Response:
        return self.http.get(address)

    def send(self, page: httpx.Response, **fields: str) -> httpx.Response:
        """Sends the page's form, with these fields chosen."""
        action = html.unescape(re.search(r'<form method=["\']post["\'] action=["\']([^"\']+)', page.text)[1])  # type: ignore[index]
        hidden = re.findall(r'<input type=["\']hidden["\'] name=["\'](\w+)["\'] value=(?:"([^"]*)"|\'([^\']*)\')', page.text)
        known = {name: html.unescape(one or other) for name, one, other in hidden}
        named = re.search(r"<input name='name' value='([^']*)'", page.text)
        known |= {"name": html.unescape(named[1])} if named else {}
        return self.http.post(page.url.join(action), data=known | {"person": self.name} | fields)

    def reason(self, page: httpx.Response) -> str | None:
        """The reason code that a page shows."""
        found = re.search(r'<code id="reason">(\w+)</code>', page.text)
        return found[1] if found else None
