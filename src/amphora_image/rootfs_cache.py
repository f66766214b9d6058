# SPDX-License-Identifier: Apache-2.0
"""Content key -> root file system: what a base element made once from the same inputs.

The key is a digest of all that goes into the tree: base OS, release, architecture, packages, apt
sources and what the archives' signed InRelease files say right now, the archive's keys, the
element's script and the tools' versions. Offline, the archives are not asked, and the newest entry
for the other inputs is taken. A wrong hit is worse than a miss: what cannot be known makes no key.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from amphora_image.errors import AmphoraImageError
from amphora_image.run import run

#: Seconds for a mirror to answer.
PATIENCE = 30

#: Bytes that all entries together may have; the least recently used go first.
LIMIT = 4 * 1024**3

#: Variables that decide what the tree holds.
VARIABLES = (
    *("ARCH", "DISTRO_NAME", "DIB_RELEASE"),
    *("AMPHORA_APT_COMPONENTS", "AMPHORA_APT_SOURCES", "AMPHORA_KERNEL_PACKAGE"),
)


@dataclass(frozen=True)
class Key:
    """Where a root file system is found.

    :ivar inputs: digest of all inputs that this host knows.
    :ivar archives: digest of the archives' state; empty offline.
    """

    inputs: str
    archives: str

    @property
    def name(self) -> str:
        """The entry's file name."""
        return f"{self.inputs}-{self.archives}.tar.zst"


def digest(*parts: bytes) -> str:
    """Return 32 hexadecimal digits for a sequence of byte strings."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()[:32]


def release_urls(sources: str) -> list[str]:
    """Return the URL of each InRelease file that lines of sources.list(5) lead to."""
    lines = (line.split() for line in sources.splitlines() if line.startswith("deb "))
    return [f"{url.rstrip('/')}/dists/{suite}/InRelease" for _, url, suite, *_ in lines]


def inputs_digest(
    environ: Mapping[str, str], packages: Sequence[str], versions: str, files: Sequence[Path]
) -> str:
    """Return the digest of the inputs that this host knows.

    :param environ: variables; those of :data:`VARIABLES` count.
    :param packages: names of the distribution's packages.
    :param versions: of the tools that make the tree.
    :param files: whose content counts: scripts, keys.
    """
    settings = json.dumps([[name, environ.get(name, "")] for name in VARIABLES])
    return digest(
        settings.encode(),
        "\n".join(sorted(packages)).encode(),
        versions.encode(),
        *(path.read_bytes() for path in files),
    )


def archives_digest(sources: str) -> str | None:
    """Ask the archives for their signed state; None if one does not tell.

    What they say is not trusted: it only chooses among trees that were made from verified files.
    """
    said = []
    for url in release_urls(sources):
        try:
            with urlopen(url, timeout=PATIENCE) as answer:  # noqa: S310  # the user's own mirror
                said.append(answer.read())
        except (URLError, OSError, ValueError):
            return None
    return digest(*said) if said else None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the cache's lock, against other builds that take or remove entries."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def find(directory: Path, key: Key) -> Path | None:
    """Return the entry of a key, or the newest of its inputs if the key has no archives."""
    if key.archives:
        entry = directory / key.name
        return entry if entry.exists() else None
    entries = sorted(directory.glob(f"{key.inputs}-*.tar.zst"), key=lambda e: e.stat().st_mtime)
    return entries[-1] if entries else None


def restore(directory: Path, key: Key, root: Path) -> bool:
    """Unpack the entry of a key into an empty directory; say whether there was one.

    :raises AmphoraImageError: an entry does not unpack; it is removed.
    """
    with locked(directory):
        entry = find(directory, key)
        if not entry:
            return False
        os.utime(entry)
    try:
        # zstd verifies the entry's checksum, tar its structure.
        _pipe(
            ["zstd", "--decompress", "--stdout", "--quiet", str(entry)],
            ["tar", "--extract", *_TAR, "--preserve-permissions", "--directory", str(root)],
        )
    except AmphoraImageError:
        entry.unlink(missing_ok=True)
        raise
    return True


def store(directory: Path, key: Key, root: Path, limit: int = LIMIT) -> None:
    """Keep a root file system, and remove the least recently used beyond the limit (bytes)."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".part", dir=directory)
    os.close(descriptor)
    part = Path(name)
    try:
        _pipe(
            ["tar", "--create", *_TAR, "--directory", str(root), "."],
            ["zstd", "-1", "--threads=0", "--check", "--quiet", "--force", "-o", str(part)],
        )
        with locked(directory):
            part.replace(directory / key.name)
            prune(directory, limit)
    finally:
        part.unlink(missing_ok=True)


def prune(directory: Path, limit: int) -> list[Path]:
    """Remove the least recently used entries beyond a limit in bytes; return them."""
    removed = []
    entries = sorted(
        directory.glob("*.tar.zst"), key=lambda entry: entry.stat().st_mtime, reverse=True
    )
    kept = 0
    for entry in entries:
        kept += entry.stat().st_size
        if kept > limit:
            entry.unlink()
            removed.append(entry)
    return removed


_TAR = ("--numeric-owner", "--xattrs", "--xattrs-include=*")


def _pipe(first: list[str], second: list[str]) -> None:
    with subprocess.Popen(first, stdout=subprocess.PIPE) as source:
        sink = subprocess.run(second, stdin=source.stdout, check=False)
    if source.returncode or sink.returncode:
        command = f"{' '.join(first)} | {' '.join(second)}"
        raise AmphoraImageError(f"{command} ended with {source.returncode}, {sink.returncode}")


def _key(packages: Sequence[str], files: Sequence[Path]) -> Key | None:
    env = os.environ
    keyring = [Path(env["DIB_APT_KEYRING"])] if env.get("DIB_APT_KEYRING") else []
    versions = run(["mmdebstrap", "--version"])
    inputs = inputs_digest(env, packages, versions, [*files, *keyring])
    if env.get("DIB_OFFLINE"):
        return Key(inputs, "")
    archives = archives_digest(env.get("AMPHORA_APT_SOURCES", ""))
    return Key(inputs, archives) if archives else None


def main() -> int:
    """``restore`` or ``store`` a root file system for the element ``amphora-base``.

    Standard input holds the packages, one a line. ``restore`` prints the key that ``store``
    needs, and returns 3 if the tree has to be made.
    """
    parser = argparse.ArgumentParser(prog="python -m amphora_image.rootfs_cache")
    parser.add_argument("action", choices=("restore", "store"))
    parser.add_argument("root", type=Path)
    parser.add_argument("files", type=Path, nargs="+", help="whose content decides the tree")
    parser.add_argument("--key", help="the key that restore printed")
    args = parser.parse_args()
    directory = Path(os.environ["DIB_IMAGE_CACHE"], "rootfs")
    try:
        key = _key(sys.stdin.read().split(), args.files)
        if args.action == "store":
            # An archive that changed while the tree was made leaves a tree of no known state.
            if key and key.name == args.key:
                store(directory, key, args.root)
            return 0
        print(key.name if key else "none")
        if key and restore(directory, key, args.root):
            return 0
        if key and not key.archives:
            raise AmphoraImageError(
                "offline, and no root file system is cached for these inputs",
                hint="run the same command once without --offline",
            )
    except AmphoraImageError as error:
        print(f"root file system cache: {error}", file=sys.stderr)
        return 1
    return 3


if __name__ == "__main__":
    sys.exit(main())
