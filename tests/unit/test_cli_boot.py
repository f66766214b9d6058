# SPDX-License-Identifier: Apache-2.0
"""``amphora-image boot``: in which forms a proof is told, and the code that it ends with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from amphora_image import check, cli, container, proof
from amphora_image.errors import HostError
from amphora_image.report import Milestone, Report


def unreadable(_: Path) -> list[check.Finding]:
    """Fail to look into an image."""
    raise HostError("debugfs is missing")


@pytest.mark.usefixtures("here")
def test_failed_proof(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed boot proof is reported in every form that was asked for, and the exit code is 5."""
    report = Report("a.qcow2", "tcg", "single", "a.log", failure="UDP balanced: timed out")
    monkeypatch.setattr(proof, "prove", lambda *_, **__: report)
    monkeypatch.setattr(check, "check_image", unreadable)
    assert cli.main(["boot", "a.qcow2", "--json", "--report", "a.html"]) == 5
    out, err = capsys.readouterr()
    assert json.loads(out)["failure"] == "UDP balanced: timed out"
    assert "error: UDP balanced: timed out" in err
    assert "a.qcow2.serial.log" in err
    page = (here / "a.html").read_text()
    assert "timed out" in page
    assert "<td>debugfs is missing" in page


def test_container_proof(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tar file is proved with podman, and its milestones are told as they are reached."""

    def prove(tar: Path, *, tell: Callable[[Milestone], None]) -> Report:
        tell(Milestone("imported", 2.5))
        return Report(str(tar), "podman", "container", "")

    monkeypatch.setattr(container, "prove", prove)
    assert cli.main(["boot", "--container", "a.tar"]) == 0
    out, err = capsys.readouterr()
    assert "a.tar, container, under podman: passed" in out
    assert "2.5 s  imported" in err
