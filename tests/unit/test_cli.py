# SPDX-License-Identifier: Apache-2.0
"""Both faces of the command: what they refuse, what they print, which code they end with."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from amphora_image import cli, options
from amphora_image.errors import (
    AmphoraImageError,
    BadValue,
    BootFailed,
    CheckFailed,
    HostError,
    Interrupted,
)
from amphora_image.host import Host
from amphora_image.request import BaseOS, ImageType, Request

TEXT = "allowed is a number of gigabytes up to 2048, such as 2 or 2.5"
FLAGS = "allowed are 1, true, yes, 0, false, no"
URLS = "allowed are http, https and file URLs"

#: Variables and options that are refused, and what the message says.
BAD = {
    "-a sparc": "-a (architecture) is 'sparc'; allowed are i386, amd64, armhf, arm64, ppc64le",
    "-a AMD64": "-a (architecture) is 'AMD64'; allowed are",
    "-a ''": "--architecture is ''",
    "-i ubuntu -a i386": "is 'i386'; ubuntu has kernels for amd64, armhf, arm64, ppc64le",
    "-i fedora -a armhf": "is 'armhf'; fedora has kernels for amd64, arm64, ppc64le",
    "-b nginx": "-b (backend) is 'nginx'; allowed are haproxy",
    "-c file": "-c (cache directory) is 'file'; allowed is a directory, which",
    "-c file/cache": "-c (cache directory) is 'file/cache'; allowed is a directory, which",
    "-c ~nobody-of-this-name/x": "-c (cache directory) is '~nobody-of-this-name/x'; there is no",
    "DIB_IMAGE_CACHE=file": "DIB_IMAGE_CACHE is 'file'; allowed is a directory, which",
    "-c ''": "--cache-dir is ''",
    "-d sid": "-d (release of ubuntu for amd64) is 'sid'; allowed are noble, jammy",
    "-i debian -d noble": "of debian for amd64) is 'noble'; allowed are trixie, bookworm",
    "-i debian -a i386 -d trixie": "of debian for i386) is 'trixie'; allowed are bookworm",
    "-i debian -d ''": "--release is ''",
    "DIB_RELEASE=focal": "is 'focal'; allowed are noble, jammy",
    "-g master -p": "-g master and -p exclude each other",
    "-g ''": "--agent-ref is ''",
    "-i gentoo": "is 'gentoo'; allowed are ubuntu, debian, fedora, centos, rocky, rhel",
    "-i rhel": "-i (base OS) is 'rhel'; it needs DIB_LOCAL_IMAGE",
    "-k 'two packages'": "-k (kernel package) is 'two packages'; allowed is the name of a package",
    "-k one,two": "-k (kernel package) is 'one,two'; allowed is the name of a package",
    "-k --help-me": "argument -k/--kernel: expected one argument",
    "--kernel=-x": "-k (kernel package) is '-x'; allowed is the name of a package",
    "-l directory": "-l (log file) is 'directory'; allowed is the name of a file",
    "-l file/log": "/file'; allowed is a directory, which",
    "-o ''": "--output is ''",
    "-o images/": "-o (output) is 'images/'; allowed is the name of a file",
    "-o .": "-o (output) is '.'; allowed is the name of a file",
    "-o ..": "-o (output) is '..'; allowed is the name of a file",
    "-o images/..": "-o (output) is 'images/..'; allowed is the name of a file",
    "-o taken": "/taken.qcow2'; allowed is the name of a file",
    "-o file/lb": "/file'; allowed is a directory, which",
    "-o $'a\\nb'": "-o (output) is 'a\\nb'; control characters are not allowed",
    "-o $'a\\x7fb'": "-o (output) is 'a\\x7fb'; control characters are not allowed",
    "-r ''": "--root-password is ''",
    "-r $'a\\nb'": "-r (root password) is empty or has a control character",
    "-s 0": f"-s (size) is '0'; {TEXT}",
    "-s -1": f"-s (size) is '-1'; {TEXT}",
    "-s 1e9": f"-s (size) is '1e9'; {TEXT}",
    "-s 2048.1": f"-s (size) is '2048.1'; {TEXT}",
    "-s nan": f"-s (size) is 'nan'; {TEXT}",
    "-s sNaN": f"-s (size) is 'sNaN'; {TEXT}",
    "-s inf": f"-s (size) is 'inf'; {TEXT}",
    "-s abc": f"-s (size) is 'abc'; {TEXT}",
    "-s 5GB": f"-s (size) is '5GB'; {TEXT}",
    "-s 1,5": f"-s (size) is '1,5'; {TEXT}",
    "-s 0.1": "-s (size) is 0.1; ubuntu needs at least 1.5 gigabytes",
    "-s 1.49": "-s (size) is 1.49; ubuntu needs at least 1.5 gigabytes",
    "-s 1e-3": "-s (size) is 0.001; ubuntu needs at least 1.5 gigabytes",
    "-i fedora -s 2": "-s (size) is 2; fedora needs at least 3 gigabytes",
    "-s ''": "--size is ''",
    "-t vmdk": "-t (image type) is 'vmdk'; allowed are qcow2, tar, raw, vhd",
    "-t qcow2,,raw": "-t (image type) is ''; allowed are qcow2, tar, raw, vhd",
    "-t qcow2,iso": "-t (image type) is 'iso'; allowed are qcow2, tar, raw, vhd",
    "-w file": "-w (working directory) is 'file'; allowed is a directory, which",
    "-w ~nobody-of-this-name": "-w (working directory) is '~nobody-of-this-name'; there is no",
    "BASE_OS_MIRROR=mirror.example.org": f"BASE_OS_MIRROR is 'mirror.example.org'; {URLS}",
    "BASE_OS_MIRROR='http://mirror.example.org/a b'": f"/a b'; {URLS}",
    "BASE_OS_MIRROR=$'http://mirror.example.org\\ndeb x'": f"deb x'; {URLS}",
    "BASE_OS_MIRROR=http://": f"BASE_OS_MIRROR is 'http://'; {URLS}",
    "DIB_DISTRIBUTION_MIRROR=ftp://mirror.example.org": f"ftp://mirror.example.org'; {URLS}",
    "DIB_DEBIAN_SECURITY_MIRROR=mirror": f"DIB_DEBIAN_SECURITY_MIRROR is 'mirror'; {URLS}",
    "DIB_APT_KEYRING=keys.gpg": "DIB_APT_KEYRING is 'keys.gpg', which does not exist",
    "DIB_LOCAL_IMAGE=nowhere -i rhel": "DIB_LOCAL_IMAGE is 'nowhere', which does not exist",
    "DIB_REPO_PATH=nowhere": "DIB_REPO_PATH is 'nowhere', which does not exist",
    "ELEMENTS_REPO_PATH=nowhere": "ELEMENTS_REPO_PATH is 'nowhere', which does not exist",
    "DIB_LOCAL_ELEMENTS='a b'": "DIB_LOCAL_ELEMENTS is 'a b'; it needs DIB_LOCAL_ELEMENTS_PATH",
    "DIB_LOCAL_ELEMENTS_PATH=file": "file', which is no directory",
    "DIB_LOCAL_ELEMENTS_PATH=directory:nowhere": "nowhere', which is no directory",
    "DIB_OCTAVIA_AMP_USE_NFTABLES=maybe": f"USE_NFTABLES is 'maybe'; {FLAGS}",
    "DIB_OCTAVIA_AMP_USE_SSH=2": f"DIB_OCTAVIA_AMP_USE_SSH is '2'; {FLAGS}",
    "DIB_NO_TMPFS=on": f"DIB_NO_TMPFS is 'on'; {FLAGS}",
    "--archi amd64": "unrecognized arguments: --archi amd64",
    "-z": "unrecognized arguments: -z",
    "debian": "unrecognized arguments: debian",
    "--dry-run=yes": "argument --dry-run: ignored explicit argument 'yes'",
    **{
        f"-{name}": f"argument -{name}/--{long}: expected one argument"
        for name, long in {
            "a": "architecture",
            "b": "backend",
            "c": "cache-dir",
            "d": "release",
            "g": "agent-ref",
            "i": "base-os",
            "k": "kernel",
            "l": "log-file",
            "o": "output",
            "r": "root-password",
            "s": "size",
            "t": "image-type",
            "w": "working-dir",
        }.items()
    },
}


def words_of(line: str) -> list[str]:
    """The words of a line; ``$'...'`` holds escapes, as in a shell."""
    plain = re.sub(r"\$'([^']*)'", lambda m: f"'{m[1].encode().decode('unicode_escape')}'", line)
    return shlex.split(plain)


@pytest.fixture
def place(here: Path) -> Path:
    """A current directory with a file, a directory and a directory that has an output's name."""
    (here / "file").write_text("mine")
    for name in ("directory", "taken.qcow2"):
        (here / name).mkdir()
    return here


