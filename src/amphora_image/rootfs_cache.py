# SPDX-License-Identifier: Apache-2.0
"""Content key -> root file system: what a base element made once from the same inputs.

The key is a digest of all that goes into the tree: base OS, release, architecture, packages, apt
sources and what the archives' signed InRelease files say right now, the archive's keys, the
element's scripts and the tools' versions. Offline, the archives are not asked, and the newest entry
for the other inputs is taken. A wrong hit is worse than a miss: what cannot be known makes no key.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from amphora_image import archives
from amphora_image.cache import FRESH, digest, locked, new_entry, note, pack, unpack, use
from amphora_image.errors import AmphoraImageError
from amphora_image.run import run

#: Variables that decide what the tree holds.
VARIABLES = (
    *("ARCH", "DISTRO_NAME", "DIB_RELEASE"),
    *("AMPHORA_APT_COMPONENTS", "AMPHORA_APT_SOURCES", "AMPHORA_KERNEL_PACKAGE"),
    "SOURCE_DATE_EPOCH",
)


@dataclass(frozen=True)
class Inputs:
    """What decides a root file system, but for the state of the archives.

    :ivar directory: the cache directory.
    :ivar system: ``debian-trixie-amd64``.
    :ivar digest: of all inputs that this host knows.
    :ivar sources: lines of sources.list(5); empty where the tool's own are used.
    """

    directory: Path
    system: str
    digest: str
    sources: str

    def entry(self, state: Sequence[str]) -> Path:
        """Return the path of the entry for a state of the archives."""
        return self.directory / "rootfs" / f"{self.system}-{self.digest}-{digest(state)}.tar.zst"

    def newest(self) -> Path | None:
        """Return the entry that was used last, whatever the archives' state was."""
        found = (self.directory / "rootfs").glob(f"{self.system}-{self.digest}-*.tar.zst")
        return max(found, key=lambda entry: entry.stat().st_mtime, default=None)


def inputs_of(
    environ: Mapping[str, str], packages: Sequence[str], versions: str, files: Sequence[Path]
) -> Inputs:
    """Return the inputs that this host knows.

    :param environ: variables; those of :data:`VARIABLES` count.
    :param packages: names of the distribution's packages.
    :param versions: of the tools that make the tree.
    :param files: whose content counts: scripts, keys.
    """
    settings = {name: environ.get(name, "") for name in VARIABLES}
    return Inputs(
        directory=Path(environ["DIB_IMAGE_CACHE"]),
        system="-".join(settings[name] for name in ("DISTRO_NAME", "DIB_RELEASE", "ARCH")),
        digest=digest(settings, sorted(packages), versions, *files),
        sources=settings["AMPHORA_APT_SOURCES"],
    )


def sources_of(cache_dir: Path, system: str, sources: str) -> str:
    """Return sources, or those that the tool chose by itself when it made such a system last."""
    remembered = cache_dir / "sources" / system
    return sources or (remembered.read_text() if remembered.exists() else "")


def find(inputs: Inputs, *, offline: bool) -> Path | None:
    """Return where the entry is or would be; None if that cannot be known."""
    if offline:
        return inputs.newest()
    state = archives.ask(sources_of(inputs.directory, inputs.system, inputs.sources))
    return inputs.entry(state) if state else None


def store(inputs: Inputs, root: Path) -> Path | None:
    """Keep a root file system, by the state of the archives that its own apt has verified.

    :returns: the entry; None if there is no state.
    """
    state = archives.state(archives.recorded(root))
    if not state:
        return None
    if not inputs.sources:
        remembered = inputs.directory / "sources" / inputs.system
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(archives.own_sources(root))
    entry = inputs.entry(state)
    with new_entry(entry) as part:
        pack(root, part)
    return entry


def provide(
    inputs: Inputs, root: Path, make: Sequence[str], *, offline: bool, fresh: bool
) -> Path | None:
    """Fill an empty directory from the cache, or by a program whose tree is kept then.

    Of several builds that want the same tree at once one makes it, and the others wait for it.

    :returns: the entry; None if the tree cannot be kept.
    :raises AmphoraImageError: it is not cached and cannot be made.
    """

    def restored() -> Path | None:
        entry = None if fresh else find(inputs, offline=offline)
        if not entry or not use(entry):
            return None
        unpack(entry, root)
        return entry

    if entry := restored():
        return entry
    if offline:
        raise AmphoraImageError(
            "offline, and no root file system is cached for these inputs",
            hint="run the same command once without --offline",
        )
    with locked(inputs.directory / "rootfs", inputs.digest):
        if entry := restored():
            return entry
        made = subprocess.run(make, check=False)
        if made.returncode:
            raise AmphoraImageError(f"{make[0]} ended with {made.returncode}")
        return store(inputs, root)


def main() -> int:
    """Fill the root file system's directory for the element ``amphora-base``.

    The element's variables count; standard input holds the packages, one a line.
    """
    parser = argparse.ArgumentParser(prog="python -m amphora_image.rootfs_cache")
    parser.add_argument("root", type=Path)
    parser.add_argument("--file", type=Path, action="append", help="whose content decides the tree")
    parser.add_argument("make", nargs="+", help="the command that makes the tree")
    args = parser.parse_args()
    env = os.environ
    keyring = [Path(env["DIB_APT_KEYRING"])] if env.get("DIB_APT_KEYRING") else []
    versions = run(["mmdebstrap", "--version"])
    inputs = inputs_of(env, sys.stdin.read().split(), versions, [*args.file, *keyring])
    try:
        entry = provide(
            inputs,
            args.root,
            args.make,
            offline=bool(env.get("DIB_OFFLINE")),
            fresh=bool(env.get(FRESH)),
        )
    except AmphoraImageError as error:
        print(f"root file system: {error}", file=sys.stderr)
        return 1
    if entry:
        note(entry, env)
    return 0


if __name__ == "__main__":
    sys.exit(main())
