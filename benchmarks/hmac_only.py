"""Baseline of the ingress: the same server, framework and signature check, and nothing stored.

Run as `python -m benchmarks.hmac_only PORT`; the secret comes from the environment.
"""

from __future__ import annotations

import os
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kilo_pipelines.providers.github_webhooks import verify_signature


def application(secret: str) -> Starlette:
    """Verifies and answers."""

    async def webhook(request: Request) -> Response:
        body = await request.body()
        if not verify_signature(secret, body, request.headers.get("x-hub-signature-256")):
            return JSONResponse({"outcome": "refused"}, status_code=401)
        return JSONResponse({"outcome": "stored"}, status_code=202)

    return Starlette(routes=[Route("/webhooks/github", webhook, methods=["POST"])])


if __name__ == "__main__":
    uvicorn.run(
        application(os.environ["BENCH_SECRET"]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
    )
