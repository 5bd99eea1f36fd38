"""The operator's door: nobody reaches Dagster's UI without its login, and no foreign page through somebody's browser."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import websockets
from websockets.sync.client import connect

from tests.support.browser import browser
from tests.support.figures import Figures
from tests.support.http import HTTP
from tests.support.platform import RunningPlatform

QUERY = {"query": "{ version }"}
NOBODY = 65534


@pytest.fixture(scope="module")
def platform() -> Iterator[RunningPlatform]:
    found = RunningPlatform("honest")
    yield found
    found.close()


@pytest.fixture
def stranger(platform: RunningPlatform) -> Iterator[httpx.Client]:
    """A browser that isn't logged in, on a page of ours."""
    with httpx.Client(
        base_url=platform.settings.admin_url, timeout=30, headers={"origin": platform.settings.admin_url}
    ) as client:
        yield client


PAGES = (
    "/dagster/",
    "/dagster/runs",
    "/dagster/server_info",
    "/dagster/graphql?query={version}",
    "/dagster/logs/x",
    "/dagster/../dagster/runs",
)


def test_without_a_session_nothing_of_dagster_is_seen(stranger: httpx.Client, figures: Figures) -> None:
    accepted = 0
    for page in PAGES:
        for cookie in ("", "kilo_operator=", "kilo_operator=forged", "kilo_operator=" + "0" * 64):
            answer = stranger.get(page, headers={"cookie": cookie})
            accepted += answer.status_code < 400 and "login" not in answer.headers.get("location", "")
            assert "dagster" not in answer.text.lower().replace("/dagster", ""), page
    answer = stranger.post("/dagster/graphql", json=QUERY)
    assert (answer.status_code, answer.json()["reason"]) == (401, "login_required")
    figures(tried=4 * len(PAGES) + 1, accepted=accepted)
    assert accepted == 0


def test_a_browser_is_led_to_the_login_and_in(platform: RunningPlatform) -> None:
    page = HTTP.get(f"{platform.settings.admin_url}/dagster/runs", headers={"accept": "text/html"})
    assert (page.status_code, page.headers["location"]) == (303, "/login?next=%2Fdagster%2Fruns")
    form = HTTP.get(f"{platform.settings.admin_url}/login")
    assert "Operator password" in form.text and form.headers["x-frame-options"] == "DENY"
    shown = platform.browser.get("/dagster/runs")
    assert shown.status_code == 200 and "/dagster" in shown.text
    assert platform.graphql("{ version }")["version"]
    cookie = next(one for one in platform.browser.cookies.jar if one.name == "kilo_operator")
    assert cookie.has_nonstandard_attr("HttpOnly")


def test_a_person_logs_in_and_looks_around_with_a_real_browser(platform: RunningPlatform) -> None:
    """What it sends as `Origin` depends on our own headers: an in-process client would not notice."""
    admin = platform.settings.admin_url
    password = platform.cli("password", "reset")[1]["password"]
    platform.__dict__.pop("browser", None)  # its session has ended with the old password
    with browser() as page:
        page.go(f"{admin}/dagster/assets", "!!document.querySelector('input[type=password]')")
        # A test that guessed passwords has used up the guesses for a while.
        for _ in range(5):
            page.run(f"document.querySelector('input[type=password]').value = {json.dumps(password)}")
            page.run("document.querySelector('form[action=\"/login\"] button').click()")
            page.wait("location.pathname.startsWith('/dagster') || document.body.innerText.includes('login_too_often')")
            if page.run("location.pathname.startsWith('/dagster')"):
                break
            time.sleep(10)
            page.go(f"{admin}/login", "!document.body.innerText.includes('login_too_often')")
        page.wait("location.pathname.startsWith('/dagster')")
        page.go(f"{admin}/dagster/assets/security_findings", "document.body.innerText.includes('security_findings')")
        page.wait("document.body.innerText.includes('Materialize')")


