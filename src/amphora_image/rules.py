# SPDX-License-Identifier: Apache-2.0
"""What an image needs to be an amphora: one small function a rule, which yields what breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from amphora_image import facts
from amphora_image.agent_locks.check_imports import COMMANDS
from amphora_image.boot_loader import embed
from amphora_image.errors import AmphoraImageError
from amphora_image.image import Image
from amphora_image.partitions import BIOS_BOOT, ESP, LAYOUTS, SECTOR
from amphora_image.request import Architecture


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


#: Packages that make a machine an amphora, by Debian's names; without dpkg this is not known.
PACKAGES = words(
    """
    cloud-guest-utils cloud-init cryptsetup-bin e2fsprogs haproxy iproute2 iputils-ping ipvsadm
    isc-dhcp-client keepalived kmod logrotate netcat-openbsd nftables procps python3 rsyslog
    systemd udev
    """
)
ENABLED = (
    "amphora-agent.service",
    "amphora-certificates.service",
    "prometheus-proxy.service",
    "rsyslog.service",
)
#: The agent writes units of its own for these.
MASKED = ("haproxy.service", "keepalived.service")

#: What a UEFI starts by itself, in EFI/BOOT (UEFI 2.10, table 3.2).
EFI_LOADERS = {"amd64": "BOOTX64.EFI", "arm64": "BOOTAA64.EFI", "armhf": "BOOTARM.EFI"}

#: Bytes: the drivers of virtual disks alone take more.
MIN_INITRAMFS = 64 * 1024

#: Features that every kernel of a supported release mounts (:manpage:`ext4(5)`).
FEATURES = words(
    """
    64bit dir_index dir_nlink ext_attr extent extra_isize filetype flex_bg has_journal huge_file
    large_file metadata_csum metadata_csum_seed orphan_file resize_inode sparse_super uninit_bg
    """
)

#: Directories that hold private keys, or copies of them: all must be on the RAM disk.
RAM_DISK = ("/etc/octavia/certs", "/var/lib/octavia/certs", "/var/lib/cloud")
RAM_DISK_MODULES = ("brd", "dm-crypt", "xts")


@dataclass(frozen=True)
class Asked:
    """What the image was to be; None where nothing tells.

    :ivar size: of the disk, bytes.
    :ivar packages: of the base OS as the manifest has them, name -> version.
    :ivar python_packages: of the agent.
    :ivar directories: of the build host, which must not be named in the image.
    """

    size: int | None = None
    sshd: bool | None = None
    root_password: bool = False
    fips: bool = False
    datasources: str | None = None
    packages: Mapping[str, str] | None = None
    python_packages: Mapping[str, str] | None = None
    directories: tuple[str, ...] = ()


Check = Callable[[Image, Asked], Iterator[str]]


def check_size(image: Image, asked: Asked) -> Iterator[str]:
    """The disk has the size that was asked for, and the root file system fills its partition."""
    if asked.size and image.file_system and image.size != asked.size:
        yield f"the disk has {image.size} bytes; {asked.size} were asked for"
    if image.root and image.file_system:
        unused = image.root.size - image.file_system.size
        if unused >= max(image.file_system.block_size, 1):
            yield f"{unused} bytes of the root partition belong to no file system"


def check_file_system(image: Image, _: Asked) -> Iterator[str]:
    """e2fsck finds no error, and every name is one."""
    if image.file_system and image.file_system.errors:
        yield f"e2fsck: {image.file_system.errors}"
    yield from (f"a name that is none: {line}" for line in image.tree.strange)


def check_loopback(image: Image, _: Asked) -> Iterator[str]:
    """Any kernel mounts the file system, without a journal to replay first."""
    if not image.file_system or not image.root:
        return
    if image.file_system.state != "clean" or "needs_recovery" in image.file_system.features:
        yield f"the file system is {image.file_system.state}, or its journal is not empty"
    if unknown := set(image.file_system.features) - FEATURES - {"needs_recovery"}:
        yield f"it has features that not every kernel mounts: {', '.join(sorted(unknown))}"
    if image.file_system.size > image.root.size:
        yield f"it has {image.file_system.size} bytes, its partition {image.root.size}"


def check_kernel(image: Image, _: Asked) -> Iterator[str]:
    """Each kernel has its initramfs and its modules, and there is one."""
    kernels = facts.read_kernels(image.tree)
    if not kernels:
        yield "there is no kernel in /boot"
    for kernel in kernels:
        version = kernel["version"]
        if not kernel["bootable"]:
            yield f"/boot/vmlinuz-{version} is missing or no kernel"
        if kernel["initramfs_bytes"] < MIN_INITRAMFS:
            yield f"the initramfs of {version} is missing or has less than {MIN_INITRAMFS} bytes"
        if not kernel["dependencies"] or not kernel["modules"]:
            yield f"the modules of {version} are missing in /usr/lib/modules"


def check_boot_loader(image: Image, _: Asked) -> Iterator[str]:
    """The firmware finds GRUB, and GRUB's menu leads to the kernel and the root file system."""
    architecture = facts.read_architecture(image.tree)
    if not image.file_system or architecture not in LAYOUTS:
        return
    loader = facts.read_boot_loader(image)
    if not loader["entries"]:
        yield "/boot/grub/grub.cfg has no entry"
    label = re.search(r"root=LABEL=(\S+)", loader["command_line"])
    if not label or label[1] != image.file_system.label:
        yield f"the kernel's root is {loader['command_line']!r}, not {image.file_system.label!r}"
    config = image.tree.text("boot/grub/grub.cfg")
    for path in re.findall(r"^\s*(?:linux|initrd)\s+(\S+)", config, re.MULTILINE):
        if not image.tree.get(path):
            yield f"grub.cfg names {path}, which is missing"
    firmware = {part.type for part in LAYOUTS[Architecture(architecture)]}
    types = {part.type.upper() for part in image.partitions}
    if BIOS_BOOT in firmware:
        yield from _faults_for_bios(image, loader["signature"])
    # An older image may start under a BIOS alone.
    if ESP in firmware and (ESP in types or BIOS_BOOT not in firmware):
        loaders = {path.upper() for path in image.esp}
        if (wanted := f"EFI/BOOT/{EFI_LOADERS[architecture]}") not in loaders:
            yield f"the EFI system partition has no {wanted}"


