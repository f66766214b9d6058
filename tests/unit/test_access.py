# SPDX-License-Identifier: Apache-2.0
"""The way to what a build downloads: what is read, what is told, and what is never shown."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from amphora_image import access, build, log, manifest, options
from amphora_image import workspace as ws
from amphora_image.access import Access, is_direct, passwords, redacted, trust
from amphora_image.errors import BadValue, HostError
from amphora_image.host import Host
from amphora_image.plan import make_plan
from amphora_image.request import Request
from amphora_image.workspace import workspace

PROXY = "http://builder:s%3Acret@proxy.example.org:3128"
INDEX = "https://t0ken@mirror.example.org/simple"


def read(*argv: str, **env: str) -> Access:
    """What a command line and variables say."""
    parser = options.Parser()
    options.add_build_options(parser)
    return options.read_access(parser.parse_args(argv), env)


@pytest.mark.parametrize("setting", access.SETTINGS, ids=lambda setting: setting.field)
def test_flag_beats_variables(setting: access.Setting, here: Path, ca_certificate: bytes) -> None:
    """The flag counts before its variables, and these in their order; without any there is none."""
    values = ("http://a.example.org/", "http://b.example.org/", "http://c.example.org/")
    if setting.metavar == "FILE":
        values = tuple(str(here / name) for name in "abc")
        for value in values:
            Path(value).write_bytes(ca_certificate)
    flag, *rest = values
    env = dict(zip(setting.variables, rest, strict=False))
    assert str(getattr(read(setting.flag, flag, **env), setting.field)) == flag
    while env:
        first = next(iter(env))
        assert str(getattr(read(**env), setting.field)) == env.pop(first)
    assert getattr(read(), setting.field) is None


@pytest.mark.parametrize("flag", ["--proxy", "--index-url", "--mirror", "--git-base"])
def test_no_password_in_a_flag(flag: str) -> None:
    """A flag with a password is refused, and its message does not repeat it."""
    with pytest.raises(BadValue, match="every user of this host can see") as caught:
        read(flag, PROXY)
    assert "cret" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("http_proxy", "ftp://u:s3cret@proxy.example.org", "allowed is a proxy's URL"),
        ("https_proxy", "http://", "allowed is a proxy's URL"),
        ("UV_DEFAULT_INDEX", "ftp://u:s3cret@mirror.example.org", "allowed are http, https"),
        ("DIB_GITREPOBASE", "mirror", "allowed are http, https, ssh, git and file URLs"),
        ("DIB_GITREPOBASE", "https://u:s3cret@git.example.org", "holds a user or password"),
        ("BASE_OS_MIRROR", "http://u:s3cret@mirror.example.org", "holds a user or password"),
        ("AMPHORA_CA_FILE", "nowhere", "No such file.*; allowed is a file with certificates"),
        ("AMPHORA_CA_FILE", "words", "no PEM; allowed is a file with certificates"),
    ],
)
def test_bad_values(here: Path, name: str, value: str, message: str) -> None:
    """What is not allowed is named, without a password in it."""
    (here / "words").write_text("words\n")
    with pytest.raises(BadValue, match=message) as caught:
        read(**{name: value})
    assert "s3cret" not in str(caught.value)


def test_keep_ca_needs_a_ca() -> None:
    """There is nothing to keep where no CA is named."""
    with pytest.raises(BadValue, match="--keep-ca needs"):
        read("--keep-ca")


def test_proxy_without_a_scheme() -> None:
    """A host and port is a proxy of HTTP, as for curl."""
    assert read(http_proxy="proxy.example.org:3128").http_proxy == "http://proxy.example.org:3128"


def test_tools_are_told_all(a_request: Callable[..., Request]) -> None:
    """The plan's variables hold the passwords, and what is shown of plan and request does not."""
    request = a_request(access=Access(http_proxy=PROXY, https_proxy=PROXY, index=INDEX))
    plan = make_plan(request, Host())
    for name in ("http_proxy", "HTTPS_PROXY"):
        assert plan.environment[name] == PROXY
    assert plan.environment["UV_DEFAULT_INDEX"] == plan.environment["PIP_INDEX_URL"] == INDEX
    shown = [plan.as_shell(), str(plan.as_json()), str(manifest.asked(request)), repr(request)]
    for text in shown:
        assert "cret" not in text
        assert "t0ken" not in text
    assert "http://***@proxy.example.org:3128" in plan.as_shell()


