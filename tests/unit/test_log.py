# SPDX-License-Identifier: Apache-2.0
"""What a build says to its log and its terminal, and what it is understood to mean."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from amphora_image import log
from amphora_image.errors import AmphoraImageError
from amphora_image.log import BuildLog, hint_for, phase_of, that_matter

WORK = "/tmp/amphora-image-x/work/amphora-image-x/dib_build.y"

#: Lines as diskimage-builder 3.43.0 writes them, with the phase that each begins or goes on with.
LINES = {
    f"dib-run-parts Running {WORK}/hooks/root.d/10-amphora-base": "root file system and packages",
    f"dib-run-parts Running {WORK}/hooks/extra-data.d/20-manifest-dir": "agent and settings",
    "dib-run-parts Running /tmp/in_target.d/pre-install.d/01-install-bin": "before installation",
    "dib-run-parts Running /tmp/in_target.d/install.d/01-package-installs": "installation",
    "dib-run-parts Running /tmp/in_target.d/post-install.d/00-packages": "after installation",
    f"dib-run-parts Running {WORK}/hooks/post-root.d/10-x": "after installation",
    f"dib-run-parts Running {WORK}/hooks/pre-finalise.d/10-x": "boot loader",
    "dib-run-parts Running /tmp/in_target.d/finalise.d/60-amphora-disk": "boot loader",
    f"dib-run-parts Running {WORK}/hooks/cleanup.d/20-amphora-manifest": "clean-up",
    # Our own.
    "phase: disk": "disk",
    "phase: image files": "image files",
    "dib-run-parts Running /tmp/in_target.d/some-new-phase.d/10-x": "some-new-phase",
    # What tells of no phase.
    "diskimage-builder version 3.43.0": None,
    f"Running hooks from {WORK}/hooks/root.d": None,
    f"dib-run-parts Sourcing environment file {WORK}/hooks/root.d/../environment.d/10-x": None,
    "dib-run-parts 10-amphora-base completed": None,
    "dib-run-parts Target: root.d": None,
    "INFO diskimage_builder.block_device.blockdevice [-] Getting value for [root-label]": None,
    "Copying hooks /elements/amphora-disk/finalise.d/60-amphora-disk": None,
    f"Unmount {WORK}/mnt/sys": None,
    "Image file image.raw created...": None,
    "Build completed successfully": None,
    # What only looks so in a trace (-x).
    "+ disk-image-create:main:334:   python3 /lib/dib-block-device.py init": None,
    "+++ disk-image-create:main:338:   python3 /lib/dib-block-device.py getval root-label": None,
    "+ disk-image-create:main:628:   echo 'Build completed successfully'": None,
}


@pytest.mark.parametrize("line", LINES)
def test_phase_of_a_line(line: str) -> None:
    """diskimage-builder's own lines tell where a build is."""
    found = phase_of(line)
    assert (found and found[0]) == LINES[line]


def test_script_of_a_line() -> None:
    """A phase's line tells the script that runs."""
    line = "dib-run-parts Running /tmp/in_target.d/install.d/60-amphora-haproxy"
    assert phase_of(line) == ("installation", "60-amphora-haproxy")


NO_SPACE = (
    "dpkg: error processing archive /var/cache/apt/archives/linux-image.deb (--unpack):\n"
    " cannot copy extracted data for './boot/vmlinuz' to '/boot/vmlinuz.dpkg-new': failed to write "
    "(No space left on device)"
)
SIGNATURE = (
    "W: GPG error: http://mirror.example.org/debian trixie InRelease: The following signatures "
    "couldn't be verified because the public key is not available: NO_PUBKEY 0123456789ABCDEF\n"
    "E: The repository 'http://mirror.example.org/debian trixie InRelease' is not signed."
)
SQV = (
    "W: OpenPGP signature verification failed: http://mirror.example.org/debian trixie InRelease: "
    "Sub-process /usr/bin/sqv returned an error code (1), error message is: Missing key 0123, "
    "which is needed to verify signature."
)
APT_TLS = (
    "W: Failed to fetch https://mirror.example.org/debian/dists/trixie/InRelease  Certificate "
    "verification failed: The certificate is NOT trusted. The certificate issuer is unknown.  "
    "Could not handshake: Error in the certificate verification. [IP: 192.0.2.1 443]"
)
UV_TLS = (
    "error: Failed to fetch: https://mirror.example.org/simple/octavia/\n"
    "  cause: error sending request for url (https://mirror.example.org/simple/octavia/)\n"
    "  cause: client error (Connect)\n"
    "  cause: invalid peer certificate: {reason}"
)
APT_DNS = (
    "Err:1 http://mirror.example.org/debian trixie InRelease\n"
    "  Could not resolve 'mirror.example.org'\n"
    "Reading package lists..."
)
APT_REFUSED = (
    "W: Failed to fetch http://mirror.example.org/debian/dists/trixie/InRelease  Could not connect "
    "to mirror.example.org:80 (192.0.2.1). - connect (111: Connection refused)"
)
UV_DNS = (
    "error: Failed to fetch: http://mirror.example.org/simple/octavia/\n"
    "  cause: error sending request for url (http://mirror.example.org/simple/octavia/)\n"
    "  cause: client error (Connect)\n"
    "  cause: dns error\n"
    "  cause: failed to lookup address information: Name or service not known"
)