@pytest.fixture
def bare_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of which nothing is known, so that nothing is started to learn of it."""
    monkeypatch.setattr(cli.host, "look", Host)
    monkeypatch.setattr(cli.platform, "machine", lambda: "x86_64")


@pytest.mark.parametrize("line", BAD)
def test_bad_value(
    line: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A bad value ends with 3 and one line with what, the value and what is allowed."""
    before = sorted(place.rglob("*")), sorted(place.parent.rglob("*"))
    argv = words_of(line)
    while argv and re.match(r"[A-Z]\w+=", argv[0]):
        monkeypatch.setenv(*argv.pop(0).split("=", 1))
    monkeypatch.setattr(cli.platform, "machine", lambda: "x86_64")
    assert cli.diskimage_create(argv) == 3
    out, err = capsys.readouterr()
    said, *hints = err.splitlines()
    assert said.startswith("error: ")
    assert BAD[line] in said
    assert all(hint.startswith("hint: ") for hint in hints)
    assert out == ""
    assert before == (sorted(place.rglob("*")), sorted(place.parent.rglob("*")))


def test_every_bad_value_has_a_hint_or_says_what_is_allowed() -> None:
    """No message of the table leaves the user without what is right."""
    right = ("allowed", "needs", "expected", "exclude", "kernels for", "exist", "directory")
    right += ("argument", "''", "root password", "there is no", *(FLAGS, URLS, TEXT))
    assert [message for message in BAD.values() if not any(word in message for word in right)] == []


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Help goes to standard output and is no failure."""
    with pytest.raises(SystemExit) as end:
        cli.diskimage_create([option])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: diskimage-create.sh")
    assert "BASE_OS_MIRROR=http://mirror.example.org/ubuntu diskimage-create.sh" in out
    assert err == ""


@pytest.mark.parametrize("option", ["-v", "--version"])
def test_version(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The version is one line on standard output."""
    with pytest.raises(SystemExit) as end:
        cli.diskimage_create([option])
    assert end.value.code == 0
    assert re.fullmatch(r"amphora-image \d+\.\d+\S*\n", capsys.readouterr().out)


