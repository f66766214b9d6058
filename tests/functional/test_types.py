# SPDX-License-Identifier: Apache-2.0
"""Every image type from one build, each opened by the programs that it is for."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tiny import SIZE, Scene, qemu_info

from amphora_image.request import ImageType

#: qemu-img's names of the disk formats.
DISKS = {"qcow2": "qcow2", "raw": "raw", "vhd": "vpc"}


def run(*argv: object) -> str:
    """Run a program that has to succeed; return its output."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def files(scene: Scene) -> dict[str, Path]:
    """Image type -> its file, all from one build of the tiny operating system."""
    build = scene.start("lb", "-t", ",".join(ImageType))
    status, said = build.end()
    assert status == 0, said
    assert scene.left_behind() == []
    return {kind: Path(f"{build.output}.{kind}") for kind in ImageType}


def test_types(files: dict[str, Path], tmp_path: Path) -> None:
    """Disks have their size and format, and archives the operating system, as their tools say.

    podman runs what it has loaded.
    """
    for kind, disk_format in DISKS.items():
        info = qemu_info(files[kind])
        assert (info["format"], info["virtual-size"]) == (disk_format, SIZE), kind
    in_tar = run("tar", "--list", "--file", files["tar"]).split()
    assert "./etc/os-release" in in_tar
    assert "./proc/" in in_tar
    assert "./boot/efi/" not in in_tar

    run("unsquashfs", "-quiet", "-no-progress", "-dest", tmp_path / "squash", files["squashfs"])
    assert (tmp_path / "squash/etc/os-release").read_text() == "ID=tiny\n"

    for transport in ("oci-archive", "docker-archive"):
        image = json.loads(run("skopeo", "inspect", f"{transport}:{files['oci']}"))
        assert (image["Os"], image["Architecture"]) == ("linux", "amd64"), transport
        assert image["Labels"]["org.opencontainers.image.title"] == "lb"

    podman = ("podman", "--cgroup-manager=cgroupfs", "--runtime=runc")
    name = "localhost/lb:latest"
    assert name in run(*podman, "load", "--input", files["oci"])
    try:
        limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", "--network=none")
        said = run(*podman, "run", "--rm", *limits, name, "cat", "/etc/os-release")
    finally:
        run(*podman, "rmi", "--force", name)
    assert said == "ID=tiny\n"