def test_redacted() -> None:
    """Users, passwords and tokens of URLs are hidden; addresses and the user of ssh are not."""
    assert redacted(f"a {PROXY} b {INDEX}") == (
        "a http://***@proxy.example.org:3128 b https://***@mirror.example.org/simple"
    )
    for text in ("ssh://git@git.example.org/x", "http://mirror.example.org/a@b", "git@x:y"):
        assert redacted(text) == text


def test_passwords_in_a_log(tmp_path: Path) -> None:
    """A password is starred in every line, in a URL or alone, as it was written or decoded."""
    secrets = passwords({"http_proxy": PROXY, "other": INDEX, "none": "x"})
    assert secrets == {"s%3Acret", "s:cret"}
    with log.BuildLog(tmp_path / "log", build.Console(quiet=True), secrets) as told:
        told.line(f"proxy {PROXY}, user builder, password s:cret or s%3Acret")
    text = (tmp_path / "log").read_text()
    assert "cret" not in text
    assert "proxy http://***@proxy.example.org:3128, user builder, password *** or ***" in text
    assert not [line for line in told.lines if "cret" in line]


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("mirror.example.org", "mirror.example.org", True),
        ("mirror.example.org", "localhost, .example.org", True),
        ("mirror.example.org", "example.org", True),
        ("mirror.example.org", "*", True),
        ("mirror.example.org", "ample.org", False),
        ("mirror.example.org", "", False),
        ("mirror.example.org", "a.mirror.example.org,", False),
    ],
)
def test_hosts_without_a_proxy(host: str, no_proxy: str, direct: bool) -> None:
    """A host, a domain above it and ``*`` are reached directly."""
    assert is_direct(host, no_proxy) is direct


class Recorder(http.server.BaseHTTPRequestHandler):
    """A proxy that answers everything itself."""

    asked: list[str]

    def do_GET(self) -> None:
        """Say what was asked for."""
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def recorder() -> Iterator[tuple[str, list[str]]]:
    """The URL of a proxy on loopback, and what is asked of it."""
    asked: list[str] = []
    handler = type("Handler", (Recorder,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_archives_are_asked_through_the_proxy(
    recorder: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own look-ups go through the proxy, or directly to a host of no_proxy."""
    monkeypatch.delenv("no_proxy", raising=False)
    url, asked = recorder
    far = "http://mirror.example.org/debian/dists/trixie/InRelease"
    with Access(http_proxy=url).urlopen(far, timeout=5) as answer:
        assert answer.read() == far.encode()
    with Access(http_proxy=url, no_proxy="127.0.0.1").urlopen(f"{url}/near", timeout=5) as answer:
        assert answer.read() == b"/near"
    assert asked == [far, "/near"]


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's trust store, and a link to it."""
    store = tmp_path / "store.crt"
    store.write_text("the host's\n")
    (tmp_path / "link.crt").symlink_to(store)
    monkeypatch.setattr(access, "STORES", (str(tmp_path / "none.crt"), str(store)))
    monkeypatch.setattr(ws, "_home", lambda: tmp_path)
    monkeypatch.setattr(ws, "detach_loop_devices", lambda _: None)
    return store


def test_trust_in_the_sandbox(stores: Path, tmp_path: Path, ca_certificate: bytes) -> None:
    """Each store of the host gets a stand-in with the CA at its end, once; it stays as it is."""
    ca_file, other = tmp_path / "ca.pem", tmp_path / "other.crt"
    ca_file.write_bytes(ca_certificate)
    other.write_text("another\n")
    environ = {"SSL_CERT_FILE": str(other), "CURL_CA_BUNDLE": str(tmp_path / "link.crt")}
    with workspace() as space:
        assert trust(Access(ca_file=ca_file), environ, space) == {"SSL_CERT_FILE": str(other)}
        mounts = {mount.target: Path(mount.source) for mount in space.mounts}
        assert mounts.keys() == {str(stores), str(other)}
        for target, source in mounts.items():
            assert source.read_bytes() == Path(target).read_bytes() + b"\n" + ca_certificate
            assert source.stat().st_mode & 0o777 == 0o644
    assert stores.read_text() == "the host's\n"


def test_no_trust_store(stores: Path, tmp_path: Path, ca_certificate: bytes) -> None:
    """A host without a trust store is told so; without a CA nothing is looked for."""
    stores.unlink()
    (tmp_path / "ca.pem").write_bytes(ca_certificate)
    with workspace() as space:
        assert trust(Access(), {}, space) == {}
        with pytest.raises(HostError, match="no trust store"):
            trust(Access(ca_file=tmp_path / "ca.pem"), {}, space)
        assert space.mounts == []
