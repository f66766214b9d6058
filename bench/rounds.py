# SPDX-License-Identifier: Apache-2.0
"""What is measured, part by part; each result is a file, and what is there is not done again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import established, floor, ours, sizes
from bench.measure import ENDS_WITH_US, Failed, phases, write_whole

#: GiB of the disks that are compared.
SIZE = 5
#: Seconds for a boot proof: what comes after the first balanced request is not compared.
BOOT_TIME = 600
ELEMENTS = "src/amphora_image/elements"

Result = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """The directory of one benchmark, and what it holds.

    :ivar tell: what to do with a line about the progress.
    """

    out: Path
    tell: Callable[[str], None]

    @property
    def checkout(self) -> Path:
        """The copy of the checkout that our builds run from."""
        return self.out / "checkout"

    def image(self, name: str) -> Path:
        """The image of ``ours``, ``established`` or ``floor``."""
        path = self.out / "images" / f"{name}.qcow2"
        path.parent.mkdir(exist_ok=True)
        return path

    def once(self, name: str, work: Callable[[Path], Result]) -> Result:
        """Return the result of that name, by doing the work if there is none yet.

        :param work: is given a path for its log.
        """
        path = self.out / f"{name}.json"
        if not path.exists():
            self.tell(name)
            write_whole(path, work(path.with_suffix(".log")))
        result: Result = json.loads(path.read_text())
        return result


def ours_round(place: Place, number: int) -> None:
    """Build ours with empty caches, again unchanged, with changes, and five at once."""
    ours.copy_checkout(place.checkout)
    cache = place.out / f"cache-{number}"

    def build(log: Path, image: str = "ours") -> Result:
        output = place.image(image)
        result = ours.build(place.checkout, output, cache, log, "-s", str(SIZE))
        return result | {"bytes": output.stat().st_size}

    def cold(log: Path) -> Result:
        shutil.rmtree(cache, ignore_errors=True)
        return build(log)

    def with_element(log: Path) -> Result:
        with ours.late_element_changed(place.checkout):
            return build(log, "changed")

    def with_agent(log: Path) -> Result:
        with ours.agent_changed(place.checkout):
            return build(log, "changed")

    # All but the first start from what the first has left in the cache.
    steps = {"cold": cold, "warm": build, "element": with_element, "agent": with_agent}
    for name, work in steps.items():
        place.once(f"rounds/{number}/ours-{name}", work)
    shutil.rmtree(cache, ignore_errors=True)
    if ours.builds_several(place.checkout):
        place.once(f"rounds/{number}/ours-five", partial(several, place, ours.FIVE))
    else:
        place.tell("five images in one command: not there")


def several(place: Place, images: Sequence[Sequence[str]], log: Path) -> Result:
    """Build several images with an empty cache in one command."""
    directory = place.out / "several"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        return ours.build_all(place.checkout, directory, directory / "cache", log, images)
    finally:
        shutil.rmtree(directory)


def established_round(place: Place, number: int) -> None:
    """Build the established composition."""

    def work(log: Path) -> Result:
        image = place.image("established")
        run = established.build(image, log, size=SIZE)
        return {
            **ours.cost(run),
            "phases": phases(established.steps(run), run.samples),
            "bytes": image.stat().st_size,
            "note": established.deviation(),
        }

    place.once(f"rounds/{number}/established", work)


def floor_round(place: Place, number: int) -> None:
    """Build the floor, of the packages that ours asks for."""

    def work(log: Path) -> Result:
        plan = the_plan(place)
        packages = sorted(sizes.roots_of(plan, place.checkout / ELEMENTS))
        sources = plan["environment"].get("AMPHORA_APT_SOURCES", "").splitlines()
        image = place.image("floor")
        run = floor.build(image, log, packages=packages, sources=sources, size=SIZE)
        return {
            **ours.cost(run),
            "phases": phases(floor.steps(run), run.samples),
            "bytes": image.stat().st_size,
        }

    place.once(f"rounds/{number}/floor", work)


def the_plan(place: Place) -> Result:
    """Return the plan of our build as ``amphora-image plan`` prints it."""
    ours.copy_checkout(place.checkout)
    argv = [str(ours.verb(place.checkout)), "plan", "-i", "debian"]
    plan: Result = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    return plan


def size_reports(place: Place) -> None:
    """Read what takes the room in each image, and why it is there."""
    names = sizes.asked(established.NAMES, [established.ELEMENTS], established.VARIABLES)
    theirs = {name: f"asked for by {', '.join(found)}" for name, found in names.items()}
    mine = sizes.roots_of(the_plan(place), place.checkout / ELEMENTS)
    for name, roots in {"ours": mine, "established": theirs, "floor": mine}.items():
        if place.image(name).exists():
            place.once(f"sizes/{name}", partial(size_report, place.image(name), roots))


def size_report(image: Path, roots: dict[str, str], _: Path) -> Result:
    """Return :func:`bench.sizes.report`, which says nothing that a log could keep."""
    return sizes.report(image, roots)


def boots(place: Place) -> None:
    """Boot both images and keep the proofs' reports: one that fails late still tells the times."""
    for name in ("ours", "established"):
        if place.image(name).exists():
            place.once(f"boots/{name}", partial(boot, place.image(name)))


def boot(image: Path, log: Path) -> Result:
    """Return the boot proof's report.

    :raises Failed: there is none.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Not the copy of the checkout's, which has not what the proof needs.
    command = str(Path(sysconfig.get_path("scripts"), "amphora-image"))
    options = ["boot", "--json", "--accel", "tcg", "--timeout", str(BOOT_TIME)]
    done = subprocess.run(
        [*ENDS_WITH_US, command, *options, "--log", log, image], capture_output=True, text=True
    )
    try:
        report: Result = json.loads(done.stdout)
    except ValueError:
        raise Failed(f"booting {image} ended with {done.returncode}: {done.stderr}") from None
    return report
