# SPDX-License-Identifier: Apache-2.0
"""Facts of an image, one ``read_x`` each, out of the value that ``image`` made of its file."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from amphora_image.disk import MIB
from amphora_image.foreign import ABIS
from amphora_image.image import Image
from amphora_image.tree import Tree

AGENT = "opt/amphora-agent"
#: e_machine of an ELF file (ELF specification) -> architecture, by Debian's names.
MACHINES = {abi.machine: str(architecture) for architecture, abi in ABIS.items()}
#: The agent's default port and address (Octavia, ``[haproxy_amphora] bind_host``, ``bind_port``).
AGENT_ADDRESS = "[::]:9443"
#: Directories whose unit files and links count, in systemd's order (:manpage:`systemd.unit(5)`).
UNIT_DIRECTORIES = ("etc/systemd/system", "usr/lib/systemd/system")


def read_os(tree: Tree) -> dict[str, str]:
    """Name the base OS and its release.

    Example: ``{"id": "debian", "release": "trixie", "name": "Debian GNU/Linux 13 (trixie)"}``
    """
    text = tree.text("etc/os-release") or tree.text("usr/lib/os-release")
    fields = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    release = fields.get("VERSION_CODENAME") or fields.get("VERSION_ID", "")
    return {
        "id": fields.get("ID", ""),
        "release": release,
        "name": fields.get("PRETTY_NAME", ""),
    }


def read_architecture(tree: Tree) -> str:
    """Tell what machine the image is for by systemd's ELF header.

    Example: ``"amd64"``
    """
    head = tree.contents.get(tree.resolve("usr/lib/systemd/systemd"), b"")[:20]
    if len(head) < 20 or not head.startswith(b"\x7fELF"):
        return "unknown"
    byte_order = ">" if head[5] == 2 else "<"
    return MACHINES.get(struct.unpack_from(f"{byte_order}H", head, 18)[0], "unknown")


def read_partitions(image: Image) -> list[dict[str, Any]]:
    """List the partitions; start and size in bytes.

    Example: ``[{"name": "root", "type": "0FC6...", "start": 2097152, "size": 5365563392}]``
    """
    return [dict(vars(part)) for part in image.partitions]


def read_file_systems(image: Image) -> list[dict[str, Any]]:
    """List the file systems that were read; sizes in bytes.

    Example: ``[{"label": "cloudimg-rootfs", "type": "ext4", "free": 4709527552}]``
    """
    found = image.file_system
    return [{**vars(found), "features": list(found.features)}] if found else []


def read_kernels(tree: Tree) -> list[dict[str, Any]]:
    """List the kernels, and what belongs to each.

    "fips" is None where the kernel's configuration is not in the image.

    Example: ``[{"version": "6.12.48-cloud-amd64", "bootable": True, "initramfs_bytes": 11534336,
    "modules": 3201, "dependencies": True, "fips": True}]``
    """
    versions = {path.removeprefix("boot/vmlinuz-") for path, _ in tree.match("boot/vmlinuz-.+")}
    versions |= {path.split("/")[3] for path, _ in tree.match("usr/lib/modules/[^/]+/modules.dep")}
    return [_kernel(tree, version) for version in sorted(versions)]


def _kernel(tree: Tree, version: str) -> dict[str, Any]:
    initramfs = (
        tree.get(name) for name in (f"boot/initrd.img-{version}", f"boot/initramfs-{version}.img")
    )
    image = tree.contents.get(f"boot/vmlinuz-{version}", b"")
    modules = tree.under(f"usr/lib/modules/{version}/kernel")
    configuration = tree.text(f"boot/config-{version}").splitlines()
    # Linux/x86 boot protocol: "HdrS" at 0x202. Arm and POWER: EFI's "MZ", or an ELF file.
    bootable = image[0x202:0x206] == b"HdrS" or image[:4] == b"\x7fELF" or image[:2] == b"MZ"
    return {
        "version": version,
        "bootable": bootable,
        "initramfs_bytes": max((entry.size for entry in initramfs if entry), default=0),
        "modules": sum(1 for path, _ in modules if ".ko" in path),
        "dependencies": tree.get(f"usr/lib/modules/{version}/modules.dep") is not None,
        "fips": "CONFIG_CRYPTO_FIPS=y" in configuration if configuration else None,
    }


def read_boot_loader(image: Image) -> dict[str, Any]:
    """Tell what the firmware and GRUB find.

    Example: ``{"name": "grub", "signature": True, "entries": ["Amphora, Linux 6.12"],
    "command_line": "root=LABEL=cloudimg-rootfs ro", "efi": ["EFI/BOOT/BOOTX64.EFI"]}``
    """
    config = image.tree.text("boot/grub/grub.cfg")
    lines = re.findall(r"^\s*linux\s+\S+\s+(.*)$", config, re.MULTILINE)
    return {
        "name": "grub" if config else "none",
        "signature": image.first_sector[510:] == b"\x55\xaa",
        "entries": re.findall(r'^\s*menuentry "([^"]*)"', config, re.MULTILINE),
        "command_line": lines[0].strip() if lines else "",
        "efi": list(image.esp),
    }


def read_os_packages(tree: Tree) -> dict[str, dict[str, str]] | None:
    """Return dpkg's packages by name; None where another package manager's database would tell.

    Example: ``{"haproxy": {"version": "3.0.11-1", "architecture": "amd64", "state": "install ok
    installed"}}``
    """
    status = tree.text("var/lib/dpkg/status")
    if not status:
        return None
    packages = {}
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))
        if "Package" in fields:
            packages[fields["Package"]] = {
                "version": fields.get("Version", ""),
                "architecture": fields.get("Architecture", ""),
                "state": fields.get("Status", ""),
            }
    return packages


def read_python_packages(tree: Tree) -> dict[str, str]:
    """Return the Python packages of the agent's environment, name -> version.

    Example: ``{"octavia": "19.0.0", "octavia-lib": "3.12.0"}``
    """
    pattern = rf"{AGENT}/lib/python[^/]+/site-packages/([^/]+)\.dist-info"
    matches = (re.fullmatch(pattern, path) for path, _ in tree.match(pattern))
    pairs = (match[1].rpartition("-") for match in matches if match)
    found = {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in pairs}
    return dict(sorted(found.items()))


def read_services(tree: Tree) -> dict[str, list[str]]:
    """Return the units that are enabled, that is wanted by a link in /etc, and the masked ones.

    Example: ``{"enabled": ["amphora-agent.service"], "masked": ["haproxy.service"]}``
    """
    links = [(path, entry) for path, entry in tree.under(UNIT_DIRECTORIES[0]) if entry.is_link]
    pattern = re.compile(r".*\.(wants|requires)/([^/]+)")
    enabled = {found[2] for path, _ in links if (found := pattern.fullmatch(path))}
    masked = {path.split("/")[3] for path, entry in links if entry.target == "/dev/null"}
    return {"enabled": sorted(enabled - masked), "masked": sorted(masked)}


def read_unit(tree: Tree, name: str) -> dict[str, list[str]]:
    """Return a unit's settings with its drop-ins, key -> values in order; empty without a unit.

    Example: ``{"After": ["rsyslog.service amphora-certificates.service"], "Type": ["oneshot"]}``
    """
    paths = [f"{directory}/{name}" for directory in UNIT_DIRECTORIES]
    files = [path for path in paths if tree.text(path)][:1]
    drop_ins = [path for each in paths for path, _ in tree.under(f"{each}.d")]
    settings: dict[str, list[str]] = {}
    used = sorted(path for path in drop_ins if path.endswith(".conf")) if files else []
    for path in files + used:
        for key, value in re.findall(r"^(\w+)=(.*)$", tree.text(path), re.MULTILINE):
            settings.setdefault(key, []).append(value.strip())
    return settings


def read_sshd(tree: Tree) -> dict[str, Any]:
    """Return whether there is an SSH server, and its settings; the first value of a keyword counts.

    Example: ``{"installed": True, "settings": {"permitrootlogin": "no"}}``
    """
    files = sorted(path for path, _ in tree.match(r"etc/ssh/sshd_config\.d/[^/]+\.conf"))
    settings: dict[str, str] = {}
    for path in [*files, "etc/ssh/sshd_config"]:
        for key, value in re.findall(r"^[ \t]*(\w+)[ \t=]+(.*)$", tree.text(path), re.MULTILINE):
            settings.setdefault(key.lower(), value.strip())
    return {"installed": tree.get("usr/sbin/sshd") is not None, "settings": settings}


def read_listening(tree: Tree) -> dict[str, Any]:
    """Tell what listens on the network as far as files tell.

    Example: ``{"agent": "[::]:9443", "ssh": "the addresses in /run/amphora-sshd/listen.conf",
    "sockets": {}}``
    """
    settings = read_sshd(tree)["settings"]
    ssh = f"{settings.get('listenaddress', 'all addresses')}, port {settings.get('port', 22)}"
    if settings.get("include", "").startswith("/run/"):
        ssh = f"the addresses in {settings['include']}"
    sockets = {
        name: streams
        for name in read_services(tree)["enabled"]
        if name.endswith(".socket")
        and (streams := [s for s in read_unit(tree, name).get("ListenStream", []) if s[:1] != "/"])
    }
    return {
        "agent": f"{AGENT_ADDRESS}, unless the controller's configuration says otherwise",
        "ssh": ssh if read_sshd(tree)["installed"] else None,
        "sockets": sockets,
    }


def read_logins(tree: Tree) -> dict[str, dict[str, Any]]:
    """Return the users who can log in: by a password (or none at all), or by SSH keys.

    Example: ``{"root": {"password": True, "keys": 0, "shell": "/bin/bash"}}``
    """
    hashes = {name: fields[0] for name, *fields in _lines(tree, "etc/shadow", 2)}
    users = {}
    for name, held, uid, _, _, home, shell in (line[:7] for line in _lines(tree, "etc/passwd", 7)):
        secret = hashes.get(name, "*") if held == "x" else held
        keys = "".join(
            tree.text(f"{home.strip('/')}/.ssh/{file}")
            for file in ("authorized_keys", "authorized_keys2")
        )
        count = sum(1 for line in keys.splitlines() if line.strip() and line[0] != "#")
        usable = secret[:1] not in ("!", "*")
        if usable or count:
            users[name] = {"uid": uid, "password": usable, "keys": count, "shell": shell}
    return users


def _lines(tree: Tree, path: str, least: int) -> Iterator[list[str]]:
    lines = (line.split(":") for line in tree.text(path).splitlines())
    return (fields for fields in lines if len(fields) >= least)


def read_directory_sizes(tree: Tree) -> dict[str, int]:
    """Return the bytes of all files below each directory of one to three levels that holds 1 MiB.

    Example: ``{"usr": 412345678, "usr/lib": 312345678}``
    """
    sizes: Counter[str] = Counter()
    for path, entry in tree.entries.items():
        if entry.is_file and entry.size:
            parts = path.split("/")[:-1][:3]
            for depth in range(len(parts)):
                sizes["/".join(parts[: depth + 1])] += entry.size
    return {path: size for path, size in sizes.items() if size >= MIB}


def read_package_sizes(tree: Tree) -> dict[str, int]:
    """Return the bytes of each package's files that are still there; "" are files of no package.

    The initramfs, byte code and all that was not unpacked by dpkg, the agent too, are of none.

    Example: ``{"haproxy": 3812345, "": 145123456}``
    """
    owned: dict[str, str] = {}
    resolved: dict[str, str] = {}
    for path, _ in tree.match(r"var/lib/dpkg/info/[^/]+\.list"):
        package = path.rpartition("/")[2].removesuffix(".list").partition(":")[0]
        for line in tree.text(path).splitlines():
            directory, _, name = line.rpartition("/")
            if directory not in resolved:
                resolved[directory] = tree.resolve(directory)
            owned[f"{resolved[directory]}/{name}"] = package
    sizes: Counter[str] = Counter()
    for path, entry in tree.entries.items():
        if entry.is_file:
            sizes[owned.get(path, "")] += entry.size
    return dict(sizes)


def read_facts(image: Image) -> dict[str, Any]:
    """Return all facts of an image as JSON values, by name, sorted."""
    tree = image.tree
    facts = {
        "architecture": read_architecture(tree),
        "boot_loader": read_boot_loader(image),
        "file_systems": read_file_systems(image),
        "image": {"name": image.name, "type": str(image.kind), "bytes": image.size},
        "kernels": read_kernels(tree),
        "listening": read_listening(tree),
        "logins": read_logins(tree),
        "os": read_os(tree),
        "os_packages": read_os_packages(tree),
        "partition_table": image.label,
        "partitions": read_partitions(image),
        "python_packages": read_python_packages(tree),
        "services": read_services(tree),
        "sizes": {
            "directories": read_directory_sizes(tree),
            "packages": read_package_sizes(tree),
        },
    }
    return dict(sorted(facts.items()))


def as_table(facts: dict[str, Any]) -> Table:
    """Return the facts as a table for people; packages and directories by their size."""
    image, loader, services = facts["image"], facts["boot_loader"], facts["services"]
    packages, sizes = facts["os_packages"], facts["sizes"]
    title = f"{image['name']} ({image['type']}, {_mib(image['bytes'])})"
    table = Table(title=Text(printable(title)))
    table.add_column("fact", no_wrap=True)
    table.add_column("value")
    rows: dict[str, Any] = {
        "base OS": facts["os"]["name"] or "unknown",
        "release": facts["os"]["release"] or "unknown",
        "architecture": facts["architecture"],
        "partitions": [
            f"{part['name'] or '-'} {_mib(part['size'])}" for part in facts["partitions"]
        ],
        "file systems": [
            f"{found['type']} {found['label']}, {_mib(found['free'])} of {_mib(found['size'])} "
            f"free, {found['errors'] or found['state']}"
            for found in facts["file_systems"]
        ],
        "kernels": [
            f"{kernel['version']}, {kernel['modules']} modules, initramfs "
            f"{_mib(kernel['initramfs_bytes'])}"
            for kernel in facts["kernels"]
        ],
        "boot loader": f"{loader['name']}: {loader['command_line']}",
        "listening": [
            f"agent: {facts['listening']['agent']}",
            f"ssh: {facts['listening']['ssh'] or 'no server'}",
            *(f"{name}: {', '.join(on)}" for name, on in facts["listening"]["sockets"].items()),
        ],
        "who can log in": [
            f"{name}: {'a password, ' if user['password'] else ''}{user['keys']} keys"
            for name, user in facts["logins"].items()
        ]
        or "nobody",
        "enabled": ", ".join(services["enabled"]),
        "masked": ", ".join(services["masked"]),
        "OS packages": "unknown" if packages is None else str(len(packages)),
        "... by size": [f"{_mib(n):>9}  {name or '(none)'}" for name, n in _top(sizes["packages"])],
        "agent's packages": ", ".join(f"{n} {v}" for n, v in facts["python_packages"].items()),
        "directories": [f"{_mib(n):>9}  /{name}" for name, n in _top(sizes["directories"])],
    }
    for name, value in rows.items():
        lines = value if isinstance(value, list) else [str(value)]
        table.add_row(name, Text("\n".join(map(printable, lines))))
    return table


def printable(text: str) -> str:
    """Return a text from an image without what a terminal or XML could take for a command."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _top(sizes: dict[str, int]) -> list[tuple[str, int]]:
    return Counter(sizes).most_common(12)


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
