# SPDX-License-Identifier: Apache-2.0
"""``bench/run``: measure what is not measured yet, then write the report and hold the budget."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from amphora_image.build import signals_interrupt
from amphora_image.errors import AmphoraImageError
from bench import budget, rounds, scaling
from bench.measure import Failed, write_whole
from bench.plots import draw
from bench.report import as_page, as_text, collect, tables
from bench.rounds import Place

#: Part -> what one round of it does.
ROUNDS: dict[str, Callable[[Place, int], None]] = {
    "ours": rounds.ours_round,
    "established": rounds.established_round,
    "floor": rounds.floor_round,
}
#: Part -> what is done once, after the rounds.
ONCE: dict[str, Callable[[Place], None]] = {
    "sizes": rounds.size_reports,
    "boots": rounds.boots,
    "scaling": scaling.scale,
}


def parts(text: str) -> list[str]:
    """Return the parts that a list with commas names."""
    names = text.split(",")
    if unknown := [name for name in names if name not in ROUNDS | ONCE]:
        raise argparse.ArgumentTypeError(
            f"{', '.join(unknown)}: allowed are {', '.join(ROUNDS | ONCE)}"
        )
    return names


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(
        prog="bench/run",
        description="Measure ours, the established way and the floor.",
    )
    every = ",".join(ROUNDS | ONCE)
    made.add_argument("--only", type=parts, default=parts(every), metavar="PARTS", help=every)
    made.add_argument("--repeat", type=int, default=1, metavar="N", help="rounds (default: 1)")
    made.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).with_name("results"),
        metavar="DIR",
        help="what is measured there already is kept (default: bench/results)",
    )
    return made


def report(out: Path) -> list[str]:
    """Write the report as JSON, text, page and drawings; return what is over the budget."""
    document = collect(out)
    limits = budget.load()
    made = tables(document, limits)
    drawings = draw(document, out)
    write_whole(out / "report.json", document)
    (out / "report.rst").write_text(as_text(document, made))
    (out / "report.html").write_text(as_page(document, made, drawings))
    return limits.excesses({n: s for n, s in document["shares"].items() if n in limits.most})


def measure(chosen: Sequence[str], repeat: int, place: Place) -> None:
    """Do what the chosen parts lack."""
    for number in range(1, repeat + 1):
        for name in (name for name in ROUNDS if name in chosen):
            ROUNDS[name](place, number)
    for name in (name for name in ONCE if name in chosen):
        ONCE[name](place)


def main() -> int:
    """Run the benchmark; return 0, 1 after a failure, or 4 if the budget is not held."""
    args = parser().parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    place = Place(out, lambda line: print(f"* {line}", file=sys.stderr, flush=True))
    try:
        with signals_interrupt():
            measure(args.only, args.repeat, place)
    except (AmphoraImageError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    over = report(out)
    print((out / "report.rst").read_text().partition("Bytes: ")[0])
    print(*over, sep="\n")
    print(f"{out}/report.html, .rst, .json")
    return 4 if over else 0


if __name__ == "__main__":
    sys.exit(main())
