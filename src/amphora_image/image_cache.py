# SPDX-License-Identifier: Apache-2.0
"""Request and Plan -> the image files that the same build has made before.

The key is a digest of the whole plan, our own code and elements, the tools, the keys and what the
archives say right now. What cannot be known makes no key: elements of the user, which may do
anything, what a Git repository holds, or the salt of a password.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from amphora_image import agent_source, archives, cache
from amphora_image.manifest import sha256_of
from amphora_image.plan import Plan
from amphora_image.request import ImageType, Request
from amphora_image.rootfs_cache import sources_of
from amphora_image.run import run

#: Our own files: code, elements, locks.
PACKAGE = Path(__file__).parent

#: How the names of variables begin that may decide what an image holds, in elements or tools.
PREFIXES = ("AMPHORA_", "DIB_", "OCTAVIA_", "PIP_", "UV_")

#: Programs whose version may decide it. They are known by their files, which is quick.
TOOLS = ("mmdebstrap", "mkfs.ext4", "qemu-img", "sfdisk", "tar")

#: The file of an entry that tells what the others are.
RECORD = "record.json"


@dataclass(frozen=True)
class Made:
    """What was made.

    :ivar contents: as :func:`.manifest.collect` returns it.
    :ivar digests: SHA-256 of each image file.
    """

    contents: Mapping[str, Any]
    digests: Mapping[ImageType, str]


@dataclass(frozen=True)
class Key:
    """Where image files are kept that were made from archives of this state."""

    entry: Path
    state: list[str]


def key_of(request: Request, plan: Plan, environ: Mapping[str, str]) -> Key | None:
    """Return the key of a request's image files; None if that cannot be known.

    Asks the archives.
    """
    if not _can_be_known(request):
        return None
    system = f"{request.base_os}-{request.release}-{request.architecture}"
    given = plan.environment.get("AMPHORA_APT_SOURCES", "")
    sources = sources_of(request.cache_dir, system, given)
    state = archives.ask(sources, request.access.urlopen)
    if state is None:
        return None
    name = cache.digest(
        [str(kind) for kind in request.image_types],
        [str(request.size), request.qemu_img_options, request.vhd_subformat],
        plan.elements,
        plan.options,
        # The way to an archive is no part of what it holds.
        {name: value for name, value in plan.environment.items() if not _is_proxy(name)},
        {name: value for name, value in environ.items() if name.startswith(PREFIXES)},
        state,
        [sys.version, *(metadata.version(name) for name in ("diskimage-builder", "uv"))],
        *map(_identity, TOOLS),
        *plan.paths.get("AMPHORA_CA_FILE", ()),
        *plan.paths.get("DIB_APT_KEYRING", ()),
        *own_files(),
    )
    return Key(request.cache_dir / "images" / f"{system}-{name}", state)


def _is_proxy(name: str) -> bool:
    return name.lower().endswith("_proxy")


def _can_be_known(request: Request) -> bool:
    env = request.environment
    others = (
        *(env.elements, env.local_elements, env.local_elements_path, env.elements_repo),
        *(env.dib_repo, env.local_image, request.root_password, request.offline),
    )
    return (
        request.debian_family
        and not any(others)
        and not isinstance(request.agent, agent_source.FromGit)
    )


def _identity(program: str) -> list[object]:
    path = shutil.which(program)
    if not path:
        return []
    found = Path(path).resolve().stat()
    return [path, found.st_size, found.st_mtime_ns]


def own_files() -> Iterator[object]:
    """Yield name, mode and content of each of our files, in order."""
    for path in sorted(PACKAGE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            yield [str(path.relative_to(PACKAGE)), path.stat().st_mode]
            yield path


def take(key: Key, files: Mapping[ImageType, Path]) -> Made | None:
    """Copy kept files to where they are wanted; None if they are not there or not whole."""
    entry = key.entry
    if not cache.use(entry):
        return None
    try:
        record = json.loads((entry / RECORD).read_text())
        _copy({entry / kind: file for kind, file in files.items()})
    except (OSError, ValueError):
        return None
    digests = digests_of(files)
    if digests != record["digests"]:
        cache.remove(entry)
        return None
    return Made(record["contents"], digests)


def keep(key: Key, files: Mapping[ImageType, Path], made: Made) -> None:
    """Keep image files, if what they are made of came from archives of the key's state."""
    if archives.state(made.contents["archives"]) != key.state:
        return
    with cache.new_entry(key.entry) as part:
        part.mkdir()
        _copy({file: part / kind for kind, file in files.items()})
        record = {"contents": dict(made.contents), "digests": dict(made.digests)}
        (part / RECORD).write_text(json.dumps(record))


def digests_of(files: Mapping[ImageType, Path]) -> dict[ImageType, str]:
    """Return the SHA-256 of each file."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(sha256_of, files.values()), strict=True))


def _copy(files: Mapping[Path, Path]) -> None:
    for source, target in files.items():
        run(["cp", "--reflink=auto", "--sparse=always", source, target])
