# SPDX-License-Identifier: Apache-2.0
"""The initramfs: which modules it holds, and the archive that the kernel unpacks."""

from __future__ import annotations

import lzma
import stat
from pathlib import Path

import pytest

from amphora_image import initramfs
from amphora_image.errors import AmphoraImageError
from amphora_image.initramfs import (
    aliases_of,
    cpio,
    entries_of,
    kernel_version,
    module_name,
    needed_modules,
)

DEPENDENCIES = [
    "kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio.ko.xz",
    "kernel/drivers/virtio/virtio.ko.xz:",
    "kernel/drivers/block/xen-blkfront.ko.xz:",
    "kernel/sound/snd.ko.xz:",
]


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Return name -> mode and content of a newc archive (initramfs buffer format)."""
    found = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 109 + name_size].decode()
        data = at + 110 + name_size
        data += -data % 4
        at = data + size
        at += -at % 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[data : data + size])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image's tree with a kernel and compressed modules."""
    modules = tmp_path / "usr/lib/modules/6.12.1"
    for line in DEPENDENCIES:
        path = modules / line.partition(":")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(module_name(path.name).encode()))
    (modules / "modules.dep").write_text("\n".join(DEPENDENCIES))
    (modules / "modules.alias").write_text(
        "# made by depmod\nalias virtio:d00000002v* virtio_blk\nalias pci:v* snd\n"
    )
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot/vmlinuz-6.12.1").touch()
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/busybox").write_bytes(b"busybox")
    return tmp_path


def test_modules_come_with_what_they_need() -> None:
    """A driver, its dependencies, and names that the kernel spells otherwise; none built in."""
    found = needed_modules(DEPENDENCIES, ["virtio_blk", "xen_blkfront", "ext4"])
    assert [module_name(path) for path in found] == ["virtio_blk", "xen_blkfront", "virtio"]


def test_aliases_are_those_of_the_modules() -> None:
    """Lines that lead to other modules, and comments, are left out."""
    lines = ["# comment", "", "alias a virtio_blk", "alias b snd"]
    assert aliases_of(lines, {"virtio_blk"}) == ["alias a virtio_blk"]


def test_archive_reads_back() -> None:
    """Names, modes and contents of any length come back from the archive."""
    entries = [
        ("a", stat.S_IFREG | 0o644, b"", (0, 0)),
        ("bb", stat.S_IFREG | 0o755, b"x" * 5, (0, 0)),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
    ]
    archive = cpio(entries)
    assert len(archive) % 4 == 0
    assert read_cpio(archive) == {name: (mode, data) for name, mode, data, _ in entries}


def test_initramfs_of_a_tree(root: Path) -> None:
    """Drivers of disks are in it, plain and found by plain names; no other module is."""
    held = read_cpio(cpio(entries_of(root, "6.12.1")))
    base = "lib/modules/6.12.1"
    modules = {name: data for name, (_, data) in held.items() if name.endswith(".ko")}
    assert modules == {
        f"{base}/kernel/drivers/block/virtio_blk.ko": b"virtio_blk",
        f"{base}/kernel/drivers/block/xen-blkfront.ko": b"xen_blkfront",
        f"{base}/kernel/drivers/virtio/virtio.ko": b"virtio",
    }
    dependencies = held[f"{base}/modules.dep"][1].decode().splitlines()
    assert "kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko" in dependencies
    assert held[f"{base}/modules.alias"][1] == b"alias virtio:d00000002v* virtio_blk\n"
    assert held["init"] == (stat.S_IFREG | 0o755, initramfs.INIT.encode())
    assert held["bin/sh"] == (stat.S_IFLNK | 0o777, b"busybox")
    for name in held:
        parent = str(Path(name).parent)
        assert parent == "." or stat.S_ISDIR(held[parent][0])


def test_parents_come_before_their_files(root: Path) -> None:
    """The kernel unpacks in order: a directory is there before what it holds."""
    seen = {"."}
    for name, *_ in entries_of(root, "6.12.1"):
        assert str(Path(name).parent) in seen
        seen.add(name)


def test_the_same_tree_gives_the_same_bytes(root: Path) -> None:
    """No time and no order of a directory gets in."""
    assert cpio(entries_of(root, "6.12.1")) == cpio(entries_of(root, "6.12.1"))


def test_what_is_missing_is_named(root: Path) -> None:
    """A tree without busybox or kernel says so."""
    (root / "usr/bin/busybox").unlink()
    with pytest.raises(AmphoraImageError, match="no /usr/bin/busybox"):
        list(entries_of(root, "6.12.1"))
    (root / "boot/vmlinuz-6.12.1").unlink()
    with pytest.raises(AmphoraImageError, match="no kernel in /boot"):
        kernel_version(root)


@pytest.mark.parametrize("newest", ["6.12.10-cloud-amd64", "6.12.9+deb13.10-amd64"])
def test_the_newest_kernel_is_taken(root: Path, newest: str) -> None:
    """Versions are compared as numbers, not as text."""
    for version in ("6.12.9+deb13-amd64", "6.9.12-cloud-amd64", newest):
        (root / f"boot/vmlinuz-{version}").touch()
    assert kernel_version(root) == newest
