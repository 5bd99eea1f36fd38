"""Which addresses a company's own network adds to those of the internet, and which never."""

from __future__ import annotations

import socket

import pytest

from kilo_pipelines.providers.outbound import AddressRefusedError, vetted_address


@pytest.mark.parametrize("address", ["10.1.2.3", "172.31.0.1", "192.168.1.1", "fd12::1", "93.184.216.34"])
def test_a_private_network_is_reached_where_the_operator_said_so(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_asked, **_more: [(0, 1, 6, "", (address, 443))])
    assert vetted_address("https://id.corp.test/x", loopback=False, private=True) == address
    with pytest.raises(AddressRefusedError):
        vetted_address("http://id.corp.test/x", loopback=False, private=True)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "::1", "169.254.169.254", "fd00:ec2::254", "fe80::1", "100.100.100.200", "0.0.0.0", "::ffff:127.0.0.1"],
)
@pytest.mark.parametrize("loopback", [False, True])
def test_neither_this_machine_nor_where_clouds_keep_their_keys_is_in_a_private_network(
    monkeypatch: pytest.MonkeyPatch, address: str, loopback: bool
) -> None:
    """A second, harmless address beside it changes nothing: somebody chooses which of them is connected to."""
    found = [(0, 1, 6, "", (address, 443)), (0, 1, 6, "", ("10.0.0.1", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_asked, **_more: found)
    with pytest.raises(AddressRefusedError):
        vetted_address("https://id.corp.test/x", loopback=loopback, private=True)
