# SPDX-License-Identifier: Apache-2.0
"""Amphorae of the RedHat family, as far as a repository of RPMs goes that is made on the spot.

What is the real thing: the command, its plan, diskimage-builder and the elements that its base
systems share, our elements, rpm and dnf, on the host and in the chroot, signatures, setfiles, the
agent. What is not: the distributions. Their packages have other files, dependencies and scripts
than those of rpm_repository; kernel and boot loader are files with a text; dracut, grub2-mkimage
and update-crypto-policies are stand-ins that write down what they are told. Nothing is booted.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mirror
import pytest
from diskimage_builder.paths import get_path
from rpm_repository import make_elements, make_repository, names, tables
from tiny import Elements, Scene

from amphora_image import agent_source, facts, packages, plan
from amphora_image.check import check_image
from amphora_image.host import Host
from amphora_image.image import Image, read_image
from amphora_image.plan import ELEMENTS, make_plan
from amphora_image.request import (
    DEBIAN_FAMILY,
    RELEASES,
    Architecture,
    BaseOS,
    Environment,
    Request,
)

RPM_FAMILY = [base_os for base_os in BaseOS if base_os not in DEBIAN_FAMILY]

#: What is built, each with other options.
BUILT: Mapping[BaseOS, tuple[str, ...]] = {
    BaseOS.CENTOS: ("-d", "10-stream", "-e", "-y", "-k", "kernel-rt-core", "--ca-file", "ca.pem"),
    BaseOS.FEDORA: ("-d", "43", "-n", "-m"),
}


#: Seconds that a build of all our elements may take on a busy machine.
PATIENCE = 900


@dataclass(frozen=True)
class Amphora:
    """An image that was built.

    :ivar said: by the build on standard error.
    """

    base_os: BaseOS
    file: Path
    image: Image
    said: str

    @property
    def kernel(self) -> str:
        """The version of the kernel that was asked for."""
        package = "kernel-rt-core" if "-k" in BUILT[self.base_os] else "kernel-core"
        return str(tables()["kernels"][package])

    @property
    def facts(self) -> dict[str, Any]:
        """What an image holds."""
        return facts.read_facts(self.image)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest beside it."""
        document: dict[str, Any] = json.loads(Path(f"{self.file}.json").read_text())
        return document

    def debugfs(self, request: str) -> str:
        """Return what debugfs says of the root file system."""
        root = self.image.root
        assert root
        return run("debugfs", "-R", request, f"{self.file}?offset={root.start}")

    def label(self, path: str) -> str:
        """Return a file's label of SELinux."""
        return self.debugfs(f"ea_get -V {path} security.selinux").rstrip("\0\n")

    def efi(self, path: str) -> str:
        """Return a file of the EFI system partition."""
        [start] = [part.start for part in self.image.partitions if part.name == "esp"]
        return run("mtype", "-i", f"{self.file}@@{start}", f"::/EFI/{path}")


def run(*argv: str | Path) -> str:
    """Run a program that has to succeed; return its output."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def number(release: str) -> int:
    """The number of a release."""
    return int(release.partition("-")[0])


def planned(release: str, **asked: Any) -> tuple[Request, plan.Plan]:
    """A request for all that can be asked for, and its plan."""
    here = Path("/here")
    request = Request(
        release=release,
        output=here / "lb",
        working_dir=here,
        cache_dir=here,
        cpu_pinning=True,
        fips=True,
        mandatory_access=True,
        **asked,
    )
    return request, make_plan(request, Host())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A directory for the builds, with an operating system in the place of each base OS."""
    elements = tmp_path_factory.mktemp("elements")
    here = Scene(tmp_path_factory.mktemp("rpm"), Elements(elements, elements))
    for base_os in BUILT:
        make_elements(elements, base_os)
    subject = ("-subj", "/CN=CA of the tests", "-days", "1", "-nodes")
    files = ("-out", here.directory / "ca.pem", "-keyout", here.directory / "ca.key")
    run("openssl", "req", "-x509", "-newkey", "rsa:2048", *subject, *files)
    yield here
    here.clear()


