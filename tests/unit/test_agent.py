# SPDX-License-Identifier: Apache-2.0
"""What is known of an agent and its Python before anything is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from amphora_image import agent, agent_source
from amphora_image.errors import AmphoraImageError, BadValue


def tree(root: Path, **links: str) -> Path:
    """A tree whose usr/bin has these symbolic links."""
    (root / "usr/bin").mkdir(parents=True)
    for name, target in links.items():
        (root / "usr/bin" / name).symlink_to(target)
    return root


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
    assert agent_source.choose({}, architecture) == agent_source.Packaged()
    assert agent_source.choose({}, architecture, packages=True) == agent_source.Packaged()
    refused = f"for {architecture}; they are for amd64, arm64"
    with pytest.raises(BadValue, match=refused) as error:
        agent_source.choose({}, architecture, ref="master")
    assert error.value.hint == "add -p"
    root = tree(tmp_path, python3="python3.13")
    with pytest.raises(BadValue, match=refused):
        agent.install(root, agent_source.Locked(), architecture=architecture, environ={})


def test_git_source_of_an_unknown_series(tmp_path: Path) -> None:
    """A branch without a lock needs constraints, and the error names their variable."""
    root = tree(tmp_path, python3="python3.13")
    source = agent_source.FromGit("stable/2024.1")
    with pytest.raises(BadValue, match=r"stable/2024.1") as error:
        agent.install(root, source, architecture="amd64", environ={})
    assert "DIB_REPOLOCATION_upper_constraints" in str(error.value.hint)


def test_git_source_in_no_directory(tmp_path: Path) -> None:
    """A repository that is neither a URL nor a directory is refused."""
    root = tree(tmp_path, python3="python3.13")
    source = agent_source.FromGit("master", repository=str(tmp_path / "nowhere"))
    with pytest.raises(BadValue, match="nowhere"):
        agent.install(root, source, architecture="amd64", environ={})


def test_packaged_source_leaves_only_the_check(tmp_path: Path) -> None:
    """With the distribution's agent there is the check and nothing else, run by its Python."""
    agent.install(tmp_path, agent_source.Packaged(), architecture="ppc64le", environ={})
    (check,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert check == tmp_path / "opt/amphora-agent/bin/check-imports"
    assert check.read_text().startswith("#!/usr/bin/python3\n")
    assert agent.packages(tmp_path) == {}


def test_constraints_are_for_one_series() -> None:
    """The constraints of one series are not applied to another."""
    with pytest.raises(BadValue, match="belong to one series"):
        agent.refresh_locks({}, ["2026.2", "2026.1"], constraints="upper.txt")
