# SPDX-License-Identifier: Apache-2.0
"""Content key -> the agent's environment: what the same requirements gave an image's Python once.

A lock names each package by its hash, so its environment is taken whenever lock, Python,
architecture, uv and our own code are the same. What Git and an index hold can change: an agent from
there is kept for builds that are offline. An environment is kept when all that an image starts was
imported from it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

from amphora_image import agent, agent_source, cache, netns_unit
from amphora_image.agent_locks.check_imports import COMMANDS
from amphora_image.errors import AmphoraImageError, BadValue

#: What decides the environment beside the source and the image's Python.
OWN_FILES = (
    *(Path(__file__), Path(agent.__file__), Path(agent_source.__file__)),
    *sorted(agent_source.LOCKS.glob("*.*")),
)


def entry_of(root: Path, environ: Mapping[str, str]) -> Path:
    """Return the path of the entry for an image's tree.

    :param environ: of diskimage-builder's phases: the source is in AMPHORA_AGENT_*.
    :raises AmphoraImageError: the tree has no Python.
    """
    source = {name: text for name, text in environ.items() if name.startswith("AMPHORA_AGENT_")}
    name = cache.digest(
        *(source, environ["ARCH"], agent.python_version(root), metadata.version("uv")),
        *OWN_FILES,
    )
    return Path(environ["DIB_IMAGE_CACHE"]) / "agent" / f"{environ['ARCH']}-{name}.tar.zst"


def is_kept(entry: Path, source: agent_source.AgentSource, environ: Mapping[str, str]) -> bool:
    """Tell whether a build may take an entry, and note that it was used."""
    fixed = isinstance(source, agent_source.Locked) or bool(environ.get("DIB_OFFLINE"))
    return fixed and not environ.get(cache.FRESH) and cache.use(entry)


def provide(root: Path, environ: Mapping[str, str]) -> None:
    """Give a tree its agent: from the cache, or by an installation.

    :raises AmphoraImageError: as :func:`agent.install`.
    """
    source = agent_source.source_from(environ)
    # Of the distribution's agent a file of ours; the packages are in the root file system.
    packaged = isinstance(source, agent_source.Packaged)
    if not packaged and is_kept(entry := entry_of(root, environ), source, environ):
        cache.unpack(entry, root)
    else:
        agent.install(root, source, architecture=environ["ARCH"], environ=environ)
    netns_unit.shorten(root)


def keep(root: Path, environ: Mapping[str, str]) -> None:
    """Keep the agent of a tree for other builds, with the byte code of what it has imported there.

    :raises AmphoraImageError: it cannot be read or written.
    """
    source = agent_source.source_from(environ)
    if isinstance(source, agent_source.Packaged):
        return
    entry = entry_of(root, environ)
    if not is_kept(entry, source, environ):
        links = [f"usr/bin/{name}" for name in COMMANDS if (root / "usr/bin" / name).is_symlink()]
        with cache.new_entry(entry) as part:
            cache.pack(root, part, [agent.HOME.lstrip("/"), *links])
    cache.note(entry, environ)


#: What ``python -m amphora_image.agent_cache`` does, for the element's scripts.
STEPS: Mapping[str, Callable[[Path, Mapping[str, str]], None]] = {"provide": provide, "keep": keep}


def main(argv: list[str]) -> int:
    """``python -m amphora_image.agent_cache STEP ROOT``; STEP is one of :data:`STEPS`.

    The source is in AMPHORA_AGENT_*, the architecture in diskimage-builder's ARCH.
    """
    if len(argv) != 2 or argv[0] not in STEPS:
        usage = f"python -m amphora_image.agent_cache {{{','.join(STEPS)}}} ROOT"
        print(f"usage: {usage}", file=sys.stderr)
        return BadValue.exit_code
    os.umask(0o022)  # keepalived may run its checks as a user other than root
    step, root = argv
    try:
        STEPS[step](Path(root), os.environ)
    except AmphoraImageError as error:
        hint = f"\nhint: {error.hint}" if error.hint else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
