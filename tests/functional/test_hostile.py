# SPDX-License-Identifier: Apache-2.0
"""Files that are no image, damaged ones and hostile ones: refused, in bounds, and nothing stays."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import fake_image
import pytest
from fake_image import COMMAND, convert, file, make_raw, run, write_at
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amphora_image import check, disk
from amphora_image.errors import AmphoraImageError, BadValue, CheckFailed

pytestmark = pytest.mark.usefixtures("nothing_stays")


def header(qcow2: Path, target: Path, offset: int, data: bytes) -> Path:
    """A copy of a qcow2 file with other bytes in its header."""
    target.write_bytes(qcow2.read_bytes())
    write_at(target, offset, data)
    return target


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (4, struct.pack(">I", 9), "version is 9"),
        (8, struct.pack(">QI", 512, 11), "backing file"),
        (20, struct.pack(">I", 63), r"clusters have 2\^63"),
        (24, struct.pack(">Q", 2**62), "disk has 4611686018427387904 bytes"),
        (32, struct.pack(">I", 2), "encrypted"),
        (36, struct.pack(">I", 2**31), "tables lie outside"),
        (40, struct.pack(">Q", 2**60), "tables lie outside"),
        (72, struct.pack(">Q", 4), "external data file"),
        (72, struct.pack(">Q", 2**40), "features"),
    ],
)
def test_hostile_qcow2(qcow2: Path, tmp_path: Path, offset: int, data: bytes, message: str) -> None:
    """A header that leads out of the file, or asks for too much, is refused before QEMU sees it."""
    with pytest.raises(CheckFailed, match=message):
        check.check_image(header(qcow2, tmp_path / "hostile.qcow2", offset, data))


def test_backing_file(qcow2: Path, tmp_path: Path) -> None:
    """An overlay of this host's files shows nothing of them, whether they are there or not."""
    for backing in ("/etc/passwd", "/missing"):
        overlay = tmp_path / "overlay.qcow2"
        create = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]
        subprocess.run([*create, overlay, "1M"], check=True)
        done = run("check", overlay)
        assert (done.returncode, done.stdout) == (4, "")
        assert "backing file" in done.stderr


def not_an_image(directory: Path) -> dict[str, tuple[Path, int, str]]:
    """Name -> a file that is no image, the exit code and a part of the message."""
    cases: dict[str, tuple[bytes, int, str]] = {
        "empty": (b"", 3, "of no known format"),
        "random": (os.urandom(100_000), 3, "of no known format"),
        "text": (b"hello\n" * 1000, 3, "of no known format"),
        "gzip": (gzip.compress(b"x" * 1000), 3, "gzip: unpack it first"),
        "vmdk": (b"KDMV" + bytes(1000), 3, "VMDK: convert it"),
        "short qcow2": (b"QFI\xfb\0\0\0\3", 4, "truncated"),
        "short vhd": (b"conectix" + bytes(100), 4, "truncated"),
        "mbr alone": (bytes(510) + b"\x55\xaa", 4, "no partition holds an ext4"),
        "ext4 magic alone": (bytes(1080) + b"\x53\xef" + bytes(3000), 4, "superblock"),
        "tar magic alone": (bytes(257) + b"ustar\0" + bytes(2000), 4, "tar file"),
    }
    made = {}
    for name, (data, code, message) in cases.items():
        path = directory / name
        path.write_bytes(data)
        made[name] = (path, code, message)
    (directory / "fifo").unlink(missing_ok=True)
    os.mkfifo(directory / "fifo")
    return {
        **made,
        "directory": (directory, 3, "allowed is a file"),
        "fifo": (directory / "fifo", 3, "allowed is a file"),
        "missing": (directory / "missing", 3, "does not exist"),
    }


@pytest.mark.parametrize("verb", ["check", "inspect"])
def test_not_an_image(tmp_path: Path, verb: str) -> None:
    """What is no image is told so in one line, without a traceback."""
    for name, (path, code, message) in not_an_image(tmp_path).items():
        done = run(verb, path)
        assert (name, done.returncode, done.stdout) == (name, code, ""), done.stderr
        assert message in done.stderr, name
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vpc"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_truncated(good: Path, tmp_path: Path, kind: str, part: float) -> None:
    """The beginning of an image is refused, or found damaged."""
    image = convert(good, tmp_path / f"image.{kind}", kind)
    os.truncate(image, int(image.stat().st_size * part))
    with pytest.raises((CheckFailed, BadValue)):
        check.check_image(image)


def tar_of(path: Path, *members: tarfile.TarInfo) -> Path:
    """A tar file of empty members."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def member(
    name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0
) -> tarfile.TarInfo:
    """A member of a tar file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../b", "./../x"])
def test_tar_that_leads_outside(tmp_path: Path, name: str) -> None:
    """A tar file with a path out of its tree is refused, and nothing is written there."""
    before = sorted(tmp_path.parent.iterdir())
    with pytest.raises(CheckFailed, match="allowed are relative paths"):
        check.check_image(tar_of(tmp_path / "a.tar", member("ok"), member(name)))
    assert sorted(tmp_path.parent.iterdir()) == before


