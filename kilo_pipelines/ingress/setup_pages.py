"""How the set-up looks: pages without scripts, everything that comes from outside escaped."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from kilo_pipelines.core.checks import Check
from kilo_pipelines.core.reasons import MEANING, Reason
from kilo_pipelines.providers.github_permissions import EVENTS, PERMISSIONS
from kilo_pipelines.settings import Settings

_SERVICES = {"platform": "Always", "code_review": "Code Review", "security_agent": "Security Agent"}


def headers(web_url: str) -> dict[str, str]:
    """Nothing is loaded from anywhere, and forms go to GitHub only."""
    return {
        "content-security-policy": (
            f"default-src 'none'; style-src 'unsafe-inline'; form-action {web_url}; frame-ancestors 'none'; base-uri 'none'"
        ),
        "x-frame-options": "DENY",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
    }


def stopped(reason: Reason, detail: str = "") -> str:
    """A page that goes no further."""
    return _frame("Set-up", _refusal(reason, detail))


def create_page(manifest: dict[str, Any], action: str, wanted: dict[str, Any], refused: list[str] | None) -> str:
    """What the App will be called, where its events go, what it may do and why; and the button."""
    where = (
        f"the organization {escape(wanted['organization'])}" if wanted["organization"] else "the account you are signed in with"
    )
    facts = [
        ("Name", f"{escape(manifest['name'])} <small>you can change it at GitHub</small>"),
        ("Belongs to", f"{where} at {escape(wanted['web_url'])}"),
        ("Webhook address", f"<code>{escape(manifest['hook_attributes']['url'])}</code>"),
        ("Visible to", "its own account only (private)"),
    ]
    body = f"""{_steps(1)}{_refusal(Reason(refused[0]), refused[1]) if refused else ""}
<p>GitHub will show this App once more before it is made, and sends its keys back here. They are stored encrypted on this machine.</p>
<table class="facts">{"".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in facts)}</table>
{_permissions()}{_events()}
<p class="quiet">It never asks for administration of repositories or for workflows, and writes to no branch that exists.</p>
<form method="post" action="{escape(action, quote=True)}">
<input type="hidden" name="manifest" value="{escape(json.dumps(manifest), quote=True)}">
<button id="create">Create the App at GitHub</button></form>"""
    return _frame("Create the GitHub App", body)


def app_page(
    checks: list[Check], wanted: dict[str, Any], connected: dict[str, Any] | None, refused: list[str] | None, settings: Settings
) -> str:
    """The App as it is, check by check; the way to the next step."""
    parts = [_steps(3 if connected else 2)]
    if refused:
        parts.append(_refusal(Reason(refused[0]), refused[1]))
    if connected:
        parts.append(_connected(connected))
    elif wanted.get("installation"):
        parts.append(
            f"<p>Installation <b>{int(wanted['installation'])}</b> is there already. GitHub is asked whether you administer it.</p>"
            '<p><a class="button" id="authorize" href="/setup/github/authorize">Continue at GitHub</a></p>'
        )
    else:
        parts.append(
            "<p>Choose at GitHub where the App is installed and which repositories it sees. Then GitHub is asked whether you administer that"
            " account: only then does it belong to an owner here.</p>"
            '<p><a class="button" id="install" href="/setup/github/install">Install the App</a></p>'
        )
    parts.append("<h2>Checks</h2>")
    parts.append(f'<table class="checks"><tbody>{"".join(map(_check, checks))}</tbody></table>')
    parts.append(
        '<p class="quiet"><a href="/setup/github">Check again</a> · <code>kilo-pipelines doctor</code> repeats these checks.</p>'
    )
    if connected:
        parts.append('<p class="quiet"><a href="/setup/github/install">Install on another account</a></p>')
    return _frame("The GitHub App", "\n".join(parts))


def _connected(told: dict[str, Any]) -> str:
    owner = escape(told["owner"])
    made = "A new owner was made for it" if told["made"] else "It belongs to the owner"
    return f"""<div class="done"><p><b>{escape(told["account"])} is connected.</b> GitHub says that {escape(told["person"])} administers it.
{made}: {escape(told["name"])}. Repositories: {int(told["repositories"])}.</p>
<p>Nothing is reviewed until you say so:</p>
<pre>kilo-pipelines services enable code_review --owner {owner}
kilo-pipelines doctor</pre></div>"""


def _steps(now: int) -> str:
    names = ("Create the App", "Install and connect it", "Turn services on")
    items = "".join(
        f'<li class="{"past" if number < now else "now" if number == now else ""}">{name}</li>'
        for number, name in enumerate(names, 1)
    )
    return f'<ol class="steps">{items}</ol>'


def _permissions() -> str:
    rows = "".join(
        f"<tr><td>{escape(one.title)}</td><td>{one.level}</td><td>{_SERVICES[one.service]}</td><td>{_words(one.reason)}</td></tr>"
        for one in PERMISSIONS
    )
    return (
        "<h2>What it may do, and why</h2><table><thead><tr><th>Permission</th><th>Level</th><th>Needed by</th><th>Reason</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _events() -> str:
    rows = "".join(
        f"<tr><td><code>{escape(one.name)}</code></td><td>{_SERVICES[one.service]}</td><td>{_words(one.reason)}</td></tr>"
        for one in EVENTS
    )
    return (
        "<h2>What it is told of</h2><table><thead><tr><th>Event</th><th>Needed by</th><th>Reason</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _check(check: Check) -> str:
    mark = "ok" if check.ok else "bad" if check.required else "note"
    word = {"ok": "fine", "bad": "missing", "note": "note"}[mark]
    remedy = "" if check.ok else f"<br><code>{escape(check.code)}</code> {_words(check.remedy)}"
    return f'<tr class="{mark}"><td>{word}</td><td>{escape(check.name)}</td><td>{escape(check.found)}{remedy}</td></tr>'


# Whoever has no open set-up is told there to begin one.
_BACK = '<p><a href="/setup/github">The set-up page</a></p>'


def _refusal(reason: Reason, detail: str) -> str:
    meaning, remedy = MEANING[reason]
    more = f"<p>{_words(detail)}</p>" if detail else ""
    return (
        f'<div class="refused" role="alert"><p><code id="reason">{reason}</code> {escape(meaning)}</p>{more}'
        f"<p><b>What to do:</b> {_words(remedy)}</p></div>{_BACK if reason is Reason.SETUP_STATE_INVALID else ''}"
    )


def _words(text: str) -> str:
    """A remedy: escaped, with its commands set as such and its addresses as links."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"https?://[^\s<&;]+", r'<a href="\g<0>">\g<0></a>', marked)


