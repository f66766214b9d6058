# SPDX-License-Identifier: Apache-2.0
"""A small initramfs, put together on the build host: find the root file system and hand over.

A distribution's initramfs starts udev and waits for it; an amphora needs the driver of one virtual
disk. Ours holds busybox, the drivers of virtual disks, and a script that loads those that the
hardware asks for (by their aliases, as udev would). Nothing of the image is run to make it, so it
can be made for any architecture.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from amphora_image.errors import AmphoraImageError
from amphora_image.run import run

#: Drivers of virtual disks and their file system; a kernel may have some of them built in.
#: ext4 names its checksums' driver in no dependency: it asks the kernel for one that is loaded.
DRIVERS = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_scsi", "sd_mod", "crc32c_generic", "ext4"),
    *("ahci", "ata_piix", "nvme", "xen_blkfront", "hv_vmbus", "hv_storvsc"),
    *("vmw_pvscsi", "mptspi"),
)

#: Programs that the script calls: links to busybox.
APPLETS = (
    *("cat", "find", "findfs", "mkdir", "modprobe", "mount", "sh", "sleep"),
    *("switch_root", "uname"),
)

#: A module's suffix -> how its content is read. The kernel's own loader need not know them all.
READERS: Mapping[str, Callable[[Path], bytes]] = {
    ".ko": Path.read_bytes,
    ".ko.gz": lambda path: gzip.decompress(path.read_bytes()),
    ".ko.xz": lambda path: lzma.decompress(path.read_bytes()),
    ".ko.zst": lambda path: _zstd(path, "--decompress"),
}

#: Seconds to wait for the root file system's disk.
PATIENCE = 60

INIT = f"""\
#!/bin/sh
export PATH=/bin
# The kernel panics when it ends, which a cloud and a proof notice; a shell would wait for ever.
fail() {{
    echo "initramfs: $1"
    exit 1
}}
mkdir -p /proc /sys /dev /root
mount -t devtmpfs devtmpfs /dev
mount -t proc proc /proc
mount -t sysfs sysfs /sys
init=/sbin/init mode=ro flags=
for word in $(cat /proc/cmdline); do
    case "$word" in
        root=*) root=${{word#root=}} ;;
        init=*) init=${{word#init=}} ;;
        rw) mode=rw ;;
        rootflags=*) flags=,${{word#rootflags=}} ;;
    esac
done
modprobe -a -q crc32c_generic ext4
turns={PATIENCE * 10}
until device=$(findfs "$root" 2> /dev/null) || [ -b "${{device:=$root}}" ]; do
    # A driver that was loaded may show devices that ask for another: their aliases come next turn.
    modprobe -a -q $(find /sys/devices -name modalias -exec cat {{}} +) 2> /dev/null
    turns=$((turns - 1))
    if [ $turns -eq 0 ]; then
        fail "root file system $root not found"
    fi
    sleep 0.1
done
mount -t ext4 -o "$mode$flags" "$device" /root || fail "$device is no root file system"
mount --move /dev /root/dev
mount --move /sys /root/sys
mount --move /proc /root/proc
exec switch_root /root "$init" "$@"
"""


def suffix_of(path: str) -> str:
    """Return a module's suffix with its compression, ``.ko.xz``."""
    return path[path.index(".ko") :]


def module_name(path: str) -> str:
    """Return the name by which the kernel knows a module's file."""
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def needed_modules(dependencies: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """Return the files of the wanted modules and of all that they depend on.

    :param dependencies: lines of modules.dep(5): ``file: file file``; each names all it needs.
    :param wanted: names of modules; those without a file are built into the kernel.
    """
    needs = dict(line.split(":", 1) for line in dependencies if ":" in line)
    files = {module_name(path): path for path in needs}
    found: set[str] = set()
    for name in wanted:
        if path := files.get(name):
            found.update([path, *needs[path].split()])
    return sorted(found)


def aliases_of(aliases: Iterable[str], names: set[str]) -> list[str]:
    """Return those lines of modules.alias that lead to one of the modules."""
    return [line for line in aliases if line.split()[-1:] and line.split()[-1] in names]


def cpio(entries: Iterable[tuple[str, int, bytes, tuple[int, int]]]) -> bytes:
    """Return a cpio archive of the format newc, as the kernel reads it (initramfs buffer format).

    :param entries: name, mode, content, device numbers (major, minor) of each file.
    """
    archive = bytearray()
    for number, (name, mode, content, device) in enumerate(_with_trailer(entries), start=1):
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields)
        archive += name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _with_trailer(
    entries: Iterable[tuple[str, int, bytes, tuple[int, int]]],
) -> Iterator[tuple[str, int, bytes, tuple[int, int]]]:
    yield from entries
    yield "TRAILER!!!", 0, b"", (0, 0)


def entries_of(root: Path, version: str) -> Iterator[tuple[str, int, bytes, tuple[int, int]]]:
    """Yield what the initramfs holds for a kernel of an image's tree.

    :raises AmphoraImageError: the tree lacks busybox or the kernel's modules.
    """
    modules = root / "usr/lib/modules" / version
    busybox = root / "usr/bin/busybox"
    for needed in (modules / "modules.dep", busybox):
        if not needed.exists():
            raise AmphoraImageError(f"the image has no /{needed.relative_to(root)}")
    files = needed_modules((modules / "modules.dep").read_text().splitlines(), DRIVERS)
    in_image = f"lib/modules/{version}"
    plain = {path: path.removesuffix(suffix_of(path)) + ".ko" for path in files}
    directories = {"bin", "dev", "lib", "lib/modules", in_image}
    for path in plain.values():
        directories.update(f"{in_image}/{parent}" for parent in Path(path).parents)
    for directory in sorted(directories):
        yield directory.removesuffix("/."), stat.S_IFDIR | 0o755, b"", (0, 0)
    # The kernel gives it to init as standard input and output before devtmpfs is mounted.
    yield "dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)
    yield "init", stat.S_IFREG | 0o755, INIT.encode(), (0, 0)
    yield "bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes(), (0, 0)
    for applet in APPLETS:
        yield f"bin/{applet}", stat.S_IFLNK | 0o777, b"busybox", (0, 0)
    for path, target in plain.items():
        content = READERS[suffix_of(path)](modules / path)
        yield f"{in_image}/{target}", stat.S_IFREG | 0o644, content, (0, 0)
    names = {module_name(path) for path in files}
    tables = {
        "modules.dep": _plain_dependencies(modules, files, plain),
        "modules.alias": aliases_of((modules / "modules.alias").read_text().splitlines(), names),
    }
    for name, lines in tables.items():
        text = "".join(f"{line}\n" for line in lines)
        yield f"{in_image}/{name}", stat.S_IFREG | 0o644, text.encode(), (0, 0)


def _plain_dependencies(modules: Path, files: list[str], plain: Mapping[str, str]) -> list[str]:
    lines = (modules / "modules.dep").read_text().splitlines()
    kept = [line for line in lines if line.partition(":")[0] in set(files)]
    return [re.sub(r"[^ :]+", lambda match: plain[match[0]], line) for line in kept]


def _zstd(path: Path, option: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "output")
        run(["zstd", "--quiet", option, path, "-o", output])
        return output.read_bytes()


def kernel_version(root: Path) -> str:
    """Return the version of the newest kernel in a tree's /boot.

    :raises AmphoraImageError: there is none.
    """

    def in_order(version: str) -> list[tuple[int, str]]:
        return [
            (int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", version)
        ]

    versions = [path.name.removeprefix("vmlinuz-") for path in (root / "boot").glob("vmlinuz-*")]
    if not versions:
        raise AmphoraImageError("no kernel in /boot", hint="-k names the kernel's package")
    return max(versions, key=in_order)


def main() -> None:
    """Write ``/boot/initrd.img-VERSION`` of a tree, for the element ``amphora-initramfs``."""
    parser = argparse.ArgumentParser(prog="python -m amphora_image.initramfs")
    parser.add_argument("root", type=Path)
    root = parser.parse_args().root
    try:
        version = kernel_version(root)
        with tempfile.NamedTemporaryFile() as archive:
            archive.write(cpio(entries_of(root, version)))
            archive.flush()
            packed = _zstd(Path(archive.name), "-9")
        (root / f"boot/initrd.img-{version}").write_bytes(packed)
    except AmphoraImageError as error:
        sys.exit(f"initramfs: {error}")


if __name__ == "__main__":
    main()
