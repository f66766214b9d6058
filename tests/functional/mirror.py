# SPDX-License-Identifier: Apache-2.0
"""An HTTP server on loopback for the files of a directory, which can also be a bad one.

A fault is a function of the request: it answers in its own way, or says that it does not and leaves
the request to the server.
"""

from __future__ import annotations

import functools
import http.server
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Mirror:
    """A server while it runs.

    :ivar context: of a server that speaks TLS.
    :ivar asked: the paths that were asked for, in order.
    :ivar closing: set when the server ends; what stalls must then go on.
    """

    root: Path
    port: int = 0
    context: ssl.SSLContext | None = None
    asked: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """Where the directory is."""
        scheme = "https" if self.context else "http"
        return f"{scheme}://127.0.0.1:{self.port}/{self.root.name}"


class Request(http.server.SimpleHTTPRequestHandler):
    """A request for a file of the directory, below its name."""

    protocol_version = "HTTP/1.1"

    def __init__(self, mirror: Mirror, fault: Fault, *arguments: object) -> None:
        self.mirror, self.fault = mirror, fault
        super().__init__(*arguments, directory=str(mirror.root.parent))  # type: ignore[arg-type]

    @property
    def file(self) -> Path:
        """The file that is asked for."""
        return Path(self.translate_path(self.path))

    def do_GET(self) -> None:
        """Answer, or let the fault do so."""
        self.mirror.asked.append(self.path)
        if not self.fault(self):
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


Fault = Callable[[Request], bool]


def no_fault(_: Request) -> bool:
    """Leave every request to the server."""
    return False


@dataclass
class On:
    """A fault of the files whose path fits a pattern, the first times or always.

    :ivar answer: what is done instead.
    """

    pattern: str
    answer: Callable[[Request], None]
    times: int | None = None

    def __call__(self, request: Request) -> bool:
        """Answer if this is a request for such a file."""
        if self.times == 0 or not re.search(self.pattern, request.path):
            return False
        if self.times:
            self.times -= 1
        self.answer(request)
        return True


def refuses(status: int) -> Callable[[Request], None]:
    """Answer with a status of HTTP and nothing else."""
    return lambda request: request.send_error(status)


def says(data: Callable[[Request], bytes]) -> Callable[[Request], None]:
    """Answer with other data than the file's."""

    def answer(request: Request) -> None:
        _begin(request, body := data(request))
        request.wfile.write(body)

    return answer


def changed(request: Request) -> bytes:
    """Return the file with one bit changed in its middle."""
    data = bytearray(request.file.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


def cuts(request: Request) -> None:
    """Answer with half of the file, and end the connection."""
    _begin(request, body := request.file.read_bytes())
    request.wfile.write(body[: len(body) // 2])
    request.close_connection = True


def stalls(request: Request) -> None:
    """Answer with half of the file, and say nothing more."""
    _begin(request, body := request.file.read_bytes())
    request.wfile.write(body[: len(body) // 2])
    request.mirror.closing.wait()
    request.close_connection = True


def redirects(request: Request) -> None:
    """Send the client to where it is."""
    request.send_response(302)
    request.send_header("Location", request.path)
    request.send_header("Content-Length", "0")
    request.end_headers()


def _begin(request: Request, body: bytes) -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()


@contextmanager
def serve(
    root: Path, fault: Fault = no_fault, context: ssl.SSLContext | None = None
) -> Iterator[Mirror]:
    """Serve a directory, by its name, for as long as the context lasts."""
    mirror = Mirror(root, context=context)
    handler = functools.partial(Request, mirror, fault)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    mirror.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield mirror
    finally:
        mirror.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
