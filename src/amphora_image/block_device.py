# SPDX-License-Identifier: Apache-2.0
"""The DIB block-device plug-in ``amphora_tree``: a directory where DIB wants a mounted disk.

DIB makes a disk, mounts it, and copies the finished tree into it; that takes loop devices, mounts
and a second copy of everything. All of our formats are written from a tree, by programs that need
none of these, so here DIB gets a directory instead, which is kept when it has ended.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diskimage_builder.block_device.plugin import NodeBase, PluginBase

#: The variable with the path at which the finished tree is to be.
TREE_VARIABLE = "AMPHORA_TREE"

#: DIB makes a file system on this file and never looks at it again: the smallest that ext4 takes.
STAND_IN_SIZE = 1024**2


class DiskNode(NodeBase):  # type: ignore[misc]  # DIB has no types
    """The disk that DIB asks for: a small file, on which it makes a file system."""

    def __init__(self, name: str, directory: Path, state: Any) -> None:
        super().__init__(name, state)
        self.file = directory / f"{name}.raw"

    def get_edges(self) -> tuple[list[str], list[str]]:
        """Return that nothing has to be there first."""
        return [], []

    def create(self) -> None:
        """Make the file; it is removed with DIB's work directory."""
        with self.file.open("wb") as file:
            file.truncate(STAND_IN_SIZE)
        place = {"device": str(self.file), "image": str(self.file)}
        self.state.setdefault("blockdev", {})[self.name] = place


class TreeNode(NodeBase):  # type: ignore[misc]  # DIB has no types
    """The tree that DIB has built, put where it would mount the file system ``base``."""

    def __init__(self, name: str, base: str, mount: str, places: Mapping[str, str], state: Any):
        super().__init__(name, state)
        self.base = base
        self.mount = mount
        self.mounted = Path(places["mount-base"])
        self.built = Path(places["build-dir"], "built")

    def get_edges(self) -> tuple[list[str], list[str]]:
        """Return the file system as what must be there first, the mount as what waits for us."""
        return [self.base], [self.mount]

    def create(self) -> None:
        """Move the tree; DIB copies what it adds to the old place afterwards: ``/etc/fstab``."""
        self.built.rename(self.mounted)
        self.built.mkdir()
        # The one type of file system that DIB has in its list and does not mount.
        self.state["filesys"][self.base]["fstype"] = "swap"

    def cleanup(self) -> None:
        """Take the tree out of DIB's directory, which it removes next."""
        self.mounted.rename(os.environ[TREE_VARIABLE])


class Tree(PluginBase):  # type: ignore[misc]  # DIB has no types
    """``amphora_tree`` in a block-device YAML.

    Keys: ``name`` (``image0``, by which DIB knows the disk), and below it ``mkfs`` and ``mount``,
    which tell DIB the label, type and mount point of the root file system. They have the names that
    DIB gives them: ``mkfs_root`` and ``mount_mkfs_root``.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, str], state: Any) -> None:
        super().__init__()
        self.nodes: list[NodeBase] = [
            DiskNode(config["name"], Path(defaults["image-dir"]), state),
            TreeNode("tree", "mkfs_root", "mount_mkfs_root", defaults, state),
        ]

    def get_nodes(self) -> list[NodeBase]:
        """Return the disk and the tree."""
        return self.nodes
