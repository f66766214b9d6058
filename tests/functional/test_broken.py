# SPDX-License-Identifier: Apache-2.0
"""Amphorae that are broken in one thing miss the milestone that names it, and tell why."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from amphora_image import boot, disk, proof
from amphora_image.image import read_image

#: Milestone, what the failure tells of it, what is removed from the image.
BROKEN = [
    ("agent answers", "amphora-agent.service: Failed", "/usr/bin/amphora-agent"),
    ("VIP plugged", "amphora-interface", "/usr/bin/amphora-interface"),
    ("HTTP balanced", "unexpected result code 500", "/usr/sbin/haproxy"),
    ("listeners added", "keepalived", "/usr/sbin/keepalived"),
    ("UDP balanced", "ip_vs", "/usr/lib/modules/{kernel}/kernel/net/netfilter/ipvs/ip_vs.ko.xz"),
    ("metrics served", "prometheus-proxy", "/usr/bin/prometheus-proxy"),
]


@pytest.fixture(scope="module")
def whole(debian_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built image as a raw disk."""
    raw = tmp_path_factory.mktemp("whole") / "whole.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", debian_image, raw], check=True)
    return raw


@pytest.fixture(scope="module")
def kernel(debian_image: Path) -> str:
    """The version of the image's kernel."""
    [(path, _)] = read_image(debian_image).tree.match(r"boot/vmlinuz-.*")
    return path.removeprefix("boot/vmlinuz-")


def changed(commands: Sequence[str], whole: Path, raw: Path) -> Path:
    """A copy of the disk with changes to its root file system, commands of debugfs(8)."""
    subprocess.run(["cp", "--sparse=always", whole, raw], check=True)
    root = disk.root_partition(disk.open_disk(raw, raw.parent))
    script = raw.with_suffix(".debugfs")
    script.write_text("".join(f"{command}\n" for command in commands))
    change = ["debugfs", "-w", "-f", script, f"{raw}?offset={root.start}"]
    said = subprocess.run(change, check=True, capture_output=True, text=True).stderr
    assert said.count("\n") == 1, said  # the version of debugfs alone
    return raw


def without(path: str, whole: Path, raw: Path) -> Path:
    """A copy of the disk without one of its files."""
    return changed([f"rm {path}"], whole, raw)


def test_no_initramfs(whole: Path, kernel: str, tmp_path: Path) -> None:
    """A kernel that finds no root file system is caught in seconds, by its own words."""
    raw = without(f"/boot/initrd.img-{kernel}", whole, tmp_path / "broken.raw")
    report = proof.prove(raw, log=tmp_path / "serial.log", accel="tcg")
    assert report.failure.startswith("agent answers: the machine stopped")
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in report.failure


def test_no_label(whole: Path, tmp_path: Path) -> None:
    """A GRUB that finds no root file system is caught in seconds too, in its shell."""
    raw = changed(["set_super_value volume_name other"], whole, tmp_path / "broken.raw")
    report = proof.prove(raw, log=tmp_path / "serial.log", accel="tcg")
    assert report.failure.startswith("agent answers: the machine stopped")
    assert "no such device: cloudimg-rootfs" in report.failure


@pytest.mark.broken
def test_no_root_file_system(whole: Path, tmp_path: Path) -> None:
    """An initramfs that finds no root file system says so, and ends instead of waiting."""
    menu = read_image(whole).tree.text("boot/grub/grub.cfg")
    (tmp_path / "menu").write_text(menu.replace("root=LABEL=cloudimg-rootfs", "root=LABEL=other"))
    path = "/boot/grub/grub.cfg"
    commands = [f"rm {path}", f"write {tmp_path / 'menu'} {path}"]
    raw = changed(commands, whole, tmp_path / "broken.raw")
    report = proof.prove(raw, log=tmp_path / "serial.log", accel="tcg")
    assert report.failure.startswith("agent answers: the machine stopped")
    assert "root file system LABEL=other not found" in report.failure


@pytest.mark.broken
@pytest.mark.parametrize(("milestone", "says", "path"), BROKEN, ids=[row[0] for row in BROKEN])
def test_broken_image(
    whole: Path,
    kernel: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    milestone: str,
    says: str,
    path: str,
) -> None:
    """What misses a file passes all that needs it not, and fails where it does."""
    raw = without(path.format(kernel=kernel), whole, tmp_path / "broken.raw")
    monkeypatch.setattr(boot, "PATIENCE", 120.0)
    report = proof.prove(raw, log=tmp_path / "serial.log")
    reached = [each.name for each in report.milestones if each.seconds is not None]
    steps = list(proof.SINGLE)
    assert report.failure.startswith(f"{milestone}: ")
    assert says in report.failure
    assert reached[2:] == steps[: steps.index(milestone)]
