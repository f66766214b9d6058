# SPDX-License-Identifier: Apache-2.0
"""Where the amphora agent comes from: a series' lock, Git, or the distribution's packages.

What a user asked for travels through diskimage-builder's phases as variables.
``docs/agent.rst`` tells of each source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from amphora_image.errors import AmphoraImageError, BadValue

LOCKS = Path(__file__).with_name("agent_locks")

#: Architecture of the image -> uv's name of the platform. Every base OS has glibc 2.28 or newer.
PLATFORMS = {"amd64": "x86_64-manylinux_2_28", "arm64": "aarch64-manylinux_2_28"}

PROJECT = "openstack/octavia"
REPOSITORY = f"https://opendev.org/{PROJECT}"
LIB_REPOSITORY = f"{REPOSITORY}-lib"


@dataclass(frozen=True)
class Series:
    """An OpenStack series as the agent sees it.

    :param name: "2026.2".
    :param octavia: version without its last part: "19" takes every 19.y.z.
    :param octavia_lib: the same for octavia-lib, "3.12".
    :param python: oldest Python that this Octavia accepts, "3.11".
    :param released: the day after the series' release, "2026-10-01".
    """

    name: str
    octavia: str
    octavia_lib: str
    python: str
    released: str


#: Newest first.
SERIES = {
    series.name: series
    for series in (
        Series("2026.2", "19", "3.12", "3.11", "2026-10-01"),
        Series("2026.1", "18", "3.11", "3.10", "2026-04-02"),
        Series("2025.2", "17", "3.10", "3.10", "2025-10-02"),
    )
}
NEWEST = next(iter(SERIES))


@dataclass(frozen=True)
class Locked:
    """Released packages, as a series' lock pins them.

    :param series: "2026.1"; if None, the newest that accepts the image's Python.
    """

    series: str | None = None


@dataclass(frozen=True)
class FromGit:
    """Octavia from Git.

    :param ref: branch, tag or commit of octavia; what the repository has checked out if None.
    :param repository: URL, or path of a local checkout, whose committed state is what counts.
    :param lib_ref: of octavia-lib; if it and lib_repository are None, the release that the
        constraints pin is taken.
    :param constraints: URL or path of an upper-constraints file; the pins of the ref's series if
        None.
    """

    ref: str | None = None
    repository: str = REPOSITORY
    lib_ref: str | None = None
    lib_repository: str | None = None
    constraints: str | None = None


@dataclass(frozen=True)
class Packaged:
    """The distribution's own packages, installed by an element and only checked here."""


AgentSource = Locked | FromGit | Packaged

_KINDS: dict[str, type[AgentSource]] = {"locked": Locked, "git": FromGit, "packages": Packaged}

#: What operators set for Octavia's own script -> the field of FromGit; the first that is set wins.
_DIB_VARIABLES = {
    "DIB_REPOREF_amphora_agent": "ref",
    "DIB_REPOLOCATION_amphora_agent": "repository",
    "OCTAVIA_REPO_PATH": "repository",
    "DIB_REPOREF_octavia_lib": "lib_ref",
    "DIB_REPOLOCATION_octavia_lib": "lib_repository",
    "DIB_REPOLOCATION_upper_constraints": "constraints",
}


def choose(
    environ: Mapping[str, str],
    architecture: str,
    *,
    ref: str | None = None,
    packages: bool = False,
    git_base: str | None = None,
) -> AgentSource:
    """The source that a user asked for: ``-g REF``, ``-p``, or any variable of Octavia's script.

    Else the newest lock, or packages for an architecture without wheels.

    :param git_base: URL that ends in a slash, for repositories that are not named.
    :raises BadValue: both options were given, the ref is none, a URL holds a password, or an
        architecture without wheels is to have the agent from Git.
    """
    for name in _DIB_VARIABLES:
        if re.search(r"://[^/@]*:[^/@]*@", environ.get(name, "")):
            raise BadValue(
                f"{name} holds a password, which would stand in the manifest",
                "leave it to git's credential helper, see gitcredentials(7)",
            )
    if packages and ref:
        raise BadValue(f"-g {ref} and -p exclude each other", "leave one of them out")
    if packages:
        return Packaged()
    asked = {
        name: environ[key] for key, name in reversed(_DIB_VARIABLES.items()) if environ.get(key)
    }
    if ref:
        asked["ref"] = ref
    # The part of git-check-ref-format(1) that a URL with a ref at its end depends on.
    if not re.fullmatch(r"(?![-/.])[\w./+-]+(?<![/.])", asked.get("ref", "master"), re.ASCII):
        raise BadValue(f"-g (agent's ref) is {asked['ref']!r}; allowed is a branch, tag or commit")
    if git_base and asked:
        asked.setdefault("repository", f"{git_base}{PROJECT}")
    if git_base and "lib_ref" in asked:
        asked.setdefault("lib_repository", f"{git_base}{PROJECT}-lib")
    if asked and platform_of(architecture):
        return FromGit(**asked)
    return Locked() if architecture in PLATFORMS else Packaged()


