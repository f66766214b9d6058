# SPDX-License-Identifier: Apache-2.0
"""A network namespace in which nothing answers, or a recording proxy of the tests alone."""

from __future__ import annotations

import array
import base64
import http.client
import http.server
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

USER = "builder:s3cret-of-the-proxy"

#: Run in the namespace: brings its loopback up, hands a listening socket over, and waits.
HOLDER = """
import array, socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
listening = socket.create_server(("127.0.0.1", 0))
fd = array.array("i", [listening.fileno()])
right = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)
socket.socket(fileno=int(sys.argv[1])).sendmsg([b"x"], [right])
sys.stdin.read()
"""


@dataclass
class Lonely:
    """A network namespace with a loopback, ip-netns(8).

    :ivar enter: argv in front of a command that is to run there.
    :ivar listening: a socket that listens there, on 127.0.0.1.
    """

    enter: tuple[str, ...]
    listening: socket.socket


@contextmanager
def lonely() -> Iterator[Lonely]:
    """Make a network namespace that has nothing but a loopback."""
    ours, theirs = socket.socketpair()
    holder = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", HOLDER, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE,
    )
    assert holder.stdin
    try:
        _, rights, *_ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        descriptor = array.array("i", rights[0][2])[0]
        with socket.socket(fileno=descriptor) as listening:
            yield Lonely(("nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"), listening)
    finally:
        holder.stdin.close()
        holder.wait()
        ours.close()
        theirs.close()


@dataclass
class Proxy:
    """A proxy that wants a user and password, and what went through it.

    :ivar asked: ``CONNECT host:port`` or ``GET URL``, in order.
    :ivar refused: how often the password was missing or wrong.
    :ivar seen: command lines of this host that held the password when something was asked for.
    """

    port: int
    asked: list[str] = field(default_factory=list)
    refused: int = 0
    seen: set[bytes] = field(default_factory=set)

    @property
    def url(self) -> str:
        """The proxy's URL, with the password."""
        return f"http://{USER}@127.0.0.1:{self.port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Plain requests and tunnels (RFC 9110, 9.3.6)."""

    proxy: Proxy

    def _may(self) -> bool:
        password = USER.partition(":")[2].encode()
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = file.read_bytes()
            except OSError:
                continue
            if password in words:
                self.proxy.seen.add(words)
        wanted = f"Basic {base64.b64encode(USER.encode()).decode()}"
        if self.headers.get("Proxy-Authorization") == wanted:
            self.proxy.asked.append(f"{self.command} {self.path}")
            return True
        self.proxy.refused += 1
        self.send_response(407)
        self.send_header("Proxy-Authenticate", "Basic")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_GET(self) -> None:
        """Fetch what is asked for, and hand it on."""
        if not self._may():
            return
        url = urlsplit(self.path)
        connection = http.client.HTTPConnection(url.netloc, timeout=60)
        connection.request("GET", url.path, headers={"Host": url.netloc})
        answer = connection.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        connection.close()

    def do_CONNECT(self) -> None:
        """Open a tunnel, until one side ends it."""
        if not self._may():
            return
        host, _, port = self.path.rpartition(":")
        with (
            suppress(ConnectionError),  # whoever has all it wants does not wait for the other side
            socket.create_connection((host, int(port)), timeout=60) as far,
        ):
            self.send_response(200)
            self.end_headers()
            near = self.connection
            other = {near: far, far: near}
            while True:
                ready, *_ = select.select([near, far], [], [], 60)
                chunks = [(side, side.recv(65536)) for side in ready]
                for side, chunk in chunks:
                    other[side].sendall(chunk)
                if not ready or not all(chunk for _, chunk in chunks):
                    break
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def proxy_of(place: Lonely) -> Iterator[Proxy]:
    """Run a proxy at the namespace's loopback that itself is outside, as long as the context."""
    made = Proxy(place.listening.getsockname()[1])
    handler = type("Handler", (_Handler,), {"proxy": made, "protocol_version": "HTTP/1.1"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
    server.socket.close()
    server.socket = place.listening
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
