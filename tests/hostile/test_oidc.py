"""Logins of operators at an OpenID Connect issuer: forged, replayed and crossed ones, and people who are no operators."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kilo_pipelines.cli.doctor_oidc import login_checks
from kilo_pipelines.core.clock import ManualClock
from kilo_pipelines.ingress.operators import OIDC_SESSION, new_password
from kilo_pipelines.settings import write_secret
from kilo_twin.oidc import MISBEHAVIOUR
from tests.support.figures import Figures
from tests.support.oidc import ADMIN, Browser, reason_of
from tests.support.twin import Twin


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    found = Twin(tmp_path_factory.mktemp("twin") / "twin")
    yield found
    found.stop()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(datetime.now(UTC))


@pytest.fixture
def browser(twin: Twin, tmp_path: Path, clock: ManualClock) -> Iterator[Browser]:
    found = Browser(twin, tmp_path, clock)
    yield found
    twin.control("oidc-misbehave", kind=None)
    found.close()


def test_an_operator_logs_in_is_named_and_logs_out(browser: Browser) -> None:
    page = browser.log_in()
    assert page.status_code == 200 and 'url=/dagster/runs"' in page.text
    cookies = {line.partition("=")[0]: line for line in page.headers.get_list("set-cookie")}
    assert {"HttpOnly", "SameSite=strict"} <= {part.strip() for part in cookies["kilo_operator"].split(";")}
    assert "ada@acme.test" in browser.ask("GET", "/session").text
    held = browser.settings.operator_sessions_file.read_text()
    assert "Ada (ada@acme.test)" in held and browser.cookies["kilo_operator"] not in held
    assert browser.ask("POST", "/logout").status_code == 303 and not browser.inside


def test_a_client_with_a_secret_proves_itself_and_a_wrong_secret_is_named(browser: Browser, clock: ManualClock) -> None:
    browser.restart(clock, oidc_client_id="kilo-pipelines")
    file = browser.settings.oidc_client_secret_file
    file.parent.mkdir(exist_ok=True)
    file.write_text("wrong")
    assert reason_of(browser.log_in()) == "oidc_refused" and not browser.inside
    file.write_text(browser.twin.credentials["oidc_client_secret"] + "\n")
    assert browser.log_in().status_code == 200 and browser.inside


@pytest.mark.parametrize(
    ("person", "reason"), [("grace", "oidc_not_operator"), ("mallory", "oidc_email_unverified"), ("", "oidc_refused")]
)
def test_who_is_no_operator_stays_outside_and_reads_why(browser: Browser, person: str, reason: str) -> None:
    page = browser.log_in(person)
    assert (page.status_code, reason_of(page)) == (403, reason) and "kilo_operator" not in browser.cookies


@pytest.mark.parametrize(
    ("settings", "inside"),
    [
        ({}, False),
        ({"oidc_operators": frozenset({"twin|ada"})}, True),
        ({"oidc_operator_group": "kilo-operators"}, True),
        ({"oidc_operator_group": "kilo"}, False),
    ],
)
def test_nobody_is_an_operator_but_by_a_configured_claim(
    browser: Browser, clock: ManualClock, settings: dict[str, Any], inside: bool
) -> None:
    browser.restart(clock, **{"oidc_operators": frozenset(), **settings})
    browser.log_in()
    assert browser.inside is inside


@pytest.mark.parametrize("kind", MISBEHAVIOUR)
def test_a_token_that_isnt_the_issuers_for_us_and_this_login_lets_nobody_in(
    browser: Browser, kind: str, figures: Figures
) -> None:
    browser.twin.control("oidc-misbehave", kind=kind)
    page = browser.ask("POST", "/login/oidc") if kind == "other_issuer_discovered" else browser.log_in()
    expected = {"not_json": "oidc_unreachable", "other_issuer_discovered": "oidc_discovery_invalid"}
    assert reason_of(page) == expected.get(kind, "oidc_token_invalid")
    figures(tried=1, accepted=int(browser.inside))
    assert not browser.inside


def test_an_answer_is_good_once_in_the_browser_that_asked_within_ten_minutes(
    browser: Browser, twin: Twin, tmp_path: Path, clock: ManualClock, figures: Figures
) -> None:
    refused = []
    back = browser.choose(browser.begin(), "ada")
    victim = Browser(twin, tmp_path / "victim", clock)
    victim.transport = browser.transport  # the same door
    refused.append(victim.ask("GET", back))  # login CSRF: somebody else's answer
    victim.begin()
    refused.append(victim.ask("GET", back))  # with a login of one's own on its way, too
    refused.append(browser.ask("GET", back.replace("state=", "state=x")))
    stolen = dict(browser.cookies)
    back = browser.choose(browser.begin(), "ada")
    stolen = dict(browser.cookies)
    assert browser.ask("GET", back).status_code == 200
    refused.append(browser.ask("GET", back))  # the cookie is gone
    browser.cookies.update(stolen)
    refused.append(browser.ask("GET", back))  # with the cookie kept
    back = browser.choose(browser.begin(), "ada")
    refused.append(browser.ask("GET", back.replace("iss=", "iss=https%3A%2F%2Felsewhere.test%2F")))  # mix-up
    back = browser.choose(browser.begin(), "ada")
    refused.append(browser.ask("GET", back + "&code=another"))
    back = browser.choose(browser.begin(), "ada")
    clock.advance(timedelta(minutes=11))
    refused.append(browser.ask("GET", back))
    assert [(one.status_code, reason_of(one)) for one in refused] == [(400, "oidc_state_invalid")] * len(refused)
    assert not any("kilo_operator=" in one.headers.get("set-cookie", "") for one in refused) and not victim.inside
    figures(tried=len(refused), accepted=0)
    victim.close()


def test_a_code_without_its_verifier_or_for_another_address_is_worth_nothing(browser: Browser) -> None:
    """The cookie of another login of the same browser: its state, nonce and verifier don't fit the code."""
    first = browser.choose(browser.begin(), "ada")
    second = browser.choose(browser.begin(), "ada")
    code = first.partition("code=")[2].partition("&")[0]
    other = second.partition("code=")[2].partition("&")[0]
    page = browser.ask("GET", second.replace(other, code))
    assert reason_of(page) == "oidc_refused" and not browser.inside


