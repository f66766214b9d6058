# SPDX-License-Identifier: Apache-2.0
"""The agent's sources, its series and their locks, without starting a program."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import agent
from amphora_image.errors import AmphoraImageError, BadValue

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
MAYBE = st.none() | TEXT
SOURCES = (
    st.builds(agent.Locked, MAYBE)
    | st.builds(agent.FromGit, MAYBE, TEXT, MAYBE, MAYBE, MAYBE)
    | st.just(agent.Packaged())
)


def entries(series: str) -> dict[str, str]:
    """Name -> one line with the version, markers and hashes, out of a lock."""
    lines = agent.without(agent.lock_of(series).read_text(), ()).splitlines()
    return {line.split("==")[0]: line for line in lines if not line.startswith("#")}


def tree(root: Path, **links: str) -> Path:
    """A tree whose usr/bin has these symbolic links."""
    (root / "usr/bin").mkdir(parents=True)
    for name, target in links.items():
        (root / "usr/bin" / name).symlink_to(target)
    return root


@given(SOURCES)
def test_environment_round_trip(source: agent.AgentSource) -> None:
    """A source survives the way through the environment, whatever its values."""
    variables = agent.environment(source)
    assert all(name.startswith("AMPHORA_AGENT_") for name in variables)
    assert agent.source_from({"PATH": "/bin", **variables}) == source


def test_no_variable_is_the_newest_lock() -> None:
    """Without any setting the agent comes from a lock."""
    assert agent.source_from({}) == agent.choose({}, "amd64") == agent.Locked()


def test_unknown_kind_of_source() -> None:
    """A kind that does not exist is refused with what is allowed."""
    with pytest.raises(BadValue, match="'pip'; allowed are locked, git, packages"):
        agent.source_from({"AMPHORA_AGENT_SOURCE": "pip"})


@pytest.mark.parametrize(
    ("variables", "options", "source"),
    [
        ({}, {"packages": True}, agent.Packaged()),
        ({}, {"ref": "master"}, agent.FromGit("master")),
        ({"DIB_REPOREF_amphora_agent": "a"}, {"ref": "b"}, agent.FromGit("b")),
        ({"DIB_REPOREF_amphora_agent": "a"}, {"packages": True}, agent.Packaged()),
        ({"OCTAVIA_REPO_PATH": "/o"}, {}, agent.FromGit(repository="/o")),
        (
            {"OCTAVIA_REPO_PATH": "/o", "DIB_REPOLOCATION_amphora_agent": "/a"},
            {},
            agent.FromGit(repository="/a"),
        ),
        (
            {
                "DIB_REPOREF_octavia_lib": "l",
                "DIB_REPOLOCATION_octavia_lib": "/l",
                "DIB_REPOLOCATION_upper_constraints": "/c",
            },
            {"ref": "r"},
            agent.FromGit("r", lib_ref="l", lib_repository="/l", constraints="/c"),
        ),
        ({"OCTAVIA_REPO_PATH": ""}, {}, agent.Locked()),
    ],
)
def test_choose(
    variables: dict[str, str], options: dict[str, object], source: agent.AgentSource
) -> None:
    """Options and the variables of Octavia's script select a source; an option beats a variable."""
    assert agent.choose(variables, "arm64", **options) == source  # type: ignore[arg-type]


def test_choose_refuses_both_options() -> None:
    """An agent cannot come from Git and from packages."""
    with pytest.raises(BadValue, match="exclude each other"):
        agent.choose({}, "amd64", ref="master", packages=True)


@pytest.mark.parametrize(
    ("ref", "series"),
    [
        ("master", "2026.2"),
        (None, "2026.2"),
        ("0123456789abcdef", "2026.2"),
        ("stable/2026.1", "2026.1"),
        ("origin/stable/2025.2", "2025.2"),
        ("18.0.1", "2026.1"),
        ("17.0.0.0rc1", "2025.2"),
        ("stable/2024.1", None),
        ("9.1.0", None),
    ],
)
def test_series_of_a_ref(ref: str | None, series: str | None) -> None:
    """A branch or a tag tells its series, everything else is the newest."""
    assert agent.series_of(ref) == series


def test_series_are_newest_first() -> None:
    """The default is the first row, so the rows are ordered and the versions fall with them."""
    rows = list(agent.SERIES.values())
    for newer, older in pairwise(rows):
        assert newer.name > older.name
        assert newer.released > older.released
        assert int(newer.octavia) == int(older.octavia) + 1
    assert rows[0].name == agent.NEWEST


@pytest.mark.parametrize(
    ("python", "asked", "series"),
    [
        ("3.10", None, "2026.1"),
        ("3.11", None, "2026.2"),
        ("3.13", None, "2026.2"),
        ("3.13", "2025.2", "2025.2"),
    ],
)
def test_series_for_a_python(python: str, asked: str | None, series: str) -> None:
    """The newest series that the image's Python can run, unless one is asked for."""
    assert agent.series_for(python, asked) == series


@pytest.mark.parametrize(("python", "asked"), [("3.9", None), ("3.10", "2026.2")])
def test_no_series_for_a_python(python: str, asked: str | None) -> None:
    """A Python that is too old is an error with a way out."""
    with pytest.raises(AmphoraImageError, match=f"Python is {python}; .* needs 3.1") as error:
        agent.series_for(python, asked)
    assert "-d" in str(error.value.hint)


def test_unknown_series() -> None:
    """A series without a lock is refused with the ones there are."""
    with pytest.raises(BadValue, match=r"'2019.1'; there are 2026.2, 2026.1, 2025.2"):
        agent.lock_of("2019.1")