def test_help_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line of the help is longer than 80 characters."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.diskimage_create(["-h"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.usefixtures("here", "bare_host")
def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run prints a line for a shell, or with --json the plan."""
    assert cli.diskimage_create(["-i", "debian", "--dry-run"]) == 0
    line = capsys.readouterr().out
    assert cli.diskimage_create(["-i", "debian", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert shlex.split(line)[-len(plan["argv"]) :] == plan["argv"]


@pytest.mark.usefixtures("bare_host")
def test_dry_run_touches_nothing(here: Path) -> None:
    """A dry run makes no file, not even a cache directory."""
    before = sorted(here.parent.rglob("*"))
    assert cli.diskimage_create(["--dry-run", "-c", "cache", "-w", "work", "-l", "log/a"]) == 0
    assert sorted(here.parent.rglob("*")) == before


@pytest.mark.usefixtures("here", "bare_host")
def test_plan_verb_is_the_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """``amphora-image plan`` shows what ``diskimage-create.sh --dry-run`` shows."""
    assert cli.main(["plan", "-i", "debian"]) == 0
    assert cli.diskimage_create(["-i", "debian", "--dry-run", "--json"]) == 0
    plan, _, dry_run = capsys.readouterr().out.partition("}\n{")
    assert json.loads(plan + "}") == json.loads("{" + dry_run)
    assert cli.main(["plan", "-i", "debian", "--shell"]) == 0
    assert cli.diskimage_create(["-i", "debian", "--dry-run"]) == 0
    shell, dry_run = capsys.readouterr().out.splitlines()
    assert shell == dry_run


@pytest.mark.parametrize("argv", [[], ["bild"], ["plan", "-a", "sparc"], ["lock", "--series"]])
@pytest.mark.usefixtures("here")
def test_bad_value_of_a_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """``amphora-image`` refuses as ``diskimage-create.sh`` does."""
    assert cli.main(argv) == 3
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert out == ""


@pytest.mark.usefixtures("here", "bare_host")
def test_build_prints_its_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are one a line on standard output, or a JSON document with their manifests."""

    def built(request: Request, *_: object) -> list[Path]:
        return list(request.outputs.values())

    monkeypatch.setattr(cli, "build", built)
    argv = ["-t", "qcow2,raw", "-o", "/images/lb"]
    assert cli.diskimage_create(argv) == 0
    assert capsys.readouterr() == ("/images/lb.qcow2\n/images/lb.raw\n", "")
    assert cli.diskimage_create([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "files": ["/images/lb.qcow2", "/images/lb.raw"],
        "manifests": ["/images/lb.qcow2.json", "/images/lb.raw.json"],
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, here: Path, bare_host: None) -> Iterator[list[Request]]:
    """What the build was asked for; it makes nothing."""
    requests: list[Request] = []
    monkeypatch.setattr(cli, "build", lambda request, *_: requests.append(request) or [])
    yield requests
    assert list(here.iterdir()) == []


def test_root_password_is_warned_of(
    asked: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    """A root password is used, warned of, and not said."""
    assert cli.diskimage_create(["-r", "correct-horse"]) == 0
    out, err = capsys.readouterr()
    assert "not for production" in err
    assert "correct-horse" not in out + err
    assert [request.root_password for request in asked] == ["correct-horse"]


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        (["-y"], True),
        (["-y", "-k", "linux-image-fips"], False),
        (["-y", "-i", "debian"], False),
        ([], False),
    ],
)
def test_fips_without_such_a_kernel_is_warned_of(
    asked: list[Request], capsys: pytest.CaptureFixture[str], options: list[str], warned: bool
) -> None:
    """Ubuntu's own kernel would take no notice of -y."""
    assert cli.diskimage_create(options) == 0
    assert ("no FIPS mode" in capsys.readouterr().err) == warned
    assert [request.fips for request in asked] == ["-y" in options]