def test_an_operator_comes_in_through_the_issuer_and_somebody_else_reads_why_not(platform: RunningPlatform) -> None:
    """The issuer is another site: whether cookies find their way back is for a real browser to say."""
    admin = platform.settings.admin_url
    button = "document.querySelector('form[action=\"/login/oidc\"] button')"
    with browser() as page:
        page.go(f"{admin}/dagster/assets/security_findings", f"!!{button}")
        page.run(f"{button}.click()")
        page.wait("location.pathname == '/oidc/authorize'")
        page.run("document.querySelector('button[value=grace]').click()")
        page.wait("document.body.innerText.includes('oidc_not_operator')")
        assert "twin|grace" in page.run("document.body.innerText")
        page.run("document.querySelector('a.button').click()")
        page.wait(f"!!{button}")
        page.go(f"{admin}/dagster/assets/security_findings", f"!!{button}")
        page.run(f"{button}.click()")
        page.wait("location.pathname == '/oidc/authorize'")
        page.run("document.querySelector('button[value=ada]').click()")
        page.wait("location.pathname == '/dagster/assets/security_findings' && document.body.innerText.includes('Materialize')")
        page.go(f"{admin}/session", "document.body.innerText.includes('Ada (ada@acme.test)')")
        page.run("document.querySelector('button').click()")
        page.wait("location.pathname == '/login'")
        page.go(f"{admin}/dagster/runs", f"!!{button}")


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1", ""])
def test_a_foreign_page_in_the_operators_browser_changes_nothing(
    platform: RunningPlatform, origin: str, figures: Figures
) -> None:
    """Dagster itself takes such requests (threats, rule 19)."""
    cookies = dict(platform.browser.cookies)
    headers = {"origin": origin} if origin else {}
    with httpx.Client(base_url=platform.settings.admin_url, cookies=cookies, headers=headers, timeout=30) as client:
        answers = [
            client.post("/dagster/graphql", json=QUERY),
            client.post("/dagster/graphql", content=json.dumps(QUERY), headers={"content-type": "text/plain"}),
            client.post("/dagster/graphql", data=QUERY),
            client.get("/dagster/graphql", params=QUERY),
            client.post("/login", data={"password": "x"}),
            client.post("/login/oidc"),
            client.post("/logout"),
            client.post("/dagster/report_asset_materialization/x", json={}),
        ]
    figures(tried=len(answers), accepted=sum(one.status_code < 400 for one in answers))
    assert [one.status_code for one in answers] == [403, 403, 403, 405, 403, 403, 403, 405]
    assert platform.browser.get("/dagster/server_info").status_code == 200, "the operator was logged out"


def test_mutations_by_get_and_by_forms_are_refused_from_our_own_page_too(platform: RunningPlatform) -> None:
    assert platform.browser.get("/dagster/graphql", params=QUERY).status_code == 405
    assert platform.browser.post("/dagster/graphql", data=QUERY).status_code == 415
    assert platform.browser.post("/dagster/graphql", json={"query": "x" * 2**21}).status_code == 413


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.", ""])
def test_a_foreign_host_name_is_refused(platform: RunningPlatform, host: str) -> None:
    """DNS rebinding: the page's own name points here."""
    answer = HTTP.get(f"{platform.settings.admin_url}/login", headers={"host": host})
    assert answer.status_code == 400


def _websocket(platform: RunningPlatform, origin: str | None, cookie: str) -> Any:
    address = platform.settings.admin_url.replace("http", "ws") + "/dagster/graphql"
    return connect(
        address,
        origin=None if origin is None else websockets.Origin(origin),
        additional_headers={"cookie": cookie},
        subprotocols=[websockets.Subprotocol("graphql-ws")],
        proxy=None,
    )


