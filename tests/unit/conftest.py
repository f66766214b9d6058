# SPDX-License-Identifier: Apache-2.0
"""What all unit tests share: they start no program, speak to no network, and need no setting."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import settings

from amphora_image import options
from amphora_image.agent_source import Locked
from amphora_image.request import Architecture, BaseOS, Request

# The same examples each time: a unit test that fails does so everywhere.
settings.register_profile("unit", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("unit")

#: Audit events (PEP 578) of the interpreter that a unit test must not cause.
FORBIDDEN = {
    **dict.fromkeys(
        ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
        "starts a program",
    ),
    **dict.fromkeys(
        ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"),
        "speaks to the network",
    ),
}
#: How the names of the variables begin that the command line reads.
SETTINGS = (
    *("DIB_", "BASE_OS_", "ELEMENTS_", "CLOUD_INIT_", "OCTAVIA_", "AMPHORA_"),
    *(
        "UV_",
        "PIP_",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
    ),
)

#: Hosts that are no network.
LOOPBACK = ("127.0.0.1", "::1", "localhost")

_refused: dict[str, str] = {}


def _is_here(event: str, args: tuple[Any, ...]) -> bool:
    """Whether an event is a socket's and concerns this machine alone: a file or the loopback."""
    match event, args:
        case "socket.getaddrinfo", (host, *_):
            return host in LOOPBACK
        case "socket.connect" | "socket.sendto" | "socket.sendmsg", (_, address):
            return not isinstance(address, tuple) or address[0] in LOOPBACK
    return False


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if event in _refused and not _is_here(event, args):
        pytest.fail(f"a unit test {_refused[event]}: {event} {args}")


# A hook can never be taken away again, so it looks at a table that is empty outside unit tests.
sys.addaudithook(_refuse)


@pytest.fixture(autouse=True)
def no_program_and_no_network() -> Iterator[None]:
    """Fail the test that starts a program or speaks to the network."""
    _refused.update(FORBIDDEN)
    yield
    _refused.clear()


@pytest.fixture(scope="session")
def a_request() -> Callable[..., Request]:
    """A function that makes a request for a Debian image in /here, some values changed."""

    def make(**changes: Any) -> Request:
        here = Path("/here")
        given: dict[str, Any] = {
            "base_os": BaseOS.DEBIAN,
            "release": "trixie",
            "architecture": Architecture.AMD64,
            "agent": Locked(),
            "output": here / "lb",
            "working_dir": here,
            "cache_dir": here / "cache",
        }
        return Request(**{**given, **changes})

    return make


@pytest.fixture(scope="session")
def ca_certificate() -> bytes:
    """The certificate of a CA, in PEM form."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "CA of the tests")])
    today = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(today).not_valid_after(today + timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, a home beside it, and none of the caller's variables."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in os.environ:
        if name.startswith(SETTINGS):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "here"


class Recorder(dict[str, str]):
    """Empty variables that remember for which of them they were asked."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the default."""
        self.names.add(name)
        return default


@pytest.fixture
def variables_read(here: Path) -> set[str]:
    """The names of all variables that the command line reads."""
    parser = options.Parser()
    options.add_build_options(parser)
    recorder = Recorder()
    options.read_request(parser.parse_args([]), recorder, "x86_64")
    assert recorder.names
    return recorder.names


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--update-golden``: write the golden plans anew, to be read and committed."""
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="tests/unit/test_plan.py: write tests/data/plans/plans.json anew",
    )
