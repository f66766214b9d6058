# SPDX-License-Identifier: Apache-2.0
"""What apt archives say of themselves: their signed InRelease files, asked for or kept by apt.

Digests of these files tell whether an archive is as it was (Debian repository format). What is
asked for is not trusted: it only chooses among things that were made from verified files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.request import urlopen

#: Seconds for a mirror to answer.
PATIENCE = 30

#: As :func:`urllib.request.urlopen`.
Opener = Callable[..., HTTPResponse]

#: Where apt of a root file system keeps the files that it has verified.
LISTS = "var/lib/apt/lists"

#: A line of sources.list(5): options in brackets may stand before the URL.
_SOURCE = re.compile(r"deb +(?:\[[^]]*\] +)?(?P<url>\S+) +(?P<suite>\S+)")


def release_urls(sources: str) -> list[str]:
    """Return the URL of each InRelease file that lines of sources.list(5) lead to."""
    found = (_SOURCE.match(line) for line in sources.splitlines())
    return [f"{row['url'].rstrip('/')}/dists/{row['suite']}/InRelease" for row in found if row]


def ask(sources: str, open_url: Opener = urlopen) -> list[str] | None:
    """Ask archives for their state: the SHA-256 of each InRelease file, sorted.

    :param sources: lines of sources.list(5).
    :param open_url: opens a URL, with a ``timeout`` in seconds.
    :returns: None if there is no archive, or one does not tell.
    """
    urls = release_urls(sources)
    if not urls:
        return None
    try:
        with ThreadPoolExecutor(len(urls)) as pool:
            return sorted(pool.map(lambda url: _digest_at(url, open_url), urls))
    except (HTTPException, OSError, ValueError):
        return None


def _digest_at(url: str, open_url: Opener) -> str:
    with open_url(url, timeout=PATIENCE) as answer:
        return hashlib.sha256(answer.read()).hexdigest()


def recorded(root: Path) -> list[dict[str, str]]:
    """Return what apt of a root file system has verified last, a row an archive.

    :returns: ``suite``, ``codename``, ``origin``, ``date`` and ``sha256`` of each Release file.
    """
    return rows(sorted((root / LISTS).glob("*Release")))


def rows(release_files: Iterable[Path]) -> list[dict[str, str]]:
    """Return a row of :func:`recorded` for each Release file."""
    found = []
    for path in release_files:
        content = path.read_bytes()
        fields = dict(
            line.split(": ", 1)
            for line in content.decode(errors="replace").splitlines()
            if ": " in line and not line.startswith(" ")
        )
        row = {key: fields.get(key.title(), "") for key in ("suite", "codename", "origin", "date")}
        found.append({**row, "sha256": hashlib.sha256(content).hexdigest()})
    return found


def state(recorded_rows: Iterable[dict[str, str]]) -> list[str]:
    """Return the state that rows tell, as :func:`ask` returns it."""
    return sorted(row["sha256"] for row in recorded_rows)


def own_sources(root: Path) -> str:
    """Return the sources of a root file system's own apt, as lines of sources.list(5)."""
    apt = root / "etc/apt"
    files = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]
    return "".join(file.read_text() for file in files if file.exists())
