# SPDX-License-Identifier: Apache-2.0
"""Both ends of the boot proof's traffic: the members, which are servers here, and the clients."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, BaseServer, ThreadingUDPServer
from typing import Any

#: The TCP and the UDP port of every member.
PORT = 80
#: The name that the certificate of the HTTPS listener is for (RFC 2606).
SITE = "www.example.org"
#: Seconds for one step on a connection, for an amphora that is emulated on a busy host.
PATIENCE = 30.0


class Member:
    """An HTTP server and a UDP server, whose answers are their address.

    :param address: a local IPv4 address.
    """

    def __init__(self, address: str, port: int = PORT) -> None:
        self.place = (address, port)
        self.servers: Sequence[BaseServer] = ()

    def start(self) -> None:
        """Begin to answer.

        :raises OSError: the address is in use or none of this host's.
        """
        self.servers = (_Http(self.place, _HttpHandler), _Udp(self.place, _UdpHandler))
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()

    def stop(self) -> None:
        """Answer no more: connections are refused."""
        for server in self.servers:
            server.shutdown()
            server.server_close()
        self.servers = ()


@contextlib.contextmanager
def serving(addresses: Sequence[str]) -> Iterator[dict[str, Member]]:
    """Let members answer for the time of a ``with`` block; address -> member."""
    with contextlib.ExitStack() as undo:
        members = {address: Member(address) for address in addresses}
        for member in members.values():
            undo.callback(member.stop)
            member.start()
        yield members


def ask_http(
    place: tuple[str, int],
    path: str = "/",
    *,
    tls: ssl.SSLContext | None = None,
    timeout: float = PATIENCE,
) -> str:
    """Send one GET on a connection of its own and return the answer's text.

    :param tls: with it, HTTPS to the host name :data:`SITE`.
    :param timeout: seconds for each step on the connection.
    :raises OSError: no connection, no TLS, no answer in time or a status other than 200.
    """
    connection = http.client.HTTPConnection(*place, timeout=timeout)
    with contextlib.closing(connection):
        connection.connect()
        if tls:
            connection.sock = tls.wrap_socket(connection.sock, server_hostname=SITE)
        connection.request("GET", path, headers={"Host": SITE, "Connection": "close"})
        with connection.getresponse() as response:
            if response.status != http.HTTPStatus.OK:
                raise OSError(f"GET {path} of {place[0]}: {response.status} {response.reason}")
            return response.read().decode()


def ask_udp(place: tuple[str, int], *, timeout: float = PATIENCE) -> str:
    """Send one datagram from a port of its own and return the answer's text.

    :param timeout: seconds.
    :raises ConnectionRefusedError: nobody listens there.
    :raises OSError: no answer in time.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(timeout)
        client.connect(place)
        client.send(b"?")
        return client.recv(1024).decode()


class _HttpHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = str(self.connection.getsockname()[0]).encode()
        self.send_response(http.HTTPStatus.OK)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


class _UdpHandler(BaseRequestHandler):
    def handle(self) -> None:
        _, server = self.request
        server.sendto(str(server.getsockname()[0]).encode(), self.client_address)


class _Http(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client, often a health monitor, that hangs up is no error."""


class _Udp(ThreadingUDPServer):
    daemon_threads = True
