# SPDX-License-Identifier: Apache-2.0
"""The report of the boot proof: table, JSON and page tell the same."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from amphora_image.check import Finding
from amphora_image.page import as_page, write_page
from amphora_image.report import Milestone, Report, Span, slowest_units

JOURNAL = """\
[    4.123456] lb kernel: systemd[1]: Starting nothing.service
[    5.000000] lb systemd[1]: Starting slow.service - Slow...
[    6.500000] lb systemd[1]: Starting quick.service - Quick...
[    6.750000] lb systemd[1]: Started quick.service - Quick.
[    9.000000] lb systemd[1]: Finished slow.service - Slow.
[    9.100000] lb systemd[1]: Started simple.service - Simple.
[    1.000000] lb systemd[1]: Starting quick.service - Quick...
[   99.000000] lb systemd[1]: Started quick.service - Quick.
""".splitlines()


@pytest.fixture
def report() -> Report:
    """A report of an image that failed, with characters that HTML has a use for."""
    return Report(
        image="/images/a<b>.qcow2",
        accelerator="tcg",
        topology="single",
        serial_log="a.log",
        milestones=[
            Milestone("kernel starts", 1.5),
            Milestone("HTTP balanced", 40.25, "50 of 50 requests"),
            Milestone("UDP balanced"),
        ],
        missing=["rebooted"],
        agent={"api_version": "1.0"},
        memory_in_use=154,
        units=[Span("slow.service", 5.0, 9.0)],
        failure="UDP balanced: timed out\n  <a line & more>",
    )


def test_table_shows_what_was_reached_and_what_not(report: Report) -> None:
    """Every milestone is shown: with its seconds, as failed, or as not tried."""
    console = Console(width=100)
    with console.capture() as capture:
        console.print(report)
    shown = capture.get()
    for text in ("40.2", "50 of 50 requests", "failed", "not tried", "under tcg", "154 MiB"):
        assert text in shown


def test_json_has_every_field(report: Report) -> None:
    """The JSON has the fields by their names, and the verdict."""
    told = json.loads(report.json())
    assert told["passed"] is False
    assert told["milestones"][1] == {
        "name": "HTTP balanced",
        "seconds": 40.25,
        "detail": "50 of 50 requests",
    }
    assert told["missing"] == ["rebooted"]


class Reader(HTMLParser):
    """What a page loads, and the text of it."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an attribute that makes a browser load something."""
        self.loads += [f"{tag} {value}" for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.text += data


def test_page_shows_all_and_loads_nothing(report: Report, tmp_path: Path) -> None:
    """The page has the whole report in it, as text, and needs no other file."""
    write_page(report, tmp_path / "proof.html", [])
    reader = Reader()
    reader.feed((tmp_path / "proof.html").read_text())
    assert reader.loads == []
    for text in ("a<b>.qcow2", "failed", "40.2 s", "not tried", "<a line & more>", "slow.service"):
        assert text in reader.text
    assert "url(" not in as_page(report, [])


def test_bars_follow_one_another(report: Report) -> None:
    """A milestone's bar begins where that of the one before ends."""
    page = as_page(report, [])
    assert "margin-left: 0.00%; width: 3.73%" in page
    assert "margin-left: 3.73%; width: 96.27%" in page


def test_page_of_a_report_without_anything() -> None:
    """A proof that saw nothing at all still makes a page."""
    assert "passed" in as_page(Report("a.qcow2", "tcg", "single", "a.log"), [])


def test_slowest_units() -> None:
    """A unit's first start counts, from systemd's first word of it to its last."""
    assert slowest_units(JOURNAL) == [
        Span("slow.service", 5.0, 9.0),
        Span("quick.service", 6.5, 6.75),
    ]
    assert slowest_units(JOURNAL, count=1) == [Span("slow.service", 5.0, 9.0)]


def test_page_has_the_findings(report: Report) -> None:
    """What ``check`` has found is on the page, or that it has found nothing."""
    found = [Finding("setuid", "error", "/usr/bin/<b> has the mode 4755", "why", "fix")]
    row = "<tr><td>setuid<td>error<td>/usr/bin/&lt;b&gt; has the mode 4755"
    assert row in as_page(report, found)
    assert "no rule is broken" not in as_page(report, found)
    assert "no rule is broken" in as_page(report, [])