@pytest.mark.parametrize("base_os", BaseOS)
def test_untested_base_os_is_warned_of(
    asked: list[Request],
    capsys: pytest.CaptureFixture[str],
    base_os: BaseOS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Who builds, or plans, what no test has booted is told so; standard output stays as it is."""
    monkeypatch.setenv("DIB_LOCAL_IMAGE", str(tmp_path))
    warning = "warning: images of this base OS are not tested: none was ever booted\n"
    told = "" if base_os in {BaseOS.DEBIAN, BaseOS.UBUNTU} else warning
    for argv in (["build"], ["build", "--dry-run", "--json"], ["plan"]):
        assert cli.main([*argv, "-i", base_os]) == 0
        out, err = capsys.readouterr()
        assert err == told
        assert "warning" not in out
    assert len(asked) == 1


def test_root_password_from_standard_input(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``-r -`` reads one line, so that the password is in no list of processes."""
    monkeypatch.setattr(cli.sys, "stdin", io.StringIO("correct horse \nnext\n"))
    assert cli.diskimage_create(["-r", "-"]) == 0
    assert [request.root_password for request in asked] == ["correct horse "]


def test_root_password_from_empty_standard_input(
    asked: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``-r -`` with nothing to read is refused."""
    monkeypatch.setattr(cli.sys, "stdin", io.StringIO())
    assert cli.diskimage_create(["-r", "-"]) == 3
    assert asked == []


def test_quiet_says_nothing(asked: list[Request], capsys: pytest.CaptureFixture[str]) -> None:
    """``--quiet`` has no word on standard error."""
    assert cli.diskimage_create(["--quiet", "-r", "correct-horse"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("odd", ["sp ace", "quo'te", 'dou"ble', "größe-日本", "$HOME", "a;b", "-x"])
def test_odd_paths(asked: list[Request], odd: str, here: Path) -> None:
    """Spaces, quotes, letters of any script and what a shell would act on are part of a path."""
    argv = [f"--output={odd}", f"--cache-dir={odd}", f"--working-dir={odd}", f"--log-file={odd}"]
    assert cli.diskimage_create([*argv, "-t", "raw"]) == 0
    [request] = asked
    assert request.outputs == {ImageType.RAW: here / f"{odd}.raw"}
    assert {request.cache_dir, request.working_dir, request.log_file} == {here / odd}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AmphoraImageError("what"), 1),
        (HostError("what"), 2),
        (BadValue("what"), 3),
        (CheckFailed("what"), 4),
        (BootFailed("what"), 5),
        (Interrupted(2), 130),
        (Interrupted(15), 143),
        (KeyboardInterrupt(), 130),
        (FileNotFoundError(2, "No such file or directory", "/what"), 1),
    ],
)
@pytest.mark.usefixtures("here", "bare_host")
def test_exit_codes(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each kind of failure has its exit code, and none shows a traceback."""

    def failing(*_: object) -> list[Path]:
        raise error

    monkeypatch.setattr(cli, "build", failing)
    assert cli.diskimage_create([]) == code
    assert cli.main(["build"]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.usefixtures("here", "bare_host")
def test_failure_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What looks like markup, a path or a long line is not changed; the hint comes last."""
    message = f"the build failed\n[bold]E: [/x] {'long ' * 60}\nThe whole log: /a b/log"

    def failing(*_: object) -> list[Path]:
        raise AmphoraImageError(message, hint="do [this]")

    monkeypatch.setattr(cli, "build", failing)
    assert cli.diskimage_create([]) == 1
    assert capsys.readouterr().err == f"error: {message}\nhint: do [this]\n"


@pytest.mark.usefixtures("here", "bare_host")
def test_no_color(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal with NO_COLOR the message has no escape sequence; without it, it has."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert cli.diskimage_create(["-a", "sparc"]) == 3
    assert "\x1b[" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.diskimage_create(["-a", "sparc"]) == 3
    assert "\x1b[" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "value"),
    [(["1", "true", "True", "YES", "yes"], True), (["0", "false", "FALSE", "no", "No"], False)],
)
@pytest.mark.parametrize("default", [True, False])
def test_flag_variables(words: list[str], value: bool, default: bool) -> None:
    """A variable that is yes or no may be written in any usual way; unset is the default."""
    assert {options._flag({"X": word}, "X", default=default) for word in words} == {value}
    assert options._flag({}, "X", default=default) is default
    assert options._flag({"X": ""}, "X", default=default) is default


def test_lock_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``amphora-image lock`` refreshes all series, or the one that was named."""
    asked = []

    def refresh(_: object, series: object, *, constraints: str | None) -> list[Path]:
        asked.append((list(series), constraints))  # type: ignore[call-overload]
        return [Path("/locks/one.txt")]

    monkeypatch.setattr(cli.agent, "refresh_locks", refresh)
    assert cli.main(["lock"]) == 0
    assert cli.main(["lock", "--series", "2026.1", "--constraints", "limits.txt"]) == 0
    assert asked == [(list(cli.agent_source.SERIES), None), (["2026.1"], "limits.txt")]
    assert capsys.readouterr().out == "/locks/one.txt\n" * 2


@pytest.mark.usefixtures("here")
def test_values_that_are_no_files_are_looked_at_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the host is looked at before every value is known to be good."""

    def look() -> Host:
        raise AssertionError("looked at the host")

    monkeypatch.setattr(cli.host, "look", look)
    assert cli.diskimage_create(["-s", "0"]) == 3
