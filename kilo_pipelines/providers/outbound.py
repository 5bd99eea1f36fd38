"""The guard of outbound addresses (threats, rule 22): resolve, vet, connect to the vetted address, follow no redirect.

Holds: which addresses of a network may be connected to, and one HTTP exchange within bounds. Does not belong here: what a failure
means to whoever asked (each caller maps the three errors to its own reasons).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Addresses of the public internet of version 6. Beyond are those that a gateway or this machine turns into ones of version 4.
_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")
_6TO4 = ipaddress.IPv6Network("2002::/16")
# What companies number their own networks with (RFC 1918, RFC 4193); loopback and link-local, where clouds keep their keys, aren't.
_PRIVATE = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))
# AWS answers instances here (IMDS over version 6), within RFC 4193's range.
_METADATA = ipaddress.IPv6Network("fd00:ec2::/32")


class OutboundError(Exception):
    """An address could not be asked; the text says how, and holds nothing of an answer."""


class AddressRefusedError(OutboundError):
    """The address isn't one that may be connected to; another try changes nothing."""


class UnreachableError(OutboundError):
    """Nothing was sent: no address, no connection."""


class AnswerLostError(OutboundError):
    """Something may have been sent, and no whole answer came in time."""


@dataclass(frozen=True)
class Answer:
    """Status, headers and the first bytes of an answer."""

    status: int
    headers: httpx.Headers
    content: bytes


def vetted_address(url: str, *, loopback: bool, private: bool = False) -> str:
    """The address of the URL's host, which is then connected to. Raises AddressRefusedError, UnreachableError.

    Every address of the name must be public, and the URL https; `private` lets a company's own networks through, too.
    With `loopback` (the offline world) a name that means this machine alone is fine, also over http.
    """
    try:
        target = httpx.URL(url)
        port = target.port or (443 if target.scheme == "https" else 80)
        if port > 65_535:  # httpx takes it
            raise ValueError("not a port")
        found = {str(one[4][0]) for one in socket.getaddrinfo(target.raw_host.decode(), port, type=socket.SOCK_STREAM)}
    except OSError:
        raise UnreachableError("the host has no address") from None
    except (httpx.InvalidURL, ValueError):  # of the latter: a name that can't be asked for
        raise AddressRefusedError("not an address") from None
    places = [ipaddress.ip_address(one.partition("%")[0]) for one in found]
    if loopback and all(one.is_loopback for one in places):
        return str(min(places, key=lambda one: one.version))
    if target.scheme != "https" or not all(_is_public(one) or (private and _is_private(one)) for one in places):
        raise AddressRefusedError("not a public address")
    return str(min(places, key=lambda one: one.version))


def _is_public(place: Address) -> bool:
    """Whether an address leads to the public internet, and not to where one of version 4 that it bears leads."""
    if isinstance(place, ipaddress.IPv6Address):
        if place.ipv4_mapped is not None:
            return _is_public(place.ipv4_mapped)
        if place not in _IPV6_UNICAST or place in _6TO4:
            return False
    return place.is_global and not place.is_multicast


def _is_private(place: Address) -> bool:
    return any(place in network for network in _PRIVATE) and place not in _METADATA


@lru_cache(maxsize=1)
def trusted() -> ssl.SSLContext:
    """The public authorities, and those that this machine's operator has added to its own."""
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


async def exchange(
    method: str,
    url: str,
    *,
    address: str | None,
    headers: Mapping[str, str],
    content: bytes = b"",
    most: int,
    seconds: float,
    connect: float,
) -> Answer:
    """One request and the first `most` bytes of its answer, all within `seconds`; raises UnreachableError, AnswerLostError.

    `address` is connected to, whatever the name means by now; None: the name, for addresses that the operator set. `connect`: seconds
    for reaching it, and once more for the TLS handshake.
    """
    target, more = httpx.URL(url), {}
    sent = {"user-agent": "kilo-pipelines", "accept-encoding": "identity", **headers}
    if address is not None:
        sent["host"] = target.netloc.decode()
        more = {"sni_hostname": target.host}
        target = target.copy_with(host=address)
    try:
        # httpx's own time-outs are per read, so that a trickle would never end.
        async with (
            asyncio.timeout(seconds),
            httpx.AsyncClient(
                timeout=httpx.Timeout(seconds, connect=connect), follow_redirects=False, trust_env=False, verify=trusted()
            ) as client,
            client.stream(method, target, content=content, headers=sent, extensions=more) as answer,
        ):
            read = b""
            if most:
                # Raw: nobody is to unpack more than what is counted.
                async for part in answer.aiter_raw():
                    read += part
                    if len(read) > most:
                        break
            return Answer(answer.status_code, answer.headers, read[:most])
    except (httpx.ConnectError, httpx.ConnectTimeout) as failure:
        raise UnreachableError(type(failure).__name__) from None
    except (httpx.HTTPError, TimeoutError) as failure:
        raise AnswerLostError(type(failure).__name__) from None
