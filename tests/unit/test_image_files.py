# SPDX-License-Identifier: Apache-2.0
"""Image files of a tree: which programs write them, and of what."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from amphora_image import disk_writer, image_files, reproducible
from amphora_image.disk_writer import Source
from amphora_image.errors import AmphoraImageError
from amphora_image.image_files import DISK_TYPES, WRITERS
from amphora_image.partitions import BIOS_BOOT, LINUX, MIB, SECTOR
from amphora_image.request import GIB, Architecture, ImageType, VhdSubformat

SIZE = 2 * GIB


@pytest.fixture
def argvs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that were asked for."""
    asked: list[list[str]] = []

    def run(argv: Sequence[object], **_: object) -> str:
        asked.append([str(word) for word in argv])
        return ""

    monkeypatch.setattr(image_files, "run", run)
    monkeypatch.setattr(disk_writer, "run", run)
    return asked


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A tree with a boot loader."""
    grub = tmp_path / "tree/boot/grub"
    grub.mkdir(parents=True)
    (grub / "boot.img").write_bytes(b"B" * 510 + b"\x55\xaa")
    (grub / "core.img").write_bytes(b"C" * 1000)
    (tmp_path / "tree/boot/efi/EFI").mkdir(parents=True)
    (tmp_path / "tree/boot/efi/EFI/grub").touch()
    return a_source(tmp_path)


def a_source(work: Path, **changes: Any) -> Source:
    """The source of an image for amd64, some things changed."""
    return Source(work=work, name="lb", size=SIZE, architecture=Architecture.AMD64, **changes)


def written(source: Source, *kinds: ImageType) -> None:
    """Write image files."""
    files = {kind: source.work / f"lb.{kind}" for kind in kinds}
    image_files.write_files(source, files)


def test_every_type_has_a_writer() -> None:
    """Each image type can be written, and those of containers are of no disk."""
    assert set(WRITERS) == set(ImageType)
    assert set(WRITERS) - DISK_TYPES == {ImageType.TAR, ImageType.OCI, ImageType.SQUASHFS}


def test_disk(source: Source, argvs: list[list[str]]) -> None:
    """The disk has its table, the file system in its partition, and GRUB in its two places."""
    written(source, ImageType.RAW)
    sfdisk, mkfat, mmd, mcopy, mkfs, convert = argvs
    assert sfdisk == ["sfdisk", "--quiet", str(source.disk)]
    assert mkfs[mkfs.index("-d") + 1] == str(source.tree)
    assert mkfs[mkfs.index("-L") + 1] == disk_writer.ROOT_LABEL
    assert f"offset={66 * MIB}," in mkfs[mkfs.index("-E") + 1]
    assert mkfs[-2:] == [str(source.disk), str((SIZE - 67 * MIB) // disk_writer.BLOCK)]
    assert mkfat[0] == "mkfs.fat"
    assert mkfat[-4:] == ["--offset", str(2 * MIB // SECTOR), str(source.disk), str(64 * 1024)]
    esp = f"{source.disk}@@{2 * MIB}"
    assert mmd == ["mmd", "-i", esp, "::/EFI"]
    assert mcopy[-3:] == [esp, str(source.esp / "EFI/grub"), "::/EFI/grub"]
    assert not (source.tree / "boot/efi").exists()
    assert convert == [
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        *map(str, (source.disk, source.work / "lb.raw")),
    ]
    with source.disk.open("rb") as disk:
        assert disk.read(8) == b"B" * 8
        disk.seek(MIB)
        assert disk.read(SECTOR + 8)[-2:] == b"CC"
    assert source.disk.stat().st_size == SIZE


def test_contents_of_every_partition() -> None:
    """Each type of partition of a layout has something that writes it."""
    types = {part.type for layout in disk_writer.LAYOUTS.values() for part in layout}
    assert types <= set(disk_writer.CONTENTS)
    assert {BIOS_BOOT, LINUX} <= types


def test_tar_makes_no_disk(source: Source, argvs: list[list[str]]) -> None:
    """A tar alone is made of the tree, in an order of its own, and no disk is written."""
    written(source, ImageType.TAR)
    [tar] = argvs
    assert tar[0] == "tar"
    assert "--sort=name" in tar
    assert tar[-2:] == [f"--directory={source.tree}", "."]
    assert not source.disk.exists()


def test_others_make_a_disk_and_a_tar(tmp_path: Path, argvs: list[list[str]]) -> None:
    """Without a tree, files are made of the disk and the tar that diskimage-builder made."""
    source = a_source(tmp_path)
    source.disk.touch()
    source.tar.touch()
    written(source, ImageType.QCOW2, ImageType.TAR)
    assert sorted(argv[0] for argv in argvs) == ["cp", "qemu-img"]
    assert source.disk.stat().st_size == 0


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ("", "compression_type=zstd"),
        ("cluster_size=1M", "compression_type=zstd,cluster_size=1M"),
        ("compression_type=zlib,compat=1.1", "compression_type=zlib,compat=1.1"),
    ],
)
def test_qcow2_options(source: Source, argvs: list[list[str]], options: str, given: str) -> None:
    """A qcow2 is compressed by zstd unless its options say otherwise."""
    changed = a_source(source.work, qemu_img_options=options)
    image_files.write_qcow2(changed, source.work / "lb.qcow2")
    [convert] = argvs
    assert convert[convert.index("-o") + 1] == given
    assert "-c" in convert


def test_reproducible(
    source: Source, argvs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an epoch the trees are settled, nothing is chosen at random, and all goes in order."""
    settled: list[Path] = []
    monkeypatch.setattr(image_files, "settle_times", lambda tree, _: settled.append(tree))
    monkeypatch.setattr(reproducible, "run", lambda *_, **__: "")
    first, second = (a_source(source.work, epoch=1795593600) for _ in range(2))
    written(first, ImageType.QCOW2)
    count = len(argvs)
    source.esp.rename(source.tree / "boot/efi")
    written(second, ImageType.QCOW2)
    assert argvs[count:] == argvs[:count]
    assert settled == [source.tree, source.esp] * 2
    convert, mkfat = argvs[-1], next(argv for argv in argvs if argv[0] == "mkfs.fat")
    assert "-W" not in convert
    assert "--invariant" in mkfat


