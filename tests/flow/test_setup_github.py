"""Setting a GitHub App up, from the operator's link to a connected installation; and everybody who must not get there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kilo_pipelines.cli import doctor
from kilo_pipelines.core.checks import Check
from kilo_pipelines.core.reasons import Reason
from kilo_pipelines.store import app_secrets
from tests.support.browser import Page, browser
from tests.support.http import HTTP
from tests.support.ingress import sign
from tests.support.setup import Person, SetupWorld


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SetupWorld]:
    running = SetupWorld(tmp_path_factory.mktemp("setup") / "twin")
    yield running
    running.close()


def test_without_a_link_nobody_sees_the_set_up(world: SetupWorld) -> None:
    for tail in ("", "?link=guessed", "/created?code=x&state=y", "/install", "/authorize", "/authorized?code=x&state=y"):
        answer = HTTP.get(world.page + tail)
        assert answer.status_code == 400 and Reason.SETUP_LINK_INVALID in answer.text, tail


def test_the_command_prints_a_link_that_leads_to_the_reasons(world: SetupWorld) -> None:
    code, told = world.cli(
        "setup", "github", "--new-app", "--org", "acme", "--enterprise-url", f"http://localhost:{world.twin.port}"
    )
    assert code == 0, told
    page = Person("grace").go(told["link"])
    assert page.status_code == 200 and told["webhook"] in page.text
    for words in ("Dependabot alerts", "asks GitHub whether the person", "dependabot_alert", "Kilo Pipelines acme"):
        assert words in page.text
    assert Person("mallory").go(told["link"]).status_code == 400, "a link is opened by one browser"


def test_the_form_may_lead_to_the_github_that_was_asked_for_and_to_no_other(world: SetupWorld) -> None:
    asked = {"web_url": "https://github.corp.example", "api_url": "https://github.corp.example/api/v3", "new_app": True}
    page = Person("grace").go(world.link(**asked))
    assert "form-action https://github.corp.example;" in page.headers["content-security-policy"]
    assert 'action="https://github.corp.example/organizations/acme/settings/apps/new?' in page.text
    assert page.headers["cache-control"] == "no-store" and "default-src 'none'" in page.headers["content-security-policy"]


def _click(page: Page, button: str, until: str, person: str = "grace") -> None:
    page.run(f"document.querySelector('#person') && (document.querySelector('#person').value = '{person}')")
    page.run(f"document.querySelector('{button}').click()")
    page.wait(until)


@pytest.mark.timeout(120)
def test_a_person_creates_installs_and_connects_in_a_browser(world: SetupWorld) -> None:
    """The whole way, with a real browser's cookies, policies and redirects between two origins."""
    with browser() as page:
        page.go(world.link(new_app=True), "document.querySelector('#create') !== null")
        _click(page, "#create", "document.title.includes('Create GitHub App')")
        _click(page, "#create", "document.querySelector('#install') !== null")
        assert page.run("document.querySelectorAll('.bad').length") == 0, page.run("document.body.innerText")
        assert "ping arrived" in page.run("document.body.innerText")
        _click(page, "#install", "document.title.includes('Install')")
        _click(page, "#install", "document.title.includes('Authorize')")
        _click(page, "#authorize", "document.querySelector('.done') !== null")
        assert "GitHub says that grace administers it" in page.run("document.body.innerText")


@pytest.fixture(scope="module")
def made(world: SetupWorld) -> SetupWorld:
    """The world after a person without a screen created the App and connected acme."""
    grace = Person("grace")
    done = grace.send(grace.send(grace.go(world.link(new_app=True))))
    assert grace.reason(done) is None and "ping arrived" in done.text, done.text
    done = grace.send(grace.send(grace.go(f"{world.page}/install"), account="acme"))
    assert "acme is connected" in done.text, done.text
    return world


@pytest.fixture
def number(made: SetupWorld) -> int:
    """Of the installation on acme, of whichever App is the present one."""
    return int(made.twin.credentials_now()["installation_id"])


