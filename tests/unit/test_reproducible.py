# SPDX-License-Identifier: Apache-2.0
"""What makes an image the same bytes each time, and what tells how two differ."""

from __future__ import annotations

import io
import json
import os
import py_compile
import shutil
import struct
import tarfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

import pytest
from rich.console import Console

from amphora_image import cli, options, reproducible, verify
from amphora_image.build_all import Build, SomeFailed
from amphora_image.disk import MIB, Disk, Partition
from amphora_image.errors import AmphoraImageError, BadValue
from amphora_image.request import Environment, ImageType
from amphora_image.verify import Compared, Difference, tree_differences

EPOCH = 1795593600


def test_identifiers_follow_from_the_epoch() -> None:
    """The same for the same part of the same build, and for no other."""
    known = {reproducible.identifier(epoch, what) for epoch in (1, 2) for what in ("disk", "esp")}
    assert len(known) == 4
    assert reproducible.identifier(1, "disk") in known
    assert all(str(uuid.UUID(each)) == each for each in known)


def test_environment() -> None:
    """Programs that know different variables are told the same time."""
    env = reproducible.environment(EPOCH)
    assert env["SOURCE_DATE_EPOCH"] == env["E2FSPROGS_FAKE_TIME"] == str(EPOCH)
    assert env["PATH"] == os.environ["PATH"]


def test_settle_times(tmp_path: Path) -> None:
    """Directories, files and links get the time, links themselves and not what they lead to."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/link").symlink_to("/nowhere")
    (tmp_path / "a/file").touch()
    reproducible.settle_times(tmp_path, EPOCH)
    found = (tmp_path, *tmp_path.rglob("*"))
    assert {path.lstat().st_mtime for path in found} == {EPOCH}
    assert len(found) == 4


def compiled(source: Path, mode: PycInvalidationMode = PycInvalidationMode.TIMESTAMP) -> Path:
    """The byte code of a new module."""
    source.write_text("x = 1\n")
    return Path(str(py_compile.compile(str(source), invalidation_mode=mode)))


def test_byte_code_knows_its_source_by_the_new_time(tmp_path: Path) -> None:
    """What was up to date is so with the new time, and what was not, or has no time, stays."""
    fresh = compiled(tmp_path / "fresh.py")
    stale = compiled(tmp_path / "stale.py")
    hashed = compiled(tmp_path / "hashed.py", PycInvalidationMode.CHECKED_HASH)
    (tmp_path / "stale.py").write_text("x = 10\n")
    lonely = compiled(tmp_path / "lonely.py")
    (tmp_path / "lonely.py").unlink()
    (tmp_path / "plain.pyc").write_bytes(b"no code")
    before = {path: path.read_bytes() for path in (stale, hashed, lonely)}
    code = fresh.read_bytes()
    reproducible.settle_times(tmp_path, EPOCH)
    assert fresh.read_bytes() == code[:4] + struct.pack("<III", 0, EPOCH, 6) + code[16:]
    assert {path: path.read_bytes() for path in before} == before


def test_byte_code_out_of_the_tree(tmp_path: Path) -> None:
    """Where a link leads is the host's, in which nothing is written."""
    outside = compiled(tmp_path / "module.py")
    before = outside.read_bytes()
    inside = tmp_path / "tree/__pycache__" / outside.name
    inside.parent.mkdir(parents=True)
    inside.symlink_to(outside)
    shutil.copy2(tmp_path / "module.py", tmp_path / "tree")
    reproducible.settle_times(tmp_path / "tree", EPOCH)
    assert outside.read_bytes() == before


@pytest.mark.parametrize("kind", [2, 3], ids=["fixed", "dynamic"])
def test_settle_vhd(tmp_path: Path, kind: int) -> None:
    """Time, identifier and checksum are in the footer, and in a dynamic VHD's copy of it."""
    file = tmp_path / "lb.vhd"
    footer = b"conectix".ljust(60, b"f") + struct.pack(">I", kind) + b"f" * 448
    file.write_bytes(b"h" * 512 + b"data" * 256 + footer)
    reproducible.settle_vhd(file, EPOCH)
    content = file.read_bytes()
    settled = content[-512:]
    assert struct.unpack_from(">I", settled, 24) == (EPOCH - 946684800,)
    assert uuid.UUID(bytes=settled[68:84]).version == 5
    (checksum,) = struct.unpack_from(">I", settled, 64)
    assert checksum == ~sum(settled[:64] + settled[68:]) & 0xFFFFFFFF
    assert content[:512] == (settled if kind == 3 else b"h" * 512)
    assert content[512:-512] == b"data" * 256


