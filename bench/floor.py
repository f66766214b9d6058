# SPDX-License-Identifier: Apache-2.0
"""The floor: the same packages by the fewest and fastest steps, be the image of use or not."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from uv import find_uv_bin

from amphora_image import agent_source, sandbox
from amphora_image.workspace import workspace
from bench.measure import Run, Span, measure, spans

RELEASE = "trixie"
#: The Python of the release, which uv has to know.
PYTHON = "3.13"

#: A line of the floor's own that begins a step.
MARK = "== "


def begins(line: str) -> str | None:
    """Return the step that a line begins."""
    return line.removeprefix(MARK) if line.startswith(MARK) else None


def steps(run: Run) -> list[Span]:
    """Divide a build into its steps."""
    return spans(run, begins)


def steps_of(
    output: Path, packages: Sequence[str], sources: Sequence[str], size: int, work: Path
) -> list[tuple[str, list[str]]]:
    """Return the steps: name, argv."""
    tree, raw = work / "tree", work / "image.raw"
    site = tree / f"opt/amphora-agent/lib/python{PYTHON}/site-packages"
    bootstrap = [
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet"),
        *("--aptopt=APT::Install-Recommends false", '--aptopt=Acquire::Languages "none"'),
        *("--dpkgopt=force-unsafe-io", f"--include={','.join(packages)}"),
        *(RELEASE, str(tree), *sources),
    ]
    install = [
        *(find_uv_bin(), "--quiet", "pip", "install", "--no-deps", "--require-hashes"),
        *("--python", sys.executable, "--python-version", PYTHON),
        *("--python-platform", agent_source.PLATFORMS["amd64"], "--target", str(site)),
        *("--requirement", str(agent_source.lock_of(agent_source.series_for(PYTHON)))),
    ]
    convert = ["qemu-img", "convert", "-O", "qcow2", "-c", "-m", "4", "-W"]
    return [
        ("mmdebstrap, one transaction", bootstrap),
        ("agent: uv", install),
        ("disk: mkfs.ext4 -d", ["mkfs.ext4", "-q", "-d", str(tree), str(raw), f"{size}G"]),
        ("qemu-img, zstd", [*convert, "-o", "compression_type=zstd", str(raw), str(output)]),
    ]


def build(
    output: Path, log: Path, *, packages: Sequence[str], sources: Sequence[str], size: int
) -> Run:
    """Build the image with empty caches, in memory, and measure it.

    :param packages: names of Debian packages.
    :param sources: lines of sources.list(5), or none for mmdebstrap's own.
    :param size: of the disk, GiB.
    :raises Failed: a step failed.
    """
    with workspace() as space:
        space.work_in(None)
        # INITRD: the kernel's package makes no initramfs, as in ours.
        settings = {"UV_CACHE_DIR": str(space.root / "cache"), "UV_LINK_MODE": "copy"}
        env = {**os.environ, **settings, "UV_SYSTEM_CERTS": "1", "INITRD": "No"}
        jobs = [sandbox.Command(["mkdir", str(space.work)], env, str(space.root))]
        for name, argv in steps_of(output, packages, sources, size, space.work):
            jobs.append(sandbox.Command(["echo", f"{MARK}{name}"], env, str(space.work)))
            jobs.append(sandbox.Command(argv, env, str(space.work)))
        return measure(sandbox.start(space.mounts, jobs), log)
