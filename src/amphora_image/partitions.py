# SPDX-License-Identifier: Apache-2.0
"""Which partitions a disk has for an architecture's firmware, and where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from amphora_image.errors import AmphoraImageError
from amphora_image.request import Architecture

SECTOR = 512
MIB = 1024**2
ALIGNMENT = MIB
#: The size of a partition that takes what the others leave.
REST = 0

#: GUIDs of partition types (UEFI 2.10, table 5.7; GNU GRUB manual, "BIOS installation"; PowerPC:
#: Discoverable Partitions Specification and GRUB's sources).
BIOS_BOOT = "21686148-6449-6E6F-744E-656564454649"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
PREP = "9E1A2D38-C612-4316-AA26-8B49521E5A8B"


@dataclass(frozen=True)
class Part:
    """A partition that a disk shall have; its size in bytes, or :data:`REST`."""

    name: str
    type: str
    size: int


class Extent(NamedTuple):
    """Where a partition lies on its disk, in bytes."""

    start: int
    size: int


_BIOS = Part("bios", BIOS_BOOT, MIB)
# FAT32, which every firmware reads, needs as much; a few megabytes of it are used.
_ESP = Part("esp", ESP, 64 * MIB)
_ROOT = Part("root", LINUX, REST)

#: Architecture -> its partitions in order: what the firmware reads, and the root file system.
LAYOUTS: Mapping[Architecture, tuple[Part, ...]] = {
    Architecture.AMD64: (_BIOS, _ESP, _ROOT),
    Architecture.I386: (_BIOS, _ROOT),
    Architecture.ARM64: (_ESP, _ROOT),
    Architecture.ARMHF: (_ESP, _ROOT),
}


def lay(parts: Sequence[Part], disk_size: int) -> dict[Part, Extent]:
    """Lay partitions one after another, each on a MiB boundary.

    The last MiB is left to the backup partition table.

    :param disk_size: bytes of the whole disk.
    :raises AmphoraImageError: they do not fit.
    """
    end_of_disk = disk_size // ALIGNMENT * ALIGNMENT - ALIGNMENT
    laid: dict[Part, Extent] = {}
    start = ALIGNMENT
    for part in parts:
        size = part.size or end_of_disk - start
        if size <= 0 or start + size > end_of_disk:
            names = ", ".join(part.name for part in parts)
            raise AmphoraImageError(f"partitions {names} do not fit a disk of {disk_size} bytes")
        laid[part] = Extent(start, size)
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return laid


def sfdisk_script(laid: Mapping[Part, Extent], identify: Callable[[str], str]) -> str:
    """Return the GPT as :manpage:`sfdisk(8)` reads it, sizes in sectors of 512 bytes.

    :param identify: name of a partition, or "disk" -> its GUID.
    """
    rows = [
        f"start={extent.start // SECTOR}, size={extent.size // SECTOR}, "
        f'type={part.type}, uuid={identify(part.name)}, name="{part.name}"'
        for part, extent in laid.items()
    ]
    return "\n".join(["label: gpt", f"label-id: {identify('disk')}", *rows]) + "\n"
