# SPDX-License-Identifier: Apache-2.0
"""The agent's sources, its series and their locks, without starting a program."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import agent, agent_source
from amphora_image.errors import AmphoraImageError, BadValue

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
MAYBE = st.none() | TEXT
SOURCES = (
    st.builds(agent_source.Locked, MAYBE)
    | st.builds(agent_source.FromGit, MAYBE, TEXT, MAYBE, MAYBE, MAYBE)
    | st.just(agent_source.Packaged())
)


def entries(series: str) -> dict[str, str]:
    """Name -> one line with the version, markers and hashes, out of a lock."""
    lines = agent.without(agent_source.lock_of(series).read_text(), ()).splitlines()
    return {line.split("==")[0]: line for line in lines if not line.startswith("#")}


@given(SOURCES)
def test_environment_round_trip(source: agent_source.AgentSource) -> None:
    """A source survives the way through the environment, whatever its values."""
    variables = agent_source.environment(source)
    assert all(name.startswith("AMPHORA_AGENT_") for name in variables)
    assert agent_source.source_from({"PATH": "/bin", **variables}) == source


def test_no_variable_is_the_newest_lock() -> None:
    """Without any setting the agent comes from a lock."""
    assert agent_source.source_from({}) == agent_source.choose({}, "amd64") == agent_source.Locked()


def test_unknown_kind_of_source() -> None:
    """A kind that does not exist is refused with what is allowed."""
    with pytest.raises(BadValue, match="'pip'; allowed are locked, git, packages"):
        agent_source.source_from({"AMPHORA_AGENT_SOURCE": "pip"})


@pytest.mark.parametrize(
    ("variables", "options", "source"),
    [
        ({}, {"packages": True}, agent_source.Packaged()),
        ({}, {"ref": "master"}, agent_source.FromGit("master")),
        ({"DIB_REPOREF_amphora_agent": "a"}, {"ref": "b"}, agent_source.FromGit("b")),
        ({"DIB_REPOREF_amphora_agent": "a"}, {"packages": True}, agent_source.Packaged()),
        ({"OCTAVIA_REPO_PATH": "/o"}, {}, agent_source.FromGit(repository="/o")),
        (
            {"OCTAVIA_REPO_PATH": "/o", "DIB_REPOLOCATION_amphora_agent": "/a"},
            {},
            agent_source.FromGit(repository="/a"),
        ),
        (
            {
                "DIB_REPOREF_octavia_lib": "l",
                "DIB_REPOLOCATION_octavia_lib": "/l",
                "DIB_REPOLOCATION_upper_constraints": "/c",
            },
            {"ref": "r"},
            agent_source.FromGit("r", lib_ref="l", lib_repository="/l", constraints="/c"),
        ),
        ({"OCTAVIA_REPO_PATH": ""}, {}, agent_source.Locked()),
    ],
)
def test_choose(
    variables: dict[str, str], options: dict[str, object], source: agent_source.AgentSource
) -> None:
    """Options and the variables of Octavia's script select a source; an option beats a variable."""
    assert agent_source.choose(variables, "arm64", **options) == source  # type: ignore[arg-type]


def test_choose_refuses_both_options() -> None:
    """An agent cannot come from Git and from packages."""
    with pytest.raises(BadValue, match="exclude each other"):
        agent_source.choose({}, "amd64", ref="master", packages=True)


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
    assert agent_source.series_of(ref) == series


def test_series_are_newest_first() -> None:
    """The default is the first row, so the rows are ordered and the versions fall with them."""
    rows = list(agent_source.SERIES.values())
    for newer, older in pairwise(rows):
        assert newer.name > older.name
        assert newer.released > older.released
        assert int(newer.octavia) == int(older.octavia) + 1
    assert rows[0].name == agent_source.NEWEST


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
    assert agent_source.series_for(python, asked) == series


@pytest.mark.parametrize(("python", "asked"), [("3.9", None), ("3.10", "2026.2")])
def test_no_series_for_a_python(python: str, asked: str | None) -> None:
    """A Python that is too old is an error with a way out."""
    with pytest.raises(AmphoraImageError, match=f"Python is {python}; .* needs 3.1") as error:
        agent_source.series_for(python, asked)
    assert "-d" in str(error.value.hint)


def test_unknown_series() -> None:
    """A series without a lock is refused with the ones there are."""
    with pytest.raises(BadValue, match=r"'2019.1'; there are 2026.2, 2026.1, 2025.2"):
        agent_source.lock_of("2019.1")


@pytest.mark.parametrize("series", agent_source.SERIES)
def test_lock_names_no_host(series: str) -> None:
    """A lock works with any mirror: there is no URL, host or option in it."""
    text = agent_source.lock_of(series).read_text()
    assert "://" not in text
    assert not re.search(r"\.(org|com|io|net)\b", text)
    assert not re.search(r"^\s*-(?!-hash=sha256:)", text, re.MULTILINE)


@pytest.mark.parametrize("series", agent_source.SERIES)
def test_lock_pins_and_hashes_everything(series: str) -> None:
    """Every entry of a lock is one exact version with its hashes."""
    pins = entries(series)
    assert len(pins) > 60
    for line in pins.values():
        assert re.fullmatch(r"[a-z0-9-]+==\S+( ; [^#]+?)?( --hash=sha256:[0-9a-f]{64})+", line)


@pytest.mark.parametrize("series", agent_source.SERIES.values(), ids=str)
def test_lock_is_of_its_series(series: agent_source.Series) -> None:
    """Octavia and octavia-lib are those of the series, and pyroute2 is there."""
    pins = entries(series.name)
    assert pins["octavia"].startswith(f"octavia=={series.octavia}.")
    assert pins["octavia-lib"].startswith(f"octavia-lib=={series.octavia_lib}.")
    assert "pyroute2" in pins


@pytest.mark.parametrize("series", agent_source.SERIES)
def test_lock_leaves_the_controller_out(series: str) -> None:
    """What only a controller imports is in no lock."""
    listed = (agent_source.LOCKS / "controller-only.txt").read_text().splitlines()
    assert not entries(series).keys() & {name for name in listed if not name.startswith("#")}
