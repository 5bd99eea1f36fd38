"""The page of the control API: Swagger UI without a download from elsewhere.

The page itself holds nothing: the description comes only for a live key, which a person pastes and the page keeps in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from kilo_pipelines.ingress.control import Who, act, not_found

# Scripts are files of ours; Swagger UI sets styles by itself and draws its icons from data.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:;"
    " connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
# What of the package is served, and as what.
_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


def page_routes(application: FastAPI) -> None:
    """Adds the description for keys, and the page for anybody."""
    static = Path(fastapi_offline.__file__).parent / "static"

    @application.router.get("/api/v1/openapi.json", response_model=None, include_in_schema=False, **act("read"))
    def describe(who: Who) -> JSONResponse:
        """The control API for programs."""
        return JSONResponse(_described(application))

    async def page(_request: Request) -> Response:
        return HTMLResponse(_PAGE, headers=_HEADERS)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name == "page.js":
            return Response(_SCRIPT, media_type="text/javascript", headers=_HEADERS)
        if name not in _FILES:
            return not_found()
        return FileResponse(static / name, media_type=_FILES[name], headers=_HEADERS)

    application.router.routes += [Route("/api/docs", page, methods=["GET"]), Route("/api/docs/{name}", file, methods=["GET"])]


def _described(application: FastAPI) -> dict[str, Any]:
    """FastAPI's description, grouped by the first word behind the version."""
    found: dict[str, Any] = application.openapi()
    for path, methods in found["paths"].items():
        for operation in methods.values():
            operation["tags"] = [path.removeprefix("/api/v1").split("/")[1]]
    return found


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>kilo-pipelines: control API</title><link rel="stylesheet" href="/api/docs/swagger-ui.css">
<style>body{font:16px/1.5 system-ui;margin:0}form{padding:1rem;max-width:40rem;margin:auto}
input{font:inherit;width:100%;box-sizing:border-box;padding:.5rem}button{font:inherit;margin-top:.5rem;padding:.5rem 1rem}</style>
<form id="ask"><h1>kilo-pipelines: control API</h1><label for="key">API key</label>
<input id="key" type="password" autocomplete="off" autofocus required><button>Show</button><p id="note" role="alert"></p>
<p><small>The key stays in this page. It is asked for at each visit.</small></p></form><div id="api"></div>
<script src="/api/docs/swagger-ui-bundle.js"></script><script src="/api/docs/page.js"></script></html>"""

_SCRIPT = """"use strict";
document.getElementById("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = document.getElementById("key").value.trim();
  const note = document.getElementById("note");
  let answer;
  try {
    answer = await fetch("/api/v1/openapi.json", {headers: {Authorization: "Bearer " + key}});
  } catch {
    note.textContent = "The control API doesn't answer, or the key has characters that no key has.";
    return;
  }
  if (!answer.ok) {
    note.textContent = "This key is refused.";
    return;
  }
  const ui = SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#api",
    presets: [SwaggerUIBundle.presets.apis],
    validatorUrl: null,
    onComplete: () => ui.preauthorizeApiKey("apiKey", key),
  });
  document.getElementById("ask").hidden = true;
});
"""
