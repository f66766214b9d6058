# SPDX-License-Identifier: Apache-2.0
"""Releases other than the default as amphorae: built, checked, and balancing load."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import COMMAND

from amphora_image import proof
from amphora_image.check import check_image


@pytest.mark.bases
@pytest.mark.parametrize("release", ["bookworm"])
def test_release_of_debian(release: str, tmp_path: Path) -> None:
    """The image breaks no rule, and does all that Octavia wants of an amphora."""
    image = tmp_path / "lb.qcow2"
    options = ("-i", "debian", "-d", release, "-o", image, "-c", tmp_path / "cache")
    subprocess.run([COMMAND, *options], check=True)
    assert check_image(image) == []
    report = proof.prove(image, log=tmp_path / "serial.log")
    assert report.failure == ""
    assert [each.name for each in report.milestones[2:]] == list(proof.SINGLE)
