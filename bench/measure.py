# SPDX-License-Identifier: Apache-2.0
"""One command's cost: wall and CPU seconds, and what the machine did in each of its phases."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

#: Seconds between two looks at the machine.
INTERVAL = 0.25
#: Sectors of /proc/diskstats, whatever the disk's own are (kernel documentation, "iostats").
SECTOR = 512
#: From here on a machine's part counts as busy.
BUSY = 0.8
#: Bytes a second below which neither disk nor network can be what a phase waits for.
TRICKLE = 2_000_000


#: Before a command: it ends, and undoes what it has begun, if this process ends for any reason.
ENDS_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")


@dataclass(frozen=True)
class Sample:
    """What the whole machine had done at a moment.

    :ivar at: seconds of the monotonic clock.
    :ivar cpu: seconds that all CPUs together were busy.
    :ivar waiting: seconds that they were idle for want of a disk.
    :ivar disk: bytes read from and written to disks.
    :ivar network: bytes received from other hosts.
    """

    at: float
    cpu: float
    waiting: float
    disk: int
    network: int


@dataclass(frozen=True)
class Span:
    """A phase of a command, seconds of the monotonic clock."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Run:
    """What a command took.

    :ivar seconds: from start to end.
    :ivar cpu_seconds: user and system time of all its processes, :manpage:`getrusage(2)`.
    :ivar lines: (seconds of the monotonic clock, text) of what it said.
    :ivar samples: of the machine meanwhile.
    """

    start: float
    seconds: float
    cpu_seconds: float
    lines: Sequence[tuple[float, str]]
    samples: Sequence[Sample]


class Failed(Exception):
    """A measured command ended with a status other than 0, or said what cannot be understood."""


def sample() -> Sample:
    """Look at the machine; :manpage:`proc(5)` tells the fields."""
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, waiting, *interrupts = (
        int(word) / tick for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    disks = (line.split() for line in Path("/proc/diskstats").read_text().splitlines())
    whole = {path.name for path in Path("/sys/block").iterdir() if (path / "device").exists()}
    cards = (line.split(":") for line in Path("/proc/net/dev").read_text().splitlines()[2:])
    return Sample(
        time.monotonic(),
        user + nice + system + sum(interrupts),
        waiting,
        sum(SECTOR * (int(fields[5]) + int(fields[9])) for fields in disks if fields[2] in whole),
        sum(int(counts.split()[0]) for name, counts in cards if name.strip() != "lo"),
    )


def measure(
    process: subprocess.Popen[str], log: Path, ending: signal.Signals = signal.SIGKILL
) -> Run:
    """Follow a started command to its end.

    :param process: its standard output is a pipe with all that it says.
    :param log: where to keep what it said, each line after its seconds.
    :param ending: the signal that ends it if this ends first.
    :raises Failed: its status is not 0.
    """
    start = time.monotonic()
    samples, lines = [sample()], []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            samples.append(sample())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    assert process.stdout
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("w") as file, process.stdout as said:
            for line in said:
                lines.append((time.monotonic(), line.rstrip()))
                file.write(f"{lines[-1][0] - start:8.2f} {line}")
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.send_signal(ending)
            process.wait()
        ended.set()
        watcher.join()
    samples.append(sample())
    if process.returncode:
        raise Failed(f"{log.stem} ended with {process.returncode}; what it said is in {log}")
    return Run(start, samples[-1].at - start, used.ru_utime + used.ru_stime, lines, samples)


def command(
    argv: Sequence[str | Path], log: Path, *, cwd: Path, env: dict[str, str] | None = None
) -> Run:
    """Run a command and measure it.

    :raises Failed: its status is not 0.
    """
    process = subprocess.Popen(
        [*ENDS_WITH_US, *map(str, argv)],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return measure(process, log, signal.SIGTERM)


def spans(run: Run, begins: Callable[[str], str | None]) -> list[Span]:
    """Divide a run into phases.

    :param begins: a line -> the phase that it begins, or None. What is before the first such line
        belongs to the phase "start".
    """
    marks = [(run.start, "start")]
    for at, line in run.lines:
        name = begins(line)
        if name and name != marks[-1][1]:
            marks.append((at, name))
    ends = [*(at for at, _ in marks[1:]), run.start + run.seconds]
    return [Span(name, at, end) for (at, name), end in zip(marks, ends, strict=True) if end > at]


def phases(found: Iterable[Span], samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Return phase -> ``seconds``, ``cores`` busy, ``disk`` and ``network`` bytes/s, ``bound``."""
    by_name: dict[str, list[Span]] = {}
    for span in found:
        by_name.setdefault(span.name, []).append(span)
    return {name: _phase(parts, samples) for name, parts in by_name.items()}


def _phase(parts: Sequence[Span], samples: Sequence[Sample]) -> dict[str, Any]:
    seconds = sum(span.end - span.start for span in parts)
    rates = {
        what: sum(_used(span, samples, what) for span in parts) / (seconds or 1)
        for what in ("cpu", "waiting", "disk", "network")
    }
    return {
        "seconds": round(seconds, 2),
        "cores": round(rates["cpu"], 2),
        "disk": round(rates["disk"]),
        "network": round(rates["network"]),
        "bound": bound(rates, os.cpu_count() or 1),
    }


def _used(span: Span, samples: Sequence[Sample], what: str) -> float:
    return _at(samples, span.end, what) - _at(samples, span.start, what)


def _at(samples: Sequence[Sample], at: float, what: str) -> float:
    """A sample's value at a moment between two looks, by a straight line."""
    for before, after in pairwise(samples):
        if at <= after.at:
            part = max(at - before.at, 0) / ((after.at - before.at) or 1)
            first, last = getattr(before, what), getattr(after, what)
            return float(first + part * (last - first))
    return float(getattr(samples[-1], what))


def bound(rates: dict[str, float], cores: int) -> str:
    """Say what a phase waits for, by what the whole machine did meanwhile.

    :param rates: per second: ``cpu`` and ``waiting`` seconds, ``disk`` and ``network`` bytes.
    """
    if rates["cpu"] >= BUSY * cores:
        return "CPU, all cores"
    if rates["waiting"] >= 0.3 and rates["disk"] >= TRICKLE:
        return "disk"
    if rates["cpu"] >= BUSY:
        return "CPU, one core"
    return "network" if rates["network"] >= TRICKLE else "latency"


def medians(values: Sequence[Any]) -> Any:
    """Return the median of numbers, or of each entry of documents of one form."""
    first = values[0]
    if isinstance(first, dict):
        common = [key for key in first if all(key in value for value in values)]
        return {key: medians([value[key] for value in values]) for key in common}
    if isinstance(first, int | float) and not isinstance(first, bool):
        return round(median(values), 3)
    return first


def write_whole(path: Path, document: Any) -> None:
    """Write a document as JSON, as a whole or not at all."""
    part = path.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(document, indent=2) + "\n")
    part.replace(path)
