"""Pages of the login: the form, what a refusal says, who is logged in. Plain HTML without scripts; everything from outside is escaped."""

from __future__ import annotations

from html import escape

from starlette.responses import HTMLResponse

from kilo_pipelines.core.reasons import MEANING, Reason

HEADERS = {
    "x-frame-options": "DENY",
    "content-security-policy": "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    # Not `no-referrer`: browsers then send `Origin: null` with the login form, which no page of ours is.
    "referrer-policy": "same-origin",
    "cache-control": "no-store",
}
# These pages load nothing and run nothing. No `form-action`: browsers hold it against every redirect after a form, and an issuer may
# send people on to others that nobody can list.
_PAGE_HEADERS = HEADERS | {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
}


def login_page(
    *, issuer: str | None, password: bool, landing: str = "", reason: Reason | None = None, detail: str = "", status: int = 200
) -> HTMLResponse:
    """The ways to log in: at `issuer` (its host), with the password, or both; above them why the last try was refused."""
    hidden = f'<input type="hidden" name="next" value="{escape(landing)}">'
    parts = []
    if issuer is not None:
        parts.append(
            f'<form method="post" action="/login/oidc">{hidden}<button class="first">Log in with {escape(issuer)}</button></form>'
        )
    if issuer is not None and password:
        parts.append('<p class="or"><span>or by password</span></p>')
    if password:
        parts.append(
            f'<form method="post" action="/login">{hidden}<label for="password">Operator password</label>'
            '<input id="password" name="password" type="password" autocomplete="current-password" required'
            f"{'' if issuer else ' autofocus'}><button{'' if issuer else ' class=first'}>Log in</button>"
            "<p><small>Printed once at the first start. <code>kilo-pipelines password reset</code> makes a new one.</small></p></form>"
        )
    if not parts:
        parts.append("<p>No way to log in is switched on. <code>kilo-pipelines doctor</code> says what to set.</p>")
    return _page("Log in", _note(reason, detail) + "".join(parts), status)


def refusal_page(reason: Reason, status: int, detail: str = "") -> HTMLResponse:
    """Why a login at the issuer led nowhere, and the way back."""
    return _page("Not logged in", _note(reason, detail) + '<p><a class="button" href="/login">Back to the login</a></p>', status)


def onward_page(landing: str) -> HTMLResponse:
    """Leads on at once. A page and no redirect: the next request is then ours, so that the browser sends the session's strict cookie."""
    address = escape(landing)
    return _page(
        "Logged in",
        f'<p>Logged in. <a href="{address}">Go on to Dagster</a></p>',
        200,
        head=f'<meta http-equiv="refresh" content="0; url={address}">',
    )


def session_page(who: str, until: str, home: str) -> HTMLResponse:
    """Who is logged in until when, and the way out."""
    return _page(
        "Your session",
        f"<p>Logged in as <strong>{escape(who)}</strong> until {escape(until)}.</p>"
        '<form method="post" action="/logout"><button class="first">Log out</button></form>'
        f'<p><a href="{escape(home)}">Back to Dagster</a></p>',
        200,
    )


def _note(reason: Reason | None, detail: str) -> str:
    if reason is None:
        return ""
    meaning, remedy = MEANING[reason]
    more = f"<p>What was seen: {escape(detail)}.</p>" if detail else ""
    return (
        f'<div class="note" role="alert"><p><strong>{_coded(meaning)}</strong></p>{more}<p>{_coded(remedy)}</p>'
        f"<p><small>Reason: <code>{reason}</code></small></p></div>"
    )


def _coded(text: str) -> str:
    """Escaped, with what stands between backticks set as code."""
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(escape(text).split("`")))


def _page(title: str, content: str, status: int, head: str = "") -> HTMLResponse:
    page = _FRAME.replace("{title}", title).replace("{head}", head).replace("{content}", content)
    return HTMLResponse(page, status, headers=_PAGE_HEADERS)


_FRAME = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · kilo-pipelines</title>{head}<style>
:root{color-scheme:light dark;--page:#f3f3f0;--card:#fff;--text:#1d1d1f;--quiet:#5c5c66;--line:#c9c9d1;--blue:#1a56c4;--on-blue:#fff;--bad:#9b0018;--bad-page:#fdf0f1}
@media(prefers-color-scheme:dark){:root{--page:#161618;--card:#212124;--text:#ececf1;--quiet:#a9a9b5;--line:#4a4a52;--blue:#8ab4ff;--on-blue:#10203c;--bad:#ff9aa5;--bad-page:#3a1d21}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;display:grid;place-items:center;min-height:100vh;margin:0;padding:1rem;background:var(--page);color:var(--text)}
main{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:2rem;width:100%;max-width:25rem}
h1{font-size:1.35rem;margin:0 0 1.25rem}.brand{margin:0;color:var(--quiet);font-size:.9rem}p{margin:.75rem 0}
label{display:block;margin-bottom:.3rem;font-weight:600}input{font:inherit;width:100%;padding:.6rem .7rem;border:1px solid var(--quiet);border-radius:8px;background:transparent;color:inherit}
button,.button{font:inherit;font-weight:600;display:block;width:100%;margin-top:1rem;padding:.65rem 1rem;border:1px solid var(--blue);border-radius:8px;background:transparent;color:var(--blue);cursor:pointer;text-align:center;text-decoration:none;overflow-wrap:anywhere}
.first{background:var(--blue);color:var(--on-blue);margin-top:0}input+.first{margin-top:1rem}
:focus-visible{outline:3px solid var(--blue);outline-offset:2px}a{color:var(--blue)}
.or{display:flex;align-items:center;gap:.75rem;margin:1.5rem 0 1.25rem;color:var(--quiet);font-size:.9rem}.or:before,.or:after{content:"";flex:1;border-top:1px solid var(--line)}
.note{border-left:4px solid var(--bad);background:var(--bad-page);border-radius:0 8px 8px 0;padding:.1rem 1rem;margin-bottom:1.5rem;overflow-wrap:anywhere}.note strong{color:var(--bad)}small{color:var(--quiet)}code{font-size:.9em}
</style></head><body><main><p class="brand">kilo-pipelines</p><h1>{title}</h1>{content}</main></body></html>"""
