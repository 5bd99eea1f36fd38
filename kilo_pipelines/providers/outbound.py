"""The one way out to an address that a setting or an owner named (threats, rule 22): resolve, vet, connect to what was vetted.

Holds: the vetting of addresses and one bounded exchange without redirects. What an answer means is its caller's.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx

# Addresses of the public internet of version 6. Beyond are those that a gateway or this machine turns into ones of version 4.
_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")
_6TO4 = ipaddress.IPv6Network("2002::/16")


class AddressRefusedError(Exception):
    """Not an address that may be connected to; the message says why."""


class UnresolvedError(Exception):
    """The host has no address now."""


class NotReachedError(Exception):
    """Nothing of the request can have arrived."""


class LostAnswerError(Exception):
    """The request may have arrived; its answer didn't."""


def vetted(url: str, *, offline: bool) -> str:
    """The address of the URL's host, which is then connected to. `offline`: this machine may be, too, and without TLS.

    AddressRefusedError unless all of the host's addresses are public and the URL is https; UnresolvedError.
    """
    try:
        target = httpx.URL(url)
        port = target.port or (443 if target.scheme == "https" else 80)
        if port > 65_535:  # httpx takes it
            raise ValueError("not a port")
        found = {str(one[4][0]) for one in socket.getaddrinfo(target.raw_host.decode(), port, type=socket.SOCK_STREAM)}
    except OSError:
        raise UnresolvedError("the host has no address") from None
    except (httpx.InvalidURL, ValueError):  # of the latter: a name that can't be asked for
        raise AddressRefusedError("not an address") from None
    places = [ipaddress.ip_address(one.partition("%")[0]) for one in found]
    if offline and all(one.is_loopback for one in places):
        return str(min(places, key=lambda one: one.version))
    if target.scheme != "https" or not all(map(_is_public, places)):
        raise AddressRefusedError("not a public address")
    return str(min(places, key=lambda one: one.version))


def _is_public(place: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address leads to the public internet, and not to where one of version 4 that it bears leads."""
    if isinstance(place, ipaddress.IPv6Address):
        if place.ipv4_mapped is not None:
            return _is_public(place.ipv4_mapped)
        if place not in _IPV6_UNICAST or place in _6TO4:
            return False
    return place.is_global and not place.is_multicast


def exchange(
    method: str,
    url: str,
    raw: bytes | None,
    headers: dict[str, str],
    *,
    most: int,
    seconds: float,
    connect_seconds: float,
    address: str | None = None,
) -> tuple[int, httpx.Headers, bytes]:
    """Status, headers and at most `most + 1` bytes of the answer (more than `most`: it was longer), all within `seconds`.

    `address` is connected to, whatever the name means by now. No redirect is followed and no proxy of the environment used.
    Raises NotReachedError and LostAnswerError.
    """
    target, more = httpx.URL(url), {}
    if address is not None:
        headers = {**headers, "host": target.netloc.decode()}
        more = {"sni_hostname": target.host}
        target = target.copy_with(host=address)
    headers = {"content-type": "application/json; charset=utf-8", "user-agent": "kilo-pipelines", **headers}

    async def whole() -> tuple[int, httpx.Headers, bytes]:
        limits = httpx.Timeout(seconds, connect=connect_seconds)
        async with (
            asyncio.timeout(seconds),
            httpx.AsyncClient(timeout=limits, follow_redirects=False, trust_env=False) as client,
            client.stream(method, target, content=raw, headers=headers, extensions=more) as answer,
        ):
            content = b""
            if most:
                async for part in answer.aiter_bytes():
                    content += part
                    if len(content) > most:
                        break
            return answer.status_code, answer.headers, content[: most + 1]

    try:
        return asyncio.run(whole())
    except (httpx.ConnectError, httpx.ConnectTimeout) as failure:
        raise NotReachedError(type(failure).__name__) from None
    except (httpx.HTTPError, TimeoutError) as failure:
        raise LostAnswerError(type(failure).__name__) from None
