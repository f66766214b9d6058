# SPDX-License-Identifier: Apache-2.0
"""The DIB block-device plug-in ``amphora_partitions``: GPT partitions as loop devices at offsets.

DIB's own ``partitioning`` needs kpartx, dmsetup and udev to make a node for each partition. A loop
device that starts at the partition's offset of the image *file* is the same thing, needs none of
them, and passes discards through (a loop device on the whole-disk loop device would not).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diskimage_builder.block_device.exception import BlockDeviceSetupException
from diskimage_builder.block_device.plugin import NodeBase, PluginBase
from diskimage_builder.block_device.utils import parse_abs_size_spec

from amphora_image.errors import AmphoraImageError
from amphora_image.run import run

logger = logging.getLogger(__name__)

SECTOR = 512
ALIGNMENT = 1024 * 1024
REST_OF_DISK = "100%"

#: Partition types by the names that a block-device YAML uses (UEFI 2.10, table 5.7; GNU GRUB
#: manual, "BIOS installation"; Discoverable Partitions Specification).
PARTITION_TYPES = {
    "bios-boot": "21686148-6449-6E6F-744E-656564454649",
    "esp": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "linux": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "prep": "9E1A2D38-C612-4316-AA26-8B49521E5A8B",
}


class Extent(NamedTuple):
    """Where a partition lies on its disk, in bytes."""

    start: int
    size: int


def extents(disk_size: int, sizes: Sequence[str]) -> list[Extent]:
    """Lay partitions one after another, each on a MiB boundary.

    :param disk_size: bytes of the whole disk.
    :param sizes: a DIB size such as ``8MiB`` for each partition, or ``100%`` for the rest of the
        disk, which leaves the last MiB to the backup partition table.
    :raises BlockDeviceSetupException: they do not fit.
    """
    end_of_disk = disk_size // ALIGNMENT * ALIGNMENT - ALIGNMENT
    laid: list[Extent] = []
    start = ALIGNMENT
    for size_spec in sizes:
        rest = end_of_disk - start
        size = rest if size_spec == REST_OF_DISK else parse_abs_size_spec(size_spec)
        if size <= 0 or size > rest:
            raise BlockDeviceSetupException(
                f"partitions {', '.join(sizes)} do not fit a disk of {disk_size} bytes"
            )
        laid.append(Extent(start, size))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return laid


def sfdisk_script(partitions: Sequence[Mapping[str, str]], laid: Sequence[Extent]) -> str:
    """Return the GPT as :manpage:`sfdisk(8)` reads it, sizes in sectors of 512 bytes."""
    rows = [
        f"start={extent.start // SECTOR}, size={extent.size // SECTOR}, "
        f'type={PARTITION_TYPES[partition["type"]]}, name="{partition["name"]}"'
        for partition, extent in zip(partitions, laid, strict=True)
    ]
    return "\n".join(["label: gpt", *rows]) + "\n"


class TableNode(NodeBase):  # type: ignore[misc]  # DIB has no types
    """The partition table of one disk; the partitions wait for it."""

    def __init__(
        self, name: str, base: str, partitions: Sequence[Mapping[str, str]], state: Any
    ) -> None:
        super().__init__(name, state)
        self.base = base
        self.partitions = partitions

    def get_edges(self) -> tuple[list[str], list[str]]:
        """Return the disk as what must be there first."""
        return [self.base], []

    def create(self) -> None:
        """Write the table and remember where each partition lies."""
        disk = self.state["blockdev"][self.base]
        disk_size = Path(disk["image"]).stat().st_size
        laid = extents(disk_size, [part["size"] for part in self.partitions])
        # Written through the loop device, so that its page cache knows the table: the boot
        # loader's first sector is written there too. The kernel is not asked to read it.
        run(
            ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk["device"]],
            stdin=sfdisk_script(self.partitions, laid),
        )
        self.state["extents"] = {
            part["name"]: list(extent) for part, extent in zip(self.partitions, laid, strict=True)
        }


class PartitionNode(NodeBase):  # type: ignore[misc]  # DIB has no types
    """One partition: a loop device at its offset of the image file."""

    def __init__(self, name: str, base: str, table: str, state: Any) -> None:
        super().__init__(name, state)
        self.base = base
        self.table = table

    def get_edges(self) -> tuple[list[str], list[str]]:
        """Return the table as what must be there first."""
        return [self.table], []

    def create(self) -> None:
        """Attach the loop device; DIB's rollback detaches it if a later node fails."""
        extent = Extent(*self.state["extents"][self.name])
        image = self.state["blockdev"][self.base]["image"]
        where = ["--offset", str(extent.start), "--sizelimit", str(extent.size)]
        device = run(["losetup", "--show", "--find", *where, image]).strip()
        self.state["blockdev"][self.name] = {"device": device}
        self.add_rollback(self.umount)

    def umount(self) -> None:
        """Detach the loop device; DIB asks twice after a failure, so a second time is no error."""
        device = self.state["blockdev"][self.name]["device"]
        try:
            run(["losetup", "--detach", device])
        except AmphoraImageError as error:
            logger.info("%s: %s", device, error)


class Partitions(PluginBase):  # type: ignore[misc]  # DIB has no types
    """``amphora_partitions`` in a block-device YAML.

    Keys: ``base`` (the disk's node), ``partitions``: a list of ``name``, ``type`` (a key of
    :data:`PARTITION_TYPES`), ``size`` (``8MiB`` or ``100%``) and what DIB puts on a partition
    (``mkfs``).
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], state: Any) -> None:
        super().__init__()
        partitions = config["partitions"]
        for partition in partitions:
            if partition.get("type") not in PARTITION_TYPES:
                raise BlockDeviceSetupException(
                    f"partition {partition['name']} has the type {partition.get('type')}; "
                    f"allowed are {', '.join(PARTITION_TYPES)}"
                )
        base, name = config["base"], config["name"]
        self.nodes: list[NodeBase] = [
            TableNode(name, base, partitions, state),
            *(PartitionNode(part["name"], base, name, state) for part in partitions),
        ]

    def get_nodes(self) -> list[NodeBase]:
        """Return the table and its partitions."""
        return self.nodes
