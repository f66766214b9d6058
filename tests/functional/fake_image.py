# SPDX-License-Identifier: Apache-2.0
"""An amphora's image of a few files that breaks no rule, and what makes it break each of them."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amphora_image import plan, rules, safety
from amphora_image.agent_locks.check_imports import COMMANDS
from amphora_image.boot_loader import embed
from amphora_image.disk import MIB, Partition
from amphora_image.ext4 import FileSystem
from amphora_image.image import Image, Mark
from amphora_image.manifest import SCHEMA
from amphora_image.partitions import BIOS_BOOT, SECTOR
from amphora_image.request import ImageType
from amphora_image.rules import Asked
from amphora_image.tree import WANTED, Entry, Tree

KERNEL = "6.1"
LABEL = "root-label"
SIZE = 32 * MIB
START = {"bios": MIB, "root": 2 * MIB}
BIOS_PARTITION = Partition("bios", BIOS_BOOT, START["bios"], MIB)
#: What of a disk of SIZE the backup of its GPT leaves.
ROOT_SIZE = SIZE - 3 * MIB
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
FEATURES = "has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,sparse_super"

ELF = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 62)
BOOT_STAGE = b"B" * (SECTOR - 2) + b"\x55\xaa"
CORE_STAGE = b"C" * 2000
# Put together, so that this file holds no key itself.
PRIVATE_KEY = ("-----BEGIN " + "PRIVATE KEY-----\n" + "Q" * 64 + "\n").encode()


@dataclass(frozen=True)
class Node:
    """A file, directory or symbolic link; the data of a link is its target."""

    mode: int
    data: bytes = b""
    uid: int = 0


Nodes = dict[str, Node]


def file(data: bytes | str = b"", mode: int = 0o644, uid: int = 0) -> Node:
    """A regular file."""
    return Node(stat.S_IFREG | mode, data.encode() if isinstance(data, str) else data, uid)


def directory(mode: int = 0o755, uid: int = 0) -> Node:
    """A directory."""
    return Node(stat.S_IFDIR | mode, b"", uid)


def link(target: str) -> Node:
    """A symbolic link."""
    return Node(stat.S_IFLNK | 0o777, target.encode())


def _package(name: str) -> str:
    return f"Package: {name}\nStatus: install ok installed\nArchitecture: all\nVersion: 1.0\n"


def _enable(unit: str, target: str = "multi-user.target.wants") -> Nodes:
    return {f"etc/systemd/system/{target}/{unit}": link(f"/usr/lib/systemd/system/{unit}")}


def nodes() -> Nodes:
    """The files of an amphora, the elements' own among them."""
    elements = ("agent", "certificates", "cloud-init", "sshd", "sysctl")
    found: Nodes = {}
    for element in elements:
        static = plan.ELEMENTS / f"amphora-{element}" / "static"
        for path in static.rglob("*"):
            if path.is_file():
                mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
                found[str(path.relative_to(static))] = file(path.read_bytes(), mode)
    packages = sorted({*rules.PACKAGES, "openssh-server"})
    found |= {
        "bin": link("usr/bin"),
        "lib": link("usr/lib"),
        f"boot/vmlinuz-{KERNEL}": file(bytes(0x202) + b"HdrS"),
        f"boot/initrd.img-{KERNEL}": file(b"\1" * (MIB + 1)),
        "boot/grub/boot.img": file(BOOT_STAGE),
        "boot/grub/core.img": file(CORE_STAGE),
        "boot/grub/grub.cfg": file(
            f'menuentry "Amphora" {{\n    linux /boot/vmlinuz-{KERNEL} root=LABEL={LABEL} ro\n'
            f"    initrd /boot/initrd.img-{KERNEL}\n}}\n"
        ),
        f"usr/lib/modules/{KERNEL}/kernel/brd.ko.xz": file(),
        f"usr/lib/modules/{KERNEL}/modules.dep": file(
            "kernel/brd.ko.xz:\nkernel/drivers/md/dm-crypt.ko.xz:\nkernel/crypto/xts.ko.xz:\n"
        ),
        "usr/lib/systemd/systemd": file(ELF, 0o755),
        "usr/lib/systemd/system/cloud-init-local.service": file("[Unit]\nDescription=cloud-init\n"),
        "usr/lib/systemd/system/rsyslog.service": file("[Unit]\nDescription=rsyslog\n"),
        "usr/lib/os-release": file('ID=debian\nVERSION_CODENAME=trixie\nPRETTY_NAME="Debian 13"\n'),
        "etc/os-release": link("../usr/lib/os-release"),
        "etc/systemd/system/haproxy.service": link("/dev/null"),
        "etc/systemd/system/keepalived.service": link("/dev/null"),
        "etc/ssh/sshd_config": file("Include /etc/ssh/sshd_config.d/*.conf\n"),
        "etc/cloud/cloud.cfg": file("users: [default]\n"),
        "etc/cloud/cloud.cfg.d/91_datasources.cfg": file(
            "datasource_list: [ ConfigDrive, None ]\n"
        ),
        "etc/machine-id": file(),
        "etc/resolv.conf": file(),
        "etc/passwd": file(
            "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/nonexistent:/usr/sbin/nologin\n"
        ),
        "etc/shadow": file("root:*:20000:0:99999:7:::\nnobody:*:20000:0:99999:7:::\n", 0o640),
        "etc/gshadow": file("root:*::\n", 0o640),
        "etc/octavia": directory(0o750),
        "etc/octavia/certs": directory(0o700),
        "var/lib/octavia/certs": directory(0o700),
        "var/lib/cloud": directory(),
        "root": directory(0o700),
        "tmp": directory(0o1777),
        "var/tmp": directory(0o1777),
        "usr/bin/python3": file(ELF, 0o755),
        "usr/bin/su": file(ELF, 0o4755),
        "usr/sbin/sshd": file(ELF, 0o755),
        "opt/amphora-agent/bin/python3": link("/usr/bin/python3"),
        "opt/amphora-agent/lib/python3.13/site-packages/octavia-1.0.dist-info/METADATA": file(),
        "var/lib/dpkg/status": file("\n".join(map(_package, packages))),
        "var/lib/dpkg/info/systemd.list": file("/.\n/lib\n/lib/systemd\n/lib/systemd/systemd\n"),
    }
    for command in COMMANDS:
        path = f"opt/amphora-agent/bin/{command}"
        found[path] = file("#!/opt/amphora-agent/bin/python3\n", 0o755)
        found[f"usr/bin/{command}"] = link(f"/{path}")
    for unit in rules.ENABLED:
        found |= _enable(unit)
    found |= _enable("amphora-certificates.service", "cloud-init-local.service.requires")
    return found


