# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a build for another architecture, the kernel's register is as it was before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import Build, Scene

from amphora_image import foreign
from amphora_image.request import Architecture

ARCHITECTURE = Architecture.ARMHF
ENTRY = f"{foreign.PREFIX}{ARCHITECTURE}"
#: Seconds in which a keeper sees that its build is gone.
PATIENCE = 10


@pytest.fixture(autouse=True)
def register(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The kernel's register, which is kept while a file system shows it."""
    place = tmp_path_factory.mktemp("register")
    subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def runs_before(register: Path) -> bool:
    """Whether the processor or the distribution runs the programs anyway."""
    assert not entries(register)
    return foreign.runs(ARCHITECTURE)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with an interpreter that ends well whatever it is given: a program of this host."""
    (native,) = (each for each in Architecture if foreign.is_native(each))
    program = tmp_path / "bin" / foreign.ABIS[ARCHITECTURE].interpreter
    program.parent.mkdir()
    program.write_bytes(foreign.leaving_program(foreign.ABIS[native]))
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def entries(register: Path) -> list[str]:
    """What keepers have registered for the architecture."""
    return [entry.name for entry in register.glob(ENTRY)]


def start(scene: Scene, path: str, name: str, fault: str = "") -> Build:
    """Start a build for the other architecture, of a tiny system of this one."""
    return scene.start(name, "-a", ARCHITECTURE, fault=fault, PATH=path)


@pytest.mark.parametrize(("fault", "expected"), [("", 0), ("install:fail", 1)])
def test_end(
    scene: Scene, path: str, register: Path, runs_before: bool, fault: str, expected: int
) -> None:
    """A build that ends, well or not, leaves nothing registered."""
    status, said = start(scene, path, "lb", fault).end()
    assert status == expected, said
    assert entries(register) == []
    assert foreign.runs(ARCHITECTURE) == runs_before
    assert scene.left_behind() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signal(
    scene: Scene, path: str, register: Path, runs_before: bool, number: signal.Signals
) -> None:
    """So does one that is ended, even if it can undo nothing itself."""
    build = start(scene, path, "lb", "install:pause")
    build.wait_for("fault: pausing")
    assert foreign.runs(ARCHITECTURE)
    assert entries(register) == ([] if runs_before else [ENTRY])
    build.process.send_signal(number)
    build.process.wait()
    wait_until_left(register)
    assert foreign.runs(ARCHITECTURE) == runs_before


def test_two_builds(scene: Scene, path: str, register: Path, runs_before: bool) -> None:
    """The first to end leaves the second one what it needs; the second leaves nothing."""
    builds = [start(scene, path, name, "install:pause") for name in ("first", "second")]
    for build in builds:
        build.wait_for("fault: pausing")
    builds[0].process.terminate()
    assert builds[0].end()[0] == 143
    assert foreign.runs(ARCHITECTURE)
    builds[1].process.terminate()
    assert builds[1].end()[0] == 143
    assert entries(register) == []
    assert foreign.runs(ARCHITECTURE) == runs_before


def test_keeper_that_was_killed(scene: Scene, path: str, register: Path, runs_before: bool) -> None:
    """What a killed keeper has left serves the next build, which takes it away."""
    argv = ["unshare", "--mount", sys.executable, "-m", "amphora_image.foreign", ARCHITECTURE]
    pipe = subprocess.PIPE
    environment = {**os.environ, "PATH": path}
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, env=environment) as keeper:
        assert keeper.stdout
        assert keeper.stdout.readline() == f"{foreign.READY}\n".encode()
        keeper.kill()
    assert entries(register) == ([] if runs_before else [ENTRY])
    assert start(scene, path, "lb").end()[0] == 0
    assert entries(register) == []


def wait_until_left(register: Path) -> None:
    """Wait until nothing is registered by keepers."""
    deadline = time.monotonic() + PATIENCE
    while entries(register):
        assert time.monotonic() < deadline
        time.sleep(0.05)