def _faults_for_bios(image: Image, signature: bool) -> Iterator[str]:
    """Tell what keeps a BIOS from starting GRUB."""
    bios = [part for part in image.partitions if part.type.upper() == BIOS_BOOT]
    start = bios[0].start // SECTOR if bios else 0
    contents = image.tree.contents
    try:
        first, second = (contents.get(f"boot/grub/{name}.img", b"") for name in ("boot", "core"))
        code, core = embed(first, second, start)
    except AmphoraImageError as error:
        yield f"in /boot/grub {error}"
        return
    if image.first_sector[: len(code)] != code or not signature:
        yield "the first sector is not GRUB's, or leads elsewhere"
    if not image.bios.startswith(core):
        yield "GRUB's core image is not whole in the BIOS boot partition"


def check_packages(image: Image, asked: Asked) -> Iterator[str]:
    """What an amphora needs is installed, and nothing half-way."""
    packages = facts.read_os_packages(image.tree)
    if packages is None:
        if not image.tree.get("usr/lib/sysimage/rpm") and not image.tree.get("var/lib/rpm"):
            yield "there is no package database"
        return
    wanted = PACKAGES | ({"openssh-server"} if asked.sshd else set())
    states = {name: found["state"] for name, found in packages.items()}
    for name in sorted(wanted - states.keys()):
        yield f"{name} is not installed"
    for name, state in states.items():
        if not state.endswith((" ok installed", " ok config-files")):
            yield f"{name} is in the state {state!r}"


def check_locked_packages(image: Image, asked: Asked) -> Iterator[str]:
    """Packages have the versions that the manifest beside the image tells."""
    found = facts.read_os_packages(image.tree)
    pairs = []
    if found is not None and asked.packages:
        present = {
            name: each["version"]
            for name, each in found.items()
            if not each["state"].endswith(" ok config-files")
        }
        pairs.append((present, asked.packages))
    if asked.python_packages:
        pairs.append((facts.read_python_packages(image.tree), _normal(asked.python_packages)))
    for present, wanted in pairs:
        for name in sorted(present.keys() | wanted.keys()):
            if present.get(name) != wanted.get(name):
                has, should = present.get(name, "missing"), wanted.get(name, "not there")
                yield f"{name} is {has}; the manifest says {should}"


def _normal(packages: Mapping[str, str]) -> dict[str, str]:
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in packages.items()}


