# SPDX-License-Identifier: Apache-2.0
"""A finished image as a plain value, read without mounting it, and the way from file to value."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from amphora_image import disk, tree
from amphora_image.disk import MIB, Partition
from amphora_image.ext4 import Ext4, FileSystem
from amphora_image.partitions import BIOS_BOOT, ESP
from amphora_image.request import ImageType
from amphora_image.tree import Tree

CHUNK = 8 * MIB
ZEROS = bytes(CHUNK)
#: Bytes that chunks have in common, so that what lies across their border is found.
OVERLAP = 4096
#: Finds beyond these say nothing new.
MAX_MARKS = 200


@dataclass(frozen=True)
class Pattern:
    """Bytes to look for in all data: a needle to find fast, and what must match from there on."""

    kind: str
    needle: bytes
    whole: re.Pattern[bytes]


@dataclass(frozen=True)
class Mark:
    """A pattern that was found; ``path`` is empty where the data belongs to no file any more."""

    kind: str
    path: str


@dataclass(frozen=True)
class Image:
    """All that is known of an image; a tar file has no disk, so no partitions and no file system.

    :ivar size: of the virtual disk, or of the tar file, bytes.
    :ivar label: kind of partition table.
    :ivar root: the partition that ``file_system`` is on.
    :ivar first_sector: of the disk.
    :ivar bios: the content of the BIOS boot partition.
    :ivar esp: paths of the EFI system partition's files.
    """

    name: str
    kind: ImageType
    size: int
    tree: Tree
    label: str = "none"
    partitions: tuple[Partition, ...] = ()
    root: Partition | None = None
    file_system: FileSystem | None = None
    first_sector: bytes = b""
    bios: bytes = b""
    esp: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()


def read_image(path: Path, patterns: Sequence[Pattern] = ()) -> Image:
    """Read an image: qcow2, raw, vhd or tar, told by its content.

    Needs no privilege. Writes to a temporary directory only, which is gone at the end.

    :param patterns: what to look for in all of its data.
    :raises BadValue: the file is no image.
    :raises HostError: a program or space is missing.
    :raises CheckFailed: the image is damaged or hostile.
    """
    kind = disk.detect(path)
    if kind is ImageType.TAR:
        return _read_tar(path, patterns)
    disk.require_programs()
    with tempfile.TemporaryDirectory(prefix="amphora-inspect-") as directory:
        return _read_disk(path, kind, patterns, Path(directory))


def _read_tar(path: Path, patterns: Sequence[Pattern]) -> Image:
    found, places = tree.read_tar(path)
    size = path.stat().st_size
    marks = {
        Mark(kind, tree.at_offset(places, offset))
        for kind, offset in search(path, patterns, 0, size)
    }
    return Image(path.name, ImageType.TAR, size, found, marks=tuple(sorted(marks, key=str)))


def _read_disk(path: Path, kind: ImageType, patterns: Sequence[Pattern], scratch: Path) -> Image:
    opened = disk.open_disk(disk.unpack(path, kind, scratch), scratch)
    root = disk.root_partition(opened)
    file_system = Ext4(opened.raw, root, scratch)
    described = file_system.describe()
    bios, esp = (
        [part for part in opened.partitions if part.type.upper() == kind]
        for kind in (BIOS_BOOT, ESP)
    )
    found = file_system.tree()
    return Image(
        path.name,
        kind,
        opened.size,
        found,
        opened.label,
        opened.partitions,
        root,
        described,
        _bytes(opened.raw, 0, 512),
        b"".join(_bytes(opened.raw, part.start, min(part.size, 4 * MIB)) for part in bios[:1]),
        tuple(path for part in esp[:1] for path in _fat_files(opened.raw, part, scratch)),
        _marks(opened.raw, root, file_system, described.block_size, found, patterns),
    )


def _fat_files(raw: Path, part: Partition, scratch: Path) -> list[str]:
    """List the files of a FAT file system, without the first slash; see :manpage:`mdir(1)`."""
    listed = disk.bounded(["mdir", "-/", "-b", "-i", f"{raw}@@{part.start}", "::"], scratch)
    return [line.removeprefix("::/") for line in listed.splitlines() if not line.endswith("/")]


def _bytes(path: Path, start: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(count)


def _marks(
    raw: Path,
    root: Partition,
    file_system: Ext4,
    block_size: int,
    found: Tree,
    patterns: Sequence[Pattern],
) -> tuple[Mark, ...]:
    hits = [
        (kind, (offset - root.start) // block_size)
        for kind, offset in search(raw, patterns, root.start, root.start + root.size)
    ]
    if not hits:
        return ()
    inodes = file_system.inodes_of(sorted({block for _, block in hits}))
    paths = {entry.inode: path for path, entry in found.entries.items()}
    # A block without inode was a file's once; an inode without name is the file system's own.
    marks = {Mark(kind, paths.get(inodes.get(block, 0), "")) for kind, block in hits}
    return tuple(sorted(marks, key=str))


def search(
    path: Path, patterns: Sequence[Pattern], start: int, end: int
) -> Iterator[tuple[str, int]]:
    """Yield the kind and offset of each pattern in a part of a file, holes left out.

    No more than :data:`MAX_MARKS` of each kind.
    """
    counts = dict.fromkeys((pattern.kind for pattern in patterns), 0)
    with path.open("rb") as file:
        for offset in _chunks(file.fileno(), start, end) if patterns else ():
            chunk = os.pread(file.fileno(), min(CHUNK + OVERLAP, end - offset), offset)
            if chunk.startswith(ZEROS) or not chunk.strip(b"\0"):
                continue
            for pattern in patterns:
                at = chunk.find(pattern.needle)
                while 0 <= at < CHUNK and counts[pattern.kind] < MAX_MARKS:
                    if pattern.whole.match(chunk, at):
                        counts[pattern.kind] += 1
                        yield pattern.kind, offset + at
                    at = chunk.find(pattern.needle, at + 1)


def _chunks(descriptor: int, start: int, end: int) -> Iterator[int]:
    offset = start
    while offset < end:
        try:
            offset = max(offset, os.lseek(descriptor, offset, os.SEEK_DATA))
        except OSError:  # ENXIO: only a hole is left
            return
        if offset < end:
            yield offset
        offset += CHUNK