def test_settle_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name, quoted, gets both times that mke2fs takes from the host, the root as well."""
    told: list[str] = []

    def run(argv: Sequence[Any], **_: object) -> str:
        told.append(Path(argv[3]).read_text())
        assert argv[4] == f"{tmp_path}/disk.raw?offset=1024"
        return ""

    monkeypatch.setattr(reproducible, "run", run)
    (tmp_path / "tree").mkdir()
    (tmp_path / 'tree/a "b').touch()
    reproducible.settle_inodes(tmp_path / "disk.raw", 1024, tmp_path / "tree", EPOCH)
    assert told == [
        f'sif "/" atime @{EPOCH}\nsif "/" ctime @{EPOCH}\n'
        f'sif "/a ""b" atime @{EPOCH}\nsif "/a ""b" ctime @{EPOCH}\n'
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_name_that_debugfs_cannot_read(tmp_path: Path) -> None:
    """A name with a line break would be another command."""
    (tmp_path / "a\nb").touch()
    with pytest.raises(AmphoraImageError, match="line break"):
        reproducible.settle_inodes(tmp_path / "disk", 0, tmp_path, EPOCH)


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "now", "2147483648", "1" * 30])
def test_epochs_that_are_not_allowed(value: str) -> None:
    """A time is whole seconds that all file systems can hold; an empty variable is none."""
    if not value:
        assert options.read_environment({"SOURCE_DATE_EPOCH": value}).source_date_epoch is None
        return
    with pytest.raises(BadValue, match="SOURCE_DATE_EPOCH is"):
        options.read_environment({"SOURCE_DATE_EPOCH": value})


def a_tar(path: Path, **members: tuple[bytes, int]) -> Path:
    """A tar with members of a content and a time."""
    with tarfile.open(path, "w") as archive:
        for name, (content, mtime) in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), mtime
            archive.addfile(member, io.BytesIO(content))
    return path


def test_tree_differences(tmp_path: Path) -> None:
    """What is in one only, and all that can differ of what is in both."""
    first = a_tar(tmp_path / "1", both=(b"x", 1), left=(b"", 1), changed=(b"a", 1))
    second = a_tar(tmp_path / "2", both=(b"x", 1), right=(b"", 1), changed=(b"b", 2))
    with tarfile.open(second, "a", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("left")
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, "both", 0o4755
        member.uid, member.mtime = 7, 1
        member.pax_headers = {"SCHILY.xattr.user.a": "1"}
        archive.addfile(member)
    found = [(each.where, each.what) for each in tree_differences(first, second)]
    kinds = ("type", "mode", "owner", "attributes", "content")
    assert found == [
        ("changed", "time"),
        ("changed", "content"),
        *(("left", kind) for kind in kinds),
        ("right", "path"),
    ]
    assert list(tree_differences(second, first))[-1].values == ("there", "missing")
    assert list(tree_differences(first, first)) == []


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two disks with a table and two partitions; the bytes of each MiB are its number."""
    paths = tmp_path / "1.raw", tmp_path / "2.raw"
    for path in paths:
        path.write_bytes(b"".join(bytes([number]) * MIB for number in range(4)))
    parts = Partition("esp", "", MIB, MIB), Partition("root", "", 2 * MIB, 2 * MIB)
    monkeypatch.setattr(verify.disk, "unpack", lambda path, *_: path)
    monkeypatch.setattr(verify.disk, "open_disk", lambda raw, _: Disk(raw, 4 * MIB, "gpt", parts))
    return paths


@pytest.mark.parametrize(
    ("at", "where", "what", "byte"),
    [
        (510, "raw: partition table", "byte 510", "00"),
        (2 * MIB - 1, "raw: partition esp", f"byte {MIB - 1}", "01"),
        (3 * MIB + 9, "raw: partition root", f"byte {MIB + 9}", "03"),
    ],
)
def test_disk_differences(
    disks: tuple[Path, Path], at: int, where: str, what: str, byte: str
) -> None:
    """The part of a disk is named, and its first byte that differs."""
    with disks[1].open("r+b") as disk:
        disk.seek(at)
        disk.write(b"\xff")
    [found] = verify.disk_differences(ImageType.RAW, *disks)
    assert (found.where, found.what) == (where, what)
    assert [value[:2] for value in found.values] == [byte, "ff"]


def test_same_disk_in_files_that_differ(disks: tuple[Path, Path]) -> None:
    """A file's format has its own bytes, which are no part of the disk."""
    [found] = verify.disk_differences(ImageType.QCOW2, *disks)
    assert (found.where, found.what) == ("qcow2", "format")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Build]:
    """The builds that were asked for; they are pretended, and the raw disks differ."""
    asked: list[Build] = []

    def build_all(builds: Sequence[Build], *_: object) -> list[tuple[Build, int, float, list[str]]]:
        [build] = builds
        asked.append(build)
        options = list(build.line.options)
        output = Path(options[options.index("-o") + 1])
        output.parent.mkdir()
        raw, tar = (Path(f"{output}.{kind}") for kind in ("raw", "tar"))
        raw.write_bytes(b"disk %d" % len(asked))
        a_tar(tar, etc=(b"same", 1))
        return [(build, 0, 1.0, [str(raw), str(tar)])]

    monkeypatch.setattr(verify, "build_all", build_all)
    monkeypatch.setattr(verify, "disk_differences", lambda *_: [])
    return asked


