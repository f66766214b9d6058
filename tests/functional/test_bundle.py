# SPDX-License-Identifier: Apache-2.0
"""A bundle of a Debian amphora: what it takes from the network, where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lonely import lonely

from amphora_image.manifest import sha256_of

OPTIONS = ("-i", "debian", "-t", "qcow2,tar")
COMMAND = (sys.executable, "-m", "amphora_image")

#: The build's time, so that two builds of the same are the same bytes.
EPOCH = "1795593600"


def run(
    *words: str | Path, enter: Sequence[str] = (), cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run the command, in a namespace if one is to be entered."""
    return subprocess.run(
        [*enter, *COMMAND, *words],
        cwd=cwd,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@dataclass(frozen=True)
class Fetched:
    """A directory with an image that was built with a network, ``online``, and a bundle of it."""

    directory: Path

    @property
    def bundle(self) -> Path:
        """The bundle."""
        return self.directory / "bundle.tar"

    def manifest(self, name: str) -> dict[str, Any]:
        """The manifest of an image."""
        document: dict[str, Any] = json.loads((self.directory / f"{name}.qcow2.json").read_text())
        return document


@pytest.fixture(scope="module")
def fetched(debian_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """A bundle, made by the options of a build."""
    directory = tmp_path_factory.mktemp("bundle")
    for words in (("build", "-o", "online"), ("fetch", "-o", "bundle.tar")):
        done = run(*words, *OPTIONS, "-c", debian_cache, cwd=directory)
        assert done.returncode == 0, done.stdout
    return Fetched(directory)


def test_the_same_image_without_a_network(fetched: Fetched, tmp_path: Path) -> None:
    """Where there is no network and no cache the bundle gives the same image, byte for byte."""
    with lonely() as place:
        place.listening.close()
        links = subprocess.run(
            [*place.enter, "ip", "-brief", "link"], check=True, capture_output=True, text=True
        ).stdout
        assert [line.split()[0] for line in links.splitlines()] == ["lo"]
        cache = tmp_path / "cache"
        words = ["build", "-o", "offline", "-c", cache, "--bundle", "bundle.tar", "--offline"]
        done = run(*words, *OPTIONS, enter=place.enter, cwd=fetched.directory)
    assert done.returncode == 0, done.stdout
    online, offline = map(fetched.manifest, ("online", "offline"))
    for what in ("packages", "python_packages", "archives"):
        assert online[what]
        assert offline[what] == online[what]
    for kind in ("tar", "qcow2"):
        files = (fetched.directory / f"{name}.{kind}" for name in ("online", "offline"))
        assert len({sha256_of(file) for file in files}) == 1
    assert {path.name for path in cache.iterdir()} <= {"logs", ".lock"}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("-d", "bookworm"), "release (-d): the bundle has trixie, asked for is bookworm"),
        (("-g", "stable/2026.1"), "agent (-g, -p): the bundle has AMPHORA_AGENT_SOURCE=locked"),
        (
            ("--mirror", "http://mirror.example.org/debian"),
            "apt sources (--mirror): the bundle has ",
        ),
    ],
)
def test_a_bundle_of_another_build(
    fetched: Fetched, tmp_path: Path, options: tuple[str, ...], what: str
) -> None:
    """What differs between the bundle and what is asked for is told, before anything is built."""
    words = ["build", "-o", "other", "-c", tmp_path, "--bundle", "bundle.tar"]
    done = run(*words, *OPTIONS, *options, cwd=fetched.directory)
    assert done.returncode == 3
    assert what in done.stdout
    assert "hint: give the options of amphora-image fetch" in done.stdout
    assert not list(fetched.directory.glob("other*"))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_broke_on_the_way(fetched: Fetched, tmp_path: Path) -> None:
    """One changed bit is noticed, and nothing is built of it."""
    data = bytearray(fetched.bundle.read_bytes())
    data[len(data) // 2] ^= 1
    broken = tmp_path / "broken.tar"
    broken.write_bytes(data)
    words = ["build", "-o", "other", "-c", tmp_path / "cache", "--bundle", broken]
    done = run(*words, *OPTIONS, cwd=fetched.directory)
    assert done.returncode == 3
    assert "is not what its index names" in done.stdout
    assert not list(fetched.directory.glob("other*"))
    assert list((tmp_path / "cache").iterdir()) == []