def _frame(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>kilo-pipelines: {escape(title)}</title>{_STYLE}<main><h1>{escape(title)}</h1>{body}</main></html>"
    )


_STYLE = """<style>
body{font:16px/1.5 system-ui,sans-serif;margin:0;background:#f4f4f2;color:#222}
main{background:#fff;border:1px solid #ddd;border-radius:8px;max-width:54rem;margin:2rem auto;padding:1.5rem 2rem 2rem}
h1{font-size:1.4rem;margin:0 0 1rem}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
table{border-collapse:collapse;width:100%;font-size:.92rem}th,td{text-align:left;vertical-align:top;padding:.4rem .6rem;border-bottom:1px solid #e6e6e3}
thead th{color:#555;font-weight:600}.facts th{width:10rem;color:#555;font-weight:600}td:first-child{white-space:nowrap}
code,pre{font:.88em ui-monospace,monospace;background:#f1f1ee;border-radius:4px;padding:.1rem .3rem;overflow-wrap:anywhere}pre{padding:.7rem;overflow-x:auto}
small,.quiet{color:#666;font-size:.88rem}
button,.button{font:inherit;display:inline-block;padding:.55rem 1.1rem;border:0;border-radius:4px;background:#1a56c4;color:#fff;text-decoration:none;cursor:pointer}
button{margin-top:.8rem}button:focus-visible,a:focus-visible{outline:3px solid #f0a500;outline-offset:2px}
.steps{display:flex;gap:1.5rem;list-style-position:inside;padding:0;margin:0 0 1.2rem;color:#777;font-size:.92rem;flex-wrap:wrap}
.steps .now{color:#1a56c4;font-weight:600}.steps .past{color:#087f23}
.refused{border-left:4px solid #b00020;background:#fdf1f2;padding:.4rem 1rem;margin:0 0 1.2rem}
.done{border-left:4px solid #087f23;background:#eef8f0;padding:.4rem 1rem;margin:0 0 1.2rem}
.checks td:first-child{font-weight:600;width:4.5rem}.ok td:first-child{color:#087f23}.bad td:first-child{color:#b00020}.note td:first-child{color:#8a5a00}
.checks td:nth-child(2){width:10rem}
</style>"""
