# SPDX-License-Identifier: Apache-2.0
"""What is known of the build host, and what is missed before any work begins."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import foreign, host
from amphora_image.access import Access
from amphora_image.errors import AmphoraImageError, HostError
from amphora_image.host import Host, Mirrors
from amphora_image.request import Architecture, BaseOS, Environment, Request

MIRROR = "http://mirror.example.org"
TLS = "https://mirror.example.org/debian"

#: Lines of apt's index targets: code name, suite, URL, origin.
DEBIAN = f"""\
trixie|stable|{MIRROR}/debian/|Debian
trixie-updates|stable-updates|{MIRROR}/debian/|Debian
trixie-security|stable-security|{MIRROR}/debian-security/|Debian
"""
UBUNTU = f"""\
noble|noble-security|{MIRROR}/security/|Ubuntu
noble|noble|{MIRROR}/ubuntu/|Ubuntu
noble|noble-updates|{MIRROR}/ubuntu/|Ubuntu
"""


@pytest.mark.parametrize(
    ("base_os", "codename", "targets", "mirrors"),
    [
        (BaseOS.DEBIAN, "trixie", DEBIAN, (f"{MIRROR}/debian/", f"{MIRROR}/debian-security/")),
        (BaseOS.UBUNTU, "noble", UBUNTU, (f"{MIRROR}/ubuntu/", f"{MIRROR}/security/")),
        (BaseOS.DEBIAN, "trixie", DEBIAN.splitlines()[0], (f"{MIRROR}/debian/", None)),
        (BaseOS.DEBIAN, "trixie", f"trixie|stable|{TLS}|Debian", (TLS, None)),
        (BaseOS.DEBIAN, "bookworm", DEBIAN, None),
        (BaseOS.DEBIAN, "trixie", "", None),
        (BaseOS.DEBIAN, "trixie", "trixie|stable|file:/srv/debian/|Debian", None),
        (BaseOS.DEBIAN, "trixie", "trixie|stable|cdrom://disk/|Debian", None),
    ],
)
def test_mirrors(
    base_os: BaseOS, codename: str, targets: str, mirrors: tuple[str, str | None] | None
) -> None:
    """A release's archive and security archive are found by code name or by suite."""
    found = host.mirrors_of(base_os, codename, targets)
    assert found == (Mirrors(*mirrors) if mirrors else None)


@pytest.mark.parametrize(("base_os", "own"), [(BaseOS.DEBIAN, DEBIAN), (BaseOS.UBUNTU, UBUNTU)])
def test_archives_of_others_are_no_mirrors(base_os: BaseOS, own: str) -> None:
    """An archive of somebody else's packages for the same release is not the release's."""
    codename = own.partition("|")[0]
    others = f"{codename}|{codename}|{MIRROR}/containers/|Some Vendor\n"
    assert host.mirrors_of(base_os, codename, others) is None
    assert host.mirrors_of(base_os, codename, others + own) == host.mirrors_of(
        base_os, codename, own
    )


@given(st.text())
def test_any_targets(targets: str) -> None:
    """Nothing that apt may say is an error."""
    assert host.mirrors_of(BaseOS.DEBIAN, "trixie", targets) is None


@given(st.integers(0, 2**53), st.integers(0, 2**53))
def test_memory(available: int, total: int) -> None:
    """/proc/meminfo counts in KiB, memory is told in bytes."""
    lines = [f"MemTotal:  {total} kB", f"MemAvailable:   {available} kB", "HugePages_Total: 0", ""]
    assert host.memory_of(lines) == available * 1024


