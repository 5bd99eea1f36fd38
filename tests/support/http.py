"""The one client for what tests ask of this machine's own listeners."""

from __future__ import annotations

from http.cookiejar import DefaultCookiePolicy

import httpx

# `httpx.get` makes a client a call, which loads the machine's authorities: 25 ms of CPU for each of thousands of requests. Neither
# connections nor cookies are kept: who restarts what it asks would meet dead ones, and nobody is logged in by somebody else's request.
HTTP = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
HTTP.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
