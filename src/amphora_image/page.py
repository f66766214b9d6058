# SPDX-License-Identifier: Apache-2.0
"""The boot proof's report as one page of HTML, which needs nothing else to be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from amphora_image.check import Finding
from amphora_image.report import Report, Span

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title: $verdict</title>
<style>
:root { color-scheme: light dark; --bar: #3b82c4; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; }
body { max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { border-radius: .3rem; color: #fff; padding: .1rem .6rem; }
.passed { background: #2b7a3d; }
.failed { background: #b3261e; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .5rem; text-align: left; }
td.seconds { font-variant-numeric: tabular-nums; text-align: right; white-space: nowrap; }
td.time { width: 40%; }
.bar { background: var(--bar); border-radius: 2px; height: .8rem; min-width: 2px; }
.away { opacity: .55; }
pre { background: #8882; overflow-x: auto; padding: 1rem; }
</style>
<h1>$title <span class="verdict $verdict">$verdict</span></h1>
<p>$about</p>
$failure
<h2>Milestones</h2>
<table id="milestones">
<tr><th>milestone<th>after<th>time<th>seen
$milestones
</table>
<h2>Slowest units of the boot</h2>
<table id="units">
<tr><th>unit<th>took<th>time
$units
</table>
<h2>Findings</h2>
<table id="findings">
<tr><th>rule<th>severity<th>what
$findings
</table>
""")


def write_page(report: Report, path: Path, findings: Sequence[Finding]) -> None:
    """Write the page.

    :param findings: of ``check``.
    :raises OSError: it cannot be written.
    """
    path.write_text(as_page(report, findings), encoding="utf-8")


def as_page(report: Report, findings: Sequence[Finding]) -> str:
    """Return a report, and what ``check`` has found, as an HTML document."""
    about = {
        "topology": report.topology,
        "accelerator": report.accelerator,
        "serial log": report.serial_log,
        **report.agent,
        **({"memory in use": f"{report.memory_in_use} MiB"} if report.memory_in_use else {}),
    }
    failure = f"<h2>Failure</h2><pre>{escape(report.failure)}</pre>" if report.failure else ""
    return _PAGE.substitute(
        title=escape(Path(report.image).name),
        verdict="passed" if report.passed else "failed",
        about="<br>".join(f"{escape(key)}: {escape(str(text))}" for key, text in about.items()),
        failure=failure,
        milestones="\n".join(_milestones(report)),
        units="\n".join(_units(report.units)),
        findings="\n".join(_findings(findings)),
    )


def _milestones(report: Report) -> list[str]:
    end = max((each.seconds or 0 for each in report.milestones), default=0)
    before, rows = 0.0, []
    for each in report.milestones:
        if each.seconds is None:
            rows.append(_row(each.name, "failed", "", each.detail))
        else:
            bar = _bar(Span(each.name, before, each.seconds), end)
            rows.append(_row(each.name, f"{each.seconds:.1f} s", bar, each.detail))
            before = each.seconds
    rows += [_row(name, "not tried", "", "", "away") for name in report.missing]
    return rows


def _units(spans: list[Span]) -> list[str]:
    end = max((span.end for span in spans), default=0)
    return [_row(span.name, f"{span.end - span.start:.1f} s", _bar(span, end)) for span in spans]


def _findings(findings: Sequence[Finding]) -> list[str]:
    rows = [(each.rule, each.severity, each.what) for each in findings]
    rows = rows or [("all", "", "no rule is broken")]
    return ["<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows]


def _bar(span: Span, end: float) -> str:
    start, width = (100 * seconds / (end or 1) for seconds in (span.start, span.end - span.start))
    return f'<div class="bar" style="margin-left: {start:.2f}%; width: {width:.2f}%"></div>'


def _row(name: str, seconds: str, bar: str, detail: str = "", kind: str = "") -> str:
    cells = f'<td>{escape(name)}<td class="seconds">{seconds}<td class="time">{bar}'
    return f'<tr class="{kind}">{cells}' + (f"<td>{escape(detail)}" if detail else "")
