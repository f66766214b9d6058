# SPDX-License-Identifier: Apache-2.0
"""The agent's environment, made by the real uv from a package index that it reaches by itself."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from uv import find_uv_bin

from amphora_image import agent, agent_source
from amphora_image.agent_locks.check_imports import COMMANDS
from amphora_image.errors import AmphoraImageError

GIT = ("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "tag.gpgSign=no")


def tree(root: Path, python: str) -> Path:
    """As little of an image as an install looks at."""
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/python3").symlink_to(f"python{python}")
    return root


def regular_files(root: Path) -> Iterator[Path]:
    """Regular files, without following links."""
    return (path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.fixture(scope="module", params=["3.13", "3.11", "3.10"])
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with the newest locked agent, by the Python it has."""
    root = tree(tmp_path_factory.mktemp("image"), request.param)
    agent.install(root, agent_source.Locked(), architecture="amd64", environ=os.environ)
    return root


def test_commands(image: Path) -> None:
    """The commands that an image starts, and no others, run by the environment's Python."""
    home = image / "opt/amphora-agent"
    names = {path.name for path in (home / "bin").iterdir()}
    assert names == {*COMMANDS, "python3", "check-imports", "ask-agent"}
    for name in names - {"python3"}:
        text = (home / "bin" / name).read_text()
        assert text.splitlines()[0].split()[0] == "#!/opt/amphora-agent/bin/python3"
        compile(text, name, "exec")
        assert os.access(home / "bin" / name, os.X_OK)
    for name in COMMANDS:
        target = "ask-agent" if name == "amphora-interface" else name
        assert (image / "usr/bin" / name).readlink() == Path("/opt/amphora-agent/bin", target)


def test_virtual_environment(image: Path) -> None:
    """Python finds its packages by pyvenv.cfg, as PEP 405 says."""
    home, version = image / "opt/amphora-agent", agent.python_version(image)
    assert (home / "bin/python3").readlink() == Path(f"/usr/bin/python{version}")
    lines = (home / "pyvenv.cfg").read_text().splitlines()
    assert lines[0] == "home = /usr/bin"
    assert f"version = {version}" in lines
    assert [path.name for path in (home / "lib").iterdir()] == [f"python{version}"]


def test_extensions_are_for_the_image(image: Path) -> None:
    """Compiled modules are those of the image's Python, not the host's."""
    tag = f"cpython-{agent.python_version(image).replace('.', '')}"
    names = [path.name for path in image.rglob("*.so") if ".cpython-" in path.name]
    assert names
    assert all(tag in name for name in names)


def test_nothing_of_the_host(image: Path) -> None:
    """No path of the build host, no installer, and no other Python's byte code."""
    host = {str(image), sys.prefix, sys.base_prefix, str(Path(find_uv_bin()).parent)} - {"/usr"}
    names = set(agent.packages(image))
    assert not names & {"pip", "uv", "wheel"}
    for path in regular_files(image):
        assert path.name not in {"direct_url.json", "uv_cache.json", "uv_build.json"}
        assert path.suffix != ".pyc"
        content = path.read_bytes()
        assert not [prefix for prefix in host if prefix.encode() in content], path


def test_packages(image: Path) -> None:
    """The manifest's names and versions are those of the lock."""
    found = agent.packages(image)
    series = agent_source.series_for(agent.python_version(image))
    lock = agent_source.lock_of(series).read_text()
    assert list(found) == sorted(found)
    assert f"octavia=={found['octavia']} " in lock
    assert f"octavia-lib=={found['octavia-lib']} " in lock


def test_install_again(tmp_path: Path) -> None:
    """A second install replaces the first, whatever was left in it."""
    root = tree(tmp_path, "3.12")
    (root / "opt/amphora-agent/lib/python3.9").mkdir(parents=True)
    for _ in range(2):
        agent.install(root, agent_source.Locked("2026.1"), architecture="arm64", environ=os.environ)
    assert not (root / "opt/amphora-agent/lib/python3.9").exists()
    assert agent.packages(root)["octavia"].startswith("18.")
    machines = {path.read_bytes()[18] for path in root.rglob("*.so")}
    assert machines == {183}  # EM_AARCH64, elf(5)