def environment(source: AgentSource) -> dict[str, str]:
    """The source as variables ``AMPHORA_AGENT_SOURCE`` and ``AMPHORA_AGENT_<FIELD>``."""
    kind = next(name for name, known in _KINDS.items() if isinstance(source, known))
    values = {field.name: getattr(source, field.name) for field in fields(source)}
    return {"AMPHORA_AGENT_SOURCE": kind} | {
        f"AMPHORA_AGENT_{name.upper()}": value
        for name, value in values.items()
        if value is not None
    }


def source_from(environ: Mapping[str, str]) -> AgentSource:
    """The inverse of `environment`; variables that are not set have the fields' defaults.

    :raises BadValue: AMPHORA_AGENT_SOURCE names no kind of source.
    """
    kind = environ.get("AMPHORA_AGENT_SOURCE", "locked")
    if kind not in _KINDS:
        raise BadValue(f"AMPHORA_AGENT_SOURCE is {kind!r}; allowed are {', '.join(_KINDS)}")
    names = {field.name: f"AMPHORA_AGENT_{field.name.upper()}" for field in fields(_KINDS[kind])}
    return _KINDS[kind](**{name: environ[key] for name, key in names.items() if key in environ})


def series_of(ref: str | None) -> str | None:
    """The series of a Git ref, or None if it is not one of SERIES.

    A branch like stable/2026.1 names it, a tag like 18.0.1 has its major version, and all else
    (master, a commit, no ref) counts as the newest.
    """
    ref = ref or ""
    if named := re.search(r"\b\d{4}\.[12]\b", ref):
        return named[0] if named[0] in SERIES else None
    if tag := re.fullmatch(r"(\d+)\.\d+(\.\w+)*", ref):
        return next((s.name for s in SERIES.values() if s.octavia == tag[1]), None)
    return NEWEST


def series_for(python: str, asked: str | None = None) -> str:
    """The series asked for, or the newest, if it accepts an image's Python, "3.10".

    :raises AmphoraImageError: it does not, or none does.
    """
    candidates = [SERIES[lock_of(asked).stem]] if asked else list(SERIES.values())
    for series in candidates:
        if numbers(python) >= numbers(series.python):
            return series.name
    oldest = candidates[-1]
    raise AmphoraImageError(
        f"the image's Python is {python}; octavia {oldest.octavia} of series {oldest.name} "
        f"needs {oldest.python} or newer",
        "take a newer release of the base OS (-d)",
    )


def lock_of(series: str) -> Path:
    """The lock file of a series, in pip's requirements format.

    :raises BadValue: there is none.
    """
    if series not in SERIES:
        raise BadValue(f"no lock for series {series!r}; there are {', '.join(SERIES)}")
    return LOCKS / f"{series}.txt"


def platform_of(architecture: str) -> str:
    """Return uv's name of the platform for which wheels are taken.

    :raises BadValue: there are none for the architecture.
    """
    if architecture not in PLATFORMS:
        known = ", ".join(PLATFORMS)
        raise BadValue(f"no wheels of the agent for {architecture}; they are for {known}", "add -p")
    return PLATFORMS[architecture]


def numbers(version: str) -> tuple[int, ...]:
    """Return what a version, "3.13", is compared by."""
    return tuple(map(int, version.split(".")))