@pytest.fixture(scope="module")
def built(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> Mapping[BaseOS, Amphora]:
    """Every amphora, built from the repository as the plan says, side by side."""
    repository = make_repository(tmp_path_factory.mktemp("repository"))
    amphorae = {}
    with mirror.serve(repository.root) as served:
        variables = {
            **repository.environment(served.url),
            "DIB_ELEMENTS": "",
            "no_proxy": "127.0.0.1",
        }
        builds = {
            base_os: scene.start(
                base_os, "-i", base_os, "-s", "3", "-t", "raw", *options, **variables
            )
            for base_os, options in BUILT.items()
        }
        for base_os, build in builds.items():
            status, said = build.end(PATIENCE)
            assert status == 0, said
            file = Path(f"{build.output}.raw")
            amphorae[base_os] = Amphora(base_os, file, read_image(file), said)
    assert scene.left_behind() == []
    return amphorae


@pytest.fixture(params=BUILT)
def amphora(request: pytest.FixtureRequest, built: Mapping[BaseOS, Amphora]) -> Amphora:
    """One of them."""
    return built[request.param]


@pytest.fixture
def centos(built: Mapping[BaseOS, Amphora]) -> Amphora:
    """CentOS Stream 10 with SELinux enforcing, FIPS mode, another kernel and a private CA."""
    return built[BaseOS.CENTOS]


@pytest.fixture
def fedora(built: Mapping[BaseOS, Amphora]) -> Amphora:
    """Fedora without SSH server, with pinned vCPUs."""
    return built[BaseOS.FEDORA]


@pytest.mark.parametrize("base_os", RPM_FAMILY)
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    ("architecture", "nftables", "agent_source"),
    [
        (Architecture.AMD64, True, agent_source.Locked()),
        (Architecture.ARM64, False, agent_source.Packaged()),
    ],
)
def test_names(
    monkeypatch: pytest.MonkeyPatch,
    base_os: BaseOS,
    older: bool,
    architecture: Architecture,
    nftables: bool,
    agent_source: agent_source.AgentSource,
) -> None:
    """Every package that elements ask for, and the kernel, is one that the release has."""
    older_release, newer_release = sorted(RELEASES[base_os], key=number)
    release = older_release if older else newer_release
    _, made = planned(
        release,
        base_os=base_os,
        architecture=architecture,
        agent=agent_source,
        environment=Environment(local_image=Path("/guest.qcow2"), nftables=nftables),
    )
    for name, value in {**made.environment, "ARCH": architecture}.items():
        monkeypatch.setenv(name, value)
    ours = {name: path for name in made.elements if (path := ELEMENTS / name).is_dir()}
    wanted = packages.collect(ours, str(ELEMENTS), Path(get_path("elements")))
    column = names("fedora" if base_os is BaseOS.FEDORA else str(number(release)))
    there = {name for name, repository in column.items() if repository != "no"}
    assert len(wanted) > 30
    assert {*wanted, made.environment["AMPHORA_KERNEL_PACKAGE"]} - there == set()


def test_it_is_said_that_they_are_not_tested(amphora: Amphora) -> None:
    """Who builds one is told so at once."""
    first = "warning: images of this base OS are not tested: none was ever booted"
    assert amphora.said.splitlines()[0] == first


def test_they_pass_the_check(amphora: Amphora) -> None:
    """No rule for an amphora is broken."""
    assert check_image(amphora.file) == []


def test_packages_are_installed(amphora: Amphora) -> None:
    """What the plan's elements ask for, by the distribution's names, is in rpm's database."""
    installed = amphora.manifest["packages"]
    assert {"haproxy", "keepalived", "iproute", "selinux-policy-targeted"} <= installed.keys()
    own = {BaseOS.CENTOS: "NetworkManager", BaseOS.FEDORA: "systemd-networkd"}
    assert set(own.values()) & installed.keys() == {own[amphora.base_os]}
    assert ("dhcp-client" in installed) == (amphora.base_os is BaseOS.FEDORA)
    assert ("openssh-server" in installed) == ("-n" not in BUILT[amphora.base_os])
    assert not {"apparmor", "busybox-static"} & installed.keys()


