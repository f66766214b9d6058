# SPDX-License-Identifier: Apache-2.0
"""What the programs of a build find in their environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from amphora_image.build import NO_LAST_SLEEP


@pytest.mark.parametrize(
    ("name", "sleeps"),
    [("disk-image-create", False), ("10-element", True), ("dib-run-parts", True)],
)
def test_who_sleeps(tmp_path: Path, name: str, sleeps: bool) -> None:
    """disk-image-create does not wait at its end; whatever it starts does, if it wants to."""
    script = tmp_path / name
    script.write_text("#!/bin/bash\nsleep 0.01 no-interval\n")
    script.chmod(0o755)
    done = subprocess.run([script], env={**os.environ, **NO_LAST_SLEEP}, capture_output=True)
    # sleep(1) refuses what is no interval.
    assert (done.returncode != 0) == (b"no-interval" in done.stderr) == sleeps
