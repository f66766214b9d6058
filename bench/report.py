# SPDX-License-Identifier: Apache-2.0
"""The results of a benchmark as one document, as tables of text, and as a page of HTML."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from bench import established
from bench.budget import Budget
from bench.measure import medians

Document = dict[str, Any]

#: What is built, in the order of the tables: result's name -> words.
CONTENDERS = {
    "ours-cold": "ours, caches empty",
    "ours-warm": "ours, nothing changed",
    "ours-element": "ours, last element changed",
    "ours-agent": "ours, agent's version changed",
    "ours-five": "ours, five images",
    "established": "established",
    "floor": "floor",
}

#: A phase's name -> its kind, so that unlike builds can be compared; the first that fits.
KINDS = (
    (r"qemu-img|image files|checksums", "image file"),
    (r"agent", "agent"),
    (r"disk|boot loader|Disk", "disk, boot loader"),
    (r"apt|mmdebstrap|root file system|locales", "packages"),
    (r"", "scripts"),
)
KIND_NAMES = ("packages", "agent", "scripts", "disk, boot loader", "image file")

#: Share -> result, what it is a share of, the figure of both.
SHARES = {
    "cold": ("ours-cold", "established", "seconds"),
    "qcow2": ("ours-cold", "established", "bytes"),
    "warm": ("ours-warm", "ours-cold", "seconds"),
    "element": ("ours-element", "ours-cold", "seconds"),
    "agent": ("ours-agent", "ours-cold", "seconds"),
    "five": ("ours-five", "ours-cold", "seconds"),
    "cold, CPU": ("ours-cold", "established", "cpu_seconds"),
    "of the floor": ("ours-cold", "floor", "seconds"),
    "of the floor, CPU": ("ours-cold", "floor", "cpu_seconds"),
}

#: Share -> milestone of the boot proof.
MILESTONES = {"answer": "agent answers", "request": "HTTP balanced"}


def kind_of(phase: str) -> str:
    """Return the kind of a phase, one of :data:`KIND_NAMES`."""
    return next(kind for pattern, kind in KINDS if re.search(pattern, phase))


def collect(out: Path) -> Document:
    """Return all results below a directory as one document; what is not there is left out.

    Keys: ``host``, ``builds`` (medians by contender), ``rounds``, ``shares``, ``boots``, ``sizes``,
    ``scaling``.
    """
    rounds = [_read(path) for path in sorted(out.glob("rounds/*"), key=lambda path: int(path.name))]
    builds = {
        name: medians([each[name] for each in rounds if name in each])
        for name in CONTENDERS
        if any(name in each for each in rounds)
    }
    found = {name: _read(out / name) for name in ("boots", "sizes", "scaling")}
    boots = {name: milestones(report) for name, report in found["boots"].items()}
    return {
        "host": {
            "system": f"{os.uname().sysname} {os.uname().release}, {os.uname().machine}",
            "cores": os.cpu_count(),
            "established": established.deviation(),
        },
        "builds": builds,
        "rounds": rounds,
        "shares": {**shares(rounds), **_of_established(boots, found["sizes"])},
        "boots": boots,
        "sizes": found["sizes"],
        "scaling": found["scaling"],
    }


def _read(directory: Path) -> Document:
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def shares(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median of each share, taken round by round."""
    found: dict[str, list[float]] = {}
    for each in rounds:
        for share, (name, base, figure) in SHARES.items():
            if name in each and base in each:
                found.setdefault(share, []).append(each[name][figure] / each[base][figure])
        if "ours-cold" in each:
            found.setdefault("rest", []).append(rest(each["ours-cold"]["phases"]))
    return {share: medians(values) for share, values in found.items()}


def rest(phases: Mapping[str, Mapping[str, Any]]) -> float:
    """Return which part of a build's seconds is not the installation of packages."""
    kinds = by_kind({"phases": phases})
    return 1 - kinds["packages"] / sum(kinds.values())


def milestones(report: Mapping[str, Any]) -> dict[str, float]:
    """Return of a boot proof: ``answer`` and ``request`` in seconds, ``memory`` in bytes."""
    seconds = {each["name"]: each["seconds"] for each in report["milestones"]}
    found = {name: seconds.get(milestone) for name, milestone in MILESTONES.items()}
    found["memory"] = next(_numbers(report, "memory"), None)
    return {name: value for name, value in found.items() if value is not None}


def _numbers(document: Any, word: str) -> Iterator[float]:
    """Yield the numbers whose key has a word in it, at any depth."""
    if isinstance(document, dict):
        for key, value in document.items():
            if word in key and isinstance(value, int | float):
                yield value
            else:
                yield from _numbers(value, word)