def test_what_github_handed_over_is_sealed_and_stands_nowhere_else(made: SetupWorld) -> None:
    held = app_secrets.read(made.settings)
    assert held.client_secret and held.private_key and held.webhook_secrets
    canaries = [held.client_secret, held.private_key.split("\n")[3], held.webhook_secrets[0].value]
    files = [one for one in made.home.rglob("*") if one.is_file() and "/pg/" not in str(one)]
    assert made.settings.github_app_file in files and made.settings.github_app_file.stat().st_mode & 0o077 == 0
    for file in files:
        content = file.read_text(errors="replace")
        assert not any(one in content for one in canaries), file


def test_answers_of_github_count_once_and_in_their_own_browser(made: SetupWorld) -> None:
    grace, other = Person("grace"), Person("grace")
    page = grace.go(made.link(new_app=True))
    other.go(made.link(new_app=True))
    state = _state(page)
    used = f"{made.page}/created?code=used&state={state}"
    before = app_secrets.read(made.settings)
    assert other.reason(other.go(used)) == Reason.SETUP_STATE_INVALID, "another browser's answer"
    assert grace.reason(grace.go(f"{made.page}/authorized?code=x&state={state}")) == Reason.SETUP_STATE_INVALID, "another step's"
    assert grace.reason(grace.go(used)) == Reason.MANIFEST_CODE_REFUSED, "GitHub knows no such code (any more)"
    assert grace.reason(grace.go(used)) == Reason.SETUP_STATE_INVALID, "twice"
    assert app_secrets.read(made.settings) == before


def _state(page: httpx.Response) -> str:
    found = re.search(r"state=([\w-]+)", page.text)
    assert found, page.text
    return found[1]


def test_who_doesnt_administer_an_organization_doesnt_connect_it(made: SetupWorld, number: int) -> None:
    """Neither somebody else nor a plain member, who sees the installation in their own list."""
    for name in ("mallory", "linus"):
        person = Person(name)
        person.go(made.link(installation=number))
        page = person.send(person.go(f"{made.page}/authorize"))
        assert person.reason(page) == Reason.INSTALLATION_NOT_YOURS, page.text


def test_a_spoofed_number_leads_to_the_person_and_no_further(made: SetupWorld, number: int) -> None:
    """GitHub's redirect after an installation carries anybody's number: mallory names acme's after installing on umbrella."""
    foreign = made.twin.control("install", where="umbrella")["installation_id"]
    mallory = Person("mallory")
    mallory.go(made.link())
    state = _state_of(mallory, f"{made.page}/install")
    page = mallory.send(mallory.go(f"{made.page}/installed?installation_id={number}&state={state}"))
    assert mallory.reason(page) == Reason.INSTALLATION_NOT_YOURS
    state = _state_of(mallory, f"{made.page}/install")
    page = mallory.send(mallory.go(f"{made.page}/installed?installation_id={foreign}&state={state}"))
    assert "umbrella is connected" in page.text


def test_a_link_for_one_installation_shows_and_connects_no_other(made: SetupWorld, number: int) -> None:
    """It is handed to another organization's owner, who isn't to learn who else is here."""
    foreign = made.twin.control("install", where="umbrella")["installation_id"]
    mallory = Person("mallory")
    page = mallory.go(made.link(installation=foreign))
    assert "installation umbrella" in page.text and "installation acme" not in page.text
    state = _state_of(mallory, f"{made.page}/install")
    assert (
        mallory.reason(mallory.go(f"{made.page}/installed?installation_id={number}&state={state}")) == Reason.SETUP_STATE_INVALID
    )


def _state_of(person: Person, address: str) -> str:
    answer = person.http.get(address, follow_redirects=False)
    return str(httpx.URL(answer.headers["location"]).params["state"])


def test_another_owners_installation_is_refused(made: SetupWorld, number: int) -> None:
    grace = Person("grace")
    grace.go(made.link(installation=number, owner=str(made.other.id)))
    page = grace.send(grace.go(f"{made.page}/authorize"))
    assert grace.reason(page) == Reason.INSTALLATION_TAKEN and made.store.owners.integrations(made.other.id) == []


def test_a_members_request_waits_for_an_owner(made: SetupWorld) -> None:
    linus = Person("linus")
    linus.go(made.link())
    page = linus.send(linus.go(f"{made.page}/install"), account="acme")
    assert linus.reason(page) == Reason.INSTALLATION_REQUESTED