def test_verify(builds: list[Build], a_request: Any, tmp_path: Path) -> None:
    """Two fresh builds in different places, as different people; nothing of them stays."""
    request = a_request(image_types=(ImageType.RAW,), output=tmp_path / "out/lb")
    found = verify.verify(request, ["-i", "debian"], lambda *_: None)
    first, second = (build.line for build in builds)
    assert first.variables == {"SOURCE_DATE_EPOCH": str(found.epoch)}
    assert second.variables == first.variables | verify.VARIED
    assert (first.wrapper, second.wrapper) == ((), verify.ELSEWHERE)
    assert first.options[:5] == second.options[:5] == ["-i", "debian", "--fresh", "-t", "raw,tar"]
    assert not set(first.options[6::2]) & set(second.options[6::2])
    assert abs(found.epoch - time.time()) < 3600
    assert found.differing == ["raw"]
    assert found.differences == []
    assert list((tmp_path / "out").iterdir()) == []


def test_verify_takes_the_epoch(builds: list[Build], a_request: Any, tmp_path: Path) -> None:
    """The time that was asked for is both builds'."""
    environment = Environment(source_date_epoch=EPOCH)
    request = a_request(output=tmp_path / "lb", environment=environment)
    assert verify.verify(request, [], lambda *_: None).epoch == EPOCH
    assert {build.line.variables["SOURCE_DATE_EPOCH"] for build in builds} == {str(EPOCH)}


def test_a_build_that_fails(
    a_request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no second build after one that failed, whose exit code it is."""
    asked: list[Build] = []

    def build_all(builds: list[Build], *_: object) -> list[tuple[Build, int, float, list[str]]]:
        asked.extend(builds)
        return [(builds[0], 2, 1.0, [])]

    monkeypatch.setattr(verify, "build_all", build_all)
    with pytest.raises(SomeFailed, match="first") as failed:
        verify.verify(a_request(output=tmp_path / "lb"), [], lambda *_: None)
    assert failed.value.exit_code == 2
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("options", "changes", "why"),
    [(["-r", "x"], {"root_password": "x"}, "random salt"), (["--dry-run"], {}, "builds nothing")],
)
def test_nothing_to_compare(
    a_request: Any, options: list[str], changes: dict[str, Any], why: str
) -> None:
    """What cannot be the same twice, or makes nothing, is refused before anything is built."""
    with pytest.raises(BadValue, match=why):
        verify.verify(a_request(**changes), options, lambda *_: None)


def test_compared() -> None:
    """The document says yes only if all files are the same; the table ends after some rows."""
    rows = [Difference(f"etc/[{number}]", "time", ("1", "2")) for number in range(100)]
    same = Compared(EPOCH, {ImageType.RAW: ("a", "a")}, [])
    other = Compared(EPOCH, {ImageType.RAW: ("a", "a"), ImageType.TAR: ("b", "c")}, rows)
    assert same.as_json() == {
        "source_date_epoch": EPOCH,
        "reproducible": True,
        "sha256": {"raw": ["a"]},
        "differences": [],
    }
    assert other.as_json()["reproducible"] is False
    assert other.as_json()["sha256"]["tar"] == ["b", "c"]
    assert other.as_json()["differences"][1] == {
        "where": "etc/[1]",
        "what": "time",
        "values": ("1", "2"),
    }
    assert same.as_table().row_count == 1
    assert other.as_table().row_count == 2 + 40 + 1
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(other.as_table())
    said = console.export_text()
    assert "etc/[1]" in said
    assert "and 60 more" in said


@pytest.mark.parametrize(("digests", "code"), [(("a", "a"), 0), (("a", "b"), 4)])
def test_command(
    monkeypatch: pytest.MonkeyPatch,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    digests: tuple[str, str],
    code: int,
) -> None:
    """The verb tells the build's options, prints what came out, and ends with 4 if it differs."""
    told: list[Sequence[str]] = []

    def verify(_: object, options: Sequence[str], __: object) -> Compared:
        told.append(options)
        return Compared(EPOCH, {ImageType.TAR: digests}, [])

    monkeypatch.setattr(cli, "verify", verify)
    options = ["-i", "debian", "-t", "tar", "--json"]
    assert cli.main(["verify-reproducible", *options]) == code
    assert told == [options]
    assert json.loads(capsys.readouterr().out)["reproducible"] is (code == 0)
