# SPDX-License-Identifier: Apache-2.0
"""What builds keep for each other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import cache
from amphora_image.cache import digest, entries, new_entry, prune, use

BLOCK = 4096


def kept(cache_dir: Path, name: str, age: int, layer: str = "rootfs") -> Path:
    """Make an entry of one block that was used a number of seconds ago."""
    path = cache_dir / layer / name
    with new_entry(path) as part:
        part.write_bytes(b"x" * BLOCK)
    os.utime(path, (1_000_000_000 - age,) * 2)
    return path


@given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
def test_digest_keeps_parts_apart(one: list[bytes], other: list[bytes]) -> None:
    """Two sequences have the same digest only if they are the same."""
    assert (digest(*one) == digest(*other)) == (one == other)


def test_digest_of_a_file_is_of_its_content(tmp_path: Path) -> None:
    """A path counts by what the file holds, a mapping by what it says in whatever order."""
    (tmp_path / "a").write_text("x")
    (tmp_path / "b").write_text("x")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(b"x")
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


def test_entry_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """What fails is not kept, and leaves nothing; what succeeds takes an older one's place."""
    path = tmp_path / "images/a"

    def fail() -> None:
        with new_entry(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert entries(tmp_path) == []
    assert list((tmp_path / "images").iterdir()) == []
    for text in ("one", "two"):
        with new_entry(path) as part:
            part.mkdir()
            (part / text).write_text(text)
            assert not (path / text).exists()
    assert [file.name for file in path.iterdir()] == ["two"]
    assert [entry.path for entry in entries(tmp_path)] == [path]


def test_use(tmp_path: Path) -> None:
    """An entry that is used is the last to go; one that is not there is not made."""
    path = kept(tmp_path, "old", 1000)
    kept(tmp_path, "new", 10)
    assert use(path)
    assert not use(tmp_path / "rootfs/none")
    os.utime(path, (1_000_000_001,) * 2)
    assert [entry.path.name for entry in entries(tmp_path)] == ["old", "new"]


def test_prune_keeps_the_recently_used(tmp_path: Path) -> None:
    """The least recently used entries of all layers go until the rest fits."""
    for age in range(4):
        kept(tmp_path, f"entry-{age}", age, cache.LAYERS[age % 2])
    assert [entry.path.name for entry in prune(tmp_path, 2 * BLOCK)] == ["entry-2", "entry-3"]
    assert [entry.as_json()["name"] for entry in entries(tmp_path)] == ["entry-0", "entry-1"]
    assert prune(tmp_path, 2 * BLOCK) == []
    assert len(prune(tmp_path, 0)) == 2


def test_new_entries_keep_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps something removes what is too much."""
    monkeypatch.setattr(cache, "LIMIT", 2 * BLOCK)
    for age in (30, 20):
        kept(tmp_path, f"entry-{age}", age)
    kept(tmp_path, "entry-0", 0, "images")
    assert {entry.path.name for entry in entries(tmp_path)} == {"entry-0", "entry-20"}
