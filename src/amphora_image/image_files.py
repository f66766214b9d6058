# SPDX-License-Identifier: Apache-2.0
"""Tree becomes image files: one writer for each image type, all at once."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from amphora_image.disk_writer import Source, write_disk
from amphora_image.errors import AmphoraImageError
from amphora_image.oci import write_oci
from amphora_image.reproducible import settle_times, settle_vhd
from amphora_image.request import Architecture, ImageType, VhdSubformat
from amphora_image.run import TAR_OPTIONS, run

#: Image types that are made of the raw disk.
DISK_TYPES = frozenset({ImageType.QCOW2, ImageType.RAW, ImageType.VHD})

#: What a running system mounts over; a container brings its own.
MOUNT_POINTS = ("proc/*", "sys/*")


def write_qcow2(source: Source, file: Path) -> None:
    """Write a compressed qcow2, by zstd unless the options say otherwise."""
    options = source.qemu_img_options
    if "compression_type=" not in options:
        options = ",".join(filter(None, ("compression_type=zstd", options)))
    # Out of order is quicker, and another order each time.
    order = ["-W"] if source.epoch is None else []
    _convert(source, file, "-O", "qcow2", "-c", "-m", "4", *order, "-o", options)


def write_raw(source: Source, file: Path) -> None:
    """Write a raw disk, with holes where it is empty."""
    _convert(source, file, "-O", "raw")


def write_vhd(source: Source, file: Path) -> None:
    """Write a VHD of exactly the disk's size."""
    _convert(source, file, "-O", "vpc", "-o", f"subformat={source.vhd_subformat},force_size=on")
    if source.epoch is not None:
        settle_vhd(file, source.epoch)


def _convert(source: Source, file: Path, *options: str) -> None:
    run(["qemu-img", "convert", "-f", "raw", *options, source.disk, file])


def write_tar(source: Source, file: Path) -> None:
    """Write a tar of the root file system."""
    if source.tar.exists():
        run(["cp", source.tar, file])
        return
    excluded = [f"--exclude=./{pattern}" for pattern in MOUNT_POINTS]
    # Neither the number of this process nor times that nobody set.
    headers = "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"
    kept = ["--sort=name", *TAR_OPTIONS, "--format=posix", headers]
    run(["tar", "--create", *excluded, *kept, f"--file={file}", f"--directory={source.tree}", "."])


def write_oci_image(source: Source, file: Path) -> None:
    """Write an OCI image of the root file system."""
    with tempfile.TemporaryDirectory(dir=source.work) as scratch:
        tar = Path(scratch, "root.tar")
        write_tar(source, tar)
        epoch = time.time() if source.epoch is None else source.epoch
        created = datetime.fromtimestamp(epoch, UTC)
        write_oci(tar, file, name=source.name, architecture=source.architecture, created=created)


def write_squashfs(source: Source, file: Path) -> None:
    """Write a squashfs of the root file system, compressed by zstd."""
    excluded = ["-wildcards", "-e", *MOUNT_POINTS]
    options = ["-quiet", "-no-progress", "-noappend", "-comp", "zstd"]
    run(["mksquashfs", source.tree, file, *options, *excluded], env=source.environment)


WRITERS: Mapping[ImageType, Callable[[Source, Path], None]] = {
    ImageType.OCI: write_oci_image,
    ImageType.QCOW2: write_qcow2,
    ImageType.RAW: write_raw,
    ImageType.SQUASHFS: write_squashfs,
    ImageType.TAR: write_tar,
    ImageType.VHD: write_vhd,
}


def write_files(source: Source, files: Mapping[ImageType, Path]) -> None:
    """Write the files; a disk is made only if one of them needs it.

    :raises AmphoraImageError: one of them cannot be written.
    """
    set_esp_aside(source)
    if source.epoch is not None:
        for tree in filter(Path.exists, (source.tree, source.esp)):
            settle_times(tree, source.epoch)
    if source.tree.exists() and not DISK_TYPES.isdisjoint(files):
        print("phase: disk", flush=True)
        write_disk(source)
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


def argv(source: Source, files: Mapping[ImageType, Path]) -> list[str]:
    """Return the arguments by which another process calls :func:`write_files`."""
    named = {str(kind): str(file) for kind, file in files.items()}
    return ["-m", "amphora_image.image_files", json.dumps([vars(source), named], default=str)]


def main(words: Sequence[str] | None = None) -> None:
    """Write image files; the last command of a build in its sandbox."""
    parser = argparse.ArgumentParser(prog="python -m amphora_image.image_files")
    parser.add_argument("job", type=json.loads, help="the source and the files, as JSON")
    given, named = parser.parse_args(words).job
    kinds = {"work": Path, "architecture": Architecture, "vhd_subformat": VhdSubformat}
    source = Source(**{**given, **{name: kind(given[name]) for name, kind in kinds.items()}})
    try:
        write_files(source, {ImageType(kind): Path(file) for kind, file in named.items()})
    except AmphoraImageError as error:
        sys.exit(f"image files: {error}")


if __name__ == "__main__":
    main()
