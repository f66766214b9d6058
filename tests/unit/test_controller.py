# SPDX-License-Identifier: Apache-2.0
"""The controller's side, against the certificates it makes and an agent made of a socket."""

from __future__ import annotations

import configparser
import contextlib
import dataclasses
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from amphora_image import controller
from amphora_image.controller import Credentials

HELLO = b'HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n{"api_version": "1.0"}'
NOT_FOUND = b"HTTP/1.1 404 NOT FOUND\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(scope="module")
def credentials() -> Credentials:
    """One set of credentials; making the keys takes a third of a second."""
    return Credentials.create()


@pytest.fixture
def server_pem(credentials: Credentials, tmp_path: Path) -> Path:
    """The agent's certificate and key as a file."""
    path = tmp_path / "server.pem"
    path.write_text(credentials.server_pem)
    return path


@contextlib.contextmanager
def agent(context: ssl.SSLContext, response: bytes = HELLO) -> Iterator[int]:
    """Serve one connection on a loopback port with a canned response."""

    def serve() -> None:
        plain, _ = listener.accept()
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as tls:
            if tls.recv(4096):
                tls.sendall(response)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(5)


@pytest.fixture
def strict(credentials: Credentials, server_pem: Path) -> ssl.SSLContext:
    """A server's TLS that wants a certificate of the client CA, as the amphora agent's does."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=credentials.client_ca)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(server_pem)
    return context


@pytest.fixture
def lax(server_pem: Path) -> ssl.SSLContext:
    """A server's TLS that serves anybody."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(server_pem)
    return context


def test_server_certificate_is_the_amphoras(credentials: Credentials) -> None:
    """The amphora's certificate names its id, serves both usages and has its key beside it."""
    certificate = x509.load_pem_x509_certificate(credentials.server_pem.encode())
    (common_name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert common_name.value == credentials.amphora_id
    assert names.get_values_for_type(x509.DNSName) == [credentials.amphora_id]
    assert set(usages) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert credentials.server_pem.index("CERTIFICATE") < credentials.server_pem.index("RSA PRIVATE")


@pytest.mark.parametrize(
    ("peer", "authority"),
    [
        ("server_pem", "server_ca"),
        ("client_pem", "client_ca"),
        ("stranger_pem", "server_ca"),
    ],
)
def test_peers_are_signed_by_their_own_authority(
    credentials: Credentials, peer: str, authority: str
) -> None:
    """Server and client certificates come from two authorities, as Octavia advises."""
    signed = x509.load_pem_x509_certificate(getattr(credentials, peer).encode())
    for name in ("server_ca", "client_ca"):
        issuer = x509.load_pem_x509_certificate(getattr(credentials, name).encode())
        if name == authority:
            signed.verify_directly_issued_by(issuer)
        else:
            with pytest.raises(ValueError, match=r"[Ii]ssuer"):
                signed.verify_directly_issued_by(issuer)


def test_secrets_stay_out_of_repr(credentials: Credentials) -> None:
    """Neither a private key nor the heartbeat key is shown by repr()."""
    assert "PRIVATE" not in repr(credentials)
    assert credentials.heartbeat_key not in repr(credentials)
    assert "PRIVATE" not in repr(controller.Authority.create("x"))


def test_agent_conf_points_at_the_injected_files(credentials: Credentials) -> None:
    """The agent's settings are INI and name the certificates where they are injected."""
    files = controller.injected_files(credentials, "10.0.2.2")
    conf = configparser.RawConfigParser()
    conf.read_string(files["/etc/octavia/amphora-agent.conf"])
    agent_section = conf["amphora_agent"]
    assert agent_section["amphora_id"] == credentials.amphora_id
    assert files[agent_section["agent_server_cert"]] == credentials.server_pem
    assert files[agent_section["agent_server_ca"]] == credentials.client_ca
    assert conf["haproxy_amphora"]["bind_port"] == "9443"
    assert conf["health_manager"]["controller_ip_port_list"] == "10.0.2.2:5555"


def test_ask_is_answered_over_mutual_tls(credentials: Credentials, strict: ssl.SSLContext) -> None:
    """The controller gets the agent's JSON and sees the injected certificate."""
    with agent(strict) as port:
        answer = controller.ask(
            port, "/", credentials, client_pem=credentials.client_pem, timeout=5
        )
    assert answer.body == {"api_version": "1.0"}
    assert answer.server_der == credentials.server_der


def test_ask_refuses_another_amphora(credentials: Credentials, lax: ssl.SSLContext) -> None:
    """A certificate of the right authority with another amphora's id is not trusted."""
    other = dataclasses.replace(credentials, amphora_id="00000000-0000-0000-0000-000000000000")
    with agent(lax) as port, pytest.raises(ssl.SSLCertVerificationError, match="ostname mismatch"):
        controller.ask(port, "/", other, client_pem=None, timeout=5)


def test_ask_tells_an_error_status(credentials: Credentials, lax: ssl.SSLContext) -> None:
    """A status other than 200 is an error with the path and the status in it."""
    with agent(lax, NOT_FOUND) as port, pytest.raises(Exception, match=r"GET /1\.0/x: 404"):
        controller.ask(port, "/1.0/x", credentials, client_pem=None, timeout=5)


def test_strangers_are_refused(credentials: Credentials, strict: ssl.SSLContext) -> None:
    """A client without a certificate and one of another authority are refused, ours is not."""
    refused = []
    for client_pem in (None, credentials.stranger_pem, credentials.client_pem):
        with agent(strict) as port:
            refused.append(controller.refuses(port, credentials, client_pem, timeout=5))
    assert refused == [True, True, False]


@pytest.mark.parametrize("response", [HELLO, NOT_FOUND, b"no HTTP\r\n\r\n"])
def test_an_answer_of_any_kind_is_no_refusal(
    credentials: Credentials, lax: ssl.SSLContext, response: bytes
) -> None:
    """An agent that says anything at all to a client without a certificate has not refused it."""
    with agent(lax, response) as port:
        assert not controller.refuses(port, credentials, None, timeout=5)


def test_silence_is_no_refusal(credentials: Credentials) -> None:
    """A port where nobody answers proves nothing."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(TimeoutError),
    ):
        controller.refuses(listener.getsockname()[1], credentials, None, timeout=0.1)


def test_another_server_is_no_refusal(credentials: Credentials, lax: ssl.SSLContext) -> None:
    """That we do not trust the server does not mean that it refuses us."""
    other = dataclasses.replace(credentials, amphora_id="00000000-0000-0000-0000-000000000000")
    with agent(lax) as port, pytest.raises(ssl.SSLCertVerificationError):
        controller.refuses(port, other, None, timeout=5)
