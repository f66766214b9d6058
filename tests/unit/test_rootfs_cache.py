# SPDX-License-Identifier: Apache-2.0
"""The key of a cached root file system, and which entries stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amphora_image.rootfs_cache import (
    VARIABLES,
    Key,
    archives_digest,
    digest,
    find,
    inputs_digest,
    prune,
    release_urls,
)

SOURCES = (
    "deb http://mirror.example.org/debian trixie main\n"
    "deb http://mirror.example.org/debian-security/ trixie-security main\n"
)


def key_of(script: Path, **changes: object) -> str:
    """Return the digest of some inputs with changes."""
    given: dict[str, object] = {
        "environ": dict.fromkeys(VARIABLES, "value"),
        "packages": ["haproxy", "keepalived"],
        "versions": "mmdebstrap 1.3.5",
        "files": [script],
        **changes,
    }
    return inputs_digest(**given)  # type: ignore[arg-type]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script of an element."""
    path = tmp_path / "script"
    path.write_text("mmdebstrap")
    return path


def test_every_input_changes_the_key(script: Path, tmp_path: Path) -> None:
    """Each variable, the packages, the versions and each file's content count."""
    other = tmp_path / "other"
    other.write_text("mmdebstrap --variant=minbase")
    changes: list[dict[str, object]] = [
        *({"environ": {**dict.fromkeys(VARIABLES, "value"), name: "x"}} for name in VARIABLES),
        {"packages": ["haproxy"]},
        {"versions": "mmdebstrap 1.4"},
        {"files": [other]},
        {"files": [script, other]},
    ]
    keys = [key_of(script), *(key_of(script, **change) for change in changes)]
    assert len(set(keys)) == len(keys)


def test_order_of_packages_does_not_change_the_key(script: Path) -> None:
    """The same set is the same key."""
    assert key_of(script) == key_of(script, packages=["keepalived", "haproxy"])


def test_digest_keeps_parts_apart() -> None:
    """Bytes that move from one part to the next are another digest."""
    assert digest(b"ab", b"c") != digest(b"a", b"bc")


def test_release_urls() -> None:
    """Each suite of the sources has its signed file."""
    assert release_urls(SOURCES) == [
        "http://mirror.example.org/debian/dists/trixie/InRelease",
        "http://mirror.example.org/debian-security/dists/trixie-security/InRelease",
    ]


def test_archives_that_do_not_answer_make_no_key(tmp_path: Path) -> None:
    """A mirror that cannot be asked, or none at all, is a miss."""
    assert archives_digest("") is None
    assert archives_digest(f"deb file://{tmp_path} trixie main") is None


def test_a_new_state_of_the_archive_changes_the_key(tmp_path: Path) -> None:
    """The InRelease file's bytes are the archive's state."""
    release = tmp_path / "dists/trixie/InRelease"
    release.parent.mkdir(parents=True)
    seen = []
    for text in ("Date: 1", "Date: 2"):
        release.write_text(text)
        seen.append(archives_digest(f"deb file://{tmp_path} trixie main"))
    assert None not in seen
    assert seen[0] != seen[1]


def test_offline_takes_the_newest_of_the_same_inputs(tmp_path: Path) -> None:
    """Without the archives' state the newest entry is right, and no other inputs' entry."""
    for age, name in enumerate(("aaa-1", "aaa-2", "bbb-3")):
        entry = tmp_path / f"{name}.tar.zst"
        entry.write_bytes(b"x")
        os.utime(entry, (age, age))
    assert find(tmp_path, Key("aaa", "")) == tmp_path / "aaa-2.tar.zst"
    assert find(tmp_path, Key("aaa", "1")) == tmp_path / "aaa-1.tar.zst"
    assert find(tmp_path, Key("aaa", "3")) is None
    assert find(tmp_path, Key("ccc", "")) is None


def test_prune_keeps_the_recently_used(tmp_path: Path) -> None:
    """The least recently used entries go until the rest fits."""
    for age in range(4):
        entry = tmp_path / f"entry-{age}.tar.zst"
        entry.write_bytes(b"x" * 100)
        os.utime(entry, (age, age))
    assert [path.name for path in prune(tmp_path, 250)] == ["entry-1.tar.zst", "entry-0.tar.zst"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "entry-2.tar.zst",
        "entry-3.tar.zst",
    ]
