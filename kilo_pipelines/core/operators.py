"""Who is an operator by what an OpenID issuer says of a person, and where a login may lead: pure rules (threats, rule 18).

Operators see every owner's work, so nothing here guesses: a claim counts in the one form that the settings name, and where nothing
is configured nobody is an operator.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

# Of a path within our own pages: no backslash, which browsers take for a slash, and nothing that a header or a log breaks at.
_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/?-]{0,1999}")


@dataclass(frozen=True)
class OperatorRule:
    """What makes an operator. `people`: verified e-mail addresses (with an @) and `sub` values; `group`: one of the `groups` claim."""

    people: frozenset[str]
    group: str | None

    @property
    def configured(self) -> frozenset[str]:
        """The grounds that count, each with its kind before it."""
        return frozenset(
            {f"email:{_address(one)}" if "@" in one else f"sub:{one}" for one in self.people}
            | ({f"group:{self.group}"} if self.group else set())
        )

    def grounds(self, claims: Mapping[str, Any]) -> frozenset[str]:
        """On which of the configured grounds this person is an operator; none: isn't one."""
        said = _said(claims)
        if claims.get("email_verified") is not True:
            said = frozenset(one for one in said if not one.startswith("email:"))
        return said & self.configured

    def lacks_verification(self, claims: Mapping[str, Any]) -> bool:
        """Whether only the issuer's word that the e-mail address is this person's is missing."""
        return not self.grounds(claims) and bool(_said(claims) & self.configured)


# Where nothing is configured.
NOBODY = OperatorRule(frozenset(), None)


def _said(claims: Mapping[str, Any]) -> frozenset[str]:
    """What the claims say in the form of grounds, whatever it is worth."""
    said = set()
    if isinstance(claims.get("sub"), str) and claims["sub"]:
        said.add(f"sub:{claims['sub']}")
    if isinstance(claims.get("email"), str):
        said.add(f"email:{_address(claims['email'])}")
    groups = claims.get("groups")
    # Some issuers write a single group as a plain string.
    for one in [groups] if isinstance(groups, str) else groups if isinstance(groups, list) else []:
        if isinstance(one, str) and one:
            said.add(f"group:{one}")
    return frozenset(said)


def _address(text: str) -> str:
    """Mail servers don't tell cases apart; beyond ASCII two letters may look or fold alike, so those stay as they are."""
    return text.lower() if text.isascii() else text


def person_of(claims: Mapping[str, Any], grounds: Collection[str]) -> str:
    """How logs and pages name a person: the name that the issuer gives, and what can't be chosen freely beside it."""
    name = next((claims[key] for key in ("name", "preferred_username", "email") if isinstance(claims.get(key), str)), "")
    known = next((one.partition(":")[2] for one in sorted(grounds) if one.startswith("email:")), str(claims["sub"]))
    return f"{name} ({known})" if name and name != known else known


def landing(wanted: str, prefix: str) -> str:
    """Where a login leads: the wanted path when it lies under `prefix`, else the prefix's own page."""
    home = f"{prefix}/"
    path = unquote(wanted.partition("?")[0])
    inside = path.startswith(home) and "//" not in path and "\\" not in path
    steps = path.split("/")
    return wanted if inside and _PATH.fullmatch(wanted) and "." not in steps and ".." not in steps else home
