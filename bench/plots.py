# SPDX-License-Identifier: Apache-2.0
"""The drawings of a report: phases side by side, and the curves."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.report import CONTENDERS, KIND_NAMES, by_kind, points

#: Distinct for all kinds of eyes (Okabe and Ito's palette), by kind of phase.
COLOURS = dict(
    zip(KIND_NAMES, ("#0072b2", "#e69f00", "#999999", "#009e73", "#cc79a7"), strict=True)
)

CURVES = {"size": "GiB of the disk", "images": "images in one command", "packages": "more packages"}


def side_by_side(builds: Mapping[str, Any]) -> Figure | None:
    """Draw a bar for each build, divided by kind of phase; None if there is none."""
    shown = {name: build for name, build in builds.items() if build["phases"]}
    if not shown:
        return None
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    names = list(reversed(shown))
    left = [0.0] * len(names)
    for kind in KIND_NAMES:
        widths = [by_kind(shown[name])[kind] for name in names]
        axes.barh(range(len(names)), widths, left=left, color=COLOURS[kind], label=kind)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, name in enumerate(names):
        axes.text(left[row], row, f" {shown[name]['seconds']:.0f} s", va="center")
    axes.set_yticks(range(len(names)), [CONTENDERS[name] for name in names])
    axes.set_xlabel("seconds")
    axes.margins(x=0.08)
    axes.legend(ncols=len(KIND_NAMES), loc="upper center", bbox_to_anchor=(0.4, 1.2), frameon=False)
    return figure


def curves(scaling: Mapping[str, Any]) -> Figure | None:
    """Draw seconds over disk size, number of images and packages; None if nothing was measured."""
    found = {curve: points(scaling, curve) for curve in CURVES}
    shown = {curve: measured for curve, measured in found.items() if measured}
    if not shown:
        return None
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for column, (curve, measured) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), column)
        numbers = [number for number, _ in measured]
        for what, style in (("seconds", "o-"), ("cpu_seconds", "s--")):
            values = [result[what] for _, result in measured]
            axes.plot(numbers, values, style, label=what.replace("cpu_", "CPU "))
        axes.set_xlabel(CURVES[curve])
        axes.set_xticks(numbers)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    return figure


def draw(document: Mapping[str, Any], out: Path) -> list[str]:
    """Write ``phases.png`` and ``scaling.png``; return the same drawings as SVG elements."""
    mpl.rcParams["svg.fonttype"] = "none"
    figures = {
        "phases": side_by_side(document["builds"]),
        "scaling": curves(document["scaling"]),
    }
    drawings = []
    for name, figure in figures.items():
        if figure:
            figure.savefig(out / f"{name}.png", dpi=120)
            text = io.StringIO()
            figure.savefig(text, format="svg")
            drawings.append(text.getvalue().partition("<!DOCTYPE")[2].partition(">")[2])
    return drawings