def test_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with a hash that the lock does not list is never installed."""
    locks = tmp_path / "locks"
    locks.mkdir()
    (locks / "2026.2.txt").write_text(f"six==1.17.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(agent_source, "LOCKS", locks)
    root = tree(tmp_path / "image", "3.13")
    with pytest.raises(AmphoraImageError, match=r"[Hh]ash"):
        agent.install(root, agent_source.Locked("2026.2"), architecture="amd64", environ=os.environ)
    assert agent.packages(root) == {}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A Git repository that is built as Octavia is, by pbr, at tag 18.0.9 and one commit more."""
    root = tmp_path / "a repository"
    (root / "octavia/cmd").mkdir(parents=True)
    for package in ("octavia", "octavia/cmd"):
        (root / package / "__init__.py").touch()
    (root / "octavia/cmd/agent.py").write_text("def main():\n    return 0\n")
    (root / "requirements.txt").write_text("octavia-lib>=3.8.0\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["pbr>=6", "setuptools>=64"]\nbuild-backend = "pbr.build"\n'
    )
    (root / "setup.py").write_text("import setuptools\n\nsetuptools.setup(pbr=True)\n")
    (root / "setup.cfg").write_text(
        "[metadata]\nname = octavia\n[files]\npackages = octavia\n"
        "[entry_points]\nconsole_scripts =\n  amphora-agent = octavia.cmd.agent:main\n"
    )
    for words in (
        ("init", "-q", "-b", "stable/2026.1"),
        ("add", "."),
        ("commit", "-q", "-m", "first"),
        ("tag", "-a", "-m", "release", "18.0.9"),
        ("commit", "-q", "--allow-empty", "-m", "second"),
    ):
        subprocess.run([*GIT, *words], cwd=root, check=True)
    return root


def test_git(repository: Path, tmp_path: Path) -> None:
    """Octavia at a Git ref, with octavia-lib and all else as its series pins them."""
    root = tree(tmp_path / "image", "3.13")
    source = agent_source.FromGit("18.0.9", repository=str(repository))
    agent.install(root, source, architecture="amd64", environ=os.environ)
    found = agent.packages(root)
    assert found["octavia"] == "18.0.9"
    assert found["octavia-lib"].startswith("3.11.")
    assert not [path for path in regular_files(root) if str(tmp_path).encode() in path.read_bytes()]
    assert not (repository / "build").exists()


def test_git_with_constraints(repository: Path, tmp_path: Path) -> None:
    """Constraints that are named are followed; without a ref, what is checked out is taken."""
    root = tree(tmp_path / "image", "3.13")
    constraints = tmp_path / "upper-constraints.txt"
    constraints.write_text("octavia-lib===3.10.0\noctavia===1.0\n")
    source = agent_source.FromGit(repository=str(repository), constraints=constraints.as_uri())
    agent.install(root, source, architecture="amd64", environ=os.environ)
    found = agent.packages(root)
    assert found["octavia"].startswith("18.0.10.dev1")
    assert found["octavia-lib"] == "3.10.0"


def test_git_ref_that_is_not_there(repository: Path, tmp_path: Path) -> None:
    """A misspelt ref is named in the error."""
    root = tree(tmp_path / "image", "3.13")
    source = agent_source.FromGit("stable/2026.1x", repository=str(repository))
    with pytest.raises(AmphoraImageError, match=r"stable/2026.1x"):
        agent.install(root, source, architecture="amd64", environ=os.environ)


def test_lock_with_constraints(tmp_path: Path) -> None:
    """A fresh lock obeys the constraints it is given, and has the form of the committed ones."""
    constraints = tmp_path / "upper-constraints.txt"
    constraints.write_text("Flask===3.1.1\n")
    (lock,) = agent.refresh_locks(
        os.environ, ["2026.2"], constraints=str(constraints), directory=tmp_path / "locks"
    )
    text = lock.read_text()
    assert lock.name == "2026.2.txt"
    assert "\nflask==3.1.1 \\\n    --hash=sha256:" in text
    assert "\noctavia==19." in text
    assert str(tmp_path) not in text
    assert "://" not in text


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent for the Python that runs these tests, where that Python can start it."""
    if platform.machine() != "x86_64":
        pytest.skip("the host cannot run the image's modules")
    root = tree(tmp_path_factory.mktemp("native"), f"3.{sys.version_info.minor}")
    agent.install(root, agent_source.Locked(), architecture="amd64", environ=os.environ)
    home = root / "opt/amphora-agent"
    base = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")
    (home / "bin/python3").unlink()
    (home / "bin/python3").symlink_to(base)
    (home / "pyvenv.cfg").write_text(f"home = {base.parent}\n")
    return home


def check(home: Path) -> subprocess.CompletedProcess[str]:
    """Run the image's own check."""
    argv = [home / "bin/python3", home / "bin/check-imports"]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_everything_imports(native: Path) -> None:
    """All that an image starts is importable, and its byte code is left behind."""
    done = check(native)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(native.glob("lib/*/site-packages/octavia/cmd/__pycache__/agent.*.pyc"))
    assert list(native.glob("lib/*/site-packages/octavia/**/__pycache__/keepalivedlvs.*.pyc"))


def test_missing_module_is_named(native: Path) -> None:
    """A package that is missing fails the check by its name."""
    (package,) = native.glob("lib/*/site-packages/pyroute2")
    hidden = package.rename(package.with_name("hidden"))
    try:
        done = check(native)
    finally:
        hidden.rename(package)
    assert done.returncode == 1
    assert "No module named 'pyroute2'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
