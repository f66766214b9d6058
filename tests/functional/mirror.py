# SPDX-License-Identifier: Apache-2.0
"""An HTTP server on loopback for the files of a directory, which can also be a bad one.

A fault is a function of the request: it answers in its own way, or says that it does not and leaves
the request to the server.
"""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Mirror:
    """A server while it runs.

    :ivar asked: the paths that were asked for, in order.
    :ivar closing: set when the server ends; what stalls must then go on.
    """

    root: Path
    port: int = 0
    asked: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """Where the directory is."""
        return f"http://127.0.0.1:{self.port}/ubuntu"


class Request(http.server.SimpleHTTPRequestHandler):
    """A request for a file below ``/ubuntu``."""

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

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing."""


Fault = Callable[[Request], bool]


def no_fault(_: Request) -> bool:
    """Leave every request to the server."""
    return False


@contextmanager
def serve(root: Path, fault: Fault = no_fault) -> Iterator[Mirror]:
    """Serve a directory named ``ubuntu`` for as long as the context lasts."""
    mirror = Mirror(root)
    handler = functools.partial(Request, mirror, fault)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
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
