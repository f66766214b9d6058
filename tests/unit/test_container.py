# SPDX-License-Identifier: Apache-2.0
"""The proof of a tar file: what is refused before podman is asked, and how long it waits."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amphora_image import container, network
from amphora_image.errors import AmphoraImageError, BadValue, HostError
from amphora_image.report import Milestone


def test_missing_tar_is_a_bad_value(tmp_path: Path) -> None:
    """A tar file that is not there is named."""
    with pytest.raises(BadValue, match=r"none\.tar"):
        container.prove(tmp_path / "none.tar")


def test_missing_program_is_a_host_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without podman is told which package to install."""
    monkeypatch.setattr("shutil.which", lambda program: None)
    (tmp_path / "a.tar").touch()
    with pytest.raises(HostError, match="podman is not installed") as failure:
        container.prove(tmp_path / "a.tar")
    assert failure.value.hint == "install the package podman"


def test_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never comes is waited for in bounded time, and named."""

    def attempt() -> bool:
        raise ConnectionRefusedError

    monkeypatch.setattr(container, "PATIENCE", 0.05)
    runs: Any = SimpleNamespace(poll=lambda: None)
    with pytest.raises(OSError, match="still missing: an answer"):
        container.wait(runs, "an answer", attempt)


def test_wait_ends_with_haproxy() -> None:
    """When HAProxy has ended nothing is waited for."""

    def attempt() -> bool:
        raise ConnectionRefusedError

    ended: Any = SimpleNamespace(poll=lambda: 125, returncode=125)
    with pytest.raises(OSError, match="HAProxy ended with 125; missing: an answer"):
        container.wait(ended, "an answer", attempt)


STEPS = list(container.STEPS)


@pytest.mark.parametrize(
    ("file", "argument", "milestone"),
    [
        ("a.tar", "import", STEPS[0]),
        ("a.oci", "load", STEPS[0]),
        ("a.tar", "-v", STEPS[1]),
    ],
)
def test_failure_is_told_by_its_milestone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, argument: str, milestone: str
) -> None:
    """What podman does not do is the failure of the milestone that needs it."""

    def run(argv: Sequence[object]) -> str:
        if argument in argv:
            raise AmphoraImageError("podman ended with 125")
        return "HAProxy version 3.0.11-1 2026/01/01"

    monkeypatch.setattr(container, "run", run)
    monkeypatch.setattr(container.network, "isolated", contextlib.nullcontext)
    monkeypatch.setattr(container.network, "add_vips", lambda: None)
    monkeypatch.setattr(container.members, "serving", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("shutil.which", lambda program: program)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    temporary = tempfile.TemporaryDirectory
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda **_: temporary(dir=tmp_path))
    (tmp_path / file).touch()
    report = container.prove(tmp_path / file)
    number = STEPS.index(milestone)
    assert report.failure == f"{milestone}: podman ended with 125"
    assert report.milestones[-1] == Milestone(milestone)
    assert [each.name for each in report.milestones] + report.missing == STEPS
    assert len(report.milestones) == number + 1


def test_configuration_is_for_a_host_with_small_limits(tmp_path: Path) -> None:
    """HAProxy needs no more files than its limit allows, four and a few for each connection."""
    config = container.haproxy_config(tmp_path, "3.0.11-1")
    limits = [int(line.split()[1]) for line in config.splitlines() if "maxconn" in line]
    assert max(limits) * 4 < 1024
    assert f"bind {network.VIP}:{container.HTTP}" in config