INRELEASE = "http://mirror.example.org/ubuntu/dists/noble/InRelease"
FETCH = f"E: Failed to fetch {INRELEASE}"


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        (NO_SPACE, "no space"),
        ("qemu-img: error while writing at byte 0: No space left on device", "no space"),
        ("cp: error writing 'x': Disk quota exceeded", "no space"),
        (SIGNATURE, "DIB_APT_KEYRING"),
        (SQV, "DIB_APT_KEYRING"),
        (APT_TLS, "--ca-file"),
        (UV_TLS.format(reason="UnknownIssuer"), "--ca-file"),
        (UV_TLS.format(reason="Other(OtherError(CaUsedAsEndEntity))"), "--ca-file"),
        (UV_TLS.format(reason="certificate expired: verification time"), "--ca-file"),
        ("ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED]", "--ca-file"),
        ("fatal: server certificate verification failed. CAfile: none", "--ca-file"),
        (APT_DNS, "--mirror"),
        (APT_REFUSED, "--mirror"),
        (UV_DNS, "--index-url"),
        (f"{FETCH}  The following signatures were invalid: BADSIG 0123", "not what was signed"),
        (f"E: Release file for {INRELEASE} is expired (invalid since 1d)", "clock"),
        (f"E: Release file for {INRELEASE} is not valid yet (invalid for 1d)", "clock"),
        (f"{FETCH}  Hash Sum mismatch", "being updated"),
        (f"{FETCH}  File has unexpected size (1 != 2). Mirror sync in progress?", "being updated"),
        (f"{FETCH}  404  Not Found [IP: 192.0.2.1 80]", "not complete"),
        (f"{FETCH}  500  Internal Server Error [IP: 192.0.2.1 80]", "out of order"),
        (f"{FETCH}  503  Service Unavailable [IP: 192.0.2.1 80]", "out of order"),
        (f"{FETCH}  Redirection loop encountered", "circle"),
        (f"{FETCH}  Error reading from server. Remote end closed connection", "broke off"),
        (f"{FETCH}  Connection timed out [IP: 192.0.2.1 80]", "broke off"),
        ("E: Unable to locate package linux-image-none", "-k"),
        ("E: Package 'linux-image-none' has no installation candidate", "-k"),
        ("E: Unable to correct problems, you have held broken packages.", "-k"),
        ("/tmp/x: line 3: mmdebstrap: command not found", "tool"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'sfdisk'", "tool"),
        ("E: something that nobody has seen before", None),
        ("", None),
    ],
)
def test_hint(said: str, hint: str | None) -> None:
    """What apt, dpkg, mmdebstrap, uv and Python say has a hint where its cause is known."""
    found = hint_for(["dib-run-parts Running x", *said.splitlines(), "Unmount /x"])
    assert (hint in found) if hint and found else found == hint


def test_build_that_goes_well_has_no_hint() -> None:
    """The usual lines of a build look like no known cause."""
    assert hint_for(LINES) is None


@given(st.lists(st.text()), st.integers(1, 40))
def test_lines_that_matter(lines: list[str], most: int) -> None:
    """They are some of the lines in their order, never more than asked for, 30 by default."""
    found = that_matter(lines, most)
    assert len(found) <= most
    remaining = iter(lines)
    assert all(line in remaining for line in found)
    assert that_matter(lines * 40) == [line for line in lines * 40 if that_matter([line])][-30:]


def test_lines_that_do_not_matter() -> None:
    """The cause stays when traces, tables and progress go."""
    noise = [
        "+ set -eu",
        "",
        "dib-run-parts ------- PROFILING -------",
        "Setting up haproxy (3.0) ...",
        "Get:1 http://mirror.example.org/debian trixie InRelease [140 kB]",
        f"Unmount {WORK}/mnt/sys",
        "Reading package lists...",
    ]
    cause = "E: Unable to locate package linux-image-none"
    assert that_matter([*noise, cause, *noise]) == [cause]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where a console writes; the caller's terminal does not count, and a second is a line."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(log.time, "monotonic", itertools.count(0.0).__next__)
    return io.StringIO()


