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


def connect() -> None:
    """Connect to a port where nothing listens."""
    with socket.socket() as plug:
        plug.connect(("127.0.0.1", 1))


@pytest.mark.parametrize(
    "speak",
    [
        connect,
        lambda: socket.getaddrinfo("localhost", 80),
        lambda: socket.create_connection(("", 1)),
    ],
)
def test_the_network_fails_the_test(speak: Callable[[], object]) -> None:
    """Neither a connection nor a look-up of a name is possible."""
    with pytest.raises(pytest.fail.Exception, match="a unit test speaks to the network: socket"):
        speak()


def test_the_failure_passes_handlers_of_errors() -> None:
    """Code that deals with any Exception cannot hide that it started a program."""
    assert not issubclass(pytest.fail.Exception, Exception)
