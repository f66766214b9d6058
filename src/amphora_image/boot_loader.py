# SPDX-License-Identifier: Apache-2.0
"""GRUB for BIOS, put on a disk without asking the host what its devices are.

``grub-install`` probes the devices under ``/boot`` and gives up where partitions are plain loop
devices. What it writes is small and documented: the boot code of the first sector holds the sector
at which the core image starts, and the first sector of the core image (``diskboot``) holds the
sector at which the rest of it follows (GRUB sources: ``include/grub/i386/pc/boot.h``).
"""

from __future__ import annotations

import struct
from pathlib import Path

from amphora_image.errors import AmphoraImageError
from amphora_image.partitions import SECTOR

#: Bytes of the first sector that are boot code; the disk signature and partition table follow.
BOOT_CODE_SIZE = 440
#: Offset in the boot code of the core image's first sector: 64 bits, little endian.
CORE_SECTOR_OFFSET = 0x5C
#: Offset in the core image's first sector of the first sector of the rest: 64 bits, little endian.
REST_SECTOR_OFFSET = 0x1F4


def embed(boot_image: bytes, core_image: bytes, first_sector: int) -> tuple[bytes, bytes]:
    """Tell GRUB's two stages where they lie.

    :param boot_image: ``boot.img``, one sector.
    :param core_image: ``core.img`` as grub-mkimage makes it for i386-pc.
    :param first_sector: the disk sector at which the core image will start.
    :returns: the boot code for the first 440 bytes of the disk, and the core image.
    :raises AmphoraImageError: one of them is not what it should be.
    """
    if len(boot_image) != SECTOR or boot_image[-2:] != b"\x55\xaa":
        raise AmphoraImageError(f"boot.img is not a boot sector of {SECTOR} bytes")
    if len(core_image) <= SECTOR:
        raise AmphoraImageError(f"core.img is too short: {len(core_image)} bytes")
    boot_code, core = bytearray(boot_image), bytearray(core_image)
    struct.pack_into("<Q", boot_code, CORE_SECTOR_OFFSET, first_sector)
    struct.pack_into("<Q", core, REST_SECTOR_OFFSET, first_sector + 1)
    return bytes(boot_code[:BOOT_CODE_SIZE]), bytes(core)


def install(grub: Path, disk: Path, start: int, room: int) -> None:
    """Write GRUB to a disk and its BIOS boot partition.

    :param grub: directory that holds ``boot.img`` and ``core.img``.
    :param disk: the disk's file.
    :param start: offset of the BIOS boot partition, bytes.
    :param room: its size, bytes.
    :raises AmphoraImageError: GRUB is not there, or the core image does not fit the partition.
    """
    missing = [name for name in ("boot.img", "core.img") if not (grub / name).is_file()]
    if missing:
        raise AmphoraImageError(
            f"the image has no /boot/grub/{missing[0]}", hint="amphora-disk makes it"
        )
    boot_code, core = embed(
        (grub / "boot.img").read_bytes(), (grub / "core.img").read_bytes(), start // SECTOR
    )
    if len(core) > room:
        raise AmphoraImageError(f"core.img has {len(core)} bytes, its partition {room}")
    with disk.open("r+b") as file:
        file.write(boot_code)
        file.seek(start)
        file.write(core)
