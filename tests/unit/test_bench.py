# SPDX-License-Identifier: Apache-2.0
"""bench: what is made of a command's output, of dpkg's database and of the results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from amphora_image.tree import Entry, Tree
from bench import budget, established, measure, ours, report, sizes
from bench.measure import Run, Sample, Span

FILE = 0o100644


def a_run(*lines: tuple[float, str], seconds: float = 10.0) -> Run:
    """A run that began at 100 s and said something now and then, on an idle machine."""
    said = [(100 + at, line) for at, line in lines]
    samples = [Sample(100.0, 0, 0, 0, 0), Sample(100 + seconds, 0, 0, 0, 0)]
    return Run(100.0, seconds, 1.0, said, samples)


def test_spans_last_until_the_next_begins() -> None:
    """A phase ends where another begins, a line of the same phase does not divide it."""
    run = a_run((2, "a"), (3, "noise"), (4, "a"), (5, "b"), (7, "a"))
    found = measure.spans(run, lambda line: line if line in "ab" else None)
    assert found == [
        Span("start", 100, 102),
        Span("a", 102, 105),
        Span("b", 105, 107),
        Span("a", 107, 110),
    ]


def test_phases_add_up_what_the_machine_did_in_each_span() -> None:
    """Two spans of one phase are one row, with rates of both together, between samples too."""
    samples = [Sample(0, 0, 0, 0, 0), Sample(10, 10, 0, 100, 0), Sample(20, 10, 0, 100, 400)]
    found = measure.phases([Span("a", 0, 5), Span("b", 5, 10), Span("a", 10, 15)], samples)
    assert found["a"] | {"bound": ""} == {
        "seconds": 10,
        "cores": 0.5,
        "disk": 5,
        "network": 20,
        "bound": "",
    }
    assert found["b"]["cores"] == 1


@pytest.mark.parametrize(
    ("busy", "expected"),
    [
        ({"cpu": 1.9}, "CPU, all cores"),
        ({"cpu": 1.0}, "CPU, one core"),
        ({"cpu": 0.2, "waiting": 0.8, "disk": 9e7}, "disk"),
        ({"cpu": 1.0, "waiting": 0.8, "disk": 9e7}, "disk"),
        ({"cpu": 0.2, "waiting": 0.8}, "latency"),
        ({"cpu": 0.2, "network": 9e7}, "network"),
        ({"cpu": 0.2, "network": 9e3}, "latency"),
    ],
)
def test_bound(busy: dict[str, float], expected: str) -> None:
    """What a phase waits for is told by what the machine does, on two cores."""
    idle = {"cpu": 0.0, "waiting": 0.0, "disk": 0.0, "network": 0.0}
    assert measure.bound(idle | busy, 2) == expected


def test_medians_of_documents() -> None:
    """Each number is the median of its own; what not all have is left out."""
    values = [
        {"a": 1, "b": {"c": 5}, "d": "x"},
        {"a": 9, "b": {"c": 7}, "d": "y"},
        {"a": 2, "b": {}},
    ]
    assert measure.medians(values) == {"a": 2, "b": {}}
    assert measure.medians(values[:2]) == {"a": 5, "b": {"c": 6}, "d": "x"}


def test_established_steps() -> None:
    """Lines of diskimage-builder begin the steps that facts of earlier days have."""
    lines = (
        "2026-01-01 00:00:00.000 | dib-run-parts Running /tmp/x/hooks/root.d/08-debootstrap",
        "2026-01-01 00:00:00.000 | dib-run-parts 08-debootstrap completed",
        "2026-01-01 00:00:00.000 | dib-run-parts Running /tmp/in_target.d/install.d/10-other",
        "2026-01-01 00:00:00.000 | Converting image using qemu-img convert",
    )
    begun = [established.begins(line) for line in lines]
    assert begun == ["mmdebstrap", None, "other scripts", "qemu-img, zlib"]


def test_every_step_has_a_kind() -> None:
    """The steps of the established way are compared with ours by kind."""
    kinds = {name: report.kind_of(name) for _, name in established.STEPS}
    assert kinds["agent: venv, pip"] == "agent"
    assert kinds["locales"] == kinds["mmdebstrap"] == "packages"
    assert kinds["qemu-img, zlib"] == report.kind_of("image files") == "image file"
    assert set(kinds.values()) == set(report.KIND_NAMES)


def test_constraints_have_no_hashes() -> None:
    """A hash would make pip refuse every package that has none."""
    lock = 'a==1 ; python_version > "3" \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\nb==2\n'
    assert established.constraints(lock) == 'a==1 ; python_version > "3"\nb==2\n'


def test_pip_settings(tmp_path: Path) -> None:
    """The index that the host's pip knows goes inside, a directory of the host does not."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("[global]\nindex-url = https://one.example.org/%7Ea\ntrusted-host = x\n")
    second.write_text("[global]\nindex-url = https://two.example.org\n")
    assert established.pip_settings([first, second, tmp_path / "none"], {}) == {
        "PIP_INDEX_URL": "https://two.example.org",
        "PIP_TRUSTED_HOST": "x",
    }
    environ = {"PIP_INDEX_URL": "file:///opt/index"}
    assert established.pip_settings([], environ) == {}


