# SPDX-License-Identifier: Apache-2.0
"""The default command makes an Ubuntu amphora, here from archives as Ubuntu's."""

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
from amphora_image.agent_locks.check_imports import COMMANDS
from amphora_image.check import check_image
from amphora_image.image import read_image

Build = Callable[..., Path]

#: What the default command has to be told, to make the release.
RELEASES: dict[str, tuple[str, ...]] = {"noble": (), "jammy": ("-d", "jammy")}


@pytest.fixture(scope="module", params=["noble", pytest.param("jammy", marks=pytest.mark.ubuntu)])
def archive(request: pytest.FixtureRequest, ubuntu_archives: Callable[[str], Archive]) -> Archive:
    """The archive of a release."""
    return ubuntu_archives(request.param)


@pytest.fixture(scope="module")
def build(archive: Archive, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build an image of the release by the command with more options, or none."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*options: str) -> Path:
        directory = tmp_path_factory.mktemp("ubuntu")
        with mirror.serve(archive.root) as served:
            environment = {
                **os.environ,
                "BASE_OS_MIRROR": served.url,
                "DIB_APT_KEYRING": str(archive.keyring),
                "no_proxy": "127.0.0.1",
            }
            command = [COMMAND, "-c", cache, *RELEASES[archive.release], *options]
            subprocess.run(command, cwd=directory, env=environment, check=True)
        return directory / "amphora-x64-haproxy.qcow2"

    return run


@pytest.fixture(scope="module")
def image(build: Build) -> Path:
    """What the command makes without options."""
    return build()


@pytest.fixture(scope="module")
def found(image: Path) -> dict[str, Any]:
    """The image's facts."""
    return facts.read_facts(read_image(image))


@pytest.fixture(scope="module")
def kernel(archive: Archive) -> str:
    """The version of the release's newest kernel."""
    return f"{tables()['releases'][archive.release]['kernel']}-generic"


def test_it_passes_the_check(image: Path) -> None:
    """No rule for an amphora is broken."""
    assert check_image(image) == []


def test_it_is_ubuntu(archive: Archive, found: dict[str, Any], kernel: str) -> None:
    """The base OS, its release, kernel and boot menu are Ubuntu's."""
    assert found["os"]["id"] == "ubuntu"
    assert found["os"]["release"] == archive.release
    [only] = found["kernels"]
    assert only["version"] == kernel
    assert only["bootable"]
    assert only["fips"] is False


def test_newer_suites_are_used(archive: Archive, found: dict[str, Any], kernel: str) -> None:
    """The kernel is that of -updates, though the release has one; the keys are Ubuntu's."""
    packages = found["os_packages"]
    first = tables()["releases"][archive.release]["first_kernel"]
    assert f"linux-image-{kernel}" in packages
    assert packages["linux-image-virtual"]["version"].startswith(kernel.removesuffix("-generic"))
    assert not any(f"-{first}-" in name for name in packages)
    assert "ubuntu-keyring" in packages
    assert "debian-archive-keyring" not in packages


def test_usr_is_merged(image: Path) -> None:
    """/bin, /sbin and /lib lead into /usr, where elements look for programs and units."""
    entries = read_image(image).tree.entries
    links = {name: entries[name].target for name in ("bin", "sbin", "lib", "lib64")}
    assert links == {name: f"usr/{name}" for name in links}


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
    """-e, -k, -m, -n and -y do on Ubuntu what they do on Debian, but for the kernel's FIPS mode."""
    image = build("-e", "-k", "linux-image-generic", "-m", "-n", "-y")
    [finding] = check_image(image)
    assert finding.rule == "fips"
    assert "is made without FIPS mode" in finding.what
    read = read_image(image)
    found = facts.read_facts(read)
    words = found["boot_loader"]["command_line"].split()
    assert {"irqaffinity=0", "fips=1"} <= set(words)
    assert any(word.startswith("lsm=") and "apparmor" in word.split(",") for word in words)
    assert "apparmor.service" in found["services"]["enabled"]
    assert {"ssh.service", "ssh.socket"} <= set(found["services"]["masked"])
    assert "linux-image-generic" in found["os_packages"]
    assert "linux-image-virtual" not in found["os_packages"]
    # The agent's leases, for the name that each distribution has given dhclient's profile.
    for name in ("sbin.dhclient", "usr.sbin.dhclient"):
        assert read.tree.get(f"etc/apparmor.d/local/{name}")


@pytest.mark.ubuntu
@pytest.mark.parametrize("archive", ["jammy"], indirect=True)
def test_packaged_agent(build: Build) -> None:
    """With -p the agent is Ubuntu's, here as old as that of the release before the newest two."""
    image = build("-p")
    assert check_image(image) == []
    read = read_image(image)
    assert "python3-octavia" in (facts.read_os_packages(read.tree) or {})
    assert facts.read_python_packages(read.tree) == {}
    for command in COMMANDS:
        first = read.tree.text(f"usr/bin/{command}").splitlines()[0]
        assert first.removeprefix("#!").strip() == "/usr/bin/python3"


@pytest.mark.ubuntu
def test_it_balances_load(image: Path, kernel: str, tmp_path: Path) -> None:
    """The image does all that Octavia wants of an amphora; its kernel finds its modules."""
    log = tmp_path / "serial.log"
    report = proof.prove(image, log=log, topology="single")
    assert report.failure == ""
    assert f"Linux version {kernel} " in log.read_text(errors="replace")
