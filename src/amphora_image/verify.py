# SPDX-License-Identifier: Apache-2.0
"""Build a request twice: whether both are the same bytes, and what differs."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from amphora_image import disk, reproducible
from amphora_image.build_all import Build, Line, SomeFailed, build_all
from amphora_image.errors import BadValue
from amphora_image.image_files import DISK_TYPES
from amphora_image.manifest import sha256_of
from amphora_image.request import ImageType, Request

#: What differs between the builds of different people, and must not matter: variables, and what a
#: shell does before it becomes the build.
VARIED = {"LANG": "tr_TR.UTF-8", "LC_ALL": "POSIX", "TZ": "Asia/Kathmandu", "USER": "somebody"}
ELSEWHERE = ("unshare", "--uts", "sh", "-c", 'umask 027 && hostname elsewhere && exec "$@"', "sh")

#: Rows of the table; the JSON has all.
ROWS = 40

#: Bytes of a disk that are read at once, and that are shown of what differs.
CHUNK, SHOWN = 2**20, 8


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in both builds.

    :ivar where: path in the tree, or image type and partition of a disk.
    :ivar what: of it, such as ``mode`` or ``content``.
    :ivar values: of the first and of the second.
    """

    where: str
    what: str
    values: tuple[str, str]


@dataclass(frozen=True)
class Compared:
    """What came out.

    :ivar epoch: the time of both builds.
    :ivar digests: of each image file: SHA-256 of the first and the second.
    """

    epoch: int
    digests: Mapping[ImageType, tuple[str, str]]
    differences: Sequence[Difference]

    @property
    def differing(self) -> list[ImageType]:
        """The image types whose files differ."""
        return [kind for kind, (first, second) in self.digests.items() if first != second]

    def as_json(self) -> dict[str, Any]:
        """Return a document: ``reproducible``, ``sha256`` by image type, ``differences``."""
        return {
            "source_date_epoch": self.epoch,
            "reproducible": not self.differing,
            "sha256": {kind: list(dict.fromkeys(both)) for kind, both in self.digests.items()},
            "differences": [vars(each) for each in self.differences],
        }

    def as_table(self) -> Table:
        """Return a table for a terminal."""
        title = f"{reproducible.VARIABLE}={self.epoch}"
        table = Table("where", "what", "first", "second", title=title)
        for kind, (first, second) in self.digests.items():
            told = "" if first == second else second
            table.add_row(kind, "differs" if told else "same", first, told)
        for each in self.differences[:ROWS]:
            # The values are of files, and may look like markup.
            table.add_row(*map(Text, (each.where, each.what, *each.values)))
        if (more := len(self.differences) - ROWS) > 0:
            table.add_row(f"and {more} more", "", "--json has all", "")
        return table


def verify(request: Request, options: Sequence[str], tell: Callable[[str, str], None]) -> Compared:
    """Build twice without a cache, the second time as somebody else elsewhere, and compare.

    :param options: of the build, of which the request was read.
    :param tell: is called with a build's name and a line of its progress.
    :raises BadValue: there is nothing to compare.
    :raises SomeFailed: a build failed.
    """
    for why, holds in {
        "-r makes another image each time: the hash has a random salt": request.root_password,
        "--dry-run builds nothing": "--dry-run" in options,
    }.items():
        if holds:
            raise BadValue(f"{why}; it is not allowed here", hint="leave it out")
    epoch = request.environment.source_date_epoch or int(time.time())
    # A tar shows best what of the tree differs.
    kinds = tuple(dict.fromkeys((*request.image_types, ImageType.TAR)))
    given = [*options, "--fresh", "-t", ",".join(kinds)]
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=request.output.parent) as scratch:

        def built(name: str, variables: Mapping[str, str], wrapper: Sequence[str]) -> list[Path]:
            place = Path(scratch, name)
            put = ["-o", str(place / request.output.name), "-w", str(place)]
            told = {**variables, reproducible.VARIABLE: str(epoch)}
            build = Build(name, Line(1, told, [*given, *put], wrapper), request)
            [(_, status, _, files)] = build_all([build], 1, tell)
            if status:
                raise SomeFailed({name: status})
            return [Path(file) for file in files]

        first, second = built("first", {}, ()), built("the second", VARIED, ELSEWHERE)
        pairs = dict(zip(kinds, zip(first, second, strict=True), strict=True))
        digests = {kind: (sha256_of(one), sha256_of(two)) for kind, (one, two) in pairs.items()}
        found = list(tree_differences(*pairs[ImageType.TAR]))
        for kind, (one, two) in pairs.items():
            if kind in DISK_TYPES and len(set(digests[kind])) > 1:
                found += disk_differences(kind, one, two)
    return Compared(epoch, digests, found)


def tree_differences(first: Path, second: Path) -> Iterator[Difference]:
    """Yield how two tars of a root file system differ, by path."""
    left, right = (dict(_members(path)) for path in (first, second))
    for name in sorted(left.keys() | right.keys()):
        if name not in left or name not in right:
            told = ("there", "missing")
            yield Difference(name, "path", told if name in left else told[::-1])
            continue
        for what, value in left[name].items():
            if value != right[name][what]:
                yield Difference(name, what, (value, right[name][what]))


def _members(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with tarfile.open(path) as archive:
        for member in archive:
            content = member.linkname
            if file := archive.extractfile(member) if member.isfile() else None:
                content = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            extended = {
                name: value
                for name, value in sorted(member.pax_headers.items())
                if name.startswith("SCHILY.xattr.")
            }
            yield (
                member.name,
                {
                    "type": member.type.decode(),
                    "mode": f"{member.mode:o}",
                    "owner": f"{member.uid}:{member.gid}",
                    "time": datetime.fromtimestamp(member.mtime, UTC).isoformat(),
                    "attributes": repr(extended),
                    "content": content,
                },
            )


def disk_differences(kind: ImageType, first: Path, second: Path) -> Iterator[Difference]:
    """Yield where each part of two disks begins to differ, or that the files alone do.

    :raises CheckFailed: one of them cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        raws = []
        for name, file in (("first", first), ("second", second)):
            place = Path(scratch, name)
            place.mkdir()
            raws.append(disk.unpack(file, kind, place))
        parts = disk.open_disk(raws[0], place).partitions
        extents = {f"partition {part.name}": (part.start, part.size) for part in parts}
        found = False
        for name, extent in {"partition table": (0, parts[0].start), **extents}.items():
            if difference := _first_bytes(raws, *extent):
                found = True
                yield Difference(f"{kind}: {name}", *difference)
        if not found:
            yield Difference(str(kind), "format", ("the same disk", "the same disk"))


def _first_bytes(raws: Sequence[Path], start: int, size: int) -> tuple[str, tuple[str, str]] | None:
    """Return the offset of the first byte that differs in a part, and both parts' bytes there."""
    with raws[0].open("rb") as one, raws[1].open("rb") as two:
        one.seek(start)
        two.seek(start)
        for offset in range(0, size, CHUNK):
            left, right = (file.read(min(CHUNK, size - offset)) for file in (one, two))
            if left != right:
                at = next(n for n, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
                told = (left[at : at + SHOWN].hex(" "), right[at : at + SHOWN].hex(" "))
                return f"byte {offset + at}", told
    return None
