# SPDX-License-Identifier: Apache-2.0
"""``amphora-image check`` on real disks: a built image, broken ones, and files that are none."""

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
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

import fake_image
import pytest
from fake_image import BREAKS, PRIVATE_KEY, Break, asked, file, make_raw, manifest, nodes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amphora_image import check, disk
from amphora_image.errors import AmphoraImageError, BadValue, CheckFailed

COMMAND = "import sys; from amphora_image.cli import main; sys.exit(main())"


def run(verb: str, *argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a verb of the command in the directory of its image."""
    words = [sys.executable, "-c", COMMAND, verb, *map(str, argv)]
    env = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)


def debugfs(raw: Path, *commands: str) -> None:
    """Change the root file system of a raw disk."""
    script = "".join(f"{command}\n" for command in commands)
    with tempfile.TemporaryDirectory() as scratch:
        root = disk.root_partition(disk.open_disk(raw, Path(scratch)))
    subprocess.run(
        ["debugfs", "-w", "-f", "-", f"{raw}?offset={root.start}"],
        input=script,
        text=True,
        check=True,
        capture_output=True,
    )


def broken(image: Path) -> set[str]:
    """The names of the rules that an image breaks."""
    return {finding.rule for finding in check.check_image(image)}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk that breaks no rule, its manifest beside it."""
    raw = make_raw(nodes(), tmp_path_factory.mktemp("good") / "amphora.raw")
    Path(f"{raw}.json").write_text(manifest(asked()))
    return raw


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """A copy of the good disk and its manifest, to be broken."""
    raw = tmp_path / "amphora.raw"
    subprocess.run(["cp", "--sparse=always", good, raw], check=True)
    Path(f"{raw}.json").write_text(manifest(asked()))
    return raw


@pytest.fixture(scope="module")
def qcow2(good: Path) -> Path:
    """The good disk as qcow2."""
    return convert(good, good.with_suffix(".qcow2"), "qcow2")


def convert(raw: Path, target: Path, kind: str) -> Path:
    """Convert a raw disk."""
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, raw, target], check=True)
    Path(f"{target}.json").write_text(manifest(asked()))
    return target


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left of an image that was looked at, good or bad."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    yield
    assert list(scratch.iterdir()) == []


def test_built_image(debian_image: Path) -> None:
    """The image that the README's command builds breaks no rule, and is read in ten seconds."""
    began = time.monotonic()
    done = run("check", debian_image, "--json")
    seconds = time.monotonic() - began
    assert (done.returncode, json.loads(done.stdout)["findings"]) == (0, []), done.stderr
    assert seconds < 30, "ten seconds on an idle machine"


def test_built_image_broken(debian_image: Path, tmp_path: Path) -> None:
    """What is changed in a built image is found by the rules that it breaks, and by no other."""
    raw = tmp_path / "broken.raw"
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", debian_image, raw], check=True
    )
    key = tmp_path / "key"
    key.write_bytes(PRIVATE_KEY)
    debugfs(
        raw,
        f"write {key} /srv/some.pem",
        f"write {key} /etc/ssh/ssh_host_rsa_key",
        "sif /usr/bin/bash mode 0104755",
        "sif /etc/shadow mode 0100666",
        "rm /usr/bin/amphora-agent",
        "rm /etc/systemd/system/haproxy.service",
    )
    Path(f"{raw}.json").write_text(Path(f"{debian_image}.json").read_text())
    assert broken(raw) == {
        *("secrets", "host-keys", "setuid", "modes", "world-writable", "agent", "services")
    }


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vpc", "tar"])
def test_good_image(good: Path, tmp_path: Path, kind: str) -> None:
    """A good image breaks no rule in any format."""
    image = tmp_path / f"image.{kind}"
    if kind == "tar":
        with tarfile.open(image, "w") as tar:
            tar.add(good.with_suffix(".tree"), ".")
        Path(f"{image}.json").write_text(manifest(asked()))
    elif kind == "vpc":
        options = ["-o", "subformat=dynamic,force_size=on"]
        subprocess.run(["qemu-img", "convert", "-O", kind, *options, good, image], check=True)
        Path(f"{image}.json").write_text(manifest(asked()))
    else:
        convert(good, image, kind)
    assert check.check_image(image) == []


