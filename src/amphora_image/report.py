# SPDX-License-Identifier: Apache-2.0
"""What the boot proof has shown, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

#: What systemd tells its journal of a unit: (seconds, "Starting" or done, unit).
_UNIT = re.compile(r"^\[ *([0-9.]+)\] \S+ systemd\[1\]: (Starting|Started|Finished) (\S+\.\w+)")


@dataclass(frozen=True)
class Milestone:
    """One thing that an amphora must do.

    :param seconds: since power-on, when it was done; None if it was not.
    :param detail: what was seen, for instance how many requests were answered by whom.
    """

    name: str
    seconds: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Span:
    """A unit of the amphora's boot and when it was started and ready, seconds since the kernel."""

    name: str
    start: float
    end: float


@dataclass
class Report:
    """What a proof has shown so far.

    :param milestones: those that were reached, in order, and the one that was not.
    :param missing: names of the milestones after the one that was not reached.
    :param agent: the agent's own words: ``hostname``, ``haproxy_version``, ``api_version`` ...
    :param memory_in_use: MiB, of the first amphora when its agent answered; None: not known.
    :param units: the units whose start took longest, the longest first; none if the amphora's
        systemd is older than 256, which does not send its journal.
    :param failure: why the proof ended early; empty if the image has passed.
    """

    image: str
    accelerator: str
    topology: str
    serial_log: str
    milestones: list[Milestone] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    agent: dict[str, object] = field(default_factory=dict)
    memory_in_use: int | None = None
    units: list[Span] = field(default_factory=list)
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the image did all that an amphora must do."""
        return not self.failure

    def json(self) -> str:
        """The report as one JSON object with the fields' names as keys, and ``passed``."""
        return json.dumps({"passed": self.passed, **dataclasses.asdict(self)}, indent=2)

    def __rich__(self) -> Table:
        verdict = "passed" if self.passed else "failed"
        title = f"{Path(self.image).name}, {self.topology}, under {self.accelerator}: {verdict}"
        table = Table("milestone", "seconds", "", title=title, min_width=60)
        for milestone in self.milestones:
            reached = milestone.seconds is not None
            seconds = f"{milestone.seconds:.1f}" if reached else "failed"
            table.add_row(milestone.name, seconds, milestone.detail)
        for name in self.missing:
            table.add_row(name, "not tried", "")
        if self.memory_in_use is not None:
            table.add_row("memory in use", "", f"{self.memory_in_use} MiB when the agent answered")
        return table


def slowest_units(journal: Iterable[str], count: int = 15) -> list[Span]:
    """Find the units whose start took longest in a journal, the longest first.

    :param journal: lines in the format ``short-monotonic`` of :manpage:`journalctl(1)`; what comes
        after a unit's first start is passed over.
    """
    starts: dict[str, float] = {}
    spans: dict[str, Span] = {}
    for seconds, word, unit in (found.groups() for found in map(_UNIT.match, journal) if found):
        if word == "Starting":
            starts.setdefault(unit, float(seconds))
        elif unit in starts:
            spans.setdefault(unit, Span(unit, starts[unit], float(seconds)))
    return sorted(spans.values(), key=lambda span: span.start - span.end)[:count]
