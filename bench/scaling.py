# SPDX-License-Identifier: Apache-2.0
"""How our builds grow: with the disk, with the number of images, and with the packages."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from bench import established, ours, sizes
from bench.rounds import ELEMENTS, Place, Result, several, the_plan

#: GiB of the disk.
SIZES = (2, 5, 10, 20)
#: Images that one command builds.
COUNTS = (1, 2, 4, 8)
#: Packages beside ours, of those that the established composition asks for.
EXTRAS = (0, 7, 14, 28)

#: The element that asks for them.
ELEMENT = "bench-packages"


def scale(place: Place) -> None:
    """Measure all curves, a point at a time."""
    ours.copy_checkout(place.checkout)
    by_size(place)
    if ours.builds_several(place.checkout):
        by_images(place)
    by_packages(place)


def by_size(place: Place) -> None:
    """Build larger and larger disks from a cache that holds all but the disk."""
    cache = place.out / "cache-scaling"

    def build(size: int, log: Path) -> Result:
        image = place.image("scaled")
        if not cache.exists():
            ours.build(place.checkout, image, cache, log, "-s", "3")
        result = ours.build(place.checkout, image, cache, log, "-s", str(size))
        return result | {"bytes": image.stat().st_size}

    for size in SIZES:
        place.once(f"scaling/size-{size}", partial(build, size))
    shutil.rmtree(cache, ignore_errors=True)


def by_images(place: Place) -> None:
    """Build more and more images, alike but for their disks, in one command with an empty cache."""
    for count in COUNTS:
        images = [("-s", str(2 + number)) for number in range(count)]
        place.once(f"scaling/images-{count}", partial(several, place, images))


def by_packages(place: Place) -> None:
    """Build with more and more packages and an empty cache."""
    elements = place.out / "elements"
    cache = place.out / "cache-packages"

    def build(names: list[str], log: Path) -> Result:
        element = elements / ELEMENT
        element.mkdir(parents=True, exist_ok=True)
        (element / "element-deps").write_text("package-installs\n")
        (element / "package-installs.yaml").write_text("".join(f"{name}:\n" for name in names))
        asked = {"DIB_LOCAL_ELEMENTS": ELEMENT, "DIB_LOCAL_ELEMENTS_PATH": str(elements)}
        image = place.image("scaled")
        try:
            result = ours.build(
                place.checkout, image, cache, log, environment=asked if names else None
            )
        finally:
            shutil.rmtree(cache, ignore_errors=True)
        return result | {"bytes": image.stat().st_size}

    names = extra_packages(place)
    for count in EXTRAS:
        place.once(f"scaling/packages-{count}", partial(build, names[:count]))
    place.image("scaled").unlink(missing_ok=True)


def extra_packages(place: Place) -> list[str]:
    """Return what operators' list asks for and ours does not."""
    theirs = sizes.asked(established.NAMES, [established.ELEMENTS], established.VARIABLES)
    mine = sizes.roots_of(the_plan(place), place.checkout / ELEMENTS)
    return sorted(
        name
        for name, elements in theirs.items()
        if elements == ["established-amphora"] and name not in mine
    )
