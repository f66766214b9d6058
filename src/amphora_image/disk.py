# SPDX-License-Identifier: Apache-2.0
"""An image file becomes a plain disk: what is hostile is refused, all else is bounded.

An image may come from anywhere. Its header is read here before QEMU sees it, so that no other file
is opened because the image names it; each program has bounds of time, memory and written bytes.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from amphora_image.errors import AmphoraImageError, BadValue, CheckFailed, HostError
from amphora_image.request import ImageType
from amphora_image.run import run

MIB = 1024**2
GIB = 1024**3
#: The largest virtual disk that is looked at, and the most bytes that are unpacked of one.
MAX_DISK = 64 * GIB
MAX_DATA = 16 * GIB
#: What one program may write to one file, unless it unpacks a disk; its seconds and its memory.
MAX_OUTPUT = 64 * MIB
MAX_SECONDS = 60
MAX_MEMORY = 2 * GIB

#: Program -> the package of Debian and Ubuntu that holds it.
PROGRAMS = {
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "mdir": "mtools",
    "prlimit": "util-linux",
    "qemu-img": "qemu-utils",
    "setpriv": "util-linux",
    "sfdisk": "fdisk",
    "timeout": "coreutils",
}
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}

#: Image types that can be looked into.
READABLE = (ImageType.QCOW2, ImageType.RAW, ImageType.VHD, ImageType.TAR)

#: First bytes of formats that people try -> what to do.
OTHER_FORMATS = {
    b"\x1f\x8b": "gzip: unpack it first",
    b"BZh": "bzip2: unpack it first",
    b"\xfd7zXZ": "xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it first",
    b"PK\x03\x04": "zip: unpack it first",
    b"KDMV": "VMDK: convert it to qcow2 first",
    b"vhdxfile": "VHDX: convert it to qcow2 first",
    b"<<< ": "VDI: convert it to qcow2 first",
    b"oci-layout\0": "an OCI archive: take the tar of the same build (-t tar,oci)",
    b"hsqs": "a squashfs: take the tar of the same build (-t tar,squashfs)",
}
#: qcow2's incompatible features that are harmless: compression type, extended L2 entries.
KNOWN_FEATURES = 1 << 3 | 1 << 4

#: Offset and value of ext4's magic number in a file system, and its types of partition.
EXT4_MAGIC = (1024 + 0x38, b"\x53\xef")


@dataclass(frozen=True)
class Partition:
    """A part of a disk; start and size in bytes, the type as GUID or as MBR's number."""

    name: str
    type: str
    start: int
    size: int


@dataclass(frozen=True)
class Disk:
    """A disk that can be read: a raw file of ``size`` bytes, its partition table and its parts.

    :ivar label: ``gpt``, ``dos``, or ``none`` where a file system fills the disk.
    """

    raw: Path
    size: int
    label: str
    partitions: tuple[Partition, ...]


def require_programs() -> None:
    """Look for all programs that images are read with.

    :raises HostError: one is missing.
    """
    for program, package in PROGRAMS.items():
        if not shutil.which(program, path=ENVIRONMENT["PATH"]):
            raise HostError(f"{program} is missing", hint=f"apt-get install {package}")


def bounded(
    argv: Sequence[str | Path], scratch: Path, *, written: int = MAX_OUTPUT, name: str = "output"
) -> str:
    """Run a program on data that nobody vouches for; return its output.

    The output stays in the file ``name`` of the scratch directory.

    :raises CheckFailed: it failed or met a bound.
    """
    output = scratch / name
    limits = [f"--as={MAX_MEMORY}", f"--fsize={written}", "--core=0"]
    # Whoever ends takes what it started along.
    mortal = ["setpriv", "--pdeathsig=KILL", "--"]
    timeout = ["timeout", "--signal=KILL", str(MAX_SECONDS)]
    bounds = [*mortal, *timeout, *mortal, "prlimit", *limits, "--"]
    try:
        run([*bounds, *argv], env=ENVIRONMENT, output=output)
    except AmphoraImageError as error:
        _, *said = str(error).splitlines()
        why = " ".join(said) or f"it failed, or met a bound: {MAX_SECONDS} s, {written} bytes"
        raise CheckFailed(f"{argv[0]} cannot read the image: {why}") from error
    return output.read_text(errors="replace")


