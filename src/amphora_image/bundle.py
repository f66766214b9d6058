# SPDX-License-Identifier: Apache-2.0
"""A bundle: what one build takes from the network, as a file, for a build where there is none.

It is the cache of one request: a tar file (POSIX.1-1988, uncompressed) whose first member is an
index in JSON, followed by the cache's entries that the request used and the keys of its archive.
Nobody signs a bundle: who makes the image of it trusts whoever made it, and the way it came.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from amphora_image import agent_source, build, cache
from amphora_image.errors import BadValue
from amphora_image.host import Host, Mirrors
from amphora_image.manifest import sha256_of
from amphora_image.plan import Plan, make_plan
from amphora_image.request import BaseOS, Request
from amphora_image.run import run
from amphora_image.workspace import workspace

SCHEMA = "amphora-image-bundle-1"
INDEX = "index.json"
KEYRING = "keyring.gpg"

#: Bytes that an index may have.
INDEX_LIMIT = 2**20

#: Names that members may have: nothing leads out of a directory.
_NAME = re.compile(rf"({'|'.join(cache.TREES)})/\w[\w.-]*|{re.escape(KEYRING)}", re.ASCII)

AGAIN = "copy the bundle again, or make it anew: amphora-image fetch"


def fetch(request: Request, here: Host, target: Path, console: Console) -> Path:
    """Make the bundle of a request; an older file stays until the new one is whole.

    :raises BadValue: a base OS whose downloads are not kept.
    :raises AmphoraImageError: as :func:`build.fetch`.
    """
    if not request.debian_family or request.bundle:
        raise BadValue(
            "a bundle is made of Debian's or Ubuntu's archive, not of "
            + ("another bundle" if request.bundle else str(request.base_os))
        )
    plan = make_plan(request, here)
    entries = build.fetch(request, plan, console)
    with cache.locked(request.cache_dir):  # nobody prunes what is copied
        files = {name: request.cache_dir / name for name in entries}
        (files[KEYRING],) = plan.paths["DIB_APT_KEYRING"]
        index = {
            "schema": SCHEMA,
            "asked": asked(request, plan),
            "mirrors": vars(here.mirrors) if here.mirrors else None,
            "base_os": here.base_os,
            "members": {
                name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                for name, file in files.items()
            },
        }
        return write(target, index, files)


def asked(request: Request, plan: Plan) -> dict[str, Any]:
    """Return what decides the content of a bundle, as JSON values by their names for the user."""
    return {
        "base OS (-i)": str(request.base_os),
        "release (-d)": request.release,
        "architecture (-a)": str(request.architecture),
        "kernel (-k)": plan.environment["AMPHORA_KERNEL_PACKAGE"],
        "agent (-g, -p)": agent_source.environment(request.agent),
        "apt sources (--mirror)": plan.environment["AMPHORA_APT_SOURCES"].splitlines(),
        "elements": list(plan.elements),
        "SOURCE_DATE_EPOCH": request.environment.source_date_epoch,
        "nftables": request.environment.nftables,
        "amphora-image": metadata.version("amphora-image"),
        "uv": metadata.version("uv"),
        "mmdebstrap": run(["mmdebstrap", "--version"], hint="apt-get install mmdebstrap").strip(),
    }


def write(target: Path, index: Mapping[str, Any], files: Mapping[str, Path]) -> Path:
    """Write a bundle under its name once it is whole; return the path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with workspace() as space:
        part = target.with_name(f".{space.root.name}.bundle.part")
        space.owns(part)
        with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
            text = json.dumps(index, indent=2, sort_keys=True).encode()
            _add(tar, INDEX, io.BytesIO(text), len(text))
            for name, file in files.items():
                with file.open("rb") as content:
                    _add(tar, name, content, file.stat().st_size)
        build.give_to_caller(part)
        return part.replace(target)


def _add(tar: tarfile.TarFile, name: str, content: IO[bytes], size: int) -> None:
    member = tarfile.TarInfo(name)  # no time, owner or name of this host
    member.size = size
    tar.addfile(member, content)