def test_kernel(amphora: Amphora) -> None:
    """The kernel that was asked for is in /boot, alone, and GRUB starts it with its initramfs."""
    names = {path.removeprefix("boot/") for path, _ in amphora.image.tree.under("boot")}
    kernels = {name for name in names if "vmlinuz" in name or "initramfs" in name}
    kernel = amphora.kernel
    assert kernels == {f"vmlinuz-{kernel}", f".vmlinuz-{kernel}.hmac", f"initramfs-{kernel}.img"}
    told = amphora.debugfs(f"cat /boot/initramfs-{kernel}.img").rstrip("\0").splitlines()
    assert told[0] == f"dracut --force --no-hostonly /boot/initramfs-{kernel}.img {kernel}"
    menu = amphora.image.tree.text("boot/grub/grub.cfg")
    assert f"linux /boot/vmlinuz-{kernel} root=LABEL=cloudimg-rootfs" in menu
    assert f"initrd /boot/initramfs-{kernel}.img" in menu
    assert "lsm=" not in menu


def test_uefi(amphora: Amphora) -> None:
    """The firmware finds the distribution's signed shim and GRUB, and GRUB its configuration."""
    vendor = {BaseOS.CENTOS: "CentOS", BaseOS.FEDORA: "Fedora"}[amphora.base_os]
    assert amphora.efi("BOOT/BOOTX64.EFI") == f"{vendor}'s shim"
    assert amphora.efi("BOOT/grubx64.efi") == f"{vendor}'s GRUB"
    assert "/boot/grub/grub.cfg" in amphora.efi(f"{amphora.base_os}/grub.cfg")
    with pytest.raises(subprocess.CalledProcessError):
        amphora.efi("BOOT/fbx64.efi")


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/etc/octavia", "system_u:object_r:etc_t:s0"),
        ("/usr/bin/bash", "system_u:object_r:bin_t:s0"),
        ("/var/log", "system_u:object_r:default_t:s0"),
        ("/proc", "system_u:object_r:default_t:s0"),
        ("/boot/grub/grub.cfg", "system_u:object_r:default_t:s0"),
    ],
)
def test_labels(amphora: Amphora, path: str, label: str) -> None:
    """Files have the policy's labels on the disk; so has what is a mount point during the build."""
    assert amphora.label(path) == label


def test_selinux(centos: Amphora, fedora: Amphora) -> None:
    """SELinux is permissive, and enforcing if that was asked for; nothing of AppArmor is there."""
    for amphora, mode in ((fedora, "permissive"), (centos, "enforcing")):
        tree = amphora.image.tree
        lines = tree.text("etc/selinux/config").splitlines()
        assert lines[1:] == [f"SELINUX={mode}", "SELINUXTYPE=targeted"]
        assert tree.get("etc/apparmor.d") is None


def test_fips(centos: Amphora, fedora: Amphora) -> None:
    """Kernel, initramfs, the system's policy and sshd are told of FIPS mode, if asked for."""
    for amphora, wanted in ((centos, True), (fedora, False)):
        tree = amphora.image.tree
        initramfs = amphora.debugfs(f"cat /boot/initramfs-{amphora.kernel}.img")
        told = (
            "fips=1" in amphora.facts["boot_loader"]["command_line"],
            'add_dracutmodules+=" fips "' in initramfs,
            tree.text("etc/crypto-policies-state") == "FIPS\n",
            tree.get("etc/ssh/sshd_config.d/05-amphora-fips.conf") is not None,
        )
        assert told == (wanted,) * len(told)