def _checks(world: SetupWorld) -> dict[str, Check]:
    return {one.name: one for one in doctor._github(world.settings)}


def test_doctor_names_what_an_installation_lacks_for_which_service_and_where_it_is_accepted(
    made: SetupWorld, number: int
) -> None:
    owner = next(one for one in made.store.owners.all() if one.name == "acme" and _holds(made, one.id, number))
    assert _checks(made)["installation acme"].ok, "no service is on"
    made.store.owners.enable_service(owner.id, "code_review", True, actor="test")
    made.twin.control("withhold", permissions=["checks"])
    found = _checks(made)["installation acme"]
    assert (found.ok, found.code) == (False, Reason.PERMISSION_MISSING), found
    assert "code_review needs permission checks: write" in found.found
    assert found.remedy.endswith(f"/installations/{number}/permissions/update")
    made.twin.control("withhold", permissions=[])
    assert _checks(made)["installation acme"].ok
    made.twin.control("suspend", installation=number, suspended=True)
    assert _checks(made)["installation acme"].code == Reason.INTEGRATION_SUSPENDED
    made.twin.control("suspend", installation=number, suspended=False)


def _holds(world: SetupWorld, owner_id: object, number: int) -> bool:
    return any(one["installation_id"] == number for one in world.store.owners.integrations(owner_id))  # type: ignore[arg-type]


def test_a_rotation_loses_no_delivery_and_ends_the_old_secret(made: SetupWorld) -> None:
    old = app_secrets.read(made.settings).webhook_secrets[0]
    body = b'{"zen": "It works.", "hook_id": 1}'

    def status(secret: str) -> int:
        headers = {"x-github-event": "ping", "x-github-delivery": "d", "x-hub-signature-256": sign(body, secret)}
        return made.post("/webhooks/github", body, headers).status_code

    code, told = made.cli("setup", "github", "rotate-webhook-secret")
    new, before = app_secrets.read(made.settings).webhook_secrets
    assert code == 0 and told == {"secret": new.id, "seen": True}
    assert (before.value, before.until is None) == (old.value, False)
    assert (status(new.value), status(old.value), status("neither")) == (200, 200, 401)
    gone = before.model_copy(update={"until": before.until and before.until.replace(year=2020)})
    app_secrets.update(made.settings, lambda held: held.model_copy(update={"webhook_secrets": (new, gone)}))
    assert (status(new.value), status(old.value)) == (200, 401)


def test_another_address_at_github_and_a_lost_way_are_told_apart(made: SetupWorld) -> None:
    found = _checks(made)
    assert found["webhook address"].ok and found["webhook reached"].ok, found
    made.twin.control("set-app", hook={"url": "http://localhost:9/nobody", "content_type": "json", "insecure_ssl": "0"})
    made.twin.control("open-pull", kind="clean")
    found = _checks(made)
    assert found["webhook address"].code == Reason.WEBHOOK_ADDRESS_DIFFERS and not found["webhook address"].ok
    assert found["webhook reached"].code == Reason.WEBHOOK_UNREACHED and not found["webhook reached"].ok
    code, told = made.cli("setup", "github", "webhook")
    assert code == 0 and told["webhook"] == made.settings.webhook_url and _checks(made)["webhook address"].ok


def test_a_key_that_github_forgot_is_named_with_its_remedy(made: SetupWorld, tmp_path: Path) -> None:
    made.twin.control("set-app", new_key=True)
    (found,) = [one for one in doctor._github(made.settings) if not one.ok]
    assert found.code == Reason.APP_KEY_REFUSED and "setup github key" in found.remedy
    pem = tmp_path / "key.pem"
    pem.write_text("-----BEGIN RSA PRIVATE KEY-----\nnone\n-----END RSA PRIVATE KEY-----\n")
    code, told = made.cli("setup", "github", "key", str(pem))
    assert code == 1 and told["reason"] == Reason.APP_KEY_REFUSED
    code, _ = made.cli("setup", "github", "key", "-", stdin=made.twin.credentials_now()["private_key_pem"])
    assert code == 0 and _checks(made)["github app"].ok
