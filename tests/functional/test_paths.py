# SPDX-License-Identifier: Apache-2.0
"""Paths may have spaces, quotes, letters of any alphabet, and a dash in front."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import diskimage_builder
import pytest
from tiny import COMMAND, Elements, Scene, qemu_info

import amphora_image

ODD = """-dir with 'single' "double" ütf λ $HOME & ; (x)"""


def test_odd_paths(tmp_path: Path, tiny_elements: Elements, request: pytest.FixtureRequest) -> None:
    """Every path that a user can give may be odd, all of them at once."""
    odd = tmp_path / ODD
    odd.mkdir()
    scene = Scene(odd, tiny_elements)
    request.addfinalizer(scene.clear)
    shutil.copytree(tiny_elements.path, odd / "-elements")
    names = {
        "--output": f"-lb{ODD}",
        "--working-dir": "-work",
        "--cache-dir": "-cache",
        "--log-file": "-build.log",
        "--image-type": "qcow2,tar",
    }
    build = scene.start(
        "lb",
        "--on-disk",
        *(f"{option}={value}" for option, value in names.items()),
        DIB_LOCAL_ELEMENTS="faults",
        DIB_LOCAL_ELEMENTS_PATH="-elements",
    )
    build.output, build.log = odd / names["--output"], odd / "-build.log"
    status, said = build.end()
    assert status == 0, said
    assert qemu_info(build.image)["virtual-size"] == 1.5 * 1024**3
    for kind in ("qcow2", "tar"):
        checksum = f"{names['--output']}.{kind}.sha256"
        subprocess.run(["sha256sum", "--quiet", "--check", "--", checksum], check=True, cwd=odd)
    assert build.manifest["packages"] == {"tiny": "1.0"}
    assert (odd / "-cache").is_dir()
    assert scene.left_behind() == []


def test_an_odd_checkout(scene: Scene) -> None:
    """The project and its virtual environment may lie in an odd directory."""
    checkout = scene.directory / ODD
    ours = Path(amphora_image.__file__).parent
    engine = Path(diskimage_builder.__file__).parent
    shutil.copytree(ours, checkout / "src" / ours.name)
    venv = checkout / ".venv"
    create = [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(venv)]
    subprocess.run(create, check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    shutil.copytree(engine, packages / engine.name)
    (packages / "checkout.pth").write_text(f"{checkout / 'src'}\n{engine.parent}\n")
    shutil.copy(Path(sysconfig.get_path("scripts"), "disk-image-create"), venv / "bin")

    check = "import amphora_image as a, diskimage_builder as d; print(a.__file__, d.__file__)"
    python = str(venv / "bin" / "python")
    places = subprocess.run([python, "-c", check], check=True, capture_output=True, text=True)
    assert places.stdout.count(str(checkout)) == 2

    build = scene.start(program=[python, "-c", COMMAND])
    status, said = build.end()
    assert status == 0, said
    qemu_info(build.image)
    assert scene.left_behind() == []