def whole(found: Nodes) -> Nodes:
    """The files with all directories above them, in an order in which they can be made."""
    parents = {str(parent) for path in found for parent in Path(path).parents} - {"."}
    return dict(sorted({**dict.fromkeys(parents, directory()), **found}.items()))


def asked(**changes: Any) -> Asked:
    """What the image was to be."""
    packages = dict.fromkeys({*rules.PACKAGES, "openssh-server"}, "1.0")
    return replace(
        Asked(
            size=SIZE,
            sshd=True,
            datasources="ConfigDrive",
            packages=packages,
            python_packages={"octavia": "1.0"},
            directories=("/srv/build/here",),
        ),
        **changes,
    )


def manifest(expected: Asked) -> str:
    """A manifest that tells the same."""
    request = {
        "size": str(expected.size / 2**30) if expected.size else "5",
        "sshd": expected.sshd,
        "root_password": "***" if expected.root_password else None,
        "fips": expected.fips,
        "working_dir": "/srv/build/here",
        "cache_dir": "/srv/build/here",
        "environment": {"datasources": expected.datasources},
    }
    record = {
        "schema": SCHEMA,
        "request": request,
        "packages": expected.packages,
        "python_packages": expected.python_packages,
    }
    return json.dumps(record)


def as_tree(found: Nodes) -> Tree:
    """The files as a tree."""
    entries = {
        path: Entry(
            node.mode,
            node.uid,
            0,
            len(node.data) if stat.S_ISREG(node.mode) else 0,
            node.data.decode() if stat.S_ISLNK(node.mode) else "",
        )
        for path, node in whole(found).items()
    }
    contents = {
        path: node.data
        for path, node in found.items()
        if stat.S_ISREG(node.mode) and WANTED.fullmatch(path)
    }
    return Tree(entries, contents)


