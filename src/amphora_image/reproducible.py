# SPDX-License-Identifier: Apache-2.0
"""The same bytes each time: what a build does when SOURCE_DATE_EPOCH is set.

By that variable (reproducible-builds.org, "SOURCE_DATE_EPOCH specification") a build is told its
time, in seconds since 1970. No file of the image is then newer, names that are chosen at random are
derived from it, and files are written in the order of their names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from amphora_image.errors import AmphoraImageError
from amphora_image.run import TAR_OPTIONS, pipe, run

VARIABLE = "SOURCE_DATE_EPOCH"

#: Of the identifiers that are derived (RFC 9562, 5.5).
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "amphora-image.invalid")


def identifier(epoch: int, what: str) -> str:
    """Return the UUID of a disk, partition or file system of a build."""
    return str(uuid.uuid5(NAMESPACE, f"{epoch} {what}"))


def environment(epoch: int) -> dict[str, str]:
    """Return the environment of programs that write file systems."""
    # mke2fs before 1.47.1 and debugfs know only the first; FAT has local times.
    told = {"E2FSPROGS_FAKE_TIME": str(epoch), VARIABLE: str(epoch), "TZ": "UTC0"}
    return {**os.environ, **told}


def settle_times(directory: Path, epoch: int) -> None:
    """Give all that is in a directory the time of the build."""
    for path in (directory, *directory.rglob("*")):
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def settle_tree(tree: Path, epoch: int) -> None:
    """Make a tree anew: in the order of names, which tmpfs keeps, and with no time after the epoch.

    :raises AmphoraImageError: it cannot be copied.
    """
    settled = tree.with_name(f"{tree.name}-settled")
    settled.mkdir()
    order = ("--sort=name", f"--mtime=@{epoch}", "--clamp-mtime")
    pipe(
        ["tar", "--create", *order, *TAR_OPTIONS, "--directory", str(tree), "."],
        ["tar", "--extract", *TAR_OPTIONS, "--preserve-permissions", "--directory", str(settled)],
    )
    shutil.rmtree(tree)
    settled.rename(tree)


def settle_inodes(disk: Path, offset: int, tree: Path, epoch: int) -> None:
    """Give the inodes of an ext4 file system the times that mke2fs took from the host's.

    :param offset: of the file system on the disk, bytes.
    :param tree: what it was filled from.
    :raises AmphoraImageError: a name cannot be told to :manpage:`debugfs(8)`.
    """
    script = disk.with_suffix(".debugfs")
    names = ["", *sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))]
    if strange := next((name for name in names if "\n" in name), None):
        raise AmphoraImageError(f"{strange!r} has a line break in its name")
    quoted = ('"/{}"'.format(name.replace('"', '""')) for name in names)
    lines = (f"sif {name} {time} @{epoch}\n" for name in quoted for time in ("atime", "ctime"))
    script.write_text("".join(lines))
    run(["debugfs", "-w", "-f", script, f"{disk}?offset={offset}"], env=environment(epoch))
    script.unlink()


def differences(first: Path, second: Path) -> Iterator[tuple[str, str]]:
    """Yield how two tars of a root file system differ: path and what of it, in order."""
    left, right = (dict(_members(path)) for path in (first, second))
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            yield name, f"only in the {'second' if name in right else 'first'}"
            continue
        for key, value in left[name].items():
            if value != right[name][key]:
                yield name, f"{key}: {value} and {right[name][key]}"


def _members(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    with tarfile.open(path) as archive:
        for member in archive:
            content = member.linkname
            if file := archive.extractfile(member) if member.isfile() else None:
                content = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            yield (
                member.name,
                {
                    "type": member.type.decode(),
                    "mode": f"{member.mode:o}",
                    "owner": f"{member.uid}:{member.gid}",
                    "time": int(member.mtime),
                    "content": content,
                },
            )