@pytest.mark.parametrize(
    ("machine", "architecture"),
    [
        ("x86_64", "amd64"),
        ("aarch64", "arm64"),
        ("i686", "i386"),
        ("armv7l", "armhf"),
        ("ppc64le", "ppc64le"),
        ("s390x", "amd64"),
        ("", "amd64"),
    ],
)
def test_default_architecture(machine: str, architecture: str) -> None:
    """The default is the host's architecture, amd64 if images cannot have that one."""
    assert host.default_architecture(machine) == architecture


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A build host that has all; tests take something away from it."""
    have = SimpleNamespace(
        uid=0,
        missing=set(),
        failing=set(),
        free=host.BUILD_SPACE,
        memory=host.TMPFS_MEMORY,
        keyring=tmp_path / "keyring.gpg",
        releases=tmp_path / "ubuntu.csv",
        targets="",
        os={"ID": "debian", "VERSION_CODENAME": "trixie"},
        name="x86_64",
        runs=set(),
    )
    have.keyring.touch()
    have.releases.touch()

    def run(argv: Sequence[str]) -> str:
        if argv[0] in have.failing:
            raise AmphoraImageError(f"{argv[0]} ended with 1")
        return str(have.targets)

    def which(tool: str) -> str | None:
        return None if tool in have.missing else f"/usr/bin/{tool}"

    keyrings = {base_os: (f"{base_os}-keys", have.keyring) for base_os in host.KEYRINGS}
    monkeypatch.setattr(host, "KEYRINGS", keyrings)
    monkeypatch.setattr(host, "PACKAGED_KEYRINGS", tmp_path / "packaged")
    monkeypatch.setattr(host, "UBUNTU_RELEASES", have.releases)
    monkeypatch.setattr(host, "run", run)
    monkeypatch.setattr(host, "available_memory", lambda: have.memory)
    monkeypatch.setattr(host.foreign, "runs", lambda architecture: architecture in have.runs)
    monkeypatch.setattr(host.os, "geteuid", lambda: have.uid)
    monkeypatch.setattr(host.shutil, "which", which)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _: SimpleNamespace(free=have.free))
    monkeypatch.setattr(host.platform, "freedesktop_os_release", lambda: have.os)
    monkeypatch.setattr(host.platform, "machine", lambda: have.name)
    return have


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("base_os", BaseOS)
def test_a_host_that_has_all(
    machine: SimpleNamespace, a_request: Callable[..., Request], on_disk: bool, base_os: BaseOS
) -> None:
    """Nothing is missed where nothing is missing."""
    local = Environment(local_image=machine.keyring)
    host.require(a_request(base_os=base_os, on_disk=on_disk, environment=local))


@pytest.mark.parametrize(
    ("lack", "asked", "message", "hint"),
    [
        ({"uid": 1000}, {}, "building an image needs root", "sudo"),
        ({"missing": {"sfdisk"}}, {}, "not installed: sfdisk", "apt-get install fdisk"),
        (
            {"missing": {"arch-test"}},
            {"architecture": Architecture.I386},
            "not installed: arch-test",
            "apt-get install arch-test",
        ),
        (
            {"missing": {"mmdebstrap", "losetup", "mount"}},
            {},
            "not installed: mmdebstrap, mount",
            "apt-get install mmdebstrap mount",
        ),
        ({"keyring": None}, {}, "the keys of debian's archive are missing", "DIB_APT_KEYRING"),
        (
            {"keyring": None},
            {"base_os": BaseOS.UBUNTU},
            "the keys of ubuntu's archive are missing",
            "install the package ubuntu-keys, or set DIB_APT_KEYRING",
        ),
        (
            {},
            {"environment": Environment(keyring=Path("/nowhere.gpg"))},
            "DIB_APT_KEYRING is /nowhere.gpg, which is no file",
            None,
        ),
        ({"failing": {"unshare"}}, {}, "no private mount and PID namespaces", "--privileged"),
        ({"memory": 2**20}, {}, "1 MiB of memory are free; a build needs 512", None),
        ({"free": 2**20}, {}, "has 1 MiB free; 1024 are needed", "-o chooses another"),
        ({"free": 2**30}, {"on_disk": True}, "has 1024 MiB free; 4096 are needed", "-w chooses"),
        (
            {},
            {"architecture": Architecture.PPC64LE},
            "images for ppc64le can be planned, not built: boot loaders are there for amd64, arm64",
            None,
        ),
        (
            {"missing": {"qemu-aarch64-static"}},
            {"architecture": Architecture.ARM64},
            "programs for arm64 do not run here, and qemu-aarch64-static is not installed",
            "apt-get install qemu-user-static",
        ),
        (
            {"name": "aarch64", "missing": {"qemu-x86_64-static"}},
            {},
            "programs for amd64 do not run here, and qemu-x86_64-static is not installed",
            "apt-get install qemu-user-static",
        ),
    ],
)
def test_what_is_missing(
    machine: SimpleNamespace,
    a_request: Callable[..., Request],
    lack: dict[str, object],
    asked: dict[str, object],
    message: str,
    hint: str | None,
) -> None:
    """Each thing that a host can lack is said with what helps; the exit code is 2."""
    if "keyring" in lack:
        machine.keyring.unlink()
    vars(machine).update(lack)
    with pytest.raises(HostError, match=re.escape(message)) as missed:
        host.require(a_request(**asked))
    assert missed.value.exit_code == 2
    assert hint in missed.value.hint if hint and missed.value.hint else missed.value.hint == hint


def test_own_architecture_needs_no_tool_for_others(
    machine: SimpleNamespace, a_request: Callable[..., Request]
) -> None:
    """What tells whether foreign programs run is asked for a foreign architecture only."""
    machine.missing = {"arch-test"}
    host.require(a_request())


@pytest.mark.parametrize(
    ("name", "runs", "architecture"),
    [("x86_64", {"i386"}, "i386"), ("aarch64", {"armhf"}, "armhf"), ("aarch64", set(), "arm64")],
)
def test_processor_that_runs_it_is_enough(
    machine: SimpleNamespace,
    a_request: Callable[..., Request],
    name: str,
    runs: set[str],
    architecture: str,
) -> None:
    """An architecture whose programs run here needs no interpreter."""
    machine.name, machine.runs = name, runs
    machine.missing = {abi.interpreter for abi in foreign.ABIS.values()}
    host.require(a_request(architecture=Architecture(architecture)))


def test_given_keyring_is_enough(
    machine: SimpleNamespace, a_request: Callable[..., Request], tmp_path: Path
) -> None:
    """With DIB_APT_KEYRING the host needs no keyring package."""
    machine.keyring.rename(tmp_path / "mine.gpg")
    host.require(a_request(environment=Environment(keyring=tmp_path / "mine.gpg")))


def test_a_packaged_keyring_is_enough(
    machine: SimpleNamespace, a_request: Callable[..., Request]
) -> None:
    """Where the distribution's keyring is not installed, ours is used; where it is, that one."""
    packaged = host.PACKAGED_KEYRINGS / machine.keyring.name
    packaged.parent.mkdir()
    packaged.touch()
    assert host.look().keyrings[BaseOS.UBUNTU] == machine.keyring
    machine.keyring.unlink()
    assert host.look().keyrings[BaseOS.UBUNTU] == packaged
    host.require(a_request(base_os=BaseOS.UBUNTU))


