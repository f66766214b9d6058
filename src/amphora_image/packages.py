# SPDX-License-Identifier: Apache-2.0
"""Every element's package list, joined before the root file system exists: one apt transaction.

DIB installs packages phase by phase, an apt run each. It also has the tools to know them all at
once: ``package-installs-squash`` reads every element's ``package-installs``, and ``pkg-map`` turns
names into the distribution's. This room asks them on the host, so that the base element can hand
the whole set to mmdebstrap. To DIB's own phases it leaves the build tools, which they take away.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amphora_image.errors import AmphoraImageError
from amphora_image.run import run

#: Phase -> ``install`` or ``uninstall`` -> [package, element] pairs, as
#: ``package-installs-squash`` writes them.
Squashed = Mapping[str, Mapping[str, list[list[str]]]]


def wanted(squashed: Squashed) -> dict[str, list[str]]:
    """Return the packages to install by the element that asks for them.

    A package that its element takes away again in the same phase is a build tool and is left to
    that phase.
    """
    by_element: dict[str, list[str]] = {}
    for actions in squashed.values():
        taken_away = actions.get("uninstall", [])
        for package, element in actions.get("install", []):
            if [package, element] not in taken_away:
                by_element.setdefault(element, []).append(package)
    return by_element


def left(squashed: Squashed) -> dict[str, dict[str, list[list[str]]]]:
    """Return what is left to DIB's phases when all that is wanted is there: build tools.

    With nothing to install a phase does not start apt.
    """
    found: dict[str, dict[str, list[list[str]]]] = {}
    for phase, actions in squashed.items():
        taken_away = actions.get("uninstall", [])
        tools = [pair for pair in actions.get("install", []) if pair in taken_away]
        kept = {"install": tools, "uninstall": taken_away}
        found[phase] = {action: pairs for action, pairs in kept.items() if pairs}
    return found


def collect(elements: Mapping[str, Path], element_path: str, tools: Path) -> list[str]:
    """Return the distribution's names of all packages that the elements ask for, sorted.

    :param elements: element -> its directory, dependencies included.
    :param element_path: the search path for elements, joined with ``:``.
    :param tools: the directory with DIB's own elements.
    :raises AmphoraImageError: a package list cannot be read.
    """
    python = sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        outfile = Path(scratch, "package-installs.json")
        squash = tools / "package-installs/bin/package-installs-squash"
        run([python, squash, f"--elements={' '.join(elements)}", f"--path={element_path}", outfile])
        squashed = json.loads(outfile.read_text())

    def mapped(element: str, packages: list[str]) -> list[str]:
        map_file = elements[element] / "pkg-map"
        if not map_file.exists():
            return packages
        pkg_map = tools / "pkg-map/bin/pkg-map"
        return run([python, pkg_map, "--missing-ok", "--pkg-map", map_file, *packages]).split()

    asked = wanted(squashed)
    with ThreadPoolExecutor() as pool:
        return sorted(set().union(*pool.map(mapped, asked, asked.values())))


def main() -> None:
    """Print the packages, one a line, for the element ``amphora-base``; DIB sets the variables.

    With ``--installed FILE``: they are installed, so leave to DIB what :func:`left` says.
    """
    parser = argparse.ArgumentParser(prog="python -m amphora_image.packages")
    parser.add_argument("--installed", type=Path, help="DIB's package-installs.json")
    if installed := parser.parse_args().installed:
        installed.write_text(json.dumps(left(json.loads(installed.read_text()))))
        return

    import yaml
    from diskimage_builder.paths import get_path

    elements = {
        name: Path(path) for name, path in yaml.safe_load(os.environ["IMAGE_ELEMENT_YAML"]).items()
    }
    try:
        print(*collect(elements, os.environ["ELEMENTS_PATH"], Path(get_path("elements"))), sep="\n")
    except AmphoraImageError as error:
        sys.exit(f"packages: {error}")


if __name__ == "__main__":
    main()