def boot_sectors() -> tuple[bytes, bytes]:
    """The first sector of the disk, and the beginning of its BIOS boot partition."""
    code, core = embed(BOOT_STAGE, CORE_STAGE, START["bios"] // SECTOR)
    return code + bytes(SECTOR - 2 - len(code)) + b"\x55\xaa", core


def as_image(found: Nodes) -> Image:
    """The files as an image, without any program's help."""
    first_sector, bios = boot_sectors()
    root = Partition("root", LINUX, START["root"], ROOT_SIZE)
    marks = {
        Mark(pattern.kind, path)
        for pattern in safety.patterns(asked())
        for path, node in found.items()
        if pattern.whole.search(node.data)
    }
    return Image(
        "amphora.raw",
        ImageType.RAW,
        SIZE,
        as_tree(found),
        "gpt",
        (BIOS_PARTITION, root),
        root,
        FileSystem(LABEL, "uuid", ROOT_SIZE, 4096, MIB, "clean", tuple(FEATURES.split(","))),
        first_sector,
        bios,
        marks=tuple(sorted(marks, key=str)),
    )


def write(found: Nodes, where: Path) -> None:
    """Make the files in a directory; needs root for their owners."""
    for path, node in whole(found).items():
        target = where / path
        if stat.S_ISLNK(node.mode):
            target.symlink_to(node.data.decode())
            continue
        if stat.S_ISDIR(node.mode):
            target.mkdir()
        else:
            target.write_bytes(node.data)
        os.chown(target, node.uid, 0)
        target.chmod(stat.S_IMODE(node.mode))


def make_raw(found: Nodes, raw: Path) -> Path:
    """Make a raw disk with GPT, boot loader and an ext4 of the files."""
    tree = raw.with_suffix(".tree")
    tree.mkdir()
    write(found, tree)
    first_sector, core = boot_sectors()
    raw.touch()
    os.truncate(raw, SIZE)
    table = (
        f"label: gpt\nstart={START['bios'] // SECTOR}, size={MIB // SECTOR}, type={BIOS_BOOT}\n"
        f"start={START['root'] // SECTOR}, size={ROOT_SIZE // SECTOR}, type={LINUX}, name=root\n"
    )
    subprocess.run(["sfdisk", "--quiet", raw], input=table, text=True, check=True)
    with raw.open("r+b") as disk:
        disk.write(first_sector[:440])
        disk.seek(START["bios"])
        disk.write(core)
    options = ["-q", "-F", "-b", "4096", "-L", LABEL, "-O", f"none,{FEATURES}", "-d", tree]
    where = ["-E", f"offset={START['root']}", raw, f"{ROOT_SIZE // 1024}k"]
    subprocess.run(["mkfs.ext4", *options, *where], check=True)
    return raw


Break = Callable[[Nodes], None]


def _put(path: str, node: Node) -> Break:
    return lambda found: found.update({path: node})


def _drop(path: str) -> Break:
    return lambda found: found.pop(path) and None


def _edit(path: str, old: str, new: str) -> Break:
    def edit(found: Nodes) -> None:
        node = found[path]
        assert old.encode() in node.data
        found[path] = replace(node, data=node.data.replace(old.encode(), new.encode()))

    return edit


UNITS = "usr/lib/systemd/system"
SHADOW = "root:*:"
SSHD = "etc/ssh/sshd_config.d/10-amphora.conf"
RAM_DISK = "usr/local/lib/amphora/certificates"
AGENT_LINKS = "etc/systemd/system/multi-user.target.wants"

#: Rule and part of its finding, and what makes the image break that rule and no other.
BREAKS: list[tuple[str, str, Break]] = [
    ("kernel", "no kernel", _put(f"boot/vmlinuz-{KERNEL}", file(b"junk"))),
    ("kernel", "initramfs of 6.1", _put(f"boot/initrd.img-{KERNEL}", file(b"short"))),
    ("kernel", "modules of 6.1", _drop(f"usr/lib/modules/{KERNEL}/kernel/brd.ko.xz")),
    ("boot-loader", "other-label", _edit("boot/grub/grub.cfg", LABEL, "other-label")),
    (
        "boot-loader",
        "names /boot/other",
        _edit("boot/grub/grub.cfg", "/boot/vmlinuz", "/boot/other"),
    ),
    ("boot-loader", "no entry", _edit("boot/grub/grub.cfg", "menuentry", "#")),
    ("boot-loader", "not whole", _put("boot/grub/core.img", file(b"D" * 2000))),
    ("boot-loader", "first sector", _put("boot/grub/boot.img", file(b"A" + BOOT_STAGE[1:]))),
    ("boot-loader", "core.img is too short", _put("boot/grub/core.img", file())),
    (
        "packages",
        "half",
        _edit("var/lib/dpkg/status", "install ok installed", "install ok half-configured"),
    ),
    (
        "agent",
        "/usr/bin/amphora-agent leads to no program",
        _drop("opt/amphora-agent/bin/amphora-agent"),
    ),
    ("agent", "has no interpreter", _drop("opt/amphora-agent/bin/python3")),
    ("agent", "leads to no program", _put("opt/amphora-agent/bin/amphora-interface", file("#!"))),
    (
        "services",
        "amphora-agent.service is not enabled",
        _drop(f"{AGENT_LINKS}/amphora-agent.service"),
    ),
    ("services", "but is missing", _drop(f"{UNITS}/rsyslog.service")),
    ("services", "haproxy.service is not masked", _drop("etc/systemd/system/haproxy.service")),
    (
        "order",
        "does not require",
        _drop("etc/systemd/system/cloud-init-local.service.requires/amphora-certificates.service"),
    ),
    (
        "order",
        "not ordered before",
        _edit(
            f"{UNITS}/amphora-certificates.service", "Before=cloud-init-local.service", "Before="
        ),
    ),
    (
        "order",
        "too late",
        _edit(f"{UNITS}/amphora-certificates.service", "DefaultDependencies=no", ""),
    ),
    (
        "order",
        "not ordered after amphora-certificates",
        _edit(f"{UNITS}/amphora-agent.service", "amphora-certificates.service", "other.service"),
    ),
    (
        "order",
        "not ordered after cloud-init-local",
        _edit(f"{UNITS}/amphora-agent.service", "After=cloud-init-local.service\n", ""),
    ),
    ("certificates", "no program", _drop(RAM_DISK)),
    ("certificates", "does not cover /var/lib/cloud", _edit(RAM_DISK, "/var/lib/cloud", "")),
    ("certificates", "no encrypted", _edit(RAM_DISK, "cryptsetup open", "true")),
    ("certificates", "mount point", _drop("var/lib/cloud")),
    (
        "certificates",
        "no module dm-crypt",
        _edit(f"usr/lib/modules/{KERNEL}/modules.dep", "dm-crypt", "dm"),
    ),
    (
        "datasources",
        "OpenStack",
        _edit("etc/cloud/cloud.cfg.d/91_datasources.cfg", "ConfigDrive", "OpenStack"),
    ),
    ("datasources", "no datasource_list", _drop("etc/cloud/cloud.cfg.d/91_datasources.cfg")),
    ("host-keys", "same in all", _put("etc/ssh/ssh_host_ed25519_key", file("key", 0o600))),
    ("machine-id", "0123", _put("etc/machine-id", file("0123456789abcdef0123456789abcdef\n"))),
    ("machine-id", "missing", _drop("etc/machine-id")),
    ("machine-id", "/etc/hostname", _put("etc/hostname", file("builder\n"))),
    ("machine-id", "cards", _put("etc/udev/rules.d/70-persistent-net.rules", file())),
    ("secrets", "a private key in /srv/some", _put("srv/some.pem", file(PRIVATE_KEY, 0o600))),
    ("secrets", "random-seed", _put("var/lib/systemd/random-seed", file("seed", 0o600))),
    ("secrets", "server.pem", _put("etc/octavia/certs/server.pem", file("x", 0o600))),
    ("secrets", "bash_history", _put("root/.bash_history", file("ls\n", 0o600))),
    (
        "secrets",
        "password",
        _put("etc/apt/auth.conf.d/mirror.conf", file("machine m login l password p")),
    ),
    ("caches", "/root/.cache/pip", _put("root/.cache/pip/http/0", file("x"))),
    ("caches", "Release", _put("var/lib/apt/lists/mirror_Release", file("x"))),
    ("caches", ".deb", _put("var/cache/apt/archives/haproxy.deb", file("x"))),
    ("caches", "/tmp/left", _put("tmp/left", file("x"))),
    ("resolver", "192.0.2.53", _put("etc/resolv.conf", file("nameserver 192.0.2.53\n"))),
    ("build-traces", "policy-rc.d", _put("usr/sbin/policy-rc.d", file("exit 101", 0o755))),
    ("build-traces", "dib-manifests", _put("etc/dib-manifests/dib_environment", file("A=B"))),
    (
        "build-traces",
        "/usr/share/a names",
        _put("usr/share/a", file("/tmp/amphora-image-1a2b3c4d/x")),
    ),
    ("build-traces", "/usr/share/b names", _put("usr/share/b", file("in /srv/build/here/x"))),
    ("compiler", "gcc-14", _put("usr/bin/x86_64-linux-gnu-gcc-14", file(ELF, 0o755))),
    ("compiler", "/usr/bin/make", _put("usr/bin/make", link("gmake"))),
    ("logins", "nobody can log in", _edit("etc/shadow", "nobody:*:", "nobody:$y$hash:")),
    ("logins", "nobody can log in", _edit("etc/shadow", "nobody:*:", "nobody::")),
    ("logins", "toor", _edit("etc/passwd", "nobody:x:65534", "toor:x:0")),
    (
        "logins",
        "1 SSH keys",
        _put("root/.ssh/authorized_keys", file("ssh-ed25519 AAAA me\n", 0o600)),
    ),
    ("root-password", "nobody asked for", _edit("etc/shadow", SHADOW, "root:$y$j9T$hash:")),
    ("root-password", "empty", _edit("etc/shadow", SHADOW, "root::")),
    ("sshd", "missing", _drop("usr/sbin/sshd")),
    (
        "sshd",
        "passwordauthentication is yes",
        _edit(SSHD, "PasswordAuthentication no", "PasswordAuthentication yes"),
    ),
    ("sshd", "permitrootlogin is unset", _edit(SSHD, "PermitRootLogin no", "")),
    (
        "sysctls",
        "net.core.somaxconn is 128",
        _put("etc/sysctl.d/99-late.conf", file("net/core/somaxconn=128\n")),
    ),
    ("sysctls", "unset", _drop("etc/sysctl.d/90-amphora.conf")),
    ("ownership", "belongs to user 1000", _put("usr/bin/tool", file(ELF, 0o755, 1000))),
    ("modes", "/etc/shadow has the mode 0644", _put("etc/shadow", file("root:*:1::::::\n", 0o644))),
    ("modes", "/etc/octavia/certs", _put("etc/octavia/certs", directory(0o755))),
    ("world-writable", "/usr/share/all", _put("usr/share/all", file("x", 0o666))),
    ("world-writable", "/srv/all", _put("srv/all", directory(0o777))),
    ("setuid", "/usr/bin/bash has the mode 4755", _put("usr/bin/bash", file(ELF, 0o4755))),
    ("setuid", "/opt/su", _put("opt/su", file(ELF, 0o2755))),
]


COMMAND = "import sys; from amphora_image.cli import main; sys.exit(main())"


def run(verb: str, *argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a verb of the command in the directory of its image."""
    words = [sys.executable, "-c", COMMAND, verb, *map(str, argv)]
    env = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)


def convert(raw: Path, target: Path, kind: str) -> Path:
    """Convert a raw disk."""
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, raw, target], check=True)
    Path(f"{target}.json").write_text(manifest(asked()))
    return target


def write_at(raw: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with raw.open("r+b") as opened:
        opened.seek(offset)
        opened.write(data)
