# SPDX-License-Identifier: Apache-2.0
"""Build a request twice: whether both are the same bytes, and what differs."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from amphora_image.manifest import sha256_of
from amphora_image.reproducible import differences
from amphora_image.request import ImageType, Request

#: What differs between the builds of different people, and must not matter.
VARIED = {"TZ": "Asia/Kathmandu", "LANG": "tr_TR.UTF-8", "USER": "somebody"}
UMASK = 0o027

#: Rows of the table; the JSON has all.
ROWS = 40


@dataclass(frozen=True)
class Compared:
    """What came out.

    :ivar digests: suffix of each image file -> SHA-256 of the first and the second.
    :ivar rows: path in the tree and what of it differs.
    """

    digests: dict[str, tuple[str, str]]
    rows: Sequence[tuple[str, str]]

    @property
    def differing(self) -> list[str]:
        """The image types whose files differ."""
        return [kind for kind, (first, second) in self.digests.items() if first != second]

    def as_json(self) -> dict[str, Any]:
        """Return a document: ``reproducible``, ``sha256`` by image type, ``differences``."""
        return {
            "reproducible": not self.differing,
            "sha256": {kind: list(dict.fromkeys(both)) for kind, both in self.digests.items()},
            "differences": [{"path": path, "what": what} for path, what in self.rows],
        }

    def as_table(self, title: str) -> Table:
        """Return a table for a terminal."""
        table = Table("what", "same", "", title=title)
        for kind, (first, second) in self.digests.items():
            same = first == second
            table.add_row(kind, "yes" if same else "no", first if same else f"{first}\n{second}")
        for path, what in self.rows[:ROWS]:
            table.add_row(path, "no", what)
        if len(self.rows) > ROWS:
            table.add_row(f"and {len(self.rows) - ROWS} more", "no", "--json has all")
        return table


def verify(request: Request, build: Callable[[Request], Sequence[Path]]) -> Compared:
    """Build twice without a cache, in another place and with other settings, and compare.

    :param build: as :func:`.build.build`, with a plan of the request.
    :raises AmphoraImageError: a build failed.
    """
    # A tar shows best what of the tree differs.
    kinds = tuple(dict.fromkeys((*request.image_types, ImageType.TAR)))
    fresh = dataclasses.replace(request, image_types=kinds, fresh=True)
    request.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".verify-", dir=request.output.parent) as scratch:
        first = _built(fresh, Path(scratch, "first"), build)
        with _varied():
            second = _built(fresh, Path(scratch, "the second one"), build)
        digests = {str(kind): (sha256_of(first[kind]), sha256_of(second[kind])) for kind in kinds}
        rows = list(differences(first[ImageType.TAR], second[ImageType.TAR]))
    return Compared(digests, rows)


def _built(
    request: Request, directory: Path, build: Callable[[Request], Sequence[Path]]
) -> dict[ImageType, Path]:
    directory.mkdir()
    moved = dataclasses.replace(request, output=directory / request.output.name)
    build(moved)
    return moved.outputs


@contextmanager
def _varied() -> Iterator[None]:
    """Be somebody else."""
    before = {name: os.environ.get(name) for name in VARIED}
    umask = os.umask(UMASK)
    os.environ.update(VARIED)
    time.tzset()
    try:
        yield
    finally:
        os.umask(umask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        time.tzset()
