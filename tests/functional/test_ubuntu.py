# SPDX-License-Identifier: Apache-2.0
"""The default command makes an Ubuntu amphora, here from an archive as Ubuntu's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mirror
import pytest
from conftest import COMMAND
from ubuntu_archive import Archive, tables

from amphora_image import facts, proof
from amphora_image.check import check_image
from amphora_image.image import read_image

KERNEL = f"{tables()['releases']['noble']['kernel']}-generic"

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(ubuntu_archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build an image by the command with more options, or none."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*options: str) -> Path:
        directory = tmp_path_factory.mktemp("ubuntu")
        with mirror.serve(ubuntu_archive.root) as archive:
            environment = {
                **os.environ,
                "BASE_OS_MIRROR": archive.url,
                "DIB_APT_KEYRING": str(ubuntu_archive.keyring),
                "no_proxy": "127.0.0.1",
            }
            command = [COMMAND, "-c", cache, *options]
            subprocess.run(command, cwd=directory, env=environment, check=True)
        return directory / "amphora-x64-haproxy.qcow2"

    return run


@pytest.fixture(scope="module")
def image(build: Build) -> Path:
    """What the default command makes."""
    return build()


@pytest.fixture(scope="module")
def found(image: Path) -> dict[str, Any]:
    """The image's facts."""
    return facts.read_facts(read_image(image))


def test_it_passes_the_check(image: Path) -> None:
    """No rule for an amphora is broken."""
    assert check_image(image) == []


def test_it_is_ubuntu(found: dict[str, Any]) -> None:
    """The base OS, its release, kernel and boot menu are those of Ubuntu 24.04."""
    assert found["os"]["id"] == "ubuntu"
    assert found["os"]["release"] == "noble"
    (kernel,) = found["kernels"]
    assert kernel["version"] == KERNEL
    assert kernel["bootable"]


def test_newer_suites_are_used(found: dict[str, Any]) -> None:
    """The kernel is that of noble-updates, though noble has one; the keys are Ubuntu's."""
    packages = found["os_packages"]
    first = tables()["releases"]["noble"]["first_kernel"]
    assert f"linux-image-{KERNEL}" in packages
    assert packages["linux-image-virtual"]["version"].startswith(KERNEL.removesuffix("-generic"))
    assert not any(first in name for name in packages)
    assert "ubuntu-keyring" in packages
    assert "debian-archive-keyring" not in packages


def test_stages_of_cloud_init(found: dict[str, Any]) -> None:
    """Ubuntu's cloud-init has a process a stage; all of them run, the certificates' disk first."""
    stages = {"cloud-init-local.service", "cloud-init.service", "cloud-config.service"}
    assert stages | {"amphora-certificates.service"} <= set(found["services"]["enabled"])
    assert not {"cloud-init-main.service"} & set(found["services"]["enabled"])


def test_ssh_has_no_socket(image: Path, found: dict[str, Any]) -> None:
    """Ubuntu's socket for SSH, which listens on every address, is off, and nothing requires it."""
    tree = read_image(image).tree
    assert "ssh.socket" in found["services"]["masked"]
    assert found["listening"]["ssh"] == "the addresses in /run/amphora-sshd/listen.conf"
    assert [path for path, _ in tree.under("etc/systemd/system/ssh.service.requires")] == []


def test_options(build: Build) -> None:
    """-e, -m and -n do on Ubuntu what they do on Debian."""
    image = build("-e", "-m", "-n")
    assert check_image(image) == []
    read = read_image(image)
    found = facts.read_facts(read)
    words = found["boot_loader"]["command_line"].split()
    assert "irqaffinity=0" in words
    assert any(word.startswith("lsm=") and "apparmor" in word.split(",") for word in words)
    assert "apparmor.service" in found["services"]["enabled"]
    assert {"ssh.service", "ssh.socket"} <= set(found["services"]["masked"])
    # The agent's leases, for the name that each distribution has given dhclient's profile.
    for name in ("sbin.dhclient", "usr.sbin.dhclient"):
        assert read.tree.get(f"etc/apparmor.d/local/{name}")


@pytest.mark.ubuntu
def test_it_balances_load(image: Path, tmp_path: Path) -> None:
    """The image does all that Octavia wants of an amphora; its kernel finds its modules."""
    log = tmp_path / "serial.log"
    report = proof.prove(image, log=log, topology="single")
    assert report.failure == ""
    assert f"Linux version {KERNEL} " in log.read_text(errors="replace")