@pytest.mark.parametrize(
    ("rule", "what", "break_it"), BREAKS, ids=[f"{rule}-{what}" for rule, what, _ in BREAKS]
)
def test_broken_tree(tmp_path: Path, rule: str, what: str, break_it: Break) -> None:
    """A disk that was made with one thing wrong breaks the named rule alone."""
    found = nodes()
    break_it(found)
    raw = make_raw(found, tmp_path / "amphora.raw")
    Path(f"{raw}.json").write_text(manifest(asked()))
    findings = check.check_image(raw)
    assert {finding.rule for finding in findings} == {rule}
    assert any(what in finding.what for finding in findings)


def write_at(raw: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with raw.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)


def remove_boot_code(raw: Path) -> None:
    """Take the boot loader out of the first sector."""
    write_at(raw, 0, bytes(440))


def remove_core(raw: Path) -> None:
    """Empty the BIOS boot partition."""
    write_at(raw, fake_image.START["bios"], bytes(4096))


def free_a_used_inode(raw: Path) -> None:
    """Make the inode bitmap wrong."""
    debugfs(raw, "freei /etc/passwd")


def leave_unclean(raw: Path) -> None:
    """Make the file system look as if it had not been unmounted."""
    debugfs(raw, "ssv state 0")


def delete_a_key(raw: Path) -> None:
    """Write a private key and delete it: its bytes stay."""
    key = raw.with_suffix(".key")
    key.write_bytes(PRIVATE_KEY)
    debugfs(raw, f"write {key} /srv.pem")
    debugfs(raw, "rm /srv.pem")


def shrink_manifest(raw: Path) -> None:
    """Let the manifest tell of a smaller disk."""
    Path(f"{raw}.json").write_text(manifest(asked(size=2**30)))


def other_packages(raw: Path) -> None:
    """Let the manifest tell of another HAProxy."""
    packages = {**(asked().packages or {}), "haproxy": "9"}
    Path(f"{raw}.json").write_text(manifest(asked(packages=packages)))


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        ("boot-loader", remove_boot_code),
        ("boot-loader", remove_core),
        ("file-system", free_a_used_inode),
        ("loopback", leave_unclean),
        ("secrets", delete_a_key),
        ("size", shrink_manifest),
        ("locked-packages", other_packages),
    ],
)
def test_broken_disk(copy: Path, rule: str, break_it: Callable[[Path], None]) -> None:
    """What is wrong with a disk, or differs from its manifest, breaks the named rule."""
    break_it(copy)
    assert broken(copy) == {rule}


def test_command(copy: Path) -> None:
    """The command shows all findings, writes JUnit XML, and exits with 4."""
    junit = copy.with_suffix(".xml")
    assert run("check", copy).returncode == 0
    remove_boot_code(copy)
    done = run("check", copy, "--junit", junit)
    assert done.returncode == 4
    assert "the first sector is not GRUB's" in done.stdout
    assert "breaks 1 of the rules: boot-loader" in done.stderr
    assert ElementTree.parse(junit).getroot().attrib["failures"] == "1"  # noqa: S314
    assert "breaks 2 of the rules: boot-loader, sshd" in run("check", copy, "-n").stderr
    assert run("check", copy, "--junit", copy.parent / "missing" / "a").returncode in (1, 3)


def test_image_is_not_written_to(good: Path) -> None:
    """Looking changes neither the image nor its time."""
    before = (good.stat().st_mtime_ns, good.read_bytes())
    check.check_image(good)
    assert (good.stat().st_mtime_ns, good.read_bytes()) == before


def test_name_of_image(good: Path, tmp_path: Path) -> None:
    """An image may be called anything."""
    for name in ("-R?offset=1", "json:{}", "a b'c\".raw"):
        image = tmp_path / name
        image.symlink_to(good)
        assert check.check_image(image, manifest=Path(f"{good}.json")) == []


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
    assert (
        not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    )


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