def check_agent(image: Image, _: Asked) -> Iterator[str]:
    """The agent's commands are programs, and their interpreter is there."""
    tree = image.tree
    for command in COMMANDS:
        path = tree.resolve(f"usr/bin/{command}")
        entry = tree.entries.get(path)
        if not entry or not entry.is_file or not entry.permissions & 0o111:
            yield f"/usr/bin/{command} leads to no program"
            continue
        interpreter = re.match(r"#!\s*(\S+)", tree.text(path))
        if not interpreter or not tree.get(interpreter[1]):
            yield f"/usr/bin/{command} has no interpreter"
    names = {*facts.read_python_packages(tree), *(facts.read_os_packages(tree) or {})}
    if not names & {"octavia", "python3-octavia", "python3-octavia-amphora-agent"}:
        yield "no package of Octavia is installed"


def check_services(image: Image, _: Asked) -> Iterator[str]:
    """What must run is enabled, and what the agent starts itself is masked."""
    services = facts.read_services(image.tree)
    for unit in ENABLED:
        if unit not in services["enabled"]:
            yield f"{unit} is not enabled"
        elif not facts.read_unit(image.tree, unit):
            yield f"{unit} is enabled, but is missing"
    for unit in MASKED:
        if unit not in services["masked"]:
            yield f"{unit} is not masked"


def check_order(image: Image, _: Asked) -> Iterator[str]:
    """The RAM disk is there before cloud-init writes keys, and the agent starts after both."""
    tree = image.tree

    def setting(unit: str, key: str) -> frozenset[str]:
        return words(" ".join(facts.read_unit(tree, unit).get(key, [])))

    ram_disk, agent, local = ENABLED[1], ENABLED[0], "cloud-init-local.service"
    if local not in setting(ram_disk, "Before"):
        yield f"{ram_disk} is not ordered before {local}"
    required = f"etc/systemd/system/{local}.requires/{ram_disk}" in tree.entries
    if not required and ram_disk not in setting(local, "Requires"):
        yield f"{local} does not require {ram_disk}: it would write keys to the disk"
    if setting(ram_disk, "DefaultDependencies") != {"no"}:
        yield f"{ram_disk} waits for sysinit.target: it would be too late"
    for earlier in (ram_disk, local):
        if earlier not in setting(agent, "After"):
            yield f"{agent} is not ordered after {earlier}"


def check_certificates(image: Image, _: Asked) -> Iterator[str]:
    """An encrypted RAM disk covers every directory that holds private keys."""
    tree = image.tree
    start = " ".join(facts.read_unit(tree, ENABLED[1]).get("ExecStart", []))
    program = tree.resolve(start.split()[0]) if start else ""
    entry = tree.entries.get(program)
    if not entry or not entry.is_file or not entry.permissions & 0o100:
        yield f"{ENABLED[1]} runs {start!r}, which is no program"
        return
    script = tree.text(program)
    if "cryptsetup open" not in script or "/dev/ram" not in script:
        yield f"/{program} makes no encrypted RAM disk"
    for directory in RAM_DISK:
        if not re.search(rf"(?<![\w/]){directory}(?![\w/])", script):
            yield f"/{program} does not cover {directory}"
        mount_point = tree.get(directory)
        if not mount_point or not mount_point.is_dir:
            yield f"{directory}, a mount point, is missing"
    for kernel in facts.read_kernels(tree):
        listed = "".join(
            tree.text(f"usr/lib/modules/{kernel['version']}/modules.{name}")
            for name in ("dep", "builtin")
        )
        for module in RAM_DISK_MODULES:
            if not re.search(rf"/{module}\.ko", listed):
                yield f"the kernel {kernel['version']} has no module {module}"


def check_datasources(image: Image, asked: Asked) -> Iterator[str]:
    """cloud-init asks the data sources that were chosen, and no others."""
    found = None
    fragments = sorted(path for path, _ in image.tree.under("etc/cloud/cloud.cfg.d"))
    for path in ["etc/cloud/cloud.cfg", *fragments]:
        for line in re.findall(r"^datasource_list:\s*\[(.*)\]", image.tree.text(path), re.M):
            found = [word.strip(" '\"") for word in line.split(",")]
    wanted = [word.strip() for word in (asked.datasources or "ConfigDrive").split(",")]
    if found is None:
        yield "no datasource_list in /etc/cloud: cloud-init would probe for all"
    elif asked.datasources is None and "ConfigDrive" not in found:
        yield f"cloud-init's data sources are {', '.join(found)}, without ConfigDrive"
    elif asked.datasources is not None and [name for name in found if name != "None"] != wanted:
        yield f"cloud-init's data sources are {', '.join(found)}; asked were {', '.join(wanted)}"
