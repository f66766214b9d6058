# SPDX-License-Identifier: Apache-2.0
"""Where partitions lie, and the table that says so."""

from __future__ import annotations

import uuid
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import partitions
from amphora_image.errors import AmphoraImageError
from amphora_image.partitions import (
    ALIGNMENT,
    LAYOUTS,
    LINUX,
    MIB,
    REST,
    SECTOR,
    Part,
    lay,
    sfdisk_script,
)
from amphora_image.request import MINIMUM_SIZE, Architecture

DISKS = st.integers(8 * MIB, 2**44)
FIXED = st.lists(st.integers(1, 3 * MIB), max_size=2)

#: The 33 sectors of the backup table (UEFI 2.10, section 5.3.2).
BACKUP = 33 * SECTOR


def parts(*sizes: int) -> list[Part]:
    """Partitions of these sizes."""
    return [Part(f"part{number}", LINUX, size) for number, size in enumerate(sizes)]


@given(DISKS, FIXED)
def test_partitions_are_laid(disk_size: int, sizes: list[int]) -> None:
    """Partitions lie on MiB boundaries, apart, inside the disk, before the backup table."""
    laid = list(lay(parts(*sizes, REST), disk_size).values())
    assert [extent.start % ALIGNMENT for extent in laid] == [0] * len(laid)
    assert laid[0].start == ALIGNMENT
    assert all(one.start + one.size <= other.start for one, other in pairwise(laid))
    assert [extent.size for extent in laid[:-1]] == sizes
    end = laid[-1].start + laid[-1].size
    assert disk_size - 2 * ALIGNMENT < end <= disk_size - BACKUP
    assert laid[-1].size % SECTOR == 0


@pytest.mark.parametrize(
    ("disk_size", "sizes"),
    [
        (0, [REST]),
        (2 * MIB, [REST]),
        (4 * MIB, [4 * MIB]),
        (4 * MIB, [MIB, MIB, MIB]),
        (4 * MIB, [2 * MIB, REST]),
        (8 * MIB, [REST, MIB]),
        (8 * MIB, [REST, REST]),
    ],
)
def test_partitions_that_do_not_fit(disk_size: int, sizes: list[int]) -> None:
    """Partitions that do not fit are refused with the disk's size."""
    with pytest.raises(AmphoraImageError, match=f"do not fit a disk of {disk_size} bytes"):
        lay(parts(*sizes), disk_size)


@given(DISKS, FIXED)
def test_sfdisk_script(disk_size: int, sizes: list[int]) -> None:
    """The script has a header and a line a partition, in sectors, as sfdisk(8) reads them."""
    laid = lay(parts(*sizes, REST), disk_size)
    header, disk, *rows = sfdisk_script(laid, "id of {}".format).splitlines()
    assert [header, disk] == ["label: gpt", "label-id: id of disk"]
    for row, (part, extent) in zip(rows, laid.items(), strict=True):
        fields = dict(field.split("=") for field in row.split(", "))
        assert int(fields["start"]) * SECTOR == extent.start
        assert 0 <= extent.size - int(fields["size"]) * SECTOR < SECTOR
        assert fields["type"] == LINUX
        assert fields["uuid"] == f"id of {part.name}"
        assert fields["name"] == f'"{part.name}"'


def test_partition_types_are_guids() -> None:
    """Each type is another GUID in the spelling of the specifications."""
    types = [partitions.BIOS_BOOT, partitions.ESP, LINUX, partitions.PREP]
    assert len(set(types)) == len(types)
    assert [str(uuid.UUID(text)).upper() for text in types] == types


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_every_layout_fits_the_smallest_disk(architecture: Architecture) -> None:
    """A disk of the smallest size that may be asked for keeps most of it for the root."""
    smallest = int(min(MINIMUM_SIZE.values()) * 1024**3)
    laid = {part.name: extent for part, extent in lay(LAYOUTS[architecture], smallest).items()}
    assert laid["root"].size > 0.9 * smallest