def unpack(bundle: Path, directory: Path) -> dict[str, Any]:
    """Write a bundle's members to a directory, each verified; return the index.

    Files are made by their names in the index, never by what the tar file says of them: there are
    no links, modes, owners or paths to be careful with.

    :raises BadValue: it is no bundle, or not as it was made.
    """
    with _whole(bundle), tarfile.open(bundle, "r:") as tar:
        index = _index(tar)
        expected = dict(index["members"])
        for member in tar:
            if member.offset == 0:  # the index
                continue
            row = expected.pop(member.name, None)
            content = tar.extractfile(member) if member.isreg() else None
            if not row or not content or not _NAME.fullmatch(member.name):
                raise ValueError(f"{member.name!r} has no place in it")
            if _copy(content, directory / member.name) != row["sha256"]:
                raise ValueError(f"{member.name} is not what its index names")
        if expected:
            raise ValueError(f"it lacks {', '.join(expected)}")
        return index


@contextmanager
def _whole(bundle: Path) -> Iterator[None]:
    """Tell the user of whatever in a bundle cannot be read."""
    try:
        yield
    except (EOFError, ValueError, LookupError, TypeError, tarfile.TarError) as error:
        raise BadValue(f"--bundle is {str(bundle)!r}, which is damaged: {error}", AGAIN) from error


def _index(tar: tarfile.TarFile) -> dict[str, Any]:
    first = tar.next()
    content = first and first.isreg() and first.name == INDEX and tar.extractfile(first)
    index = json.loads(content.read(INDEX_LIMIT)) if content else {}
    if not isinstance(index, dict) or index.get("schema") != SCHEMA:
        raise ValueError(f"it is no bundle of schema {SCHEMA}")
    return index


def _copy(content: IO[bytes], target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        shutil.copyfileobj(content, file)
    return sha256_of(target)


@contextmanager
def opened(request: Request, here: Host) -> Iterator[tuple[Request, Host]]:
    """Yield a request and its host as a bundle has them: its cache, mirrors and keys.

    :raises BadValue: the bundle is damaged, or was made for other options.
    """
    if not request.bundle:
        yield request, here
        return
    request.cache_dir.mkdir(parents=True, exist_ok=True)
    with workspace() as space:
        private = Path(tempfile.mkdtemp(prefix=".bundle-", dir=request.cache_dir))
        space.owns(private)
        index = unpack(request.bundle, private)
        keys = replace(request.environment, keyring=private / KEYRING)
        inside = replace(request, cache_dir=private, environment=keys)
        with _whole(request.bundle):
            mirrors = Mirrors(**index["mirrors"]) if index["mirrors"] else None
            there = Host(BaseOS(index["base_os"]) if index["base_os"] else None, mirrors)
            held = dict(index["asked"])
        require_same(held, asked(inside, make_plan(inside, there)))
        yield replace(inside, log_file=request.log_file or build.default_log(request)), there


def require_same(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a bundle that was made for something else.

    :param held: what the bundle was asked for, as :func:`asked` returns it.
    :raises BadValue: something differs; all that does is told.
    """
    differing = [
        f"{name}: the bundle has {_shown(held.get(name), wanted.get(name))}, "
        f"asked for is {_shown(wanted.get(name), held.get(name))}"
        for name in sorted({*held, *wanted})
        if held.get(name) != wanted.get(name)
    ]
    if differing:
        raise BadValue(
            "the bundle was made for something else: " + "; ".join(differing),
            hint="give the options of amphora-image fetch, or fetch with these",
        )


def _shown(value: Any, other: Any) -> str:
    """Return a value for the user; of lists and documents what the other lacks."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = [f"{key}={text}" for key, text in value.items()]
        other = [f"{key}={text}" for key, text in other.items()]
    if isinstance(value, list) and isinstance(other, list):
        return ", ".join(str(item) for item in value if item not in other) or "no more"
    return str(value)
