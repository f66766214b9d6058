# SPDX-License-Identifier: Apache-2.0
"""The directory that diskimage-builder gets in place of a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from diskimage_builder.block_device.config import config_tree_to_graph, create_graph

from amphora_image.block_device import TREE_VARIABLE, Tree
from amphora_image.disk_writer import ROOT_LABEL
from amphora_image.plan import ELEMENTS, OUR_DISK

CONFIG = ELEMENTS / OUR_DISK / "block-device-default.yaml"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """DIB's directories, as its parameters name them; the tree is built."""
    places = {
        "image-dir": str(tmp_path / "image"),
        "build-dir": str(tmp_path / "build"),
        "mount-base": str(tmp_path / "build/mnt"),
    }
    (tmp_path / "image").mkdir()
    (tmp_path / "build/built/etc").mkdir(parents=True)
    (tmp_path / "build/built/etc/os-release").write_text("ID=debian\n")
    return places


def test_graph(places: dict[str, str]) -> None:
    """DIB's own file system is made on our disk, and its mount waits for our tree."""
    graph = config_tree_to_graph(yaml.safe_load(CONFIG.read_text()))
    _, order = create_graph(graph, places, {})
    assert [node.name for node in order] == ["image0", "mkfs_root", "tree", "mount_mkfs_root"]


def test_label() -> None:
    """What the elements are told is the label of the disk that is written."""
    [entry] = yaml.safe_load(CONFIG.read_text())
    assert entry["amphora_tree"]["mkfs"]["label"] == ROOT_LABEL


def test_tree_comes_and_goes(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tree moves to where DIB goes on with it, unmounted, and at the end out of there."""
    monkeypatch.setenv(TREE_VARIABLE, str(tmp_path / "tree"))
    state: dict[str, Any] = {"filesys": {"mkfs_root": {"fstype": "ext4"}}}
    disk, tree = Tree({"name": "image0"}, places, state).get_nodes()
    disk.create()
    image = Path(state["blockdev"]["image0"]["image"])
    assert image.stat().st_size == 2**20
    assert image.stat().st_blocks == 0

    tree.create()
    assert state["filesys"]["mkfs_root"]["fstype"] == "swap"
    assert list((tmp_path / "build/built").iterdir()) == []
    assert (tmp_path / "build/mnt/etc/os-release").exists()

    for node in (tree, disk):
        node.umount()
        node.cleanup()
    assert (tmp_path / "tree/etc/os-release").read_text() == "ID=debian\n"
    assert not (tmp_path / "build/mnt").exists()