def _of_established(boots: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for figures in (boots, sizes):
        if "ours" in figures and "established" in figures:
            mine, theirs = figures["ours"], figures["established"]
            for name in (*MILESTONES, "memory", "used"):
                if name in mine and name in theirs:
                    found[name] = round(mine[name] / theirs[name], 3)
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a simple table of reStructuredText; the first column must not be empty."""
    lines = [list(head), *([cell or "\\ " for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    rule = "  ".join("=" * width for width in widths)

    def text(line: Sequence[str]) -> str:
        return "  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip()

    return "\n".join([rule, text(lines[0]), rule, *map(text, lines[1:]), rule])


def by_kind(build: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of a build by kind of phase."""
    found = dict.fromkeys(KIND_NAMES, 0.0)
    for phase, figures in build["phases"].items():
        found[kind_of(phase)] += figures["seconds"]
    return found


def tables(document: Document, budget: Budget) -> dict[str, str]:
    """Return title -> table of reStructuredText, of what the document has."""
    builds = document["builds"]
    made = {
        "Builds": _builds(builds),
        "Shares": _shares(document["shares"], budget),
        **{f"Phases: {CONTENDERS[n]}": _phases(b) for n, b in builds.items() if b["phases"]},
        "Boots": _boots(document["boots"]),
        "Scaling": _scaling(document["scaling"]),
        **{f"Bytes: {name}": _packages(found) for name, found in document["sizes"].items()},
    }
    return {title: text for title, text in made.items() if text}


def _builds(builds: Mapping[str, Any]) -> str:
    head = ["build", "seconds", "CPU s", *KIND_NAMES, "bytes"]
    rows = []
    for name, build in builds.items():
        kinds = by_kind(build).values() if build["phases"] else [None] * len(KIND_NAMES)
        cells = ["" if seconds is None else f"{seconds:.1f}" for seconds in kinds]
        size = f"{build['bytes']:,}" if "bytes" in build else ""
        figures = [f"{build['seconds']:.1f}", f"{build['cpu_seconds']:.1f}"]
        rows.append([CONTENDERS[name], *figures, *cells, size])
    return table(head, rows) if rows else ""


def _shares(found: Mapping[str, float], budget: Budget) -> str:
    rows = []
    for name, share in found.items():
        most = budget.most.get(name)
        verdict = "" if most is None else "over" if share > most else "held"
        of = budget.base.get(name, "")
        rows.append([name, f"{share:.3f}", "none" if most is None else str(most), of, verdict])
    return table(["share", "measured", "at most", "of", "budget"], rows) if rows else ""


def _phases(build: Mapping[str, Any]) -> str:
    rows = [
        [
            phase,
            f"{figures['seconds']:.1f}",
            f"{figures.get('cores', 0):.2f}",
            f"{figures.get('disk', 0) / 1e6:.1f}",
            f"{figures.get('network', 0) / 1e6:.1f}",
            figures["bound"],
        ]
        for phase, figures in build["phases"].items()
    ]
    return table(["phase", "seconds", "cores", "disk MB/s", "net MB/s", "bound by"], rows)


def _boots(boots: Mapping[str, Mapping[str, float]]) -> str:
    figures = (*MILESTONES, "memory")
    rows = [
        [name, *(f"{found[each]:,.1f}" if each in found else "" for each in figures)]
        for name, found in boots.items()
    ]
    head = ["image", "agent answers, s", "first request, s", "memory in use"]
    return table(head, rows) if rows else ""


def points(scaling: Mapping[str, Any], curve: str) -> list[tuple[int, Document]]:
    """Return the points of a curve, ``size``, ``images`` or ``packages``, in order."""
    found = [(name.split("-"), result) for name, result in scaling.items()]
    return sorted(
        ((int(number), result) for (kind, number), result in found if kind == curve),
        key=lambda point: point[0],
    )


def _scaling(scaling: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{curve}: {number}",
            f"{result['seconds']:.1f}",
            f"{result['cpu_seconds']:.1f}",
            f"{result['bytes']:,}" if "bytes" in result else "",
            str(result.get("packages", "")),
        ]
        for curve in ("size", "images", "packages")
        for number, result in points(scaling, curve)
    ]
    return table(["curve", "seconds", "CPU s", "bytes", "packages in all"], rows) if rows else ""


def _packages(found: Mapping[str, Any]) -> str:
    rows = [[row["package"], f"{row['bytes']:,}", row["why"]] for row in found["packages"]]
    rows.append(["all files", f"{found['used']:,}", ""])
    return table(["package", "bytes", "why"], rows)


def as_text(document: Document, made: Mapping[str, str]) -> str:
    """Return the report in reStructuredText."""
    parts = ["Benchmark\n=========", _about(document["host"])]
    for title, text in made.items():
        parts.append(f"{title}\n{'-' * len(title)}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _about(host: Mapping[str, Any]) -> str:
    return f"{host['system']}, {host['cores']} cores. Established: {host['established']}."


_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Amphora images: benchmark</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; }
body { padding: 0 1rem; }
figure { background: #fff; margin: 0; overflow-x: auto; }
pre { font-size: 13px; overflow-x: auto; }
</style>
<h1>Amphora images: benchmark</h1>
<p>$about</p>
$figures
$tables
</html>
""")


def as_page(document: Document, made: Mapping[str, str], drawings: Iterable[str]) -> str:
    """Return the report as a page of HTML that needs nothing else.

    :param drawings: as SVG elements.
    """
    return _PAGE.substitute(
        about=escape(_about(document["host"])),
        figures="\n".join(f"<figure>{drawing}</figure>" for drawing in drawings),
        tables="\n".join(
            f"<h2>{escape(title)}</h2><pre>{escape(text)}</pre>" for title, text in made.items()
        ),
    )
