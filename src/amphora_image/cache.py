# SPDX-License-Identifier: Apache-2.0
"""What builds keep for each other: entries named by what they are made of, within a bound.

The cache directory has a directory for each layer: ``rootfs`` (:mod:`.rootfs_cache`), ``agent``
(:mod:`.agent_cache`) and ``images`` (:mod:`.image_cache`). An entry is a file or a directory that
appears whole, and is read only under its name; the time of its last use is its modification time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from amphora_image.errors import AmphoraImageError
from amphora_image.run import TAR_OPTIONS, pipe

#: Layers of trees, which are all that a build takes from the network.
TREES = ("rootfs", "agent")
LAYERS = (*TREES, "images")

#: Variables of a build. Set: nothing is taken from the cache.
FRESH = "AMPHORA_FRESH"
#: A file for the names of the trees that the build uses, a line each.
USED = "AMPHORA_USED_FILE"

#: Bytes that all entries together may have; the least recently used go first.
LIMIT = 8 * 1024**3

#: Digits of the digests in names: 128 bits.
DIGITS = 32


@dataclass(frozen=True)
class Entry:
    """Something that is kept: where, of how many bytes on the disk, and when it was used last."""

    path: Path
    bytes: int
    used: datetime

    def as_json(self) -> dict[str, str]:
        """Return the entry as a row of ``cache list``, all of it text."""
        return {
            "layer": self.path.parent.name,
            "name": self.path.name,
            "bytes": str(self.bytes),
            "used": self.used.isoformat(timespec="seconds"),
        }


def digest(*parts: object) -> str:
    """Return the digest of JSON values, bytes and files' contents, in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()[:DIGITS]


@contextmanager
def locked(directory: Path, name: str = "lock") -> Iterator[None]:
    """Hold a lock of a directory, against other builds."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f".{name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def new_entry(path: Path) -> Iterator[Path]:
    """Yield a directory for the content of a new entry, ``path``; keep it if the block succeeds.

    What the block writes to ``content`` of that directory becomes the entry.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as scratch:
        content = Path(scratch, "content")
        yield content
        with locked(path.parent.parent):
            remove(path)  # another build may have been as fast
            content.rename(path)
            prune(path.parent.parent, LIMIT)


def use(path: Path) -> bool:
    """Tell whether there is an entry, and note that it was used."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def note(entry: Path, environ: Mapping[str, str]) -> None:
    """Tell a build, by its environment, that it uses an entry."""
    if used := environ.get(USED):
        with Path(used).open("a") as file:
            file.write(f"{entry.parent.name}/{entry.name}\n")


def pack(root: Path, file: Path, paths: Sequence[str] = (".",)) -> None:
    """Write what is at some paths of a tree to a file.

    :raises AmphoraImageError: it cannot be read or written.
    """
    pipe(
        ["tar", "--create", *TAR_OPTIONS, "--directory", str(root), *paths],
        ["zstd", "-1", "--threads=0", "--check", "--quiet", "-o", str(file)],
    )


def unpack(entry: Path, root: Path) -> None:
    """Restore what an entry holds of a tree.

    :raises AmphoraImageError: it does not unpack; it is removed.
    """
    try:
        # zstd verifies the entry's checksum, tar its structure.
        pipe(
            ["zstd", "--decompress", "--stdout", "--quiet", str(entry)],
            ["tar", "--extract", *TAR_OPTIONS, "--preserve-permissions", "--directory", str(root)],
        )
    except AmphoraImageError:
        entry.unlink(missing_ok=True)
        raise


def entries(cache_dir: Path) -> list[Entry]:
    """Return all entries, the most recently used first."""
    paths = (path for layer in LAYERS for path in (cache_dir / layer).glob("[!.]*"))
    return sorted(map(_entry, paths), key=lambda entry: entry.used, reverse=True)


def _entry(path: Path) -> Entry:
    used = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    files = path.iterdir() if path.is_dir() else [path]
    return Entry(path, sum(file.stat().st_blocks * 512 for file in files), used)


def prune(cache_dir: Path, limit: int) -> list[Entry]:
    """Remove the least recently used entries beyond a limit in bytes; return them."""
    removed, kept = [], 0
    for entry in entries(cache_dir):
        kept += entry.bytes
        if kept > limit:
            remove(entry.path)
            removed.append(entry)
    return removed


def remove(path: Path) -> None:
    """Remove an entry, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