@pytest.mark.parametrize("series", agent.SERIES)
def test_lock_names_no_host(series: str) -> None:
    """A lock works with any mirror: there is no URL, host or option in it."""
    text = agent.lock_of(series).read_text()
    assert "://" not in text
    assert not re.search(r"\.(org|com|io|net)\b", text)
    assert not re.search(r"^\s*-(?!-hash=sha256:)", text, re.MULTILINE)


@pytest.mark.parametrize("series", agent.SERIES)
def test_lock_pins_and_hashes_everything(series: str) -> None:
    """Every entry of a lock is one exact version with its hashes."""
    pins = entries(series)
    assert len(pins) > 60
    for line in pins.values():
        assert re.fullmatch(r"[a-z0-9-]+==\S+( ; [^#]+?)?( --hash=sha256:[0-9a-f]{64})+", line)


@pytest.mark.parametrize("series", agent.SERIES.values(), ids=str)
def test_lock_is_of_its_series(series: agent.Series) -> None:
    """Octavia and octavia-lib are those of the series, and pyroute2 is there."""
    pins = entries(series.name)
    assert pins["octavia"].startswith(f"octavia=={series.octavia}.")
    assert pins["octavia-lib"].startswith(f"octavia-lib=={series.octavia_lib}.")
    assert "pyroute2" in pins


@pytest.mark.parametrize("series", agent.SERIES)
def test_lock_leaves_the_controller_out(series: str) -> None:
    """What only a controller imports is in no lock."""
    listed = (agent.LOCKS / "controller-only.txt").read_text().splitlines()
    assert not entries(series).keys() & {name for name in listed if not name.startswith("#")}


def test_without() -> None:
    """Entries go with their hashes; names that only start alike stay."""
    text = "# c\nOctavia==1 \\\n    --hash=sha256:00\noctavia-lib===2\nflask==3 \\\n    --hash=x\n"
    assert agent.without(text, {"octavia"}) == "# c\noctavia-lib===2\nflask==3 --hash=x"


@pytest.mark.parametrize(
    "links",
    [
        {"python3": "python3.13"},
        {"python3": "./python3.13"},
        {"python3": "/usr/bin/python3.13"},
        {"python3": "/usr/bin/python-default", "python-default": "../bin/python3.13"},
    ],
)
def test_python_version(tmp_path: Path, links: dict[str, str]) -> None:
    """Links are followed inside the tree, never on the host."""
    assert agent.python_version(tree(tmp_path, **links)) == "3.13"


def test_newest_python(tmp_path: Path) -> None:
    """A newer Python beside the distribution's own is the agent's; other programs do not count."""
    root = tree(tmp_path, python3="python3.9")
    for name in ("python3.9", "python3.12", "python3.13-config"):
        (root / "usr/bin" / name).touch()
    assert agent.python_version(root) == "3.12"


@pytest.mark.parametrize("links", [{}, {"python3": "python3"}, {"python3": "python2.7"}])
def test_no_python(tmp_path: Path, links: dict[str, str]) -> None:
    """A tree without a Python 3 is an error that says what to install."""
    with pytest.raises(AmphoraImageError, match="no Python in the image") as error:
        agent.python_version(tree(tmp_path, **links))
    assert "python3" in str(error.value.hint)


@pytest.mark.parametrize("architecture", ["i386", "armhf", "ppc64le"])
def test_no_wheels_for_the_architecture(tmp_path: Path, architecture: str) -> None:
    """An architecture without wheels has packages, and nothing else even if that is asked for."""
    assert agent.choose({}, architecture) == agent.Packaged()
    assert agent.choose({}, architecture, packages=True) == agent.Packaged()
    refused = f"for {architecture}; they are for amd64, arm64"
    with pytest.raises(BadValue, match=refused) as error:
        agent.choose({}, architecture, ref="master")
    assert error.value.hint == "add -p"
    root = tree(tmp_path, python3="python3.13")
    with pytest.raises(BadValue, match=refused):
        agent.install(root, agent.Locked(), architecture=architecture, environ={})


def test_git_source_of_an_unknown_series(tmp_path: Path) -> None:
    """A branch without a lock needs constraints, and the error names their variable."""
    root = tree(tmp_path, python3="python3.13")
    source = agent.FromGit("stable/2024.1")
    with pytest.raises(BadValue, match=r"stable/2024.1") as error:
        agent.install(root, source, architecture="amd64", environ={})
    assert "DIB_REPOLOCATION_upper_constraints" in str(error.value.hint)


def test_git_source_in_no_directory(tmp_path: Path) -> None:
    """A repository that is neither a URL nor a directory is refused."""
    root = tree(tmp_path, python3="python3.13")
    source = agent.FromGit("master", repository=str(tmp_path / "nowhere"))
    with pytest.raises(BadValue, match="nowhere"):
        agent.install(root, source, architecture="amd64", environ={})


def test_packaged_source_leaves_only_the_check(tmp_path: Path) -> None:
    """With the distribution's agent there is the check and nothing else, run by its Python."""
    agent.install(tmp_path, agent.Packaged(), architecture="ppc64le", environ={})
    (check,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert check == tmp_path / agent.VERIFY[0].lstrip("/")
    assert check.read_text().startswith("#!/usr/bin/python3\n")
    assert agent.packages(tmp_path) == {}


def test_constraints_are_for_one_series() -> None:
    """The constraints of one series are not applied to another."""
    with pytest.raises(BadValue, match="belong to one series"):
        agent.refresh_locks({}, ["2026.2", "2026.1"], constraints="upper.txt")
