# SPDX-License-Identifier: Apache-2.0
"""The amphora agent: locked requirements -> its Python environment inside an image's tree.

It is ``/opt/amphora-agent`` there, made on the build host: a virtual environment of the image's own
Python, with neither pip nor a compiler. ``docs/agent.rst`` tells of its sources.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from uv import find_uv_bin

from amphora_image.agent_locks.check_imports import COMMANDS
from amphora_image.agent_source import (
    LIB_REPOSITORY,
    LOCKS,
    SERIES,
    AgentSource,
    FromGit,
    Locked,
    Packaged,
    Series,
    lock_of,
    numbers,
    platform_of,
    series_for,
    series_of,
)
from amphora_image.errors import AmphoraImageError, BadValue
from amphora_image.run import run

#: Where the environment is, as the image sees it.
HOME = "/opt/amphora-agent"

#: Pure Python that is built on the host where the agent is taken from Git; all else is a wheel.
BUILT = ("octavia", "octavia-lib", "simplegeneric")

#: One of Octavia's commands, without what only the controller needs.
COMMAND = """\
import sys

from amphora_lazy import starting

with starting():
    from {module} import main
{then}
sys.exit(main())
"""
#: Command -> what it does as soon as it is imported.
THEN = {"amphora-agent": "\nimport amphora_fork\n\namphora_fork.serve()\n"}
#: Command -> who is asked to do its work.
ASKED = {"amphora-interface": "ask-agent"}


def refresh_locks(
    environ: Mapping[str, str],
    series: Collection[str] = tuple(SERIES),
    *,
    constraints: str | None = None,
    directory: Path = LOCKS,
) -> list[Path]:
    """Resolve each series anew and write its lock.

    :param constraints: path or URL of that series' upper constraints; without it, packages other
        than octavia and octavia-lib are the newest of the day when the series was released.
    :raises BadValue: a series is unknown, or there are constraints for more than one.
    """
    if constraints and len(series) > 1:
        raise BadValue(
            f"constraints {constraints} for {', '.join(series)}: they belong to one series",
            "name the series with --series",
        )
    return [_lock(SERIES[lock_of(name).stem], constraints, directory, environ) for name in series]


def _lock(
    series: Series, constraints: str | None, directory: Path, environ: Mapping[str, str]
) -> Path:
    # pyroute2: recent octavia imports it on an image but declares it nowhere.
    wanted = f"octavia=={series.octavia}.*\noctavia-lib=={series.octavia_lib}.*\npyroute2\n"
    day, origin = f"{series.released}T00:00:00Z", "upper constraints"
    limits: list[str | Path] = ["--constraints", constraints or ""]
    if not constraints:
        origin = f"packages of {day}, octavia and octavia-lib of their newest stable release"
        limits = ["--exclude-newer", day]
        for name in ("octavia", "octavia-lib"):
            limits += ["--exclude-newer-package", f"{name}=0 days"]
    pins = _uv(
        environ,
        *("compile", "-", "--universal", "--python-version", series.python),
        *("--generate-hashes", "--no-annotate", "--no-header", "--only-binary", ":all:"),
        *("--excludes", LOCKS / "controller-only.txt", *limits),
        stdin=wanted,
    )
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{series.name}.txt"
    partial = target.with_suffix(".partial")
    partial.write_text(
        f"# Made by: amphora-image lock --series {series.name}\n# From: {origin}\n{pins}"
    )
    return partial.replace(target)


def install(
    root: Path, source: AgentSource, *, architecture: str, environ: Mapping[str, str]
) -> None:
    """Make the agent's environment in an image's tree, and its commands in /usr/bin.

    Octavia calls haproxy-vrrp-check, amphora-health-checker and amphora-interface by bare name,
    out of keepalived and ``ip netns exec``, whose search path may be no more than /usr/bin:/bin.
    Of `Packaged` nothing is left there but the one program that each source has: check-imports, to
    run inside the image, which ends with 0, or with 1 and a line that names what is missing.

    :param root: the image's tree, whose newest Python runs the agent.
    :param architecture: of the image, "amd64".
    :param environ: for uv: its cache, index, proxies and certificates; DIB_OFFLINE is honoured.
    :raises AmphoraImageError: no Python in the tree or one too old, no wheels for the
        architecture, or uv failed.
    """
    home = root / HOME.lstrip("/")
    shutil.rmtree(home, ignore_errors=True)
    (home / "bin").mkdir(parents=True)
    if isinstance(source, Packaged):
        _write_command(home / "bin/check-imports", "/usr/bin/python3", _checker())
        return
    version = python_version(root)
    site = home / f"lib/python{version}/site-packages"
    with TemporaryDirectory(prefix="amphora-agent-") as scratch:
        wanted = _requirements(source, version, Path(scratch))
        _uv(
            environ,
            *("install", "--python", sys.executable, "--only-binary", ":all:", "--target", site),
            *("--python-version", version, "--python-platform", platform_of(architecture)),
            *wanted,
        )
    _forget_build_host(site)
    _lay_out(root, home, version)


def packages(root: Path) -> dict[str, str]:
    """Name -> version of the Python packages in the agent's environment; {} if there is none."""
    return {dist.name: dist.version for dist in sorted(_installed(root), key=lambda d: d.name)}


def python_version(root: Path) -> str:
    """Version of the newest Python in a tree's usr/bin, "3.13".

    The one of python3 need not be it: the RedHat family's release 9 has 3.9 for itself.

    :raises AmphoraImageError: there is no python3.
    """
    names = [path.name for path in (root / "usr/bin").glob("python3.*")]
    others = [found[1] for name in names if (found := re.fullmatch(r"python(3\.\d+)", name))]
    return max([_default_python(root), *others], key=numbers)