def test_subscriptions_come_from_our_own_page_only(platform: RunningPlatform, figures: Figures) -> None:
    cookie = f"kilo_operator={platform.browser.cookies['kilo_operator']}"
    ours = platform.settings.admin_url
    refused = [("http://evil.example", cookie), (None, cookie), (ours, ""), (ours, "kilo_operator=forged")]
    for origin, held in refused:
        with pytest.raises(websockets.InvalidStatus):
            _websocket(platform, origin, held)
    figures(tried=len(refused), accepted=0)
    with _websocket(platform, ours, cookie) as live:
        live.send(json.dumps({"type": "connection_init", "payload": {}}))
        assert json.loads(live.recv(10))["type"] == "connection_ack"


def test_dagster_never_sees_the_operators_cookie(platform: RunningPlatform) -> None:
    """A page of Dagster's could show or log it."""
    answer = platform.browser.get("/dagster/server_info")
    assert "set-cookie" not in answer.headers
    for log in platform.settings.logs_dir.glob("*.log"):
        assert platform.browser.cookies["kilo_operator"] not in log.read_text(errors="replace")


def test_guessing_is_slowed_down_and_a_reset_ends_every_session(platform: RunningPlatform, stranger: httpx.Client) -> None:
    before = platform.browser.cookies["kilo_operator"]
    answers = [stranger.post("/login", data={"password": f"guess-{number}"}).status_code for number in range(9)]
    assert 429 in answers and set(answers) <= {401, 429} and "kilo_operator" not in stranger.cookies
    password = platform.cli("password", "reset")[1]["password"]
    answer = stranger.get("/dagster/server_info", headers={"cookie": f"kilo_operator={before}"})
    assert answer.status_code == 401
    for file in (platform.settings.operator_password_file, platform.settings.logs_dir / "platform.log"):
        assert password not in file.read_text(errors="replace")
    platform.browser.close()
    del platform.browser  # the next test logs in anew


def test_every_port_asks_who_is_there_and_every_socket_lies_in_a_private_directory(
    platform: RunningPlatform, figures: Figures
) -> None:
    """Loopback is not authentication. The twin is a stranger's server and listens like one."""
    settings = platform.settings
    ports = {port for _, port in platform.listening()}
    assert ports == {settings.public_port, settings.admin_port, settings.twin_port}
    tried = accepted = 0
    for port, paths in {
        settings.public_port: ("/webhooks/github", "/callbacks/sessions/00000000-0000-0000-0000-000000000000"),
        settings.admin_port: (
            "/metrics",
            "/api/v1/owners",
            "/api/v1/reviews",
            "/api/v1/openapi.json",
            "/dagster/graphql",
            "/dagster/runs",
            "/session",
            "/login/oidc/callback",
        ),
    }.items():
        for path in paths:
            for method in ("GET", "POST"):
                answer = HTTP.request(method, f"http://127.0.0.1:{port}{path}", json={}, follow_redirects=False)
                tried, accepted = tried + 1, accepted + (answer.status_code < 300)
    sockets = [path for path in settings.sockets.rglob("*") if stat.S_ISSOCK(path.stat().st_mode)]
    assert sockets and stat.S_IMODE(settings.sockets.stat().st_mode) == 0o700
    figures(tried=tried, accepted=accepted)
    assert accepted == 0


def _as_nobody(work: Callable[[], list[str]]) -> list[str]:
    """What another user of the machine gets: the work is done in a forked child under its id."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    os.waitpid(pid, 0)
    found: list[str] = json.loads(content)
    return found


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_another_user_of_the_machine_reaches_no_socket_and_no_secret(platform: RunningPlatform, figures: Figures) -> None:
    settings = platform.settings
    sockets = [path for path in settings.sockets.rglob("*") if stat.S_ISSOCK(path.stat().st_mode)]
    files = [path for path in settings.home.rglob("*") if path.is_file()]

    def attack() -> list[str]:
        got = []
        for path in sockets:
            with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                got.append(str(path))
        for path in files:
            with suppress(OSError), path.open("rb"):
                got.append(str(path))
        return got

    got = _as_nobody(attack)
    figures(tried=len(sockets) + len(files), accepted=len(got))
    assert sockets and files and got == []
