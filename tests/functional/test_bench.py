# SPDX-License-Identifier: Apache-2.0
"""bench: real commands are measured, and what was measured is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from amphora_image.plan import ELEMENTS
from bench import floor, measure, sizes
from bench.measure import Failed
from bench.rounds import Place

BUSY = "echo begin; timeout 1 sh -c 'while :; do :; done'; echo end"


def test_command_is_measured(tmp_path: Path) -> None:
    """Seconds of the clock and of the CPU, its children's too, and when each line came."""
    run = measure.command(["sh", "-c", BUSY], tmp_path / "log", cwd=tmp_path)
    assert 1 <= run.seconds < 20
    assert 0.1 < run.cpu_seconds < run.seconds + 0.5, "one busy process and a kernel's rounding"
    (begun, _), (ended, _) = run.lines
    assert ended - begun >= 0.9
    assert [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()] == [
        "begin",
        "end",
    ]
    (phase,) = measure.phases([measure.Span("busy", begun, ended)], run.samples).values()
    assert phase["cores"] > 0.1


def test_failed_command(tmp_path: Path) -> None:
    """A failure is no measurement; what was said can be read."""
    with pytest.raises(Failed, match="log ended with 3"):
        measure.command(["sh", "-c", "echo why; exit 3"], tmp_path / "log", cwd=tmp_path)
    assert "why" in (tmp_path / "log").read_text()


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    """A result that is there is taken; work that fails leaves none, so that it is done again."""
    told: list[str] = []
    place = Place(tmp_path, told.append)

    def fail(_: Path) -> dict[str, int]:
        raise Failed("broken")

    with pytest.raises(Failed):
        place.once("part/a", fail)
    assert place.once("part/a", lambda _: {"seconds": 1}) == {"seconds": 1}
    assert place.once("part/a", fail) == {"seconds": 1}
    assert told == ["part/a", "part/a"]


def test_who_asked_for_a_package() -> None:
    """Elements' lists are read as diskimage-builder reads them, names mapped, conditions kept."""
    variables = {
        "AMPHORA_AGENT_FROM_PACKAGES": "0",
        "DIB_OCTAVIA_AMP_USE_NFTABLES": "True",
        "DISTRO_NAME": "debian",
    }
    found = sizes.asked(["amphora-base", "amphora-agent"], [ELEMENTS], variables)
    assert found["haproxy"] == ["amphora-haproxy"]
    assert found["systemd-sysv"] == ["amphora-base"]
    assert "init-system" not in found
    assert "iptables" not in found


def test_floor_stops_where_a_step_fails(tmp_path: Path) -> None:
    """A package that nobody has ends the build, and no image is left."""
    image = tmp_path / "floor.qcow2"
    sources = ["deb file:///var/empty trixie main"]
    with pytest.raises(Failed):
        floor.build(image, tmp_path / "log", packages=["none"], sources=sources, size=1)
    assert "mmdebstrap" in (tmp_path / "log").read_text()
    assert not image.exists()
