# SPDX-License-Identifier: Apache-2.0
"""The image under test keeps within the budget, as far as one image and its own cache can tell.

``bench/run`` holds all of ``bench/budget.toml``, with the established way and the floor beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import COMMAND, OPTIONS

from amphora_image.image import read_image
from amphora_image.plan import ELEMENTS
from bench import budget
from bench.report import rest

LIMITS = budget.load()


@pytest.fixture(scope="module")
def seconds(debian_image: Path, debian_cache: Path) -> dict[str, float]:
    """Phase -> seconds of the image's build, which began with an empty cache and has filled it."""
    manifest = json.loads(Path(f"{debian_image}.json").read_text())
    if manifest["request"]["cache_dir"] != str(debian_cache):
        pytest.skip("AMPHORA_TEST_IMAGE names an image that was not built with the tests' cache")
    found: dict[str, float] = manifest["seconds"]
    return found


def build(cache: Path, directory: Path, **environment: str) -> tuple[float, list[dict[str, str]]]:
    """Build the image once more, elsewhere; return the seconds, and the state of the archives."""
    start = time.monotonic()
    command = [COMMAND, *OPTIONS, "-c", cache]
    subprocess.run(command, cwd=directory, env={**os.environ, **environment}, check=True)
    took = time.monotonic() - start
    return took, archives_of(directory / "amphora-x64-haproxy.qcow2")


def archives_of(image: Path) -> list[dict[str, str]]:
    """The state of the archives that an image came from."""
    found: list[dict[str, str]] = json.loads(Path(f"{image}.json").read_text())["archives"]
    return found


@pytest.fixture(scope="module")
def again(
    debian_image: Path, debian_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> float:
    """Seconds of a build of which nothing has changed, the archives neither."""
    directory = tmp_path_factory.mktemp("again")
    known = archives_of(debian_image)
    while True:
        took, found = build(debian_cache, directory)
        if found == known:
            return took
        known = found  # something was published in between


def test_bytes(debian_image: Path) -> None:
    """The file and all that is in it are small beside the established composition's image."""
    files = read_image(debian_image).tree.entries.values()
    bytes_of = {
        "qcow2": debian_image.stat().st_size,
        "used": sum(entry.size for entry in files if entry.is_file),
    }
    shares = {name: count / LIMITS.recorded[name] for name, count in bytes_of.items()}
    assert LIMITS.excesses(shares) == []


def test_packages_take_most_of_a_cold_build(seconds: dict[str, float]) -> None:
    """All that is done beside installing packages is a small part of a build."""
    phases = {name: {"seconds": taken} for name, taken in seconds.items()}
    assert LIMITS.excesses({"rest": rest(phases)}) == []


def test_nothing_changed(seconds: dict[str, float], again: float) -> None:
    """A build of the same image again takes next to no time."""
    assert LIMITS.excesses({"warm": again / sum(seconds.values())}) == []


@pytest.mark.usefixtures("again")  # the cache then has what the archives hold now
def test_last_element_changed(
    seconds: dict[str, float], debian_cache: Path, tmp_path: Path
) -> None:
    """A change of the last element does not install the packages again."""
    element = tmp_path / "elements/amphora-trim"
    shutil.copytree(ELEMENTS / "amphora-trim", element)
    script = max(element.glob("*.d/*"))
    script.write_text(script.read_text() + "# Changed.\n")
    took, _ = build(debian_cache, tmp_path, DIB_LOCAL_ELEMENTS_PATH=str(element.parent))
    assert LIMITS.excesses({"element": took / sum(seconds.values())}) == []
