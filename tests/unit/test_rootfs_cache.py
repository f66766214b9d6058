# SPDX-License-Identifier: Apache-2.0
"""Root file systems by what they are made of: the key, and when one is made."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from amphora_image import archives, cache, rootfs_cache
from amphora_image.errors import AmphoraImageError
from amphora_image.rootfs_cache import VARIABLES, Inputs, inputs_of, provide, sources_of

STATE = ["0123"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The script of an element."""
    path = tmp_path / "script"
    path.write_text("mmdebstrap")
    return path


def inputs(script: Path, **changes: object) -> Inputs:
    """Return some inputs with changes."""
    given: dict[str, object] = {
        "environ": {**dict.fromkeys(VARIABLES, "value"), "DIB_IMAGE_CACHE": str(script.parent)},
        "packages": ["haproxy", "keepalived"],
        "versions": "mmdebstrap 1.3.5",
        "files": [script],
        **changes,
    }
    return inputs_of(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", VARIABLES)
def test_every_variable_changes_the_key(script: Path, name: str) -> None:
    """Each variable that decides what the tree holds counts."""
    environ = {**dict.fromkeys(VARIABLES, "value"), "DIB_IMAGE_CACHE": str(script.parent)}
    changed = inputs(script, environ={**environ, name: "x"})
    assert changed.entry(STATE) != inputs(script).entry(STATE)


@pytest.mark.parametrize(
    "change",
    [{"packages": ["haproxy"]}, {"versions": "mmdebstrap 1.4"}, {"files": []}],
    ids=["packages", "versions", "files"],
)
def test_every_other_input_changes_the_key(script: Path, change: dict[str, object]) -> None:
    """Packages, versions and files count."""
    assert inputs(script, **change).entry(STATE) != inputs(script).entry(STATE)


def test_content_of_a_script_changes_the_key(script: Path) -> None:
    """A script, or a key of the archive, counts by what it holds."""
    before = inputs(script)
    script.write_text("mmdebstrap --variant=minbase")
    assert inputs(script) != before


def test_state_of_the_archives_changes_the_key(script: Path) -> None:
    """Another state of an archive is another entry."""
    assert inputs(script).entry(["0123"]) != inputs(script).entry(["0124"])


def test_order_of_packages_does_not_change_the_key(script: Path) -> None:
    """The same set is the same key."""
    assert inputs(script) == inputs(script, packages=["keepalived", "haproxy"])


def test_sources_that_the_tool_chose(script: Path) -> None:
    """Where no sources were given, those of the last such root file system are asked."""
    given = inputs(script)
    assert sources_of(given.directory, given.system, "deb x") == "deb x"
    assert sources_of(given.directory, given.system, "") == ""
    (given.directory / "sources").mkdir()
    (given.directory / "sources" / given.system).write_text("deb y")
    assert sources_of(given.directory, given.system, "") == "deb y"


class Workshop:
    """What makes, keeps and restores root file systems, pretended.

    :ivar state: what the archives say.
    :ivar did: what was done, in order.
    :ivar status: what the command that makes a tree ends with.
    """

    def __init__(self) -> None:
        self.state: list[str] | None = STATE
        self.did: list[str] = []
        self.status = 0

    def ask(self, _: str) -> list[str] | None:
        """Tell the archives' state."""
        return self.state

    def pipe(self, first: list[str], second: list[str]) -> None:
        """Pack or unpack."""
        self.did.append("restore" if first[0] == "zstd" else "store")
        if second[0] == "zstd":
            Path(second[-1]).write_bytes(b"tree")

    def make(self, argv: Sequence[str], **_: object) -> SimpleNamespace:
        """Run the command that makes a tree."""
        self.did.append(argv[0])
        return SimpleNamespace(returncode=self.status)


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Everything pretended; a tree that is made comes from the archives' state of that moment."""
    made = Workshop()
    monkeypatch.setattr(cache, "pipe", made.pipe)
    monkeypatch.setattr(rootfs_cache.archives, "ask", made.ask)
    monkeypatch.setattr(
        rootfs_cache.archives,
        "recorded",
        lambda _: [{"sha256": digest} for digest in made.state or ()],
    )
    monkeypatch.setattr(subprocess, "run", made.make)
    return made


def provided(given: Inputs, *, offline: bool = False, fresh: bool = False) -> None:
    """Ask for a tree."""
    provide(given, given.directory / "root", ["mmdebstrap"], offline=offline, fresh=fresh)


def test_second_build_makes_nothing(shop: Workshop, script: Path) -> None:
    """From the same inputs and archives a tree is made once."""
    provided(inputs(script))
    provided(inputs(script))
    assert shop.did == ["mmdebstrap", "store", "restore"]


def test_a_changed_archive_is_not_missed(shop: Workshop, script: Path) -> None:
    """When an archive says something else, the tree is made anew; the old one stays for a while."""
    provided(inputs(script))
    shop.state = ["0456"]
    provided(inputs(script))
    assert shop.did == ["mmdebstrap", "store"] * 2
    assert len(cache.entries(script.parent)) == 2


def test_an_archive_that_does_not_answer_is_a_miss(shop: Workshop, script: Path) -> None:
    """Without the archives' state nothing is taken, and nothing can be named to be kept."""
    shop.state = None
    provided(inputs(script))
    provided(inputs(script))
    assert shop.did == ["mmdebstrap"] * 2


def test_fresh(shop: Workshop, script: Path) -> None:
    """On demand the tree is made anew, and kept."""
    provided(inputs(script))
    provided(inputs(script), fresh=True)
    assert shop.did == ["mmdebstrap", "store"] * 2


def test_offline_takes_what_was_used_last(shop: Workshop, script: Path) -> None:
    """Offline no archive is asked: the newest entry of the same inputs serves, or nothing does."""
    provided(inputs(script))
    [entry] = cache.entries(script.parent)
    shop.state = None
    provided(inputs(script), offline=True)
    assert shop.did[2:] == ["restore"]
    assert inputs(script).newest() == entry.path
    with pytest.raises(AmphoraImageError, match="offline, and no root file system is cached"):
        provided(inputs(script, packages=["haproxy"]), offline=True)


def test_newest_of_several(script: Path) -> None:
    """The entry that was used last is the newest, whatever its state."""
    given = inputs(script)
    for age, state in enumerate((["1"], ["2"])):
        entry = given.entry(state)
        entry.parent.mkdir(exist_ok=True)
        entry.touch()
        os.utime(entry, (age, age))
    assert given.newest() == given.entry(["2"])


def test_a_failure_keeps_nothing(shop: Workshop, script: Path) -> None:
    """A tree that could not be made is not kept."""
    shop.status = 25
    with pytest.raises(AmphoraImageError, match="mmdebstrap ended with 25"):
        provided(inputs(script))
    assert shop.did == ["mmdebstrap"]
    assert cache.entries(script.parent) == []


def test_a_broken_entry_goes(shop: Workshop, script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not unpack is an error and is removed: the next build makes it anew."""
    provided(inputs(script))

    def broken(*_: object) -> None:
        raise AmphoraImageError("zstd ended with 1")

    monkeypatch.setattr(cache, "pipe", broken)
    with pytest.raises(AmphoraImageError, match="zstd ended with 1"):
        provided(inputs(script))
    assert cache.entries(script.parent) == []


def test_own_sources_are_remembered(
    shop: Workshop, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources that the tool chose are kept, so that the next build can ask them."""
    environ = {
        **dict.fromkeys(VARIABLES, "value"),
        "DIB_IMAGE_CACHE": str(script.parent),
        "AMPHORA_APT_SOURCES": "",
    }
    monkeypatch.setattr(archives, "own_sources", lambda _: "deb own")
    given = inputs(script, environ=environ)
    provided(given)
    assert sources_of(given.directory, given.system, "") == "deb own"
