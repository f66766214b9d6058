# SPDX-License-Identifier: Apache-2.0
"""What this machine is and can do: found out before any work begins."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from amphora_image import foreign
from amphora_image.errors import AmphoraImageError, HostError
from amphora_image.partitions import LAYOUTS
from amphora_image.request import GIB, Architecture, BaseOS, ImageType, Request
from amphora_image.run import run

#: Free memory that a build on tmpfs needs, and free space that any build needs, in bytes.
TMPFS_MEMORY = 4 * GIB
BUILD_MEMORY = GIB // 2
BUILD_SPACE = 4 * GIB
OUTPUT_SPACE = GIB

#: Program -> the package of Debian and Ubuntu that holds it.
TOOLS: Mapping[str, str] = {
    "chroot": "coreutils",
    "fstrim": "util-linux",
    "mcopy": "mtools",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.fat": "dosfstools",
    "mount": "mount",
    "openssl": "openssl",
    "qemu-img": "qemu-utils",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "sudo": "sudo",
    "tar": "tar",
    "unshare": "util-linux",
}
APT_TOOLS: Mapping[str, str] = {"gpgv": "gpgv", "mmdebstrap": "mmdebstrap", "zstd": "zstd"}

#: What makes the root file system: our own element, or diskimage-builder's.
BASE_TOOLS: Mapping[BaseOS, Mapping[str, str]] = {
    BaseOS.UBUNTU: APT_TOOLS,
    BaseOS.DEBIAN: APT_TOOLS,
    BaseOS.FEDORA: {"podman": "podman"},
    BaseOS.CENTOS: {"dnf": "dnf dnf-plugins-core", "rpm": "rpm"},
    BaseOS.ROCKY: {"podman": "podman"},
    BaseOS.RHEL: {"kpartx": "kpartx"},
}

#: What mmdebstrap asks whether this host runs the programs of another architecture.
FOREIGN_TOOLS: Mapping[str, str] = {"arch-test": "arch-test"}

#: Image type, the program that it alone needs, its package.
TYPE_TOOLS = ((ImageType.SQUASHFS, "mksquashfs", "squashfs-tools"),)

#: Where the packages of the distributions put the keys of their archives.
#: A file of the same name in PACKAGED_KEYRINGS stands in for one that is not installed.
KEYRINGS: Mapping[BaseOS, tuple[str, Path]] = {
    BaseOS.DEBIAN: (
        "debian-archive-keyring",
        Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    ),
    BaseOS.UBUNTU: (
        "ubuntu-keyring or ubuntu-archive-keyring",
        Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
    ),
}

#: By this file of distro-info-data mmdebstrap knows which releases are Ubuntu's.
UBUNTU_RELEASES = Path("/usr/share/distro-info/ubuntu.csv")

PACKAGED_KEYRINGS = Path(__file__).parent / "keyrings"


@dataclass(frozen=True)
class Mirrors:
    """URLs of the apt archives that this host uses."""

    archive: str
    security: str | None = None


@dataclass(frozen=True)
class Host:
    """What a plan has to know of the machine that builds.

    :ivar base_os: what it runs, if that is one that we build.
    :ivar mirrors: where its own packages come from, if it runs apt.
    :ivar keyrings: the files with the keys of the archives, as far as there are any here.
    """

    base_os: BaseOS | None = None
    mirrors: Mirrors | None = None
    keyrings: Mapping[BaseOS, Path] = field(default_factory=dict)


def look() -> Host:
    """Return what this machine is. Starts apt-get where there is one; needs no privilege."""
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    name = release.get("ID", "")
    base_os = BaseOS(name) if name in set(BaseOS) else None
    return Host(
        base_os=base_os,
        mirrors=_own_mirrors(base_os, release.get("VERSION_CODENAME", "")),
        keyrings={base_os: path for base_os in KEYRINGS if (path := keyring_of(base_os))},
    )


def keyring_of(base_os: BaseOS) -> Path | None:
    """Return the file with the keys of a base OS's archive: the host's, or the one we bring."""
    _, installed = KEYRINGS[base_os]
    candidates = (installed, PACKAGED_KEYRINGS / installed.name)
    return next((path for path in candidates if path.is_file()), None)


def default_architecture(machine: str) -> Architecture:
    """Return the architecture of a host by the name that :manpage:`uname(2)` gives it."""
    return foreign.MACHINES.get(machine, Architecture.AMD64)


def _own_mirrors(base_os: BaseOS | None, codename: str) -> Mirrors | None:
    if not base_os or not codename or not shutil.which("apt-get"):
        return None
    try:
        targets = run(
            [
                "apt-get",
                "indextargets",
                "--format",
                "$(CODENAME)|$(SUITE)|$(REPO_URI)|$(ORIGIN)",
                "Created-By: Packages",
            ]
        )
    except AmphoraImageError:
        return None
    return mirrors_of(base_os, codename, targets)


def mirrors_of(base_os: BaseOS, codename: str, targets: str) -> Mirrors | None:
    """Return the mirrors of a release among apt's index targets.

    :param targets: lines ``code name|suite|URL|origin``, as the archives' Release files say.
    """
    by_codename: dict[str, str] = {}
    by_suite: dict[str, str] = {}
    # Only the base OS's own archives, and only what the build can use as it is: no file:, cdrom:
    # or mirror+file: sources.
    own = rf"(.*?)\|(.*?)\|(https?://.*)\|{base_os}"
    for found in re.finditer(rf"^{own}$", targets, re.MULTILINE | re.IGNORECASE):
        by_codename.setdefault(found[1], found[3])
        by_suite.setdefault(found[2], found[3])
    # Ubuntu's suites all have the release as their code name, so there the suite tells.
    urls = by_codename | by_suite
    archive = urls.get(codename)
    return Mirrors(archive, urls.get(f"{codename}-security")) if archive else None


def require(request: Request) -> None:
    """Refuse at once what cannot work on this machine.

    :raises HostError: the first of: not root, a tool or the archive's keys are missing, no
        private namespaces, too little memory or space.
    """
    if os.geteuid() != 0:
        raise HostError("building an image needs root", hint="run the same command with sudo")
    by_type = {tool: package for kind, tool, package in TYPE_TOOLS if kind in request.image_types}
    emulated = request.debian_family and not foreign.is_native(request.architecture)
    by_architecture = FOREIGN_TOOLS if emulated else {}
    _require_tools({**TOOLS, **BASE_TOOLS[request.base_os], **by_architecture, **by_type})
    _require_keyring(request)
    _require_release(request)
    _require_architecture(request.architecture)
    _require_namespaces()
    if available_memory() < BUILD_MEMORY:
        raise HostError(
            f"{available_memory() // 2**20} MiB of memory are free; "
            f"a build needs {BUILD_MEMORY // 2**20}"
        )
    if builds_on_disk(request):
        _require_space(request.working_dir, BUILD_SPACE, "-w chooses another directory")
    _require_space(request.output.parent, OUTPUT_SPACE, "-o chooses another directory")


def builds_on_disk(request: Request) -> bool:
    """Whether the build works on disk: it was asked for, or there is too little memory."""
    return request.on_disk or available_memory() < TMPFS_MEMORY


def _require_tools(tools: Mapping[str, str]) -> None:
    missing = {tool: package for tool, package in tools.items() if not shutil.which(tool)}
    if missing:
        raise HostError(
            f"not installed: {', '.join(sorted(missing))}",
            hint=f"apt-get install {' '.join(sorted(set(missing.values())))}",
        )


def _require_keyring(request: Request) -> None:
    if not request.debian_family:
        return
    package, path = KEYRINGS[request.base_os]
    given = request.environment.keyring
    if given and not given.is_file():
        raise HostError(f"DIB_APT_KEYRING is {given}, which is no file")
    if not given and not keyring_of(request.base_os):
        raise HostError(
            f"the keys of {request.base_os}'s archive are missing: {path}",
            hint=f"install the package {package}, or set DIB_APT_KEYRING to a file with the keys",
        )


def _require_release(request: Request) -> None:
    if request.base_os is not BaseOS.UBUNTU or request.access.mirror:
        return
    if not UBUNTU_RELEASES.exists():
        raise HostError(
            f"where Ubuntu's archive is cannot be told without {UBUNTU_RELEASES}",
            hint="apt-get install distro-info-data, or name a --mirror",
        )


def _require_architecture(wanted: Architecture) -> None:
    if wanted not in LAYOUTS:
        raise HostError(
            f"images for {wanted} can be planned, not built: boot loaders are there for "
            + ", ".join(sorted(LAYOUTS))
        )
    foreign.require(wanted)


def _require_namespaces() -> None:
    try:
        run(["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"])
    except AmphoraImageError as error:
        raise HostError(
            f"no private mount and PID namespaces here: {error}",
            hint="in a container, run it with --privileged",
        ) from error


def _require_space(directory: Path, wanted: int, hint: str) -> None:
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise HostError(
            f"{existing} has {free // 2**20} MiB free; {wanted // 2**20} are needed", hint
        )


def available_memory() -> int:
    """Return the bytes of memory that new work can have (``MemAvailable`` of proc(5))."""
    return memory_of(Path("/proc/meminfo").read_text().splitlines())


def memory_of(lines: Iterable[str]) -> int:
    """Return ``MemAvailable`` in bytes from the lines of /proc/meminfo."""
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values["MemAvailable"].split()[0]) * 1024