BUILD = [
    f"dib-run-parts Running {WORK}/hooks/root.d/10-amphora-base",
    "I: running apt-get update...",
    "Get:1 http://mirror.example.org/debian trixie InRelease [140 kB]",
    f"dib-run-parts Running {WORK}/hooks/root.d/50-trim-dpkg",
    "dib-run-parts Running /tmp/in_target.d/finalise.d/60-amphora-disk",
    "phase: image files",
]


def test_plain_lines_where_there_is_no_terminal(screen: io.StringIO, tmp_path: Path) -> None:
    """Elsewhere than on a terminal each phase is one plain line, when it has ended."""
    with BuildLog(tmp_path / "log", Console(file=screen)) as build_log:
        for line in BUILD:
            build_log.line(f"{line}\n")
    said = screen.getvalue().splitlines()
    assert [re.sub(r"^ *\d+\.\d s  ", "", line) for line in said] == [
        "root file system and packages",
        "boot loader",
        "image files",
    ]
    assert "\x1b" not in screen.getvalue()


def test_log_file_has_every_line(screen: io.StringIO, tmp_path: Path) -> None:
    """The file has all lines with the seconds since the beginning, whatever is in them."""
    path = tmp_path / "a/new/log"
    with BuildLog(path, Console(file=screen, quiet=True)) as build_log:
        for line in (*BUILD, "größe", "caf\udce9", "tab\tand\r"):
            build_log.line(line)
        assert len(path.read_text().splitlines()) == len(BUILD) + 3  # not only at the end
    written = path.read_text().splitlines()
    assert all(re.match(r" *\d+\.\d\d ", line) for line in written)
    assert [line[9:] for line in written] == [*BUILD, "größe", "caf?", "tab\tand"]
    assert screen.getvalue() == ""


def test_seconds_add_up(screen: io.StringIO, tmp_path: Path) -> None:
    """A phase that begins again goes on counting; the order is that of the first beginning."""
    with BuildLog(tmp_path / "log", Console(file=screen)) as build_log:
        for name in ("a", "b", "a", "c"):
            build_log.phase(name)
    assert list(build_log.seconds) == ["a", "b", "c"]
    assert build_log.seconds["a"] == 2 * build_log.seconds["b"] > 0


def fail(build_log: BuildLog) -> None:
    """Let a build fail in its first phase."""

    def build() -> None:
        with build_log:
            build_log.line(BUILD[0])
            raise AmphoraImageError("no")

    with pytest.raises(AmphoraImageError):
        build()


def test_failure_marks_its_phase(screen: io.StringIO, tmp_path: Path) -> None:
    """The phase in which a build failed says so."""
    fail(BuildLog(tmp_path / "log", Console(file=screen)))
    assert screen.getvalue() == "failed  root file system and packages\n"


HOSTILE = [
    "I: [/]",
    "I: [/bold] x",
    "I: [red",
    "Setting up x [/usr] ...",
    "Get:1 [\\",
    "I: \x1b[31m",
]


@pytest.mark.parametrize("line", HOSTILE)
def test_terminal_shows_what_looks_like_markup(
    line: str, screen: io.StringIO, tmp_path: Path
) -> None:
    """On a terminal, brackets in the output of programs are text."""
    console = Console(file=screen, force_terminal=True, width=80)
    with BuildLog(tmp_path / "log", console) as build_log:
        build_log.line(BUILD[0])
        build_log.line(line)
        assert build_log._status
        console.print(build_log._status.status)
    assert "[" in screen.getvalue()


@pytest.mark.parametrize("width", [10, 20, 80])
def test_terminal_line_fits(width: int, screen: io.StringIO, tmp_path: Path) -> None:
    """What goes on now is cut, so that the line of progress stays one line."""
    console = Console(file=screen, force_terminal=True, width=width)
    with BuildLog(tmp_path / "log", console) as build_log:
        build_log.line(BUILD[0])
        build_log.line(f"Setting up {'long-' * 50}")
        assert build_log._status
        assert "long-" * 20 not in str(build_log._status.status)


def test_no_color(screen: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR a terminal gets no color, not even for a failure."""

    def said() -> str:
        console = Console(file=screen, force_terminal=True, width=80, color_system="truecolor")
        fail(BuildLog(tmp_path / "log", console))
        return screen.getvalue()

    color = re.compile(r"\x1b\[(\d+;)*([34]\d|9\d|10\d)[;m]")
    assert color.search(said())
    monkeypatch.setenv("NO_COLOR", "1")
    screen.seek(0)
    screen.truncate()
    assert not color.search(said())


def test_no_color_without_a_terminal(
    screen: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With NO_COLOR in a pipe there is no escape sequence at all."""
    monkeypatch.setenv("NO_COLOR", "1")
    with BuildLog(tmp_path / "log", Console(file=screen)) as build_log:
        for line in BUILD:
            build_log.line(line)
    assert "\x1b" not in screen.getvalue()
