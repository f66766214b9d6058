# SPDX-License-Identifier: Apache-2.0
"""Image files that are the same bytes each time, from builds that were not alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from tiny import PATIENCE, Scene

from amphora_image.disk_writer import Source
from amphora_image.image_files import write_files
from amphora_image.manifest import sha256_of
from amphora_image.request import GIB, Architecture, ImageType

EPOCH = 1795593600
#: File -> content, of a root file system that looks like one.
FILES = {
    "boot/efi/EFI/debian/grubx64.efi": "grub",
    "boot/efi/EFI/BOOT/BOOTX64.EFI": "shim",
    "boot/grub/boot.img": "x" * 510 + "\x55\xaa",
    "boot/grub/core.img": "x" * 513,
    "etc/a file": "1",
    'etc/"quoted"': "2",
    "usr/share/other": "3",
}


def make_tree(tree: Path, names: Iterable[str], mtime: int) -> None:
    """Make the files in an order and with a time."""
    for name in names:
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FILES[name], encoding="latin-1")
        os.utime(path, (mtime, mtime))
    (tree / "etc/link").symlink_to("a file")
    os.link(tree / "etc/a file", tree / "etc/same")


def digests(work: Path, names: Iterable[str], mtime: int) -> dict[ImageType, str]:
    """SHA-256 of the image files of a tree."""
    make_tree(work / "tree", names, mtime)
    files = {kind: work / f"lb.{kind}" for kind in ImageType}
    write_files(Source(work, "lb", GIB, Architecture.AMD64, epoch=EPOCH), files)
    return {kind: sha256_of(file) for kind, file in files.items()}


def test_files_of_two_trees(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither the order in which files were made nor when, early or late, is in any file."""
    first, second = (Path(tmp_path_factory.mktemp("work", numbered=True)) for _ in range(2))
    assert digests(first, FILES, EPOCH + 10) == digests(second, reversed(FILES), EPOCH - 2000)
    fsck = subprocess.run(["e2fsck", "-fn", f"{first}/image.raw?offset={66 * 2**20}"], check=False)
    assert fsck.returncode == 0


#: The installed command, without its installed script.
COMMAND = "import sys; from amphora_image.cli import main; sys.exit(main())"
VERIFY = (sys.executable, "-c", COMMAND, "verify-reproducible", "--json")


def test_builds_that_differ(scene: Scene) -> None:
    """Where an image tells who built it, the path in the tree and the parts of disks are named."""
    words = ("-t", ",".join(ImageType))
    build = scene.start("lb", *words, fault="install:differ", program=VERIFY)
    said, errors = build.process.communicate(timeout=PATIENCE)
    assert build.process.returncode == 4, errors
    found = json.loads(said)
    assert found["reproducible"] is False
    assert [len(both) for both in found["sha256"].values()] == [2] * len(ImageType)
    [first, *rest] = found["differences"]
    assert (first["where"], first["what"]) == ("./etc/built-by", "content")
    disks = {f"{kind}: partition root" for kind in ("qcow2", "raw", "vhd")}
    assert {each["where"] for each in rest} == disks
    assert not list(scene.directory.glob(".verify-*"))
    assert scene.left_behind() == []


def test_two_builds_of_debian(tmp_path: Path) -> None:
    """Two fresh builds of one request are the same bytes, as a disk, compressed, and as a tar."""
    place = ("-o", tmp_path / "lb", "-c", tmp_path / "cache")
    options = ("-i", "debian", "-s", "2", "-t", "raw,qcow2,tar", *place)
    done = subprocess.run(
        [*VERIFY, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["reproducible"] is True
    assert found["differences"] == []
    assert [len(digests) for digests in found["sha256"].values()] == [1, 1, 1]
    assert not list(tmp_path.glob(".verify-*"))
