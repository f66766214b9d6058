# SPDX-License-Identifier: Apache-2.0
"""Tree becomes a disk: a raw file with partitions, root file system and boot loader.

No loop device, no mount, no copy: mke2fs(8) fills the file system from the tree at its offset of
the file.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from amphora_image import boot_loader, reproducible
from amphora_image.partitions import (
    BIOS_BOOT,
    ESP,
    LAYOUTS,
    LINUX,
    SECTOR,
    Extent,
    lay,
    sfdisk_script,
)
from amphora_image.request import Architecture, VhdSubformat
from amphora_image.run import run

#: By this label boot loader, initramfs and fstab(5) find the root file system; cloud images'
#: usual one.
ROOT_LABEL = "cloudimg-rootfs"

#: Named one by one, so that an image does not depend on the build host's mke2fs.conf(5), and GRUB
#: of every supported release can read it.
FEATURES = (
    *("has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit"),
    *("flex_bg", "sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize"),
    "metadata_csum",
)
#: Bytes a block; bytes of the disk, and of its table, that an inode takes.
BLOCK, BYTES_PER_INODE, INODE = 4096, 16384, 256
JOURNAL_MIB = 32
#: Per cent of the blocks that only root may use.
RESERVED = 1


@dataclass(frozen=True)
class Source:
    """What the files are made of.

    :ivar work: holds the tree, or the disk and the tar that elements of others had DIB make.
    :ivar name: of the image.
    :ivar size: of the disk, bytes.
    :ivar epoch: SOURCE_DATE_EPOCH, if the same bytes are wanted each time.
    """

    work: Path
    name: str
    size: int
    architecture: Architecture
    qemu_img_options: str = ""
    vhd_subformat: VhdSubformat = VhdSubformat.DYNAMIC
    epoch: int | None = None

    @property
    def tree(self) -> Path:
        """The root file system's tree."""
        return self.work / "tree"

    @property
    def esp(self) -> Path:
        """The files of the EFI system partition."""
        return self.work / "esp"

    @property
    def disk(self) -> Path:
        """The raw disk."""
        return self.work / "image.raw"

    @property
    def tar(self) -> Path:
        """The tar that DIB made."""
        return self.work / "image.tar"

    @property
    def environment(self) -> dict[str, str] | None:
        """Of programs that write file systems; None: the caller's own."""
        return None if self.epoch is None else reproducible.environment(self.epoch)

    def identify(self, what: str) -> str:
        """Return the UUID of a part of the disk."""
        if self.epoch is None:
            return str(uuid.uuid4())
        return reproducible.identifier(self.epoch, what)


def write_disk(source: Source) -> None:
    """Write a new disk, a sparse file.

    :raises AmphoraImageError: the tree does not fit, or lacks its boot loader.
    """
    with source.disk.open("wb") as file:
        file.truncate(source.size)
    laid = lay(LAYOUTS[source.architecture], source.size)
    run(["sfdisk", "--quiet", source.disk], stdin=sfdisk_script(laid, source.identify))
    for part, extent in laid.items():
        CONTENTS[part.type](source, extent)


def write_root(source: Source, extent: Extent) -> None:
    """Make the root file system and copy the tree into it."""
    seed = f"hash_seed={source.identify('hash')}"
    run(
        [
            *("mkfs.ext4", "-q", "-L", ROOT_LABEL, "-d", source.tree),
            *("-b", str(BLOCK), "-i", str(BYTES_PER_INODE), "-I", str(INODE)),
            *("-m", str(RESERVED), "-J", f"size={JOURNAL_MIB}", "-U", source.identify("root fs")),
            *("-O", ",".join(("none", *FEATURES))),
            # The new file is all zeros: nothing to discard, and nothing left for the kernel to
            # initialise at the first boot.
            *("-E", f"offset={extent.start},nodiscard,lazy_itable_init=0,{seed}"),
            *(source.disk, str(extent.size // BLOCK)),
        ],
        env=source.environment,
    )
    if source.epoch is not None:
        reproducible.settle_inodes(source.disk, extent.start, source.tree, source.epoch)


def write_grub_for_bios(source: Source, extent: Extent) -> None:
    """Write GRUB to its partition and to the disk's first sector."""
    boot_loader.install(source.tree / "boot/grub", source.disk, extent.start, extent.size)


def write_esp(source: Source, extent: Extent) -> None:
    """Make the EFI system partition (UEFI 2.10, section 13.3) and copy its files into it."""
    place = ("--offset", str(extent.start // SECTOR))
    kibibytes = str(extent.size // 1024)
    # One sector a cluster: else mkfs.fat(8) chooses by the size of the whole disk.
    sizes = ("-F", "32", "-s", "1")
    serial = ("-i", source.identify("esp fs")[:8])
    # The label has a time; mkfs.fat knows no SOURCE_DATE_EPOCH.
    fixed = [] if source.epoch is None else ["--invariant"]
    run(["mkfs.fat", *sizes, *fixed, *serial, "-n", "ESP", *place, source.disk, kibibytes])
    image = f"{source.disk}@@{extent.start}"
    # One by one: mcopy(1) takes a directory's files in the order that the host has them.
    for path in sorted(source.esp.rglob("*")):
        make = ["mmd", "-i", image] if path.is_dir() else ["mcopy", "-m", "-i", image, path]
        run([*make, f"::/{path.relative_to(source.esp)}"], env=source.environment)


#: A partition's type -> what writes its content.
CONTENTS: Mapping[str, Callable[[Source, Extent], None]] = {
    BIOS_BOOT: write_grub_for_bios,
    ESP: write_esp,
    LINUX: write_root,
}
