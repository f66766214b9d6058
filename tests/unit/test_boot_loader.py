# SPDX-License-Identifier: Apache-2.0
"""GRUB put on a disk."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import boot_loader
from amphora_image.boot_loader import BOOT_CODE_SIZE, embed
from amphora_image.errors import AmphoraImageError
from amphora_image.partitions import SECTOR

BOOT = st.binary(min_size=SECTOR - 2, max_size=SECTOR - 2).map(lambda code: code + b"\x55\xaa")
CORE = st.binary(min_size=SECTOR + 1, max_size=4 * SECTOR)
SECTORS = st.integers(1, 2**64 - 2)


@given(BOOT, CORE, SECTORS)
def test_embed_changes_two_fields(boot: bytes, core: bytes, first_sector: int) -> None:
    """The two stages get the sectors of what follows them, and nothing else changes."""
    boot_code, placed = embed(boot, core, first_sector)
    assert struct.unpack_from("<Q", boot_code, 0x5C) == (first_sector,)
    assert struct.unpack_from("<Q", placed, 0x1F4) == (first_sector + 1,)
    assert boot_code[:0x5C] + boot_code[0x64:] == boot[:0x5C] + boot[0x64:BOOT_CODE_SIZE]
    assert placed[:0x1F4] + placed[0x1FC:] == core[:0x1F4] + core[0x1FC:]
    assert len(boot_code) == 440


@pytest.mark.parametrize(
    ("boot", "core", "message"),
    [
        (b"", b"x" * 1024, "boot.img is not a boot sector of 512 bytes"),
        (b"x" * SECTOR, b"x" * 1024, "boot.img is not a boot sector of 512 bytes"),
        (b"x" * SECTOR + b"\x55\xaa", b"x" * 1024, "boot.img is not a boot sector"),
        (b"x" * 510 + b"\x55\xaa", b"", "core.img is too short: 0 bytes"),
        (b"x" * 510 + b"\x55\xaa", b"x" * SECTOR, "core.img is too short: 512 bytes"),
    ],
)
def test_embed_refuses(boot: bytes, core: bytes, message: str) -> None:
    """What is no boot sector or no core image is not written anywhere."""
    with pytest.raises(AmphoraImageError, match=message):
        embed(boot, core, 2048)


@pytest.fixture
def grub(tmp_path: Path) -> Path:
    """A directory with GRUB's two stages."""
    (tmp_path / "grub").mkdir()
    (tmp_path / "grub/boot.img").write_bytes(b"B" * 510 + b"\x55\xaa")
    (tmp_path / "grub/core.img").write_bytes(b"C" * 1000)
    return tmp_path / "grub"


def test_install(grub: Path, tmp_path: Path) -> None:
    """The disk keeps its signature, its partition table and what is behind GRUB."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"d" * 8192)
    boot_loader.install(grub, disk, 4096, 2048)
    boot_code, core = embed(b"B" * 510 + b"\x55\xaa", b"C" * 1000, 4096 // SECTOR)
    expected = bytearray(b"d" * 8192)
    expected[: len(boot_code)] = boot_code
    expected[4096 : 4096 + len(core)] = core
    assert disk.read_bytes() == expected


def test_install_where_there_is_no_room(grub: Path, tmp_path: Path) -> None:
    """A disk whose partition is too small stays as it is."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"d" * 8192)
    with pytest.raises(AmphoraImageError, match=r"core\.img has 1000 bytes, its partition 999"):
        boot_loader.install(grub, disk, 4096, 999)
    assert disk.read_bytes() == b"d" * 8192


@pytest.mark.parametrize("name", ["boot.img", "core.img"])
def test_install_without_grub(grub: Path, tmp_path: Path, name: str) -> None:
    """A tree without GRUB is told by the file that is missing."""
    (grub / name).unlink()
    with pytest.raises(AmphoraImageError, match=f"no /boot/grub/{name}"):
        boot_loader.install(grub, tmp_path / "disk", 4096, 2048)
