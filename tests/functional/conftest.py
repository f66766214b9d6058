# SPDX-License-Identifier: Apache-2.0
"""What functional tests share."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_image import asked, convert, make_raw, manifest, nodes
from tiny import Elements, Scene, make_elements
from ubuntu_archive import Archive, make_archive

from amphora_image import proof

#: The README's command for a Debian amphora, and its tar file as well.
COMMAND = Path(__file__).parents[2] / "diskimage-create.sh"
OPTIONS = ("-i", "debian", "-t", "qcow2,tar")
#: Sees an image reach the milestones of these names; the rest is proof.prove's.
ProvePart = Callable[..., None]


@pytest.fixture(scope="session")
def tiny_elements(tmp_path_factory: pytest.TempPathFactory) -> Elements:
    """The tests' elements and their tiny operating system."""
    return make_elements(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def scene(tmp_path: Path, tiny_elements: Elements) -> Iterator[Scene]:
    """A directory for builds; nothing of them outlives the test."""
    here = Scene(tmp_path, tiny_elements)
    yield here
    here.clear()


@pytest.fixture(scope="session")
def debian_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the tests' own: what other builds left must not stand in for a build."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def debian_image(debian_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian amphora as the README's command builds it, a qcow2 file; its tar file is beside it.

    AMPHORA_TEST_IMAGE names one that was built before: for work on the tests themselves.
    """
    if ready := os.environ.get("AMPHORA_TEST_IMAGE"):
        return Path(ready)
    directory = tmp_path_factory.mktemp("debian")
    subprocess.run([COMMAND, *OPTIONS, "-c", debian_cache], cwd=directory, check=True)
    return directory / "amphora-x64-haproxy.qcow2"


@pytest.fixture(scope="session")
def ubuntu_archives(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Archive]:
    """An archive as Ubuntu's for a release, for a mirror to serve; each is made once.

    AMPHORA_TEST_CACHE names a directory for Debian's packages, which are else fetched anew.
    """

    @functools.cache
    def archive(release: str) -> Archive:
        directory = tmp_path_factory.mktemp(release)
        kept = os.environ.get("AMPHORA_TEST_CACHE")
        return make_archive(directory, Path(kept) if kept else directory / "cache", release)

    return archive


@pytest.fixture(scope="session")
def ubuntu_archive(ubuntu_archives: Callable[[str], Archive]) -> Archive:
    """An archive as that of Ubuntu's default release."""
    return ubuntu_archives("noble")


@pytest.fixture
def prove_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ProvePart:
    """A function that sees an image reach milestones of a single amphora, and asks for no other."""

    def prove(image: Path, names: Collection[str], **how: Any) -> None:
        steps = {name: step for name, step in proof.SINGLE.items() if name in names}
        monkeypatch.setitem(proof.TOPOLOGIES, "single", (1, steps))
        report = proof.prove(image, log=tmp_path / "serial.log", **how)
        assert report.failure == ""
        assert [each.name for each in report.milestones[2:]] == list(names)

    return prove


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw disk that breaks no rule, its manifest beside it."""
    raw = make_raw(nodes(), tmp_path_factory.mktemp("good") / "amphora.raw")
    Path(f"{raw}.json").write_text(manifest(asked()))
    return raw


@pytest.fixture(scope="module")
def qcow2(good: Path) -> Path:
    """The good disk as qcow2."""
    return convert(good, good.with_suffix(".qcow2"), "qcow2")


@pytest.fixture
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left of an image that was looked at, good or bad."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    yield
    assert list(scratch.iterdir()) == []
