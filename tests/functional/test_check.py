# SPDX-License-Identifier: Apache-2.0
"""``amphora-image check`` on real disks: a built image, a good one, and broken ones."""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import fake_image
import pytest
from fake_image import (
    BREAKS,
    PRIVATE_KEY,
    Break,
    asked,
    convert,
    make_raw,
    manifest,
    nodes,
    run,
    write_at,
)

from amphora_image import check, disk

pytestmark = pytest.mark.usefixtures("nothing_stays")


def debugfs(raw: Path, *commands: str) -> None:
    """Change the root file system of a raw disk."""
    script = "".join(f"{command}\n" for command in commands)
    with tempfile.TemporaryDirectory() as scratch:
        root = disk.root_partition(disk.open_disk(raw, Path(scratch)))
    subprocess.run(
        ["debugfs", "-w", "-f", "-", f"{raw}?offset={root.start}"],
        input=script,
        text=True,
        check=True,
        capture_output=True,
    )


def broken(image: Path) -> set[str]:
    """The names of the rules that an image breaks."""
    return {finding.rule for finding in check.check_image(image)}


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """A copy of the good disk and its manifest, to be broken."""
    raw = tmp_path / "amphora.raw"
    subprocess.run(["cp", "--sparse=always", good, raw], check=True)
    Path(f"{raw}.json").write_text(manifest(asked()))
    return raw


def test_built_image(debian_image: Path) -> None:
    """The image that the README's command builds breaks no rule, and is read in ten seconds."""
    began = time.monotonic()
    done = run("check", debian_image, "--json")
    seconds = time.monotonic() - began
    assert (done.returncode, json.loads(done.stdout)["findings"]) == (0, []), done.stderr
    assert seconds < 30, "ten seconds on an idle machine"


def test_built_image_broken(debian_image: Path, tmp_path: Path) -> None:
    """What is changed in a built image is found by the rules that it breaks, and by no other."""
    raw = tmp_path / "broken.raw"
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", debian_image, raw], check=True
    )
    key = tmp_path / "key"
    key.write_bytes(PRIVATE_KEY)
    debugfs(
        raw,
        f"write {key} /srv/some.pem",
        f"write {key} /etc/ssh/ssh_host_rsa_key",
        "sif /usr/bin/bash mode 0104755",
        "sif /etc/shadow mode 0100666",
        "rm /usr/bin/amphora-agent",
        "rm /etc/systemd/system/haproxy.service",
    )
    Path(f"{raw}.json").write_text(Path(f"{debian_image}.json").read_text())
    assert broken(raw) == {
        *("secrets", "host-keys", "setuid", "modes", "world-writable", "agent", "services")
    }


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vpc", "tar"])
def test_good_image(good: Path, tmp_path: Path, kind: str) -> None:
    """A good image breaks no rule in any format."""
    image = tmp_path / f"image.{kind}"
    if kind == "tar":
        with tarfile.open(image, "w") as tar:
            tar.add(good.with_suffix(".tree"), ".")
        Path(f"{image}.json").write_text(manifest(asked()))
    elif kind == "vpc":
        options = ["-o", "subformat=dynamic,force_size=on"]
        subprocess.run(["qemu-img", "convert", "-O", kind, *options, good, image], check=True)
        Path(f"{image}.json").write_text(manifest(asked()))
    else:
        convert(good, image, kind)
    assert check.check_image(image) == []


@pytest.mark.parametrize(
    ("rule", "what", "break_it"), BREAKS, ids=[f"{rule}-{what}" for rule, what, _ in BREAKS]
)
def test_broken_tree(tmp_path: Path, rule: str, what: str, break_it: Break) -> None:
    """A disk that was made with one thing wrong breaks the named rule alone."""
    found = nodes()
    break_it(found)
    raw = make_raw(found, tmp_path / "amphora.raw")
    Path(f"{raw}.json").write_text(manifest(asked()))
    findings = check.check_image(raw)
    assert {finding.rule for finding in findings} == {rule}
    assert any(what in finding.what for finding in findings)


def remove_boot_code(raw: Path) -> None:
    """Take the boot loader out of the first sector."""
    write_at(raw, 0, bytes(440))


def remove_core(raw: Path) -> None:
    """Empty the BIOS boot partition."""
    write_at(raw, fake_image.START["bios"], bytes(4096))


def free_a_used_inode(raw: Path) -> None:
    """Make the inode bitmap wrong."""
    debugfs(raw, "freei /etc/passwd")


def leave_unclean(raw: Path) -> None:
    """Make the file system look as if it had not been unmounted."""
    debugfs(raw, "ssv state 0")


def delete_a_key(raw: Path) -> None:
    """Write a private key and delete it: its bytes stay."""
    key = raw.with_suffix(".key")
    key.write_bytes(PRIVATE_KEY)
    debugfs(raw, f"write {key} /srv.pem")
    debugfs(raw, "rm /srv.pem")


def shrink_manifest(raw: Path) -> None:
    """Let the manifest tell of a smaller disk."""
    Path(f"{raw}.json").write_text(manifest(asked(size=2**30)))


def other_packages(raw: Path) -> None:
    """Let the manifest tell of another HAProxy."""
    packages = {**(asked().packages or {}), "haproxy": "9"}
    Path(f"{raw}.json").write_text(manifest(asked(packages=packages)))


@pytest.mark.parametrize(
    ("rule", "break_it"),
    [
        ("boot-loader", remove_boot_code),
        ("boot-loader", remove_core),
        ("file-system", free_a_used_inode),
        ("loopback", leave_unclean),
        ("secrets", delete_a_key),
        ("size", shrink_manifest),
        ("locked-packages", other_packages),
    ],
)
def test_broken_disk(copy: Path, rule: str, break_it: Callable[[Path], None]) -> None:
    """What is wrong with a disk, or differs from its manifest, breaks the named rule."""
    break_it(copy)
    assert broken(copy) == {rule}


def test_command(copy: Path) -> None:
    """The command shows all findings, writes JUnit XML, and exits with 4."""
    junit = copy.with_suffix(".xml")
    assert run("check", copy).returncode == 0
    remove_boot_code(copy)
    done = run("check", copy, "--junit", junit)
    assert done.returncode == 4
    assert "the first sector is not GRUB's" in done.stdout
    assert "breaks 1 of the rules: boot-loader" in done.stderr
    assert ElementTree.parse(junit).getroot().attrib["failures"] == "1"  # noqa: S314
    assert "breaks 2 of the rules: boot-loader, sshd" in run("check", copy, "-n").stderr
    assert run("check", copy, "--junit", copy.parent / "missing" / "a").returncode in (1, 3)


def test_image_is_not_written_to(good: Path) -> None:
    """Looking changes neither the image nor its time."""
    before = (good.stat().st_mtime_ns, good.read_bytes())
    check.check_image(good)
    assert (good.stat().st_mtime_ns, good.read_bytes()) == before


def test_name_of_image(good: Path, tmp_path: Path) -> None:
    """An image may be called anything."""
    for name in ("-R?offset=1", "json:{}", "a b'c\".raw"):
        image = tmp_path / name
        image.symlink_to(good)
        assert check.check_image(image, manifest=Path(f"{good}.json")) == []