@pytest.mark.parametrize("origin", ["http://evil.example", "null", ""])
def test_a_foreign_page_begins_no_login(browser: Browser, origin: str) -> None:
    headers = {"origin": origin} if origin else {"origin": ""}
    answer = browser.ask("POST", "/login/oidc", headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (403, "origin_refused")


@pytest.mark.parametrize(
    "wanted",
    ["https://evil.example/", "//evil.example", "/dagster//evil.example", "/dagster/\\evil.example", "/logout", "/dagsterx/"],
)
def test_a_login_leads_nowhere_but_under_our_own_pages(browser: Browser, wanted: str) -> None:
    assert 'url=/dagster/"' in browser.log_in(landing=wanted).text
    assert browser.ask("GET", "/login", params={"next": wanted}).headers["location"] == "/dagster/"


def test_keys_that_the_issuer_changed_are_fetched_once_and_not_for_every_forged_token(
    browser: Browser, clock: ManualClock
) -> None:
    assert browser.log_in().status_code == 200
    browser.twin.control("oidc-rotate")
    assert reason_of(browser.log_in()) == "oidc_token_invalid", "asked again within half a minute"
    clock.advance(timedelta(seconds=31))
    assert browser.log_in().status_code == 200


def test_a_wrong_clock_is_called_by_its_name(browser: Browser) -> None:
    browser.restart(ManualClock(datetime.now(UTC) + timedelta(minutes=20)))
    page = browser.log_in()
    assert reason_of(page) == "oidc_clock_skew" and not browser.inside
    assert re.search(r"clock is -1(199|20[0-9]) s from", page.text)


def test_an_issuer_that_is_away_is_named_and_the_password_still_works(browser: Browser, clock: ManualClock) -> None:
    password = new_password(browser.settings.operator_password_file, browser.settings.operator_sessions_file)
    browser.restart(clock, oidc_issuer="http://localhost:9/oidc")
    page = browser.ask("POST", "/login/oidc")
    assert (page.status_code, reason_of(page)) == (502, "oidc_unreachable")
    answer = browser.ask("POST", "/login", data={"password": password, "next": "/dagster/runs"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/dagster/runs") and browser.inside


def test_a_machine_of_the_inner_network_is_no_issuer_unless_allowed(browser: Browser, clock: ManualClock) -> None:
    """Loopback is the offline world's; elsewhere an address that the issuer names could be any service of ours."""
    browser.restart(clock, offline=False)
    assert reason_of(browser.ask("POST", "/login/oidc")) == "oidc_unreachable"


def test_without_the_password_way_the_right_password_opens_nothing(browser: Browser, clock: ManualClock) -> None:
    password = new_password(browser.settings.operator_password_file, browser.settings.operator_sessions_file)
    assert browser.ask("POST", "/login", data={"password": password}).status_code == 303 and browser.inside
    browser.restart(clock, password_login=False)
    assert not browser.inside, "a session of the password outlived its way"
    page = browser.ask("POST", "/login", data={"password": password})
    assert (page.status_code, reason_of(page)) == (403, "password_login_off") and not browser.inside
    assert "Operator password" not in browser.ask("GET", "/login").text
    assert browser.log_in().status_code == 200 and browser.inside


def test_a_session_ends_with_its_time_and_with_what_made_it(browser: Browser, clock: ManualClock) -> None:
    browser.log_in()
    browser.restart(clock)
    assert browser.inside, "a restart logs nobody out"
    browser.restart(clock, oidc_operators=frozenset({"grace@acme.test"}))
    assert not browser.inside, "who isn't named any more is out"
    browser.restart(clock, oidc_operators=frozenset({"ada@acme.test"}))
    assert browser.inside
    browser.restart(clock, oidc_issuer="https://issuer.test")
    assert not browser.inside
    browser.restart(clock, oidc_issuer=f"http://localhost:{browser.twin.port}/oidc")
    clock.advance(OIDC_SESSION)
    assert not browser.inside


def test_codes_are_tried_no_faster_than_passwords_and_strangers_use_up_nobodys_tries(browser: Browser) -> None:
    for _ in range(20):
        assert browser.ask("GET", "/login/oidc/callback?code=x&state=y").status_code == 400
    pages = []
    for _ in range(6):
        state = browser.begin().partition("state=")[2].partition("&")[0]
        pages.append(reason_of(browser.ask("GET", f"/login/oidc/callback?code=guessed&state={state}")))
    assert pages == ["oidc_refused"] * 5 + ["login_too_often"]


def test_over_https_cookies_are_secure_and_of_this_host_alone(browser: Browser) -> None:
    origin = "https://kilo.example"
    begun = browser.ask("POST", "/login/oidc", origin=origin)
    line = begun.headers["set-cookie"]
    assert line.startswith("__Host-kilo_login=") and "Secure" in line and "Path=/;" in line
    assert f"redirect_uri={origin.replace(':', '%3A').replace('/', '%2F')}" in begun.headers["location"]
    # The plain name, which a neighbouring host could set, isn't taken for it.
    state = begun.headers["location"].partition("state=")[2].partition("&")[0]
    sealed = line.partition("=")[2].partition(";")[0]
    crossed = browser.ask("GET", f"/login/oidc/callback?code=x&state={state}", ADMIN, headers={"cookie": f"kilo_login={sealed}"})
    assert reason_of(crossed) == "oidc_state_invalid"


def test_doctor_names_what_is_wrong_with_the_issuer(browser: Browser, clock: ManualClock) -> None:
    def faults(at: ManualClock = clock, **more: Any) -> set[str]:
        return {one.code for one in login_checks(browser.settings.model_copy(update=more), at) if not one.ok}

    assert faults() == set()
    assert faults(oidc_operators=frozenset()) == {"oidc_operators_missing"}
    assert faults(oidc_client_id=None) == {"oidc_not_configured"}
    assert faults(oidc_client_id=None, password_login=False) == {"oidc_not_configured", "login_impossible"}
    assert faults(oidc_issuer="http://localhost:9/oidc") == {"oidc_unreachable"}
    assert faults(oidc_issuer=f"{browser.settings.oidc_issuer}/") == {"oidc_discovery_invalid"}
    assert faults(ManualClock(datetime.now(UTC) + timedelta(minutes=2))) == {"oidc_clock_skew"}
    assert faults(offline=False, admin_origin="http://kilo.example") == {"oidc_unreachable", "oidc_redirect_plain"}
    write_secret(browser.settings.oidc_client_secret_file, "s")
    browser.settings.oidc_client_secret_file.chmod(0o640)
    assert faults() == {"oidc_secret_readable"}
