# SPDX-License-Identifier: Apache-2.0
"""Tree becomes image files: one writer for each image type, all at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amphora_image.disk_writer import Source, write_disk
from amphora_image.errors import AmphoraImageError
from amphora_image.request import Architecture, ImageType
from amphora_image.run import run

#: Image types that are made of the raw disk.
DISK_TYPES = frozenset({ImageType.QCOW2, ImageType.RAW, ImageType.VHD})

#: What a running system mounts over; a container brings its own.
MOUNT_POINTS = ("./proc/*", "./sys/*")


def write_qcow2(source: Source, file: Path) -> None:
    """Write a compressed qcow2, by zstd unless the options say otherwise."""
    options = source.qcow2_options
    if "compression_type=" not in options:
        options = ",".join(filter(None, ("compression_type=zstd", options)))
    _convert(source, file, "-O", "qcow2", "-c", "-m", "4", "-W", "-o", options)


def write_raw(source: Source, file: Path) -> None:
    """Write a raw disk, with holes where it is empty."""
    _convert(source, file, "-O", "raw")


def write_vhd(source: Source, file: Path) -> None:
    """Write a dynamic VHD of exactly the disk's size."""
    _convert(source, file, "-O", "vpc", "-o", "subformat=dynamic,force_size=on")


def _convert(source: Source, file: Path, *options: str) -> None:
    run(["qemu-img", "convert", "-f", "raw", *options, source.disk, file])


def write_tar(source: Source, file: Path) -> None:
    """Write a tar of the root file system."""
    if source.tar.exists():
        run(["cp", source.tar, file])
        return
    excluded = [f"--exclude={pattern}" for pattern in MOUNT_POINTS]
    kept = ["--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*"]
    run(["tar", "--create", *excluded, *kept, f"--file={file}", f"--directory={source.tree}", "."])


WRITERS: Mapping[ImageType, Callable[[Source, Path], None]] = {
    ImageType.QCOW2: write_qcow2,
    ImageType.RAW: write_raw,
    ImageType.TAR: write_tar,
    ImageType.VHD: write_vhd,
}


def write_files(
    source: Source, files: Mapping[ImageType, Path], size: int, architecture: Architecture
) -> None:
    """Write the files; a disk is made only if one of them needs it.

    :param size: of the disk, bytes.
    :raises AmphoraImageError: one of them cannot be written.
    """
    set_esp_aside(source)
    if source.tree.exists() and not DISK_TYPES.isdisjoint(files):
        print("phase: disk", flush=True)
        write_disk(source, size, architecture)
    print("phase: image files", flush=True)
    with ThreadPoolExecutor() as pool:
        writing = [pool.submit(WRITERS[kind], source, file) for kind, file in files.items()]
    for each in writing:
        each.result()


def set_esp_aside(source: Source) -> None:
    """Take the EFI system partition's files out of the tree: they are no part of it."""
    place = source.tree / "boot/efi"
    if place.exists():
        place.rename(source.esp)


def argv(
    source: Source, files: Mapping[ImageType, Path], size: int, architecture: Architecture
) -> list[str]:
    """Return the arguments by which another process calls :func:`write_files`."""
    options = ["--size", str(size), "--architecture", str(architecture)]
    options += [f"--qemu-img-options={source.qcow2_options}"]
    named = [f"{kind}={file}" for kind, file in files.items()]
    return ["-m", "amphora_image.image_files", *options, str(source.work), *named]


def main(words: Sequence[str] | None = None) -> None:
    """Write image files; the last command of a build in its sandbox."""
    parser = argparse.ArgumentParser(prog="python -m amphora_image.image_files")
    parser.add_argument("--size", type=int, required=True, help="bytes of the disk")
    parser.add_argument("--architecture", type=Architecture, required=True)
    parser.add_argument("--qemu-img-options", default="")
    parser.add_argument("work", type=Path, help="directory with the tree")
    parser.add_argument("files", nargs="+", help="TYPE=FILE")
    args = parser.parse_args(words)
    named = (word.split("=", 1) for word in args.files)
    files = {ImageType(kind): Path.cwd() / file for kind, file in named}
    try:
        write_files(Source(args.work, args.qemu_img_options), files, args.size, args.architecture)
    except AmphoraImageError as error:
        sys.exit(f"image files: {error}")


if __name__ == "__main__":
    main()
