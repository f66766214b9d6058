# SPDX-License-Identifier: Apache-2.0
"""What archives say of themselves."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from amphora_image import archives
from amphora_image.archives import ask, own_sources, recorded, release_urls, state

SOURCES = (
    "# a comment\n"
    "deb http://mirror.example.org/debian trixie main\n"
    "deb [trusted=no] http://mirror.example.org/debian-security/ trixie-security main\n"
    "deb-src http://mirror.example.org/debian trixie main\n"
)
RELEASE = (
    "-----BEGIN PGP SIGNED MESSAGE-----\n\nOrigin: Debian\nSuite: stable\nCodename: trixie\n"
    "Date: Sat, 01 Nov 2025 00:00:00 UTC\nSHA256:\n 0123 5 main/x: y\n"
)


def test_release_urls() -> None:
    """Each suite of the sources has its signed file."""
    assert release_urls(SOURCES) == [
        "http://mirror.example.org/debian/dists/trixie/InRelease",
        "http://mirror.example.org/debian-security/dists/trixie-security/InRelease",
    ]


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """An archive of two suites in a directory."""
    for suite in ("trixie", "trixie-updates"):
        file = tmp_path / f"mirror/dists/{suite}/InRelease"
        file.parent.mkdir(parents=True)
        file.write_text(f"{RELEASE}{suite}")
    return tmp_path / "mirror"


def sources(mirror: Path, *suites: str) -> str:
    """Lines of sources.list(5) for suites of an archive."""
    return "".join(f"deb file://{mirror} {suite} main\n" for suite in suites)


def test_archives_that_do_not_answer_have_no_state(mirror: Path) -> None:
    """A mirror that cannot be asked, or none at all, tells nothing; neither does a part of them."""
    assert ask("") is None
    assert ask(sources(mirror, "trixie", "trixie-security")) is None
    assert ask("deb nonsense trixie main") is None


def test_state_is_the_files_bytes(mirror: Path) -> None:
    """Whatever changes in an InRelease file changes the state; the order of suites does not."""
    before = ask(sources(mirror, "trixie", "trixie-updates"))
    assert before == ask(sources(mirror, "trixie-updates", "trixie"))
    (mirror / "dists/trixie/InRelease").write_text(RELEASE)
    after = ask(sources(mirror, "trixie", "trixie-updates"))
    assert before
    assert after
    assert before != after


def test_what_apt_has_verified_is_the_same_state(mirror: Path, tmp_path: Path) -> None:
    """A root file system made from archives tells the state that they told when they were asked."""
    lists = tmp_path / archives.LISTS
    lists.mkdir(parents=True)
    for suite in ("trixie", "trixie-updates"):
        content = (mirror / f"dists/{suite}/InRelease").read_bytes()
        (lists / f"mirror_dists_{suite}_InRelease").write_bytes(content)
    found = recorded(tmp_path)
    assert state(found) == ask(sources(mirror, "trixie", "trixie-updates"))
    assert found[1] == {
        "suite": "stable",
        "codename": "trixie",
        "origin": "Debian",
        "date": "Sat, 01 Nov 2025 00:00:00 UTC",
        "sha256": hashlib.sha256(f"{RELEASE}trixie".encode()).hexdigest(),
    }


def test_own_sources(tmp_path: Path) -> None:
    """A root file system's sources are all files that its apt reads."""
    assert own_sources(tmp_path) == ""
    more = tmp_path / "etc/apt/sources.list.d"
    more.mkdir(parents=True)
    (more / "b.list").write_text("deb b\n")
    (more / "a.list").write_text("deb a\n")
    (more.parent / "sources.list").write_text("deb first\n")
    assert own_sources(tmp_path) == "deb first\ndeb a\ndeb b\n"


def test_a_file_that_tells_little(tmp_path: Path) -> None:
    """What a Release file lacks is empty, and bytes that are no text do not matter."""
    (tmp_path / "b_Release").write_bytes(b"Suite: caf\xe9\n")
    [row] = archives.rows([tmp_path / "b_Release"])
    assert row["suite"].startswith("caf")
    assert row["date"] == ""