def test_services(amphora: Amphora) -> None:
    """The agent's services start; what would be in their way cannot."""
    services = amphora.facts["services"]
    assert {"amphora-agent.service", "amphora-certificates.service", "rsyslog.service"} <= set(
        services["enabled"]
    )
    masked = set(services["masked"])
    assert {"firewalld.service", "haproxy.service", "keepalived.service"} <= masked
    assert {"nftables.service", "dnf-makecache.timer"} <= masked


def test_network(centos: Amphora, fedora: Amphora) -> None:
    """The management card is NetworkManager's, or systemd-networkd's where there is one."""
    tree = centos.image.tree
    assert "no-auto-default=*" in tree.text("etc/NetworkManager/conf.d/amphora.conf")
    assert list(tree.under("etc/NetworkManager/system-connections")) == []
    assert "NetworkManager-wait-online.service" in centos.facts["services"]["masked"]
    services = fedora.facts["services"]
    assert "systemd-networkd.service" in services["enabled"]
    assert "systemd-networkd-wait-online.service" in services["masked"]
    assert fedora.image.tree.get("etc/NetworkManager") is None


def test_sshd(centos: Amphora, fedora: Amphora) -> None:
    """Management addresses alone have an sshd, with its own host key; with -n there is none."""
    services = centos.facts["services"]
    assert "amphora-sshd-address.path" in services["enabled"]
    assert "sshd.service" not in services["enabled"]
    assert {"sshd.socket", "sshd-keygen.target"} <= set(services["masked"])
    assert {"sshd.service", "sshd.socket"} <= set(fedora.facts["services"]["masked"])
    assert fedora.image.tree.get("usr/sbin/sshd") is None


def test_settings_of_the_family(amphora: Amphora) -> None:
    """Kernel settings, HAProxy's group and dhclient's hook are where the family looks for them."""
    tree = amphora.image.tree
    assert "net.ipv4.ip_nonlocal_bind = 1" in tree.text("etc/sysctl.d/90-amphora.conf")
    assert amphora.debugfs("cat /var/lib/octavia/haproxy-default-user-group.conf").endswith(
        "group nobody\n"
    )
    hook = tree.get("etc/dhcp/dhclient-enter-hooks")
    assert hook is not None
    assert hook.permissions == 0o755
    assert tree.get("etc/logrotate.d/rsyslog") is None


def test_private_ca(centos: Amphora) -> None:
    """The image trusts the CA while it is built, and forgets it."""
    anchors = "/etc/pki/ca-trust/source/anchors"
    told = centos.image.tree.text("etc/pki/ca-trust/told").splitlines()
    assert told == [f"trusted: {anchors}/amphora-image-1.crt", f"trusted: {anchors}/*"]
    assert list(centos.image.tree.under(anchors.lstrip("/"))) == []


def test_pinned_cpus(centos: Amphora, fedora: Amphora) -> None:
    """Interrupts stay on the first vCPU and the others are HAProxy's alone, if asked for."""
    for amphora, wanted in ((fedora, True), (centos, False)):
        told = (
            "irqaffinity=0" in amphora.facts["boot_loader"]["command_line"].split(),
            "irqbalance.service" in amphora.facts["services"]["masked"],
            amphora.image.tree.get("usr/lib/systemd/system/haproxy.slice") is not None,
        )
        assert told == (wanted,) * len(told)


def test_agent(amphora: Amphora) -> None:
    """The agent's commands are there, for the image's Python."""
    tree = amphora.image.tree
    python = tree.entries["opt/amphora-agent/bin/python3"]
    assert tree.get(python.target.lstrip("/")) is not None
    assert tree.get("usr/bin/amphora-agent") is not None
    assert "octavia" in amphora.manifest["python_packages"]


def test_nothing_is_left_of_the_build(amphora: Amphora) -> None:
    """The image has no cache, log or record of command lines of dnf."""
    tree = amphora.image.tree
    left = [path for path, _ in tree.match(r"var/(log/.*dnf.*|lib/dnf/history.*|cache/dnf/.+)")]
    assert left == []