def test_ours_tells_its_phases() -> None:
    """A phase's line comes at its end."""
    run = a_run((3, "   2.5 s  disk"), (4, "anything else"), (6, "   1.0 s  image files"))
    assert ours.steps(run) == [Span("disk", 100.5, 103), Span("image files", 105, 106)]


def test_edits_are_undone(tmp_path: Path) -> None:
    """A changed element is the old one again, whatever happens to the build."""
    script = tmp_path / "src/amphora_image/elements/amphora-trim/finalise.d/90-x"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/bash\n")
    changed = ours.late_element_changed(tmp_path)
    changed.__enter__()
    assert script.read_text() != "#!/bin/bash\n"
    assert not changed.__exit__(RuntimeError, RuntimeError(), None)
    assert script.read_text() == "#!/bin/bash\n"


STATUS = """\
Package: libc6
Status: install ok installed

Package: haproxy
Status: install ok installed
Pre-Depends: init-helpers (>= 1)
Depends: libc6 (>= 2.38), awk | mawk,
 libssl3
Recommends: docs

Package: init-helpers
Status: install ok installed

Package: gawk
Status: install ok installed
Provides: awk (= 5)
Depends: libc6

Package: docs
Status: install ok installed
Depends: docs-data

Package: docs-data
Status: install ok installed

Package: libssl3
Status: deinstall ok config-files

Package: bash
Status: install ok installed
Essential: yes

Package: left
Status: install ok installed
Depends: lefts-library

Package: lefts-library
Status: install ok installed
"""


def test_reasons() -> None:
    """Each package has the shortest chain to what was asked for; what is removed has none."""
    assert sizes.reasons(STATUS, {"haproxy": "asked for", "absent": "asked for"}) == {
        "haproxy": "asked for",
        "bash": "essential",
        "libc6": "needed by haproxy",
        "gawk": "needed by haproxy",
        "init-helpers": "needed by haproxy",
        "docs": "recommended by haproxy",
        "docs-data": "needed by docs",
        "left": "a script, or nobody any more",
        "lefts-library": "needed by left",
    }


def test_files_of_no_package() -> None:
    """The agent's packages, the initramfs and byte code are told apart; links are followed."""
    site = "opt/amphora-agent/lib/python3.13/site-packages"
    entries = {
        "bin": Entry(0o120777, target="usr/bin"),
        "usr/bin/bash": Entry(FILE, size=1),
        f"{site}/octavia/a.py": Entry(FILE, size=10),
        f"{site}/octavia-19.0.0.dist-info/RECORD": Entry(FILE, size=5),
        "boot/initrd.img-6.12": Entry(FILE, size=100),
        "usr/lib/python3/__pycache__/a.pyc": Entry(FILE, size=7),
        "etc/motd": Entry(FILE, size=3),
    }
    lists = {"var/lib/dpkg/info/bash.list": b"/bin/bash\n"}
    entries |= dict.fromkeys(lists, Entry(FILE))
    found, why = sizes.unowned(Tree(entries, lists))
    assert found == {
        "(agent) octavia": 15,
        "(initramfs)": 100,
        "(byte code)": 7,
        "(other files)": 3,
    }
    assert set(why) == set(found)