def detect(path: Path) -> ImageType:
    """Return the format of an image by its first and last bytes, whatever its name.

    :raises BadValue: it is no file, is empty, or has none of our formats.
    """
    if not path.exists():
        raise BadValue(f"IMAGE is {str(path)!r}, which does not exist")
    if not path.is_file():
        raise BadValue(f"IMAGE is {str(path)!r}; allowed is a file, which this is not")
    with path.open("rb") as file:
        head = file.read(4096)
        file.seek(max(0, path.stat().st_size - 512))
        tail = file.read()
    for magic, advice in OTHER_FORMATS.items():
        if head.startswith(magic):
            raise BadValue(f"IMAGE is {str(path)!r}, which is {advice}")
    offset, ext4 = EXT4_MAGIC
    if head.startswith(b"QFI\xfb"):
        return ImageType.QCOW2
    if head[257:262] == b"ustar":
        return ImageType.TAR
    if b"conectix" in (head[:8], tail[:8]):
        return ImageType.VHD
    if head[510:512] == b"\x55\xaa" or head[offset : offset + 2] == ext4:
        return ImageType.RAW
    raise BadValue(
        f"IMAGE is {str(path)!r}, {path.stat().st_size} bytes of no known format",
        hint=f"allowed are {', '.join(READABLE)}; is it whole?",
    )


def check_qcow2(header: bytes, length: int) -> None:
    """Refuse a qcow2 header that leads out of its file or asks for more than a disk holds.

    :param header: at least the first 104 bytes (QEMU: ``docs/interop/qcow2.txt``).
    :param length: bytes of the file.
    :raises CheckFailed: it is refused.
    """
    if len(header) < 104:
        raise CheckFailed(f"the qcow2 header is truncated: {len(header)} bytes")
    fields = struct.unpack_from(">4sIQIIQIIQQIIQQ", header)
    _, version, backing, _, cluster_bits, size, encrypted, l1_entries, l1_offset, *rest = fields
    features = rest[-1] if version >= 3 else 0
    data_file = bool(features & 1 << 2)
    refused = {
        f"its version is {version}; allowed are 2 and 3": version not in (2, 3),
        "it names a backing file, without which it is no image": bool(backing),
        "it names an external data file": data_file,
        "it is encrypted": bool(encrypted),
        f"it has features that are not known: {features:#x}": bool(
            features & ~(KNOWN_FEATURES | 1 << 2)
        ),
        f"its clusters have 2^{cluster_bits} bytes; allowed are 2^9 to 2^21": not (
            9 <= cluster_bits <= 21
        ),
        f"its disk has {size} bytes; allowed are at most {MAX_DISK}": size > MAX_DISK,
        "its tables lie outside the file: it is truncated or damaged": (
            l1_offset + 8 * l1_entries > length or rest[0] >= length
        ),
    }
    for message, holds in refused.items():
        if holds:
            raise CheckFailed(f"the qcow2 file is refused: {message}")


