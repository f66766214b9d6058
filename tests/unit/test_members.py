# SPDX-License-Identifier: Apache-2.0
"""Members and clients, on the loopback."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from amphora_image.controller import Authority
from amphora_image.members import SITE, Member, ask_http, ask_udp


@pytest.fixture
def member() -> Iterator[Member]:
    """A member that answers on some port of the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    it = Member("127.0.0.1", port)
    it.start()
    yield it
    it.stop()


def test_member_answers_with_its_address(member: Member) -> None:
    """Over HTTP and UDP the answer says who gave it."""
    assert ask_http(member.place, timeout=5) == "127.0.0.1"
    assert ask_udp(member.place, timeout=5) == "127.0.0.1"


def test_member_that_stopped_refuses_and_can_return(member: Member) -> None:
    """A stopped member refuses connections at once; started again, it answers."""
    member.stop()
    for ask in (ask_http, ask_udp):
        with pytest.raises(ConnectionRefusedError):
            ask(member.place, timeout=5)
    member.start()
    assert ask_http(member.place, timeout=5) == "127.0.0.1"


@contextlib.contextmanager
def canned(answer: bytes, tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, int]]:
    """Serve one connection with a canned answer."""

    def serve() -> None:
        plain, _ = listener.accept()
        with (
            contextlib.suppress(OSError),
            tls.wrap_socket(plain, server_side=True) if tls else plain as connection,
        ):
            connection.recv(4096)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        thread.join(5)


def test_error_status_is_no_answer() -> None:
    """HAProxy's 503 is an error with the status in it, and its page is not left unread and open."""
    answer = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n<html>No server</html>"
    with canned(answer) as place:
        assert str(error_of(place)) == "GET / of 127.0.0.1: 503 Service Unavailable"
    gc.collect()  # a socket that is open still is an error now


def error_of(place: tuple[str, int]) -> OSError | None:
    """Ask, and keep the error in a local variable: only a collection of garbage frees both."""
    error = None
    try:
        ask_http(place, timeout=5)
    except OSError as caught:
        error = caught
    return error


@pytest.mark.parametrize(("name", "trusted"), [(SITE, True), ("www.example.com", False)])
def test_https_is_for_the_sites_name(tmp_path: Path, name: str, trusted: bool) -> None:
    """A listener's certificate must be of our authority and name the site."""
    authority = Authority.create("a CA")
    pem = tmp_path / "server.pem"
    pem.write_text(authority.issue(name))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(pem)
    client = ssl.create_default_context(cadata=authority.certificate)
    with canned(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", server) as place:
        if trusted:
            assert ask_http(place, tls=client, timeout=5) == "hi"
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match="ostname mismatch"):
                ask_http(place, tls=client, timeout=5)