def test_shares_are_taken_round_by_round() -> None:
    """The median of the rounds' shares, not the share of the medians: hosts are noisy."""
    phases = {"root file system and packages": {"seconds": 3.0}, "disk": {"seconds": 1.0}}
    rounds = [
        {"ours-cold": {"seconds": cold, "phases": phases}, "ours-warm": {"seconds": warm}}
        for cold, warm in ((10, 1), (100, 20), (10, 4))
    ]
    assert report.shares(rounds) == {"warm": 0.2, "rest": 0.25}


def test_milestones() -> None:
    """A proof that failed late tells what was reached before, and memory wherever it stands."""
    proof = {
        "milestones": [
            {"name": "agent answers", "seconds": 30.0},
            {"name": "HTTP balanced", "seconds": None},
        ],
        "agent": {"memory_in_use": 1000},
    }
    assert report.milestones(proof) == {"answer": 30.0, "memory": 1000}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a result as a part of the benchmark leaves it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def test_report(tmp_path: Path) -> None:
    """What is measured stands in the tables and on the page, escaped; what is over is marked."""
    phases = {"disk": {"seconds": 2.0, "bound": "disk"}}
    build = {"seconds": 10.0, "cpu_seconds": 5.0, "bytes": 100, "phases": phases}
    write(tmp_path / "rounds/1/ours-cold.json", build)
    write(tmp_path / "rounds/1/established.json", {**build, "seconds": 20.0, "bytes": 1000})
    rows = [{"package": "a<b", "bytes": 7, "why": ""}]
    write(tmp_path / "sizes/ours.json", {"used": 7, "image": 1, "packages": rows})
    write(tmp_path / "scaling/size-10.json", {"seconds": 2.0, "cpu_seconds": 1.0})
    write(tmp_path / "scaling/size-2.json", {"seconds": 1.0, "cpu_seconds": 1.0})
    document = report.collect(tmp_path)
    assert document["shares"] == {"cold": 0.5, "cold, CPU": 1, "qcow2": 0.1, "rest": 1}
    made = report.tables(document, budget.load())
    shown = {line.split()[0]: line.split()[1:] for line in made["Shares"].splitlines()}
    assert shown["cold"] == ["0.500", "0.3", "established", "over"]
    assert shown["qcow2"] == ["0.100", "0.366", "established", "held"]
    order = [line.split()[1] for line in made["Scaling"].splitlines() if line.startswith("size")]
    assert order == ["2", "10"]
    page = report.as_page(document, made, ["<svg></svg>"])
    assert "a&lt;b" in page
    assert "<svg></svg>" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_table_has_a_width_for_each_column() -> None:
    """Text that docutils reads: no empty first cell, no line longer than its rule."""
    made = report.table(["a", "b"], [["", "longer than the head"], ["x", ""]])
    rule, head, *_ = made.splitlines()
    assert rule == "==  ===================="
    assert head == "a   b"


def test_budget_names_each_share_that_is_over() -> None:
    """A share at its limit is held, one beyond it is told with what it is a share of."""
    limits = budget.Budget({}, {"warm": 0.1, "cold": 0.3}, {"warm": "cold", "cold": "established"})
    assert limits.excesses({"warm": 0.1, "cold": 0.31}) == [
        "cold is 0.310 of established; the budget is 0.3"
    ]
    with pytest.raises(KeyError):
        limits.excesses({"unknown": 1})


def test_budget_file_is_whole() -> None:
    """Every share that a report can have has a limit, but those that explain others."""
    limits = budget.load()
    measured = {*report.SHARES, *report.MILESTONES, "memory", "rest", "used"}
    assert measured - set(limits.most) == {"cold, CPU", "of the floor", "of the floor, CPU"}
    assert set(limits.most) <= measured
    assert set(limits.recorded) == {"qcow2", "used"}