def test_identifiers_are_new_each_time(source: Source, argvs: list[list[str]]) -> None:
    """Without an epoch no two disks have the same identifiers."""
    assert source.identify("disk") != source.identify("disk")
    assert source.environment is None


@pytest.mark.parametrize("subformat", VhdSubformat)
def test_vhd(source: Source, argvs: list[list[str]], subformat: VhdSubformat) -> None:
    """A VHD is of the kind that was asked for, and of the disk's size."""
    image_files.write_vhd(a_source(source.work, vhd_subformat=subformat), source.work / "lb.vhd")
    [convert] = argvs
    assert convert[convert.index("-o") + 1] == f"subformat={subformat},force_size=on"


def test_squashfs(source: Source, argvs: list[list[str]]) -> None:
    """A squashfs is made of the tree, without what is mounted over."""
    written(source, ImageType.SQUASHFS)
    [argv] = argvs
    assert argv[:3] == ["mksquashfs", str(source.tree), str(source.work / "lb.squashfs")]
    assert argv[-2:] == list(image_files.MOUNT_POINTS)


def test_oci(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OCI image is made of the tar, its time is SOURCE_DATE_EPOCH, and no other file stays."""

    def tar(argv: Sequence[object], **_: object) -> str:
        [file] = (word for word in map(str, argv) if word.startswith("--file="))
        Path(file.removeprefix("--file=")).write_bytes(b"tree")
        return ""

    monkeypatch.setattr(image_files, "run", tar)
    source = a_source(source.work, epoch=0)
    written(source, ImageType.OCI)
    with tarfile.open(source.work / "lb.oci") as archive:
        assert {member.mtime for member in archive} == {0}
    assert {path.name for path in source.work.iterdir()} == {"tree", "esp", "lb.oci"}


def test_main_does_what_argv_says(
    source: Source, argvs: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The words of one process are understood by the other."""
    kinds = DISK_TYPES | {ImageType.TAR}
    files = {kind: source.work / f"l=b.{kind}" for kind in kinds}
    module, *words = image_files.argv(source, files)[1:]
    assert module == "amphora_image.image_files"
    image_files.main(words)
    targets = {word for argv in argvs for word in argv if "l=b" in word}
    assert targets == {*(str(files[kind]) for kind in DISK_TYPES), f"--file={files[ImageType.TAR]}"}
    assert capsys.readouterr().out == "phase: disk\nphase: image files\n"


def test_failure(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that fails is told in one line."""

    def run(*_: object, **__: object) -> str:
        raise AmphoraImageError("tar ended with 2")

    monkeypatch.setattr(image_files, "run", run)
    words = image_files.argv(source, {ImageType.TAR: Path("/x")})[2:]
    with pytest.raises(SystemExit, match="image files: tar ended with 2"):
        image_files.main(words)
