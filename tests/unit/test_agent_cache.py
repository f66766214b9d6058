# SPDX-License-Identifier: Apache-2.0
"""When the agent's environment is installed, and when it is taken from the cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from amphora_image import agent, agent_cache, agent_source, cache

Provide = Callable[..., list[str]]


def tree(root: Path, python: str = "3.13") -> Path:
    """As little of an image as is looked at."""
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/python3").symlink_to(f"python{python}")
    return root


@pytest.fixture
def provide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Provide:
    """A function that asks for an agent and tells what was done for it; programs are pretended.

    Between the steps the image imports what it starts.
    """
    did: list[str] = []
    trees = iter(range(100))

    def pack(_: Path, file: Path, paths: list[str]) -> None:
        did.append("pack")
        file.write_text(" ".join(paths))

    monkeypatch.setattr(agent, "install", lambda *_, **__: did.append("install"))
    monkeypatch.setattr(cache, "pack", pack)
    monkeypatch.setattr(cache, "unpack", lambda *_: did.append("unpack"))

    def ask(python: str = "3.13", **environ: str) -> list[str]:
        did.clear()
        given = {
            "ARCH": "amd64",
            "AMPHORA_AGENT_SOURCE": "locked",
            "DIB_IMAGE_CACHE": str(tmp_path / "cache"),
            **environ,
        }
        root = tree(tmp_path / f"tree-{next(trees)}", python)
        agent_cache.provide(root, given)
        did.append("imports")
        agent_cache.keep(root, given)
        return list(did)

    return ask


MADE, TAKEN = ["install", "imports", "pack"], ["unpack", "imports"]
GIT = {"AMPHORA_AGENT_SOURCE": "git", "AMPHORA_AGENT_REF": "master"}


def test_the_same_again_is_taken(provide: Provide) -> None:
    """A lock gives the same agent each time; --fresh makes it anew."""
    assert [provide(), provide(), provide(AMPHORA_FRESH="1")] == [MADE, TAKEN, MADE]


@pytest.mark.parametrize(
    "change",
    [
        {"ARCH": "arm64"},
        {"AMPHORA_AGENT_SERIES": "2026.1"},
        {"python": "3.12"},
        GIT,
    ],
    ids=str,
)
def test_what_differs_is_made(provide: Provide, change: dict[str, str]) -> None:
    """Another architecture, series, Python or source is another agent."""
    assert [provide(), provide(**change)] == [MADE, MADE]


@pytest.mark.parametrize("change", ["lock", "code", "uv"])
def test_what_makes_it_counts(
    provide: Provide, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that was refreshed, other code of ours and another uv make another agent."""
    provide()
    if change == "uv":
        monkeypatch.setattr(agent_cache.metadata, "version", lambda _: "0.0")
    else:
        (tmp_path / "changed").write_text(change)
        files = (*agent_cache.OWN_FILES, tmp_path / "changed")
        monkeypatch.setattr(agent_cache, "OWN_FILES", files)
    assert provide() == MADE


def test_own_files() -> None:
    """The locks and all code that writes the environment count."""
    names = {path.name for path in agent_cache.OWN_FILES}
    assert {
        "agent.py",
        "agent_cache.py",
        "agent_source.py",
        "check_imports.py",
        "amphora_lazy.py",
    } <= names
    assert {f"{series}.txt" for series in agent_source.SERIES} <= names


def test_git_is_taken_offline_alone(provide: Provide) -> None:
    """What a branch holds can change, so it is asked wherever that can be done."""
    offline = {**GIT, "DIB_OFFLINE": "1"}
    assert [provide(**GIT), provide(**GIT), provide(**offline)] == [MADE, MADE, TAKEN]


def test_packages_of_the_distribution_are_not_kept(provide: Provide) -> None:
    """They are in the root file system."""
    assert provide(AMPHORA_AGENT_SOURCE="packages") == ["install", "imports"]


def test_the_build_is_told_what_is_used(provide: Provide, tmp_path: Path) -> None:
    """The entry's name from the cache directory on, made or taken."""
    used = tmp_path / "used"
    for _ in range(2):
        provide(AMPHORA_USED_FILE=str(used))
    (name,) = set(used.read_text().split())
    assert (tmp_path / "cache" / name).read_text() == "opt/amphora-agent"


@pytest.mark.parametrize("words", [[], ["provide"], ["lose", "/"]], ids=str)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong call of the module is told what is right."""
    assert agent_cache.main(words) == 3
    assert "agent_cache {provide,keep} ROOT" in capsys.readouterr().err


def test_main_tells_errors_without_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure is a message, a hint and an exit code."""
    for name, value in (("AMPHORA_AGENT_SOURCE", "locked"), ("ARCH", "amd64")):
        monkeypatch.setenv(name, value)
    assert agent_cache.main(["provide", str(tmp_path)]) == 1
    assert re.match(r"error: no Python.*\nhint: install python3", capsys.readouterr().err)
