# SPDX-License-Identifier: Apache-2.0
"""What is promised of the project's files: the reference is whole, the house rules hold."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

import pytest

from amphora_image import cli, errors
from amphora_image.request import RELEASES, Architecture, BaseOS, ImageType

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs/reference.rst").read_text()
URL_HOST = re.compile(r"https?://(?:[^/@\s]*@)?([\w-]+(?:\.[\w-]+)+)")


def files_of(directory: Path) -> Iterator[Path]:
    """The files that are the project's: all that Git is not told to ignore."""
    ignored = [".git", *(ROOT / ".gitignore").read_text().split()]
    for path in sorted(directory.iterdir()):
        if any(fnmatch(path.name, pattern.rstrip("/")) for pattern in ignored):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from files_of(path)
        elif path.is_file():
            yield path


FILES = {path: path.read_text(errors="replace") for path in files_of(ROOT)}


def named(path: Path) -> str:
    """A file's name in the project."""
    return str(path.relative_to(ROOT))


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb of ``amphora-image``."""
    [action] = [a for a in cli._verbs()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


@pytest.mark.parametrize("verb", verbs())
def test_reference_has_every_option(verb: str) -> None:
    """Each option of each verb is in the reference, by all its names."""
    options = {option for action in verbs()[verb]._actions for option in action.option_strings}
    assert {option for option in options if f"``{option}``" not in REFERENCE} == set()


def test_reference_has_every_variable(variables_read: set[str]) -> None:
    """Each variable that the command line reads is in the reference."""
    assert {name for name in variables_read if f"``{name}``" not in REFERENCE} == set()


@pytest.mark.parametrize(
    "values",
    [Architecture, BaseOS, ImageType, {name for names in RELEASES.values() for name in names}],
)
def test_reference_has_every_value(values: set[str]) -> None:
    """Each value that is allowed is in the reference."""
    assert {value for value in values if f"``{value}``" not in REFERENCE} == set()


def test_reference_has_every_exit_code() -> None:
    """Each exit code is in the reference."""
    section = REFERENCE.partition("Exit codes")[2]
    codes = {0, 130, 143}
    codes |= {kind.exit_code for kind in errors.AmphoraImageError.__subclasses__()}
    assert {code for code in codes if not re.search(rf"\b{code}\b", section)} == set()


def test_marks_have_tests() -> None:
    """Each test that stands behind a mark of what is proven is there, and each note is one."""
    text = (ROOT / "docs/support.rst").read_text()
    tests = re.findall(r"^\.\. \[\d+\] ``([^:`]+)(?:::(\w+))?``", text, re.MULTILINE)
    assert len(tests) == len(re.findall(r"^\.\. \[", text, re.MULTILINE)) > 10
    for file, function in tests:
        assert f"def {function}" in (ROOT / file).read_text(), file


def test_every_verb_is_documented() -> None:
    """Each verb of ``amphora-image`` is in some document."""
    told = "".join(text for path, text in FILES.items() if path.suffix == ".rst")
    assert {verb for verb in verbs() if f"amphora-image {verb}" not in told} == set()


def registries() -> set[str]:
    """Host names of package registries, none of which is written here.

    They are what this machine's apt, pip and uv use, and what diskimage-builder's elements name
    as mirrors and indexes.
    """
    etc = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    etc += [Path("/etc/pip.conf"), Path("/etc/uv/uv.toml"), Path.home() / ".config/pip/pip.conf"]
    texts = [path.read_text(errors="replace") for path in etc if path.is_file()]
    texts += [value for name, value in os.environ.items() if "INDEX" in name]
    elements = Path(str(resources.files("diskimage_builder"))) / "elements"
    telling = re.compile(r".*(?:MIRROR\S*=\S*https?://|https?://\S+/(?:simple|pypi|project)\b).*")
    for path in elements.rglob("*"):
        if path.is_file():
            texts += telling.findall(path.read_text(errors="replace"))
    hosts = {host.lower() for text in texts for host in URL_HOST.findall(text)}
    return {host for host in hosts if "example" not in host}


def test_no_registry_is_named() -> None:
    """No file holds the host name of a package registry: mirrors are the user's choice."""
    forbidden = registries()
    assert len(forbidden) > 3
    text = {named(path): text.lower() for path, text in FILES.items()}
    assert {(name, host) for name in text for host in forbidden if host in text[name]} == set()


def test_example_mirrors() -> None:
    """Lines for apt, and URLs that look like an archive's or an index's, are of example.org."""
    looks = re.compile(
        r"\bdeb(?:-src)?\s+(?:\[[^]]*\]\s+)?\w+://([\w.-]+)"
        r"|https?://([\w.-]+)(?::\d+)?/(?:debian|ubuntu|fedora|centos|simple|pypi)\b"
    )
    found = {
        (named(path), "".join(hosts))
        for path, text in FILES.items()
        for hosts in looks.findall(text)
    }
    allowed = {"mirror.example.org", "127.0.0.1"}  # nobody's, and a test's own
    assert {place for place in found if place[1] not in allowed} == set()
    assert ("tests/data/plans/command-lines.txt", "mirror.example.org") in found


SOURCES = [
    path
    for path, text in FILES.items()
    if path.suffix in {".py", ".sh", ".bash", ".toml", ".ini"} or text.startswith("#!")
]


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_licence(path: Path) -> None:
    """Each source file begins with its licence, after a line that names its interpreter."""
    assert "# SPDX-License-Identifier: Apache-2.0" in FILES[path].splitlines()[:2]


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=named)
def test_module(path: Path) -> None:
    """A module is at most 500 lines long and says in its docstring what it is."""
    lines = path.read_text().splitlines()
    assert len(lines) <= 500
    assert re.search(r'^"""\S', path.read_text(), re.MULTILINE)
