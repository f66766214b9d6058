# SPDX-License-Identifier: Apache-2.0
"""Our own builds, by ``diskimage-create.sh`` of a copy of this checkout, which may be edited."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amphora_image import agent_source
from bench.measure import Run, Span, command, phases

CHECKOUT = Path(__file__).parents[1]
#: What of a checkout is not copied.
LEFT_OUT = (".git", ".venv", ".tox", ".*_cache", "__pycache__", "results", "*.qcow2")

#: What a build that has no terminal says at the end of each phase.
_PHASE = re.compile(r" *(\d+\.\d) s  (\S.*)")

#: Five images of two bases, options varied.
FIVE = (
    ("-d", "trixie"),
    ("-d", "trixie", "-n"),
    ("-d", "trixie", "-s", "2", "-t", "qcow2,raw"),
    ("-d", "bookworm"),
    ("-d", "bookworm", "-e"),
)


def copy_checkout(target: Path) -> None:
    """Copy the checkout and let it install what it needs, so that no build has to."""
    if not target.exists():
        part = target.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(CHECKOUT, part, ignore=shutil.ignore_patterns(*LEFT_OUT))
        part.rename(target)
    subprocess.run([target / "diskimage-create.sh", "--version"], check=True, capture_output=True)


def build(
    checkout: Path,
    image: Path,
    cache: Path,
    log: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Build a Debian image and measure it.

    :param image: a path that ends in ``.qcow2``.
    :param environment: variables beside this process's own.
    :returns: what it cost, with the manifest's seconds as phases.
    :raises Failed: the build failed.
    """
    places: list[str | Path] = ["-o", image, "-c", cache]
    argv = [checkout / "diskimage-create.sh", "-i", "debian", *places, *options]
    run = command(argv, log, cwd=image.parent, env={**os.environ, **(environment or {})})
    manifest = json.loads(Path(f"{image}.json").read_text())
    found = phases(steps(run), run.samples)
    told = {
        name: {"bound": "", **found.get(name, {}), "seconds": seconds}
        for name, seconds in manifest["seconds"].items()
    }
    return cost(run) | {"phases": told, "packages": len(manifest["packages"])}


def build_all(
    checkout: Path, directory: Path, cache: Path, log: Path, images: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Build several images by one command and measure it.

    :raises Failed: a build failed.
    """
    lines = [
        " ".join(["-i debian", *options, f"-c {cache}", f"-o {directory}/image-{number}"])
        for number, options in enumerate(images)
    ]
    listing = log.with_suffix(".images")
    listing.parent.mkdir(parents=True, exist_ok=True)
    listing.write_text("".join(f"{line}\n" for line in lines))
    run = command([verb(checkout), "build-all", listing], log, cwd=directory)
    return cost(run) | {"phases": {}}


def builds_several(checkout: Path) -> bool:
    """Whether the verb ``build-all`` is there."""
    done = subprocess.run([verb(checkout), "build-all", "--help"], capture_output=True)
    return done.returncode == 0


def verb(checkout: Path) -> Path:
    """Return the command ``amphora-image`` of a checkout."""
    return checkout / ".venv/bin/amphora-image"


def cost(run: Run) -> dict[str, Any]:
    """Return what a run cost as JSON values, seconds."""
    return {"seconds": round(run.seconds, 2), "cpu_seconds": round(run.cpu_seconds, 2)}


def steps(run: Run) -> list[Span]:
    """Return the phases by when the build told that they had ended."""
    told = ((at, _PHASE.fullmatch(line)) for at, line in run.lines)
    return [Span(found[2], at - float(found[1]), at) for at, found in told if found]


@contextmanager
def late_element_changed(checkout: Path) -> Iterator[None]:
    """Let the last element of all, ``amphora-trim``, be another while the block runs."""
    scripts = sorted((checkout / "src/amphora_image/elements/amphora-trim").glob("*.d/*"))
    with _edited(scripts[-1], scripts[-1].read_text() + "# Changed.\n"):
        yield


@contextmanager
def agent_changed(checkout: Path) -> Iterator[None]:
    """Let the newest series' lock pin the agent of the series before while the block runs."""
    newest, before = list(agent_source.SERIES)[:2]
    locks = checkout / "src/amphora_image/agent_locks"
    with _edited(locks / f"{newest}.txt", (locks / f"{before}.txt").read_text()):
        yield


@contextmanager
def _edited(path: Path, text: str) -> Iterator[None]:
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)