def test_tar_with_links_outside(tmp_path: Path) -> None:
    """Links of a tar file lead nowhere but into its own tree."""
    tar = tar_of(
        tmp_path / "a.tar",
        member("etc/os-release", tarfile.SYMTYPE, "/../../../../../../etc/hostname"),
        member("loop", tarfile.SYMTYPE, "loop"),
        member("etc/passwd", tarfile.LNKTYPE, "/etc/passwd"),
        member("dev/sda", tarfile.BLKTYPE),
    )
    document = json.loads(run("inspect", tar, "--json").stdout)
    assert document["os"]["id"] == ""
    assert document["logins"] == {}


def test_tar_with_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading ends at a bound, however many entries follow."""
    monkeypatch.setattr("amphora_image.tree.MAX_ENTRIES", 100)
    tar = tar_of(tmp_path / "a.tar", *(member(f"file-{number}") for number in range(101)))
    with pytest.raises(CheckFailed, match="more than 100 entries"):
        check.check_image(tar)


def test_tar_with_a_huge_header(tmp_path: Path) -> None:
    """A header that would fill the memory is not read."""
    tar = tmp_path / "a.tar"
    info = member("x", tarfile.XHDTYPE, size=2**33)
    tar.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tar, 2**33 + 4096)
    with pytest.raises(CheckFailed, match="damaged or hostile"):
        check.check_image(tar)


def test_truncated_tar(tmp_path: Path) -> None:
    """A tar file that ends in a file's data is refused."""
    tar = tar_of(tmp_path / "a.tar", member("etc/motd", size=10_000))
    os.truncate(tar, 5_000)
    with pytest.raises(CheckFailed, match="truncated"):
        check.check_image(tar)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal(qcow2: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A signal ends it with all that it started, and nothing stays."""
    programs = tmp_path / "programs"
    programs.mkdir()
    started = tmp_path / "started"
    slow = programs / "e2fsck"
    slow.write_text(f"#!/bin/sh\necho $$ > {started}\nexec sleep 60\n")
    slow.chmod(0o755)
    path = f"{programs}:{disk.ENVIRONMENT['PATH']}"
    first = f"from amphora_image import disk; disk.ENVIRONMENT['PATH'] = {path!r}"
    words = [sys.executable, "-c", f"{first}\n{COMMAND}", "check", str(qcow2)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    pid = int(started.read_text())
    time.sleep(0.2)
    with suppress(OSError):  # it has ended, or is about to
        assert not Path(f"/proc/{pid}/cmdline").read_bytes()


def test_missing_program(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is missing is named with its package."""
    monkeypatch.setitem(disk.ENVIRONMENT, "PATH", "/nowhere")
    with pytest.raises(AmphoraImageError, match="debugfs is missing") as caught:
        check.check_image(good)
    assert (caught.value.exit_code, caught.value.hint) == (2, "apt-get install e2fsprogs")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of small images: kind -> image."""
    directory = tmp_path_factory.mktemp("small")
    tree = {"etc/os-release": file("ID=debian\n"), "etc/passwd": file("root:x:0:0::/:/bin/sh\n")}
    raw = make_raw(tree, directory / "small.raw")
    images = {kind: convert(raw, directory / f"small.{kind}", kind) for kind in ("qcow2", "vpc")}
    images["tar"] = directory / "small.tar"
    with tarfile.open(images["tar"], "w") as tar:
        tar.add(raw.with_suffix(".tree"), ".")
    found = {kind: path.read_bytes() for kind, path in images.items()}
    with raw.open("rb") as opened:
        found["raw"] = opened.read(4 * 2**20)
    return found


#: Paths that this process has opened for writing, while somebody wants to know.
written: list[Path] = []
watching = False


def _watch(event: str, args: tuple[object, ...]) -> None:
    """Note files that are opened for writing (PEP 578)."""
    if watching and event == "open":
        path, _, flags = args
        if isinstance(path, str) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
            written.append(Path(path))


sys.addaudithook(_watch)


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What this process opens for writing; what others write without a path lands in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(globals(), "watching", True)
    written.clear()
    return written


def peak_memory() -> int:
    """The most memory that this process, or one that it has started, had so far, in bytes."""
    whom = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(each).ru_maxrss for each in whom) * 1024


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(["qcow2", "vpc", "tar", "raw"]),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=16)),
        min_size=1,
        max_size=6,
    ),
    near=st.sampled_from([512, 4096, 2**20, 2**30]),
)
def test_mutated_image(
    small: dict[str, bytes],
    tmp_path: Path,
    watched: list[Path],
    kind: str,
    changes: list[tuple[float, bytes]],
    near: int,
) -> None:
    """Whatever bytes of an image change, it is read or refused, in bounds and in its place."""
    data = bytearray(small[kind])
    # Superblock and group descriptors are more interesting than the space before them.
    base = fake_image.START["root"] if kind == "raw" and near == 4096 else 0
    for place, new in changes:
        at = base + int(place * min(near, len(data) - base - 16))
        data[at : at + len(new)] = new
    image = tmp_path / f"mutated.{kind}"
    image.write_bytes(data)
    if kind == "raw":
        os.truncate(image, fake_image.SIZE)
    before = sorted(tmp_path.iterdir())
    began = time.monotonic()
    watched.clear()
    with suppress(BadValue, CheckFailed):
        check.check_image(image)
    assert time.monotonic() - began < disk.MAX_SECONDS
    assert peak_memory() < disk.MAX_MEMORY
    assert {path for path in watched if tmp_path / "scratch" not in path.parents} <= {
        Path(os.devnull)
    }
    assert sorted(tmp_path.iterdir()) == before
