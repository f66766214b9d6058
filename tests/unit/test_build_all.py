# SPDX-License-Identifier: Apache-2.0
"""A file of command lines becomes several builds."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from amphora_image import build_all as several
from amphora_image import cli
from amphora_image.build_all import Build, Line, jobs_here, plan_builds, read_lines
from amphora_image.errors import BadValue
from amphora_image.host import TMPFS_MEMORY
from amphora_image.request import ImageType, Request

TEXT = """
# images of the cloud
-i debian -o 'an image'   # the default

A=1 B='x y=z' -d bookworm -o C=3
"""


def test_lines() -> None:
    """A line has variables, then options, quoted as in a shell; the rest is for people."""
    assert read_lines(TEXT) == [
        Line(3, {}, ["-i", "debian", "-o", "an image"]),
        Line(5, {"A": "1", "B": "x y=z"}, ["-d", "bookworm", "-o", "C=3"]),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no image is named"), ("# -i debian", "no image"), ("-o 'x", "line 1 cannot be read")],
)
def test_lines_that_are_none(text: str, message: str) -> None:
    """A file without a line, or with one that no shell would take, is a bad value."""
    with pytest.raises(BadValue, match=message):
        read_lines(text)


def test_all_lines_are_read_first(a_request: Callable[..., Request]) -> None:
    """A bad value is told with its line, and so are two lines that write the same file."""

    def read(line: Line) -> Request:
        if "bad" in line.options:
            raise BadValue("-s (size) is 'bad'", "a hint")
        return a_request(output=Path("/here", line.options[0]))

    lines = [Line(number, {}, [name]) for number, name in enumerate(("a", "b", "a"), start=1)]
    assert [build.name for build in plan_builds(lines[:2], read)] == ["a", "b"]
    with pytest.raises(BadValue, match=r"line 3: /here/a\.qcow2 is the output of line 1 too"):
        plan_builds(lines, read)
    with pytest.raises(BadValue, match=r"line 9: -s \(size\) is 'bad'"):
        plan_builds([Line(9, {}, ["bad"])], read)


@pytest.mark.parametrize(
    ("builds", "processors", "memory", "jobs"),
    [(5, 8, 100, 5), (5, 2, 100, 2), (5, 8, 3, 3), (5, 8, 0, 1), (1, 8, 8, 1)],
)
def test_jobs(
    monkeypatch: pytest.MonkeyPatch, builds: int, processors: int, memory: int, jobs: int
) -> None:
    """As many builds at a time as there are processors and memory for, one at least."""
    monkeypatch.setattr(several.os, "cpu_count", lambda: processors)
    monkeypatch.setattr(several, "available_memory", lambda: memory * TMPFS_MEMORY)
    assert jobs_here(builds) == jobs


class Process:
    """A build that tells its name and ends with the status that its first option is."""

    most = running = 0
    together = threading.Lock()

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], **_: object) -> None:
        self.options = argv[argv.index("--json") + 1 :]
        self.stderr = io.StringIO(f"saw {env.get('A')}\nended\n")
        self.stdout = io.StringIO(json.dumps({"files": [f"{self.options[0]}.qcow2"]}))
        self.status = int(self.options[0])
        with Process.together:
            Process.running += 1
            Process.most = max(Process.most, Process.running)

    def wait(self) -> int:
        """Return the status."""
        Process.running -= 1
        return self.status

    def terminate(self) -> None:
        """Nothing is left to end."""


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> type[Process]:
    """Builds that are only pretended."""
    monkeypatch.setattr(several.subprocess, "Popen", Process)
    Process.most = Process.running = 0
    return Process


def test_builds_run_and_tell(processes: type[Process], a_request: Callable[..., Request]) -> None:
    """Each build has its variables, its progress bears its name, and one failure stops no other."""
    told: list[tuple[str, str]] = []
    builds = [
        Build(name, Line(1, variables, [name]), a_request())
        for name, variables in (("0", {"A": "1"}), ("4", {}), ("00", {}))
    ]
    done = several.build_all(builds, 1, lambda *row: told.append(row))
    assert [(build.name, status, files) for build, status, _, files in done] == [
        ("0", 0, ["0.qcow2"]),
        ("4", 4, []),
        ("00", 0, ["00.qcow2"]),
    ]
    assert told[:2] == [("0", "saw 1"), ("0", "ended")]
    assert len(told) == 6
    assert processes.most == 1


def test_command(
    processes: type[Process],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The verb builds the lines of a file and ends with the exit code of the first that failed."""
    monkeypatch.setattr(cli, "plan_builds", lambda lines, _: [fake(line) for line in lines])
    (here / "images.txt").write_text("0\n5\n4\n")
    assert cli.main(["build-all", "images.txt"]) == 5
    printed = capsys.readouterr()
    assert printed.out == "0.qcow2\n"
    assert "2 of the images failed: 5, 4" in printed.err
    assert cli.main(["build-all", "images.txt", "--jobs", "2", "--json"]) == 5
    rows = json.loads(capsys.readouterr().out)
    assert [(row["line"], row["exit_code"]) for row in rows] == [(1, 0), (2, 5), (3, 4)]


def fake(line: Line) -> Build:
    """A build that asks for nothing."""
    return Build(line.options[0], line, None)  # type: ignore[arg-type]


def test_lines_take_the_options_of_a_build(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a line asks for is read as the build itself reads it, its variables included."""
    seen: list[Build] = []

    def build_all(builds: Sequence[Build], *_: object) -> list[object]:
        seen.extend(builds)
        return []

    monkeypatch.setattr(cli, "build_all", build_all)
    monkeypatch.setattr(cli.sys, "stdin", io.StringIO("DIB_RELEASE=bookworm -i debian -t raw,tar"))
    assert cli.main(["build-all", "-"]) == 0
    [build] = seen
    assert build.request.release == "bookworm"
    assert build.request.image_types == (ImageType.RAW, ImageType.TAR)
    monkeypatch.setattr(cli.sys, "stdin", io.StringIO("-i debian\n-i debian -s none"))
    assert cli.main(["build-all", "-"]) == 3
    assert "line 2: -s (size) is 'none'" in capsys.readouterr().err


def test_cache_verbs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Entries are listed, removed beyond a limit, and what is removed is told."""
    entry = here / "cache/rootfs/debian-x.tar.zst"
    entry.parent.mkdir(parents=True)
    entry.write_bytes(b"x" * 4096)
    assert cli.main(["cache", "list", "-c", "cache", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["layer"], row["name"], row["bytes"]) == ("rootfs", entry.name, "4096")
    assert cli.main(["cache", "list", "-c", "cache"]) == 0
    assert "rootfs" in capsys.readouterr().out
    assert cli.main(["cache", "prune", "-c", "cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert cli.main(["cache", "prune", "-c", "cache", "--limit", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row]
    assert not entry.exists()
