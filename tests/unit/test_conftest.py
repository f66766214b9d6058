# SPDX-License-Identifier: Apache-2.0
"""The guard of the unit tests itself."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from subprocess import Popen

import pytest

NOWHERE = "/nonexistent/program"


def fork() -> None:
    """Fork; a child that there should not be ends at once."""
    if os.fork() == 0:
        os._exit(0)


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"], check=True),
        lambda: subprocess.check_output(["true"]),
        lambda: Popen(["true"]),
        lambda: os.system("true"),  # noqa: S605
        lambda: os.popen("true"),  # noqa: S605
        lambda: os.execv(NOWHERE, ["true"]),  # noqa: S606
        lambda: os.execvpe(NOWHERE, ["true"], {}),  # noqa: S606
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: os.spawnv(os.P_WAIT, "/bin/true", ["true"]),  # noqa: S606
        fork,
    ],
)
def test_a_program_fails_the_test(start: Callable[[], object]) -> None:
    """No way to start a program is open, and the message says what was tried."""
    with pytest.raises(pytest.fail.Exception, match=r"a unit test starts a program: \S+ \("):
        start()


#: An address that is nobody's (RFC 5737).
NOBODY = ("192.0.2.1", 9)


def connect() -> None:
    """Connect to nobody."""
    with socket.socket() as plug:
        plug.settimeout(0.01)
        plug.connect(NOBODY)


def send() -> None:
    """Send nobody a datagram."""
    with socket.socket(type=socket.SOCK_DGRAM) as plug:
        plug.sendto(b"?", NOBODY)


@pytest.mark.parametrize(
    "speak", [connect, send, lambda: socket.getaddrinfo("mirror.example.org", 80)]
)
def test_the_network_fails_the_test(speak: Callable[[], object]) -> None:
    """Neither a connection, nor a datagram, nor a look-up of a name is possible."""
    with pytest.raises(pytest.fail.Exception, match="a unit test speaks to the network: socket"):
        speak()


def test_this_machine_is_no_network() -> None:
    """A server of the test's own can be spoken to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_the_failure_passes_handlers_of_errors() -> None:
    """Code that deals with any Exception cannot hide that it started a program."""
    assert not issubclass(pytest.fail.Exception, Exception)
