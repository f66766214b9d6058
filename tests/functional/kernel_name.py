# SPDX-License-Identifier: Apache-2.0
"""Give a Linux kernel another name: what ``uname -r`` says, by which it finds its modules.

The name is in the compressed payload of the bzImage (Documentation/arch/x86/boot.rst), so that is
unpacked, changed and packed again. It must not grow, for the code before it knows its length: the
types for BPF (.BTF), which no amphora reads, are blanked to make it smaller.
"""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

SETUP_SECTORS, KERNEL_VERSION, PAYLOAD = 0x1F1, 0x20E, 0x248
SECTOR = 512
NAME_BYTES = 65  # of a field of struct new_utsname


def rename(file: Path, old: str, new: str) -> None:
    """Change the name in a bzImage whose payload is compressed with zstd."""
    image = bytearray(file.read_bytes())
    setup = (image[SETUP_SECTORS] + 1) * SECTOR
    offset, length = struct.unpack_from("<II", image, PAYLOAD)
    start = setup + offset
    # The last four bytes are the length when unpacked.
    room = length - 4
    vmlinux = bytearray(_zstd(bytes(image[start : start + room]), "--decompress"))
    field = old.encode().ljust(NAME_BYTES, b"\0")
    assert vmlinux.count(field), f"no kernel of the name {old}"
    # Only where a whole field of the name is: "vermagic", which the modules must match, stays.
    vmlinux = vmlinux.replace(field, new.encode().ljust(NAME_BYTES, b"\0"))
    banner = f"Linux version {old} "
    vmlinux = vmlinux.replace(banner.encode(), f"Linux version {new}".ljust(len(banner)).encode())
    _blank_types(vmlinux)
    packed = _zstd(bytes(vmlinux), "-18")
    assert len(packed) <= room, f"{len(packed)} bytes do not fit into {room}"
    # The kernel looks for the end of the frame by itself: what follows it is ignored.
    image[start : start + room] = packed.ljust(room, b"\0")
    said = 0x200 + struct.unpack_from("<H", image, KERNEL_VERSION)[0]
    image[said : said + len(old)] = new.encode().ljust(len(old), b" ")
    file.write_bytes(image)


def _blank_types(vmlinux: bytearray) -> None:
    """Blank the section .BTF of an ELF file (elf(5))."""
    table, size, count, names = struct.unpack_from("<Q10xHHH", vmlinux, 0x28)
    headers = [struct.unpack_from("<II16xQQ", vmlinux, table + size * n) for n in range(count)]
    strings = headers[names][2]
    for name, _, offset, length in headers:
        if vmlinux[strings + name :].startswith(b".BTF\0"):
            vmlinux[offset : offset + length] = bytes(length)


def _zstd(data: bytes, option: str) -> bytes:
    command = ["zstd", "--quiet", "--stdout", "-T0", "--no-check", option]
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout
