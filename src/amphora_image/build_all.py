# SPDX-License-Identifier: Apache-2.0
"""A file of command lines -> several images: builds side by side that share what they can."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from amphora_image.errors import AmphoraImageError, BadValue
from amphora_image.host import TMPFS_MEMORY, available_memory
from amphora_image.request import Request

#: A variable before the options of a line.
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")

#: The build of one image, in a process of its own.
COMMAND = (sys.executable, "-m", "amphora_image", "build")


@dataclass(frozen=True)
class Line:
    """A line of the file.

    :ivar number: of the line, from 1.
    :ivar variables: laid over the caller's environment.
    :ivar options: of ``amphora-image build``.
    :ivar wrapper: words before the command, none in a file: a program that becomes the command.
    """

    number: int
    variables: Mapping[str, str]
    options: Sequence[str]
    wrapper: Sequence[str] = ()


@dataclass(frozen=True)
class Build:
    """An image to build: what it is called in the progress, its line and what that asks for."""

    name: str
    line: Line
    request: Request


def read_lines(text: str) -> list[Line]:
    """Return the lines of a file: variables, then options, quoted as in a shell; # for comments.

    :raises BadValue: a line cannot be read, or there is none.
    """
    lines = []
    for number, row in enumerate(text.splitlines(), start=1):
        try:
            words = shlex.split(row, comments=True)
        except ValueError as error:
            raise BadValue(f"line {number} cannot be read: {error}") from None
        count = next((n for n, word in enumerate(words) if not _ASSIGNMENT.match(word)), len(words))
        if words:
            variables = dict(word.split("=", 1) for word in words[:count])
            lines.append(Line(number, variables, words[count:]))
    if not lines:
        raise BadValue("no image is named", hint="a line has the options of one image")
    return lines


def plan_builds(lines: Sequence[Line], read: Callable[[Line], Request]) -> list[Build]:
    """Return the builds of lines, all of them valid.

    :param read: what a line asks for.
    :raises BadValue: a line has a value that is not allowed, or two write the same file.
    """
    builds: list[Build] = []
    owners: dict[Path, int] = {}
    for line in lines:
        try:
            request = read(line)
        except BadValue as error:
            raise BadValue(f"line {line.number}: {error}", error.hint) from None
        for file in request.outputs.values():
            other = owners.setdefault(file, line.number)
            if other != line.number:
                raise BadValue(
                    f"line {line.number}: {file} is the output of line {other} too",
                    hint="-o names the output file",
                )
        builds.append(Build(request.output.name, line, request))
    return builds


def jobs_here(builds: int) -> int:
    """Return how many builds run side by side: by processors and memory, one at least."""
    return max(1, min(builds, os.cpu_count() or 1, available_memory() // TMPFS_MEMORY))


class Runner:
    """Builds that run, each in a process; ends them all if one must not go on.

    :param tell: is called with a build's name and a line of its progress.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self.tell = tell
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, build: Build) -> tuple[int, float, list[str]]:
        """Run one build; return its exit code, its seconds and its files."""
        began = time.monotonic()
        with self.lock:
            if self.stopped:
                return 130, 0.0, []
            process = subprocess.Popen(
                [
                    # If we are killed, it ends in order.
                    *("setpriv", "--pdeathsig", "TERM", "--"),
                    *(*build.line.wrapper, *COMMAND, "--json", *build.line.options),
                ],
                env={**os.environ, **build.line.variables},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a Ctrl-C on the terminal is for us to pass on
            )
            self.processes.add(process)
        assert process.stderr
        assert process.stdout
        for row in process.stderr:
            self.tell(build.name, row.rstrip("\n"))
        said = process.stdout.read()
        status = process.wait()
        files = json.loads(said)["files"] if status == 0 else []
        return status, time.monotonic() - began, files

    def stop(self) -> None:
        """Let each build end in order, and wait for that."""
        with self.lock:
            self.stopped = True
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()


def build_all(
    builds: Sequence[Build], jobs: int, tell: Callable[[str, str], None]
) -> list[tuple[Build, int, float, list[str]]]:
    """Build images, ``jobs`` at a time; return each with exit code, seconds and files.

    A build that fails does not stop the others.
    """
    runner = Runner(tell)
    pool = ThreadPoolExecutor(jobs)
    try:
        running = [pool.submit(runner.run, build) for build in builds]
        return [(build, *each.result()) for build, each in zip(builds, running, strict=True)]
    finally:
        runner.stop()
        pool.shutdown(cancel_futures=True)


class SomeFailed(AmphoraImageError):
    """Some of several builds failed; the exit code is that of the first."""

    def __init__(self, failed: Mapping[str, int]) -> None:
        super().__init__(
            f"{len(failed)} of the images failed: {', '.join(failed)}",
            hint="what each said is above",
        )
        self.exit_code = next(iter(failed.values()))
