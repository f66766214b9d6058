# SPDX-License-Identifier: Apache-2.0
"""The same bytes each time: what a build does when SOURCE_DATE_EPOCH is set.

By that variable (reproducible-builds.org, "SOURCE_DATE_EPOCH specification") a build is told its
time, in seconds since 1970. All that is in the image has that time, and names that are chosen at
random are derived from it.
"""

from __future__ import annotations

import os
import struct
import uuid
from importlib.util import source_from_cache
from pathlib import Path

from amphora_image.errors import AmphoraImageError
from amphora_image.run import run

VARIABLE = "SOURCE_DATE_EPOCH"

#: Of the identifiers that are derived (RFC 9562, 5.5).
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "amphora-image.invalid")

#: Bytes of a VHD's footer, and 2000-01-01, from which it counts (Virtual Hard Disk Image Format
#: Specification, "Hard Disk Footer Format").
VHD_FOOTER, VHD_START = 512, 946_684_800
VHD_DYNAMIC = 3


def identifier(epoch: int, what: str) -> str:
    """Return the UUID of a disk, partition or file system of a build."""
    return str(uuid.uuid5(NAMESPACE, f"{epoch} {what}"))


def environment(epoch: int) -> dict[str, str]:
    """Return the environment of programs that write file systems."""
    # mke2fs before 1.47.1 and debugfs know only the first; FAT has local times.
    told = {"E2FSPROGS_FAKE_TIME": str(epoch), VARIABLE: str(epoch), "TZ": "UTC0"}
    return {**os.environ, **told}


def settle_times(tree: Path, epoch: int) -> None:
    """Give all that is in a tree the time of the build.

    Older times too: they tell when this host checked our elements out, or unpacked a package.
    """
    paths = (tree, *tree.rglob("*"))
    for path in paths:
        if path.suffix == ".pyc" and not path.is_symlink():
            _settle_byte_code(path, epoch)
    for path in paths:
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def _settle_byte_code(path: Path, epoch: int) -> None:
    """Let byte code that knows its source by time and size (PEP 552) know it by the new time."""
    try:
        source = Path(source_from_cache(path)).lstat()
    except (ValueError, OSError):  # not in a __pycache__, or without its source
        return
    known = (number % 2**32 for number in (0, int(source.st_mtime), source.st_size))
    with path.open("r+b") as file:
        if file.read(16)[4:] == struct.pack("<III", *known):
            file.seek(8)
            file.write(struct.pack("<I", epoch))


def settle_inodes(disk: Path, offset: int, tree: Path, epoch: int) -> None:
    """Give the inodes of an ext4 file system the times that mke2fs took from the host's.

    :param offset: of the file system on the disk, bytes.
    :param tree: what it was filled from.
    :raises AmphoraImageError: a name cannot be told to :manpage:`debugfs(8)`.
    """
    script = disk.with_suffix(".debugfs")
    names = ["", *sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))]
    if strange := next((name for name in names if "\n" in name), None):
        raise AmphoraImageError(f"{strange!r} has a line break in its name")
    quoted = ('"/{}"'.format(name.replace('"', '""')) for name in names)
    lines = (f"sif {name} {time} @{epoch}\n" for name in quoted for time in ("atime", "ctime"))
    script.write_bytes(os.fsencode("".join(lines)))
    run(["debugfs", "-w", "-f", script, f"{disk}?offset={offset}"], env=environment(epoch))
    script.unlink()


def settle_vhd(file: Path, epoch: int) -> None:
    """Give a VHD the time and the identifier of the build, which QEMU takes from the host."""
    with file.open("r+b") as disk:
        disk.seek(-VHD_FOOTER, os.SEEK_END)
        footer = bytearray(disk.read(VHD_FOOTER))
        struct.pack_into(">I", footer, 24, max(0, epoch - VHD_START))
        footer[68:84] = uuid.UUID(identifier(epoch, "vhd")).bytes
        footer[64:68] = bytes(4)
        struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
        disk.seek(-VHD_FOOTER, os.SEEK_END)
        disk.write(footer)
        (kind,) = struct.unpack_from(">I", footer, 60)
        if kind == VHD_DYNAMIC:  # has a copy at its beginning
            disk.seek(0)
            disk.write(footer)