def check_vhd(path: Path) -> None:
    """Refuse a VHD that is truncated, names a parent, or unpacks to too much.

    :raises CheckFailed: it is refused (Virtual Hard Disk Image Format Specification).
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, length - 512))
        footer = file.read(512)
        if len(footer) < 512 or not footer.startswith(b"conectix"):
            raise CheckFailed("the VHD file is refused: its footer is missing; it is truncated")
        header_offset, size = struct.unpack_from(">16xQ24xQ", footer)
        (kind,) = struct.unpack_from(">I", footer, 60)
        if kind not in (2, 3):
            raise CheckFailed(f"the VHD file is refused: its type is {kind}; allowed: 2, 3 (whole)")
        if size > MAX_DISK:
            raise CheckFailed(
                f"the VHD file is refused: its disk has {size} bytes; allowed are {MAX_DISK}"
            )
        if kind == 2:
            return
        header = file.seek(min(header_offset, length)) and file.read(1024)
        if not header or len(header) < 1024 or not header.startswith(b"cxsparse"):
            raise CheckFailed("the VHD file is refused: its dynamic header is missing")
        table_offset, _, entries, block = struct.unpack_from(">16xQIII", header)
        if table_offset + 4 * entries > length or entries * block > 2 * MAX_DISK:
            raise CheckFailed("the VHD file is refused: its block table lies outside the file")
        file.seek(table_offset)
        blocks = struct.unpack(f">{entries}I", file.read(4 * entries))
    used = [number for number in blocks if number != 0xFFFFFFFF]
    if len(set(used)) != len(used) or any(number * 512 + block > length for number in used):
        raise CheckFailed("the VHD file is refused: its blocks overlap or lie outside the file")


def unpack(path: Path, kind: ImageType, scratch: Path) -> Path:
    """Return a raw file of an image: the image itself, or one in the scratch directory.

    :raises CheckFailed: the image is hostile or damaged.
    """
    path = path.resolve()
    raw = scratch / "disk.raw"
    if kind is ImageType.RAW:
        raw.symlink_to(path)  # a name that no program takes for options
        return raw
    source = scratch / f"image.{kind}"
    source.symlink_to(path)
    if kind is ImageType.QCOW2:
        with path.open("rb") as file:
            check_qcow2(file.read(512), path.stat().st_size)
        check = ["qemu-img", "check", "-f", "qcow2", "--output=json", str(source)]
        said = json.loads(bounded(check, scratch))
        with path.open("rb") as file:
            cluster = 1 << struct.unpack_from(">20xI", file.read(24))[0]
        data = said.get("allocated-clusters", 0) * cluster
    else:
        check_vhd(path)
        data = path.stat().st_size
    free = shutil.disk_usage(scratch).free
    if data > MAX_DATA:
        raise CheckFailed(f"the image holds {data} bytes of data; allowed are {MAX_DATA}")
    if data > free:
        raise HostError(f"{scratch.parent} has {free} bytes free; {data} are needed", "set TMPDIR")
    disk_format = "vpc" if kind is ImageType.VHD else "qcow2"
    convert = ["qemu-img", "convert", "-f", disk_format, "-O", "raw", str(source), str(raw)]
    bounded(convert, scratch, written=MAX_DISK + MIB)
    return raw


def open_disk(raw: Path, scratch: Path) -> Disk:
    """Read the partition table of a raw file.

    :raises CheckFailed: there is none, or it does not fit the disk.
    """
    size = raw.stat().st_size
    with raw.open("rb") as file:
        head = file.read(4096)
    offset, ext4 = EXT4_MAGIC
    if head[offset : offset + 2] == ext4:
        return Disk(raw, size, "none", (Partition("", "", 0, size),))
    table = json.loads(bounded(["sfdisk", "--json", raw], scratch))["partitiontable"]
    sector = table.get("sectorsize", 512)
    partitions = tuple(
        Partition(part.get("name", ""), part["type"], part["start"] * sector, part["size"] * sector)
        for part in table.get("partitions", [])
    )
    for number, part in enumerate(partitions, 1):
        if part.start + part.size > size:
            raise CheckFailed(
                f"partition {number} ends at byte {part.start + part.size} of {size}",
                hint="the file is truncated",
            )
    return Disk(raw, size, table["label"], partitions)


def root_partition(disk: Disk) -> Partition:
    """Return the partition of the root file system: the largest one that holds an ext4.

    :raises CheckFailed: there is none.
    """
    offset, magic = EXT4_MAGIC
    found = []
    with disk.raw.open("rb") as file:
        for part in disk.partitions:
            file.seek(part.start + offset)
            if file.read(2) == magic:
                found.append(part)
    if not found:
        raise CheckFailed("no partition holds an ext4 file system, the only kind that is read")
    return max(found, key=lambda part: part.size)
