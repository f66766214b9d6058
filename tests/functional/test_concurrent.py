# SPDX-License-Identifier: Apache-2.0
"""Two builds at once with one cache directory, and what each of them leaves: whole files."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import SIZE, Build, Elements, Scene, qemu_info

CALLER = {"SUDO_UID": "12345", "SUDO_GID": "23456"}
TYPES = {"first": ("qcow2",), "second": ("tar", "vhd", "qcow2")}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_elements: Elements) -> Iterator[Scene]:
    """The scene of two builds at once, both done; the second was started by sudo."""
    here = Scene(tmp_path_factory.mktemp("concurrent"), tiny_elements)
    here.start("first", "-t", ",".join(TYPES["first"]))
    here.start("second", "-t", ",".join(TYPES["second"]), "-r", "secret word", **CALLER)
    yield here
    here.clear()


@pytest.fixture(scope="module")
def builds(scene: Scene) -> dict[str, Build]:
    """Both builds, ended well."""
    for build in scene.builds:
        status, said = build.end()
        assert status == 0, said
    return {build.output.name: build for build in scene.builds}


@pytest.fixture(params=TYPES)
def build(request: pytest.FixtureRequest, builds: dict[str, Build]) -> Build:
    """Each of the two builds."""
    return builds[request.param]


def files(build: Build) -> list[Path]:
    """Return the image files of a build."""
    return [Path(f"{build.output}.{kind}") for kind in TYPES[build.output.name]]


def test_images(build: Build) -> None:
    """Each image file is whole and has the size that was asked for."""
    for path in files(build):
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                assert "./etc/os-release" in tar.getnames()
        else:
            # A VHD ends on a whole MiB too, so that it can be imported as it is.
            assert qemu_info(path)["virtual-size"] == SIZE


def test_checksums(build: Build) -> None:
    """The checksum files fit the images, by sha256sum's own judgement."""
    for path in files(build):
        check = ["sha256sum", "--check", "--strict", f"{path.name}.sha256"]
        done = subprocess.run(check, cwd=path.parent, capture_output=True, text=True)
        assert done.stdout == f"{path.name}: OK\n"


def test_manifest(build: Build) -> None:
    """The manifest tells what was asked, what went in and what came out."""
    for path in files(build):
        manifest = json.loads(Path(f"{path}.json").read_text())
        assert manifest["request"]["base_os"] == "debian"
        assert manifest["request"]["size"] == "1.5"
        assert manifest["plan"]["elements"][0] == "tiny-os"
        assert manifest["tools"]["diskimage-builder"]
        assert manifest["packages"] == {"tiny": "1.0"}
        assert manifest["python_packages"] == {}
        assert manifest["archives"] == []
        assert {"installation", "image files"} <= manifest["seconds"].keys()
        assert set(manifest["files"]) == {each.name for each in files(build)}
        told = manifest["files"][path.name]
        assert told["bytes"] == path.stat().st_size
        with path.open("rb") as file:
            assert told["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()


def test_owner(builds: dict[str, Build]) -> None:
    """All that is beside an image belongs to whoever called sudo, or to root."""
    owners = {"first": (0, 0), "second": (12345, 23456)}
    for name, owner in owners.items():
        made = list(builds[name].output.parent.glob(f"{name}.*"))
        assert len(made) == 3 * len(TYPES[name]) + 1
        assert {path: (path.stat().st_uid, path.stat().st_gid) for path in made} == dict.fromkeys(
            made, owner
        )


def test_the_root_password_is_nowhere(builds: dict[str, Build]) -> None:
    """Neither the log nor the manifest has the root password."""
    build = builds["second"]
    for path in (build.log, Path(f"{build.image}.json")):
        assert "secret word" not in path.read_text()


def test_nothing_is_left(scene: Scene, builds: dict[str, Build]) -> None:
    """Both builds have cleaned up, and left no other files than those asked for."""
    assert builds
    assert scene.left_behind() == []
    names = {path.name for path in scene.directory.iterdir()}
    expected = {
        f"{name}.{kind}{suffix}"
        for name, kinds in TYPES.items()
        for kind in kinds
        for suffix in ("", ".sha256", ".json")
    }
    assert names == expected | {"first.log", "second.log", "cache", "tmp"}
