# SPDX-License-Identifier: Apache-2.0
"""Every element's package list, joined."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import packages
from amphora_image.errors import AmphoraImageError

PAIRS = st.lists(st.lists(st.sampled_from("abcd"), min_size=2, max_size=2))
SQUASHED = st.dictionaries(
    st.sampled_from(["pre-install.d", "install.d", "post-install.d"]),
    st.dictionaries(st.sampled_from(["install", "uninstall"]), PAIRS),
)


def test_wanted() -> None:
    """Packages go by element over all phases; a build tool is left to its phase."""
    squashed = {
        "install.d": {
            "install": [["haproxy", "lb"], ["gcc", "agent"], ["kmod", "lb"]],
            "uninstall": [["gcc", "agent"]],
        },
        "post-install.d": {"install": [["socat", "lb"]], "uninstall": [["kmod", "lb"]]},
    }
    assert packages.wanted(squashed) == {"lb": ["haproxy", "kmod", "socat"]}


def test_wanted_by_another_element() -> None:
    """A build tool of one element may be what another one wants to keep."""
    squashed = {
        "install.d": {
            "install": [["gcc", "agent"], ["gcc", "debug"]],
            "uninstall": [["gcc", "agent"]],
        }
    }
    assert packages.wanted(squashed) == {"debug": ["gcc"]}


@given(SQUASHED)
def test_wanted_is_what_stays(squashed: dict[str, dict[str, list[list[str]]]]) -> None:
    """What is wanted was asked for in some phase that does not take it away."""
    found = {
        (name, element) for element, names in packages.wanted(squashed).items() for name in names
    }
    assert found == {
        (name, element)
        for actions in squashed.values()
        for name, element in actions.get("install", [])
        if [name, element] not in actions.get("uninstall", [])
    }


@given(SQUASHED)
def test_what_is_left_is_not_wanted(squashed: dict[str, dict[str, list[list[str]]]]) -> None:
    """Each package that is asked for is either wanted or left, and what goes away still goes."""
    left = packages.left(squashed)
    assert packages.wanted(left) == {}
    for phase, actions in squashed.items():
        wanted = packages.wanted({phase: actions})
        count = sum(map(len, wanted.values())) + len(left[phase].get("install", []))
        assert count == len(actions.get("install", []))
        assert left[phase].get("uninstall", []) == actions.get("uninstall", [])


def test_phase_with_nothing_to_install() -> None:
    """Such a phase has no list at all, for DIB starts apt with an empty one."""
    squashed = {"install.d": {"install": [["haproxy", "lb"]]}}
    assert packages.left(squashed) == {"install.d": {}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], list[list[str]]]:
    """A function that lets package-installs-squash tell a document; it returns the argvs."""

    def answer(squashed: object) -> list[list[str]]:
        argvs: list[list[str]] = []

        def run(argv: Sequence[object]) -> str:
            words = list(map(str, argv))
            argvs.append(words)
            if words[1].endswith("package-installs-squash"):
                Path(words[-1]).write_text(json.dumps(squashed))
                return ""
            return "".join(f"{word}-mapped\n" for word in words[words.index("--pkg-map") + 2 :])

        monkeypatch.setattr(packages, "run", run)
        return argvs

    return answer


def test_collect(asked: Callable[[object], list[list[str]]], tmp_path: Path) -> None:
    """Names are mapped where their element has a map, and each comes once, sorted."""
    argvs = asked(
        {"install.d": {"install": [["z", "lb"], ["a", "lb"], ["b", "base"], ["z", "base"]]}}
    )
    elements = {"lb": tmp_path / "lb", "base": tmp_path / "base"}
    (tmp_path / "lb").mkdir()
    (tmp_path / "lb/pkg-map").touch()
    names = packages.collect(elements, "/ours:/theirs", Path("/dib"))
    assert names == ["a-mapped", "b", "z", "z-mapped"]
    squash, pkg_map = argvs
    assert squash[1:4] == [
        "/dib/package-installs/bin/package-installs-squash",
        "--elements=lb base",
        "--path=/ours:/theirs",
    ]
    assert pkg_map[1:] == [
        "/dib/pkg-map/bin/pkg-map",
        *("--missing-ok", "--pkg-map", str(tmp_path / "lb/pkg-map"), "z", "a"),
    ]


def test_main(
    asked: Callable[[object], list[list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The element's command prints a package a line."""
    asked({"install.d": {"install": [["b", "base"], ["a", "base"]]}})
    monkeypatch.setenv("IMAGE_ELEMENT_YAML", "{base: /elements/base}")
    monkeypatch.setenv("ELEMENTS_PATH", "/elements")
    monkeypatch.setattr("sys.argv", ["packages"])
    packages.main()
    assert capsys.readouterr().out == "a\nb\n"


def test_main_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that cannot be read ends the command with its reason."""

    def run(_: object) -> str:
        raise AmphoraImageError("squash ended with 1")

    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setattr("sys.argv", ["packages"])
    monkeypatch.setenv("IMAGE_ELEMENT_YAML", "{base: /elements/base}")
    monkeypatch.setenv("ELEMENTS_PATH", "/elements")
    with pytest.raises(SystemExit, match="packages: squash ended with 1"):
        packages.main()


def test_main_when_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The element's command leaves the build tools in DIB's list."""
    file = tmp_path / "package-installs.json"
    phase = {"install": [["gcc", "agent"], ["bash", "agent"]], "uninstall": [["gcc", "agent"]]}
    file.write_text(json.dumps({"install.d": phase}))
    monkeypatch.setattr("sys.argv", ["packages", "--installed", str(file)])
    packages.main()
    assert json.loads(file.read_text())["install.d"]["install"] == [["gcc", "agent"]]