def test_ubuntu_without_its_releases(
    machine: SimpleNamespace, a_request: Callable[..., Request]
) -> None:
    """Where mmdebstrap does not know Ubuntu's releases, a mirror has to be named."""
    machine.releases.unlink()
    with pytest.raises(HostError, match="cannot be told without") as missed:
        host.require(a_request(base_os=BaseOS.UBUNTU))
    assert "distro-info-data" in str(missed.value.hint)
    mirror = Access(mirror=f"{MIRROR}/ubuntu")
    host.require(a_request(base_os=BaseOS.UBUNTU, access=mirror))
    host.require(a_request(base_os=BaseOS.DEBIAN))


def test_ubuntu_keys_are_always_there() -> None:
    """No build host lacks the keys of the default base OS's archive."""
    assert (host.PACKAGED_KEYRINGS / host.KEYRINGS[BaseOS.UBUNTU][1].name).is_file()


@pytest.mark.parametrize(
    ("base_os", "tool", "hint"),
    [
        (BaseOS.FEDORA, "podman", "apt-get install podman"),
        (BaseOS.CENTOS, "dnf", "apt-get install dnf dnf-plugins-core"),
        (BaseOS.CENTOS, "rpm", "apt-get install rpm"),
        (BaseOS.ROCKY, "podman", "apt-get install podman"),
        (BaseOS.RHEL, "kpartx", "apt-get install kpartx"),
    ],
)
def test_tools_of_other_base_oses(
    machine: SimpleNamespace,
    a_request: Callable[..., Request],
    base_os: BaseOS,
    tool: str,
    hint: str,
) -> None:
    """What diskimage-builder's element of the base OS calls is asked for, and there alone."""
    machine.missing = {tool}
    local = Environment(local_image=machine.keyring)
    with pytest.raises(HostError, match=f"not installed: {tool}") as missed:
        host.require(a_request(base_os=base_os, environment=local))
    assert missed.value.hint == hint
    host.require(a_request(base_os=BaseOS.DEBIAN))


def test_other_base_oses_need_no_apt(
    machine: SimpleNamespace, a_request: Callable[..., Request]
) -> None:
    """What only Debian and Ubuntu need is not asked for elsewhere."""
    machine.missing = set(host.APT_TOOLS)
    host.require(a_request(base_os=BaseOS.ROCKY, release="10"))


def test_space_of_a_directory_to_be_made(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The space that counts is that of the directory in which the new one will be."""
    asked: list[Path] = []

    def usage(place: Path) -> SimpleNamespace:
        asked.append(place)
        return SimpleNamespace(free=0)

    monkeypatch.setattr(host.shutil, "disk_usage", usage)
    with pytest.raises(HostError, match=str(tmp_path)):
        host._require_space(tmp_path / "a/b", 1, "")
    assert asked == [tmp_path]


def test_look(machine: SimpleNamespace) -> None:
    """A Debian host tells its base OS, its mirrors and the keys that it has."""
    machine.targets = DEBIAN
    keyrings = {BaseOS.DEBIAN: machine.keyring, BaseOS.UBUNTU: machine.keyring}
    mirrors = Mirrors(f"{MIRROR}/debian/", f"{MIRROR}/debian-security/")
    assert host.look() == Host(BaseOS.DEBIAN, mirrors, keyrings)


@pytest.mark.parametrize(
    "lack",
    [
        {"missing": {"apt-get"}},
        {"failing": {"apt-get"}},
        {"os": {"ID": "debian"}},
        {"os": {"ID": "arch"}},
        {"os": {"ID": "fedora", "VERSION_CODENAME": ""}},
    ],
)
def test_look_where_there_is_no_apt(machine: SimpleNamespace, lack: dict[str, object]) -> None:
    """A host without apt, or with one that fails, has no mirrors, and that is no error."""
    machine.targets = DEBIAN
    vars(machine).update(lack)
    assert host.look().mirrors is None
