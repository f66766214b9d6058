# SPDX-License-Identifier: Apache-2.0
"""Tree becomes a disk: a raw file with partitions, root file system and boot loader.

No loop device, no mount, no copy: mke2fs(8) fills the file system from the tree at its offset of
the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from amphora_image import boot_loader
from amphora_image.partitions import BIOS_BOOT, LAYOUTS, LINUX, Extent, lay, sfdisk_script
from amphora_image.request import Architecture
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


def write_disk(tree: Path, raw: Path, size: int, architecture: Architecture) -> None:
    """Write a new disk of ``size`` bytes to the file ``raw``, which is sparse.

    :raises AmphoraImageError: the tree does not fit, or lacks its boot loader.
    """
    with raw.open("wb") as file:
        file.truncate(size)
    laid = lay(LAYOUTS[architecture], size)
    run(["sfdisk", "--quiet", raw], stdin=sfdisk_script(laid))
    for part, extent in laid.items():
        CONTENTS[part.type](tree, raw, extent)


def write_root(tree: Path, raw: Path, extent: Extent) -> None:
    """Make the root file system and copy the tree into it."""
    run(
        [
            *("mkfs.ext4", "-q", "-L", ROOT_LABEL, "-d", tree),
            *("-b", str(BLOCK), "-i", str(BYTES_PER_INODE), "-I", str(INODE)),
            *("-m", str(RESERVED), "-J", f"size={JOURNAL_MIB}"),
            *("-O", ",".join(("none", *FEATURES))),
            # The new file is all zeros: nothing to discard, and nothing left for the kernel to
            # initialise at the first boot.
            *("-E", f"offset={extent.start},nodiscard,lazy_itable_init=0"),
            *(raw, str(extent.size // BLOCK)),
        ]
    )


def write_grub_for_bios(tree: Path, raw: Path, extent: Extent) -> None:
    """Write GRUB to its partition and to the disk's first sector."""
    boot_loader.install(tree / "boot/grub", raw, extent.start, extent.size)


#: A partition's type -> what writes its content.
CONTENTS: Mapping[str, Callable[[Path, Path, Extent], None]] = {
    BIOS_BOOT: write_grub_for_bios,
    LINUX: write_root,
}
