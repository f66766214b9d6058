# SPDX-License-Identifier: Apache-2.0
"""What makes an image the same bytes each time, and what tells how two differ."""

from __future__ import annotations

import io
import os
import tarfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from amphora_image import options, reproducible
from amphora_image.errors import AmphoraImageError, BadValue
from amphora_image.request import ImageType
from amphora_image.verify import Compared, verify

EPOCH = 1795593600


def test_identifiers_follow_from_the_epoch() -> None:
    """The same for the same part of the same build, and for no other."""
    known = {reproducible.identifier(epoch, what) for epoch in (1, 2) for what in ("disk", "esp")}
    assert len(known) == 4
    assert reproducible.identifier(1, "disk") in known
    assert all(str(uuid.UUID(each)) == each for each in known)


def test_environment() -> None:
    """Programs that know different variables are told the same time."""
    env = reproducible.environment(EPOCH)
    assert env["SOURCE_DATE_EPOCH"] == env["E2FSPROGS_FAKE_TIME"] == str(EPOCH)
    assert env["PATH"] == os.environ["PATH"]


def test_settle_times(tmp_path: Path) -> None:
    """Directories, files and links get the time, links themselves and not what they lead to."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/link").symlink_to("/nowhere")
    (tmp_path / "a/file").touch()
    reproducible.settle_times(tmp_path, EPOCH)
    found = (tmp_path, *tmp_path.rglob("*"))
    assert {int(path.lstat().st_mtime) for path in found} == {EPOCH}
    assert len(found) == 4


def test_settle_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each name, quoted, gets both times that mke2fs takes from the host, the root as well."""
    told: list[str] = []

    def run(argv: Sequence[Any], **_: object) -> str:
        told.append(Path(argv[3]).read_text())
        assert argv[4] == f"{tmp_path}/disk.raw?offset=1024"
        return ""

    monkeypatch.setattr(reproducible, "run", run)
    (tmp_path / "tree").mkdir()
    (tmp_path / 'tree/a "b').touch()
    reproducible.settle_inodes(tmp_path / "disk.raw", 1024, tmp_path / "tree", EPOCH)
    assert told == [
        f'sif "/" atime @{EPOCH}\nsif "/" ctime @{EPOCH}\n'
        f'sif "/a ""b" atime @{EPOCH}\nsif "/a ""b" ctime @{EPOCH}\n'
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["tree"]


def test_name_that_debugfs_cannot_read(tmp_path: Path) -> None:
    """A name with a line break would be another command."""
    (tmp_path / "a\nb").touch()
    with pytest.raises(AmphoraImageError, match="line break"):
        reproducible.settle_inodes(tmp_path / "disk", 0, tmp_path, EPOCH)


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "now", "4354819200", "1" * 30])
def test_epochs_that_are_not_allowed(value: str) -> None:
    """A time is whole seconds that all file systems can hold; an empty variable is none."""
    if not value:
        assert options.read_environment({"SOURCE_DATE_EPOCH": value}).source_date_epoch is None
        return
    with pytest.raises(BadValue, match="SOURCE_DATE_EPOCH is"):
        options.read_environment({"SOURCE_DATE_EPOCH": value})


def a_tar(path: Path, **members: tuple[bytes, int]) -> Path:
    """A tar with members of a content and a time."""
    with tarfile.open(path, "w") as archive:
        for name, (content, mtime) in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), mtime
            archive.addfile(member, io.BytesIO(content))
    return path


def test_differences(tmp_path: Path) -> None:
    """What is in one only, and content and time of what is in both."""
    first = a_tar(tmp_path / "1", both=(b"x", 1), left=(b"", 1), changed=(b"a", 1))
    second = a_tar(tmp_path / "2", both=(b"x", 1), right=(b"", 1), changed=(b"b", 2))
    rows = list(reproducible.differences(first, second))
    assert [(path, what.split(" and ")[0].split(":")[0]) for path, what in rows] == [
        ("changed", "time"),
        ("changed", "content"),
        ("left", "only in the first"),
        ("right", "only in the second"),
    ]
    assert list(reproducible.differences(first, first)) == []


def test_verify(a_request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fresh builds in different places, with other settings; nothing of them stays."""
    monkeypatch.setenv("TZ", "UTC")
    seen = []

    def build(request: Any) -> list[Path]:
        mask = os.umask(0o022)
        os.umask(mask)
        seen.append((request.output, os.environ["TZ"], mask))
        assert request.fresh
        request.outputs[ImageType.RAW].write_bytes(b"disk %d" % len(seen))
        a_tar(request.outputs[ImageType.TAR], etc=(b"same", 1))
        return list(request.outputs.values())

    before = os.environ.copy()
    request = a_request(image_types=(ImageType.RAW,), output=tmp_path / "out/lb")
    found = verify(request, build)
    (first, utc, mask), (second, elsewhere, other_mask) = seen
    assert first.parent != second.parent
    assert utc != elsewhere
    assert mask != other_mask
    assert os.environ == before
    assert time.tzname[0] == "UTC"
    assert found.differing == ["raw"]
    assert found.rows == []
    assert list((tmp_path / "out").iterdir()) == []


def test_compared() -> None:
    """The document says yes only if all files are the same; the table ends after some rows."""
    rows = [(f"etc/{number}", "time: 1 and 2") for number in range(100)]
    same = Compared({"raw": ("a", "a")}, [])
    other = Compared({"raw": ("a", "a"), "tar": ("b", "c")}, rows)
    assert same.as_json() == {"reproducible": True, "sha256": {"raw": ["a"]}, "differences": []}
    assert other.as_json()["reproducible"] is False
    assert other.as_json()["sha256"]["tar"] == ["b", "c"]
    assert same.as_table("x").row_count == 1
    assert other.as_table("x").row_count == 2 + 40 + 1
