"""What is connected to by its address must still prove its name: a pinned address is no reason to believe who answers there."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from kilo_pipelines.providers import outbound


def certificate(directory: Path, name: str) -> Path:
    """Key and certificate for a name, signed by itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = directory / "server.pem"
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


@contextmanager
def answering(file: Path) -> Iterator[tuple[int, list[bytes]]]:
    """A TLS server that answers `{}` once: its port, and what it was asked."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    asked: list[bytes] = []

    def serve(server: socket.socket) -> None:
        with suppress(OSError):
            caller, _ = server.accept()
            with context.wrap_socket(caller, server_side=True) as held:
                asked.append(held.recv(65_536))
                held.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()[1], asked
    thread.join(5)


@pytest.mark.parametrize(
    ("name", "trusted", "answered"), [("id.test", True, True), ("id.test", False, False), ("evil.test", True, False)]
)
def test_only_who_proves_the_name_is_spoken_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, trusted: bool, answered: bool
) -> None:
    """`trusted`: by an authority that the machine's operator added, as a company's own issuer has one."""
    file = certificate(tmp_path, name)
    monkeypatch.setenv("SSL_CERT_FILE", str(file if trusted else tmp_path / "none"))
    outbound.trusted.cache_clear()
    with answering(file) as (port, asked):
        url = f"https://id.test:{port}/x"
        work = outbound.exchange("GET", url, address="127.0.0.1", headers={}, most=10, seconds=5, connect=2)
        if answered:
            assert asyncio.run(work).content == b"{}" and f"host: id.test:{port}".encode() in asked[0].lower()
        else:
            with pytest.raises(outbound.UnreachableError):
                asyncio.run(work)
            assert asked == []
    outbound.trusted.cache_clear()