def _default_python(root: Path) -> str:
    python = root / "usr/bin/python3"
    for _ in range(8):
        if found := re.fullmatch(r"python(3\.\d+)", python.name):
            return found[1]
        if not python.is_symlink():
            break
        target = python.readlink()
        python = root / str(target).lstrip("/") if target.is_absolute() else python.parent / target
    raise AmphoraImageError(
        f"no Python in the image: {root}/usr/bin/python3 does not lead to a python3.N",
        "install python3 in the image before the agent",
    )


def _uv(environ: Mapping[str, str], *arguments: str | Path, stdin: str | None = None) -> str:
    # Copies, not hard links: what happens in the image must not reach uv's cache.
    ours = {"UV_LINK_MODE": "copy", "UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never"}
    offline = {"UV_OFFLINE": "1"} if environ.get("DIB_OFFLINE") else {}
    return run(
        [find_uv_bin(), "pip", *arguments],
        env={"UV_SYSTEM_CERTS": "1", **environ, **ours, **offline},
        stdin=stdin,
        hint="--index-url names a mirror, --ca-file a private CA, -g the Git ref",
    )


def _requirements(source: Locked | FromGit, version: str, scratch: Path) -> list[str | Path]:
    """Uv's arguments that say what to install; files that they need are made in scratch."""
    if isinstance(source, Locked):
        lock = lock_of(series_for(version, source.series))
        return ["--no-deps", "--require-hashes", "--requirement", lock]
    wanted, constraints = scratch / "requirements.txt", scratch / "constraints.txt"
    lines = [f"octavia @ {_git(source.repository, source.ref)}", "pyroute2"]
    if source.lib_ref or source.lib_repository:
        same = (source.ref or "").startswith(("stable/", "unmaintained/"))
        lib = _git(
            source.lib_repository or LIB_REPOSITORY,
            source.lib_ref or (source.ref if same else None),
        )
        lines.append(f"octavia-lib @ {lib}")
    wanted.write_text("\n".join(lines))
    ours = {line.split()[0] for line in lines} - {"pyroute2"}
    constraints.write_text(without(_constraints(source), ours))
    built = [word for name in BUILT for word in ("--no-binary", name)]
    return ["--requirement", wanted, "--constraints", constraints, *built]


def _git(location: str, ref: str | None) -> str:
    """A location as a PEP 508 URL."""
    if "://" not in location:
        if not Path(location).is_dir():
            raise BadValue(f"no repository {location!r}; allowed are a URL and a directory")
        location = Path(location).resolve().as_uri()
    return f"git+{location}@{ref}" if ref else f"git+{location}"


def _constraints(source: FromGit) -> str:
    if not source.constraints:
        if series := series_of(source.ref):
            return lock_of(series).read_text()
        raise BadValue(
            f"no constraints are known for {source.ref}; the series are {', '.join(SERIES)}",
            "name that series' constraints file in DIB_REPOLOCATION_upper_constraints",
        )
    try:
        if source.constraints.startswith(("https://", "http://", "file://")):
            with urlopen(source.constraints, timeout=60) as answer:  # noqa: S310
                return str(answer.read().decode())
        return Path(source.constraints).read_text()
    except OSError as error:
        raise AmphoraImageError(f"cannot read constraints {source.constraints}: {error}") from error


def without(requirements: str, names: Collection[str]) -> str:
    """Requirements-format text without the entries (and their hashes) of these packages."""
    entries = re.sub(r"\\\n\s*", "", requirements).splitlines()
    return "\n".join(e for e in entries if re.split(r"[^\w.-]", e)[0].lower() not in names)


def _forget_build_host(site: Path) -> None:
    """Take away uv's traces, scripts for the host's Python, and tests, which nothing imports."""
    for path in (site / "bin", site / "share", *site.rglob("tests")):
        shutil.rmtree(path, ignore_errors=True)
    for name in ("direct_url.json", "uv_build.json", "uv_cache.json"):
        for path in site.glob(f"*.dist-info/{name}"):
            path.unlink()
    # Of setuptools: what it would do at each start is for programs that build packages.
    for name in (".lock", "distutils-precedence.pth"):
        (site / name).unlink(missing_ok=True)


def _lay_out(root: Path, home: Path, version: str) -> None:
    """Turn the installed packages into a virtual environment (PEP 405) with Octavia's commands."""
    python = f"{HOME}/bin/python3"
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {version}\n"
    )
    (home / "bin/python3").symlink_to(f"/usr/bin/python{version}")
    _write_command(home / "bin/check-imports", python, _checker())
    for module in ("amphora_fork.py", "amphora_lazy.py"):
        shutil.copy(LOCKS / module, home / f"lib/python{version}/site-packages")
    _write_command(home / "bin/ask-agent", f"{python} -IS", (LOCKS / "amphora_fork.py").read_text())
    octavia = next((dist for dist in _installed(root) if dist.name == "octavia"), None)
    points = octavia.entry_points.select(group="console_scripts") if octavia else ()
    for point in (point for point in points if point.name in COMMANDS):
        text = COMMAND.format(module=point.module, then=THEN.get(point.name, ""))
        _write_command(home / "bin" / point.name, python, text)
        link = root / "usr/bin" / point.name
        link.unlink(missing_ok=True)
        link.symlink_to(f"{HOME}/bin/{ASKED.get(point.name, point.name)}")


def _checker() -> str:
    return (LOCKS / "check_imports.py").read_text()


def _write_command(path: Path, python: str, text: str) -> None:
    path.write_text(f"#!{python}\n{text}")
    path.chmod(0o755)


def _installed(root: Path) -> list[Distribution]:
    sites = root.glob(f"{HOME.lstrip('/')}/lib/python3*/site-packages")
    return list(distributions(path=[str(site) for site in sites]))
