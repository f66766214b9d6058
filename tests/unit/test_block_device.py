# SPDX-License-Identifier: Apache-2.0
"""GPT partitions as loop devices: where they lie, and how they come and go."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from diskimage_builder.block_device.exception import BlockDeviceSetupException
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import block_device
from amphora_image.block_device import (
    ALIGNMENT,
    PARTITION_TYPES,
    REST_OF_DISK,
    SECTOR,
    Extent,
    PartitionNode,
    Partitions,
    extents,
    sfdisk_script,
)
from amphora_image.errors import AmphoraImageError

MIB = 1024**2
DISKS = st.integers(8 * MIB, 2**44)
FIXED = st.lists(st.integers(1, 3 * MIB).map(lambda size: f"{size}B"), max_size=2)

#: The 33 sectors of the backup table (UEFI 2.10, section 5.3.2).
BACKUP = 33 * SECTOR

CONFIG = {
    "name": "table",
    "base": "disk",
    "partitions": [
        {"name": "bios", "type": "bios-boot", "size": "1MiB"},
        {"name": "root", "type": "linux", "size": "100%", "mkfs": {}},
    ],
}


@given(DISKS, FIXED)
def test_extents(disk_size: int, sizes: list[str]) -> None:
    """Partitions lie on MiB boundaries, apart, inside the disk, before the backup table."""
    laid = extents(disk_size, [*sizes, REST_OF_DISK])
    assert [extent.start % ALIGNMENT for extent in laid] == [0] * len(laid)
    assert laid[0].start == ALIGNMENT
    assert all(one.start + one.size <= other.start for one, other in pairwise(laid))
    assert [f"{extent.size}B" for extent in laid[:-1]] == sizes
    end = laid[-1].start + laid[-1].size
    assert disk_size - 2 * ALIGNMENT < end <= disk_size - BACKUP
    assert laid[-1].size % SECTOR == 0


@pytest.mark.parametrize(
    ("disk_size", "sizes"),
    [
        (0, ["100%"]),
        (2 * MIB, ["100%"]),
        (4 * MIB, ["4MiB"]),
        (4 * MIB, ["1MiB", "1MiB", "1MiB"]),
        (4 * MIB, ["2MiB", "100%"]),
        (8 * MIB, ["100%", "1MiB"]),
        (8 * MIB, ["100%", "100%"]),
        (8 * MIB, ["0MiB"]),
    ],
)
def test_extents_that_do_not_fit(disk_size: int, sizes: list[str]) -> None:
    """Partitions that do not fit are refused with their sizes and the disk's."""
    with pytest.raises(BlockDeviceSetupException, match=f"do not fit a disk of {disk_size} bytes"):
        extents(disk_size, sizes)


def test_no_partition() -> None:
    """A disk may have none."""
    assert extents(8 * MIB, []) == []


@given(DISKS, FIXED)
def test_sfdisk_script(disk_size: int, sizes: list[str]) -> None:
    """The script has a header and a line a partition, in sectors, as sfdisk(8) reads them."""
    laid = extents(disk_size, [*sizes, REST_OF_DISK])
    parts = [{"name": f"part{number}", "type": "linux"} for number in range(len(laid))]
    header, *rows = sfdisk_script(parts, laid).splitlines()
    assert header == "label: gpt"
    for row, part, extent in zip(rows, parts, laid, strict=True):
        fields = dict(field.split("=") for field in row.split(", "))
        assert int(fields["start"]) * SECTOR == extent.start
        assert 0 <= extent.size - int(fields["size"]) * SECTOR < SECTOR
        assert fields["type"] == PARTITION_TYPES["linux"]
        assert fields["name"] == f'"{part["name"]}"'


def test_partition_types_are_guids() -> None:
    """Each type is another GUID in the spelling of the specifications."""
    assert len(set(PARTITION_TYPES.values())) == len(PARTITION_TYPES)
    assert [str(uuid.UUID(text)).upper() for text in PARTITION_TYPES.values()] == list(
        PARTITION_TYPES.values()
    )


@pytest.fixture
def argvs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The programs that were asked for, standard input last; losetup gives /dev/loop7."""
    asked: list[list[str]] = []

    def run(argv: Sequence[object], *, stdin: str = "") -> str:
        asked.append([*map(str, argv), stdin])
        return "/dev/loop7\n"

    monkeypatch.setattr(block_device, "run", run)
    return asked


def test_partitions_come_and_go(argvs: list[list[str]], tmp_path: Path) -> None:
    """The table is written to the disk, a loop device made for each partition, and detached."""
    image = tmp_path / "image.raw"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    state: dict[str, Any] = {"blockdev": {"disk": {"device": "/dev/loop6", "image": str(image)}}}
    table, bios, root = Partitions(CONFIG, {}, state).get_nodes()
    assert (table.get_edges(), bios.get_edges()) == ((["disk"], []), (["table"], []))

    table.create()
    laid = extents(8 * MIB, ["1MiB", "100%"])
    [written] = argvs
    assert written[0] == "sfdisk"
    assert written[-2:] == ["/dev/loop6", sfdisk_script(CONFIG["partitions"], laid)]  # type: ignore[arg-type]

    root.create()
    assert state["blockdev"]["root"] == {"device": "/dev/loop7"}
    where = ["--offset", str(2 * MIB), "--sizelimit", str(5 * MIB)]
    assert argvs[-1] == ["losetup", "--show", "--find", *where, str(image), ""]

    root.rollback()
    root.umount()
    assert argvs[-2:] == [["losetup", "--detach", "/dev/loop7", ""]] * 2


def test_detaching_twice_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop device that is gone already does not end the rest of the clean-up."""

    def run(_: object) -> str:
        raise AmphoraImageError("losetup ended with 1")

    monkeypatch.setattr(block_device, "run", run)
    PartitionNode(
        "root", "disk", "table", {"blockdev": {"root": {"device": "/dev/loop7"}}}
    ).umount()


@pytest.mark.parametrize("kind", [{"type": "fat"}, {}])
def test_unknown_partition_type(kind: dict[str, str]) -> None:
    """A type that is not known is refused with those that are."""
    config = {**CONFIG, "partitions": [{"name": "x", "size": "100%", **kind}]}
    with pytest.raises(BlockDeviceSetupException, match="allowed are bios-boot, esp, linux, prep"):
        Partitions(config, {}, {})


def test_extent_is_json() -> None:
    """diskimage-builder keeps its state as JSON between its commands; an extent survives that."""
    assert Extent(*list(Extent(1, 2))) == Extent(1, 2)
