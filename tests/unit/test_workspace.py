# SPDX-License-Identifier: Apache-2.0
"""The directories of a build: safe names for them, and their end."""

from __future__ import annotations

import fcntl
import json
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from amphora_image import workspace as ws
from amphora_image.errors import AmphoraImageError
from amphora_image.sandbox import Mount
from amphora_image.workspace import PREFIX, SAFE_PATH, Workspace, remove_stale, workspace

ODD = ["sp ace", "quo'te", 'dou"ble', "größe-日本", "$HOME", "a;b", "a:b", "a*b", "a\nb", "(a)"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workspaces are made, in place of /tmp; its name is safe."""
    monkeypatch.setattr(ws, "_home", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def detached(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The workspaces whose loop devices were detached; no program is started for it."""
    names: list[str] = []
    monkeypatch.setattr(ws, "detach_loop_devices", names.append)
    return names


@pytest.fixture
def space(home: Path, detached: list[str]) -> Iterator[Workspace]:
    """A workspace."""
    with workspace() as made:
        yield made


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_safe_path(space: Workspace, tmp_path: Path, name: str, kind: str) -> None:
    """What a shell would not take as one word is mounted under a name that it does."""
    path = tmp_path / name
    path.mkdir() if kind == "directory" else path.touch()
    safe = space.safe(path)
    assert SAFE_PATH.fullmatch(str(safe))
    assert safe.parent == space.root
    assert safe.is_dir() == (kind == "directory")
    assert space.mounts == [Mount(str(path), str(safe))]


def test_safe_path_stays_what_it_is(space: Workspace, tmp_path: Path) -> None:
    """A path with a safe name needs no mount; a link is followed first."""
    (tmp_path / "plain-1.0_x").mkdir()
    (tmp_path / "a link").symlink_to("plain-1.0_x")
    assert space.safe(tmp_path / "plain-1.0_x") == tmp_path / "plain-1.0_x"
    assert space.safe(tmp_path / "a link") == tmp_path / "plain-1.0_x"
    assert space.mounts == []


def test_safe_paths_differ(space: Workspace, tmp_path: Path) -> None:
    """Each odd path gets a name of its own, beside the work directory's."""
    space.work_in(None)
    for name in ODD:
        (tmp_path / name).mkdir()
        space.safe(tmp_path / name)
    targets = [mount.target for mount in space.mounts]
    assert len(set(targets)) == len(targets) == len(ODD) + 1


def test_work_in_memory(space: Workspace) -> None:
    """In memory, the work directory is a tmpfs of the sandbox; its path has the build's name."""
    space.work_in(None)
    assert space.mounts == [Mount("", str(space.work.parent))]
    assert space.work.parent.is_dir()
    assert space.work.name == space.root.name


@pytest.mark.parametrize("name", ["work", "a/new/one", "größe 'x'"])
def test_work_on_disk(space: Workspace, tmp_path: Path, name: str) -> None:
    """On disk, it is a new directory of the one that was asked for, seen under a safe name."""
    space.work_in(tmp_path / name)
    [made] = (tmp_path / name).iterdir()
    assert space.mounts == [Mount(str(made), str(space.work.parent))]
    assert SAFE_PATH.fullmatch(str(space.work))


@pytest.mark.parametrize("failure", [None, AmphoraImageError("no"), KeyboardInterrupt()])
def test_nothing_stays(home: Path, detached: list[str], failure: BaseException | None) -> None:
    """All that belongs to a workspace ends with it, after success and after any failure."""
    others = home / "others"
    others.mkdir()
    (others / "file").touch()

    def work() -> str:
        with workspace() as space:
            space.work_in(home / "work")
            for number in range(3):
                part = home / f"part{number}"
                part.touch()
                space.owns(part)
            space.owns(home / "never-made")
            (space.root / "inside").mkdir()
            (space.root / "link").symlink_to(others)
            if failure:
                raise failure
            return space.root.name

    if failure:
        with pytest.raises(type(failure)):
            work()
    else:
        assert detached == [work()]
    assert sorted(path.name for path in home.iterdir()) == ["others", "work"]
    assert list((home / "work").iterdir()) == []
    assert (others / "file").exists()


def test_a_link_is_removed_not_followed(home: Path, detached: list[str]) -> None:
    """A link that belongs to a workspace goes; what it points to stays."""
    (home / "others").mkdir()
    with workspace() as space:
        (home / "link").symlink_to("others")
        space.owns(home / "link")
    assert [path.name for path in home.iterdir()] == ["others"]


def test_state_file(space: Workspace, home: Path) -> None:
    """The state file names all that is to be removed, at any time."""
    for number in range(3):
        space.owns(home / f"part {number}")
        state = json.loads((space.root / "state.json").read_text())
        assert state["remove"] == [
            str(space.root),
            *(str(home / f"part {n}") for n in range(number + 1)),
        ]
    assert space.root.stat().st_mode & 0o77 == 0


def test_state_file_appears_locked(
    home: Path, detached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no moment at which another build could take a new workspace for a stale one."""
    seen: list[Path] = []
    flock = fcntl.flock

    def watched(file: object, how: int) -> None:
        seen.extend(home.glob(f"{PREFIX}*/state.json"))
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(ws.fcntl, "flock", watched)
    with workspace() as space:
        assert seen == []
        assert remove_stale() == []
        assert seen == [space.root / "state.json"]
        assert space.root.exists()


def left_behind(home: Path, text: str, name: str = "dead") -> Path:
    """A workspace whose build was killed; its state file holds the text."""
    root = home / f"{PREFIX}{name}"
    root.mkdir(mode=0o700)
    (root / "state.json").write_text(text)
    (root / "inside").mkdir()
    return root


def test_stale_workspace_is_removed(home: Path, detached: list[str]) -> None:
    """What the state file of a killed build names is removed, and nothing else."""
    for name in ("lb.part", "other"):
        (home / name).touch()
    (home / "work").mkdir()
    names = [f"{home}/{PREFIX}dead", f"{home}/work", f"{home}/lb.part", f"{home}/gone"]
    root = left_behind(home, json.dumps({"pid": 1, "remove": names}))
    assert remove_stale() == [root.name] == detached
    assert [path.name for path in home.iterdir()] == ["other"]


def test_living_workspace_stays(home: Path, detached: list[str]) -> None:
    """While the lock of its state file is held, nothing of a workspace is removed."""
    (home / "part").touch()
    root = left_behind(home, json.dumps({"pid": 1, "remove": [f"{home}/part"]}))
    with (root / "state.json").open("r+") as state:
        fcntl.flock(state, fcntl.LOCK_EX)
        assert remove_stale() == []
        assert (root / "inside").exists()
        assert (home / "part").exists()
    assert detached == []
    assert remove_stale() == [root.name]


@pytest.mark.parametrize("text", ["", "{", "{}", '{"pid": 1}', '{"pid": 1, "remove": ["/a"', "\0"])
def test_unreadable_state(home: Path, detached: list[str], text: str) -> None:
    """Of a build that was killed while it wrote its state, the workspace itself is removed."""
    left_behind(home, text)
    assert len(remove_stale()) == 1
    assert list(home.iterdir()) == []


def test_each_stale_workspace_is_removed(home: Path, detached: list[str]) -> None:
    """One that cannot be read does not keep the others."""
    left_behind(home, "", "a")
    (home / f"{PREFIX}b").mkdir()
    (home / f"{PREFIX}b/state.json").mkdir()
    left_behind(home, "", "c")
    assert sorted(remove_stale()) == [f"{PREFIX}a", f"{PREFIX}c"]


def test_workspace_of_somebody_else(
    home: Path, detached: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone may write to /tmp: a state file in another user's directory is not obeyed."""
    (home / "precious").touch()
    root = left_behind(home, json.dumps({"remove": [f"{home}/precious"]}))
    monkeypatch.setattr(ws.os, "geteuid", lambda: root.stat().st_uid + 1)
    assert remove_stale() == []
    assert (home / "precious").exists()


def test_workspace_that_is_a_link(home: Path, detached: list[str]) -> None:
    """A link with a workspace's name is not followed."""
    (home / "precious").touch()
    root = left_behind(home, json.dumps({"remove": [f"{home}/precious"]}))
    root.rename(home / "elsewhere")
    root.symlink_to("elsewhere")
    assert remove_stale() == []
    assert (home / "precious").exists()


def test_new_workspace_removes_stale_ones(home: Path, detached: list[str]) -> None:
    """The next build begins with what the last one left."""
    root = left_behind(home, "")
    with workspace():
        assert not root.exists()


@pytest.mark.parametrize(
    ("directory", "used"), [("/var/tmp", "/var/tmp"), ("/home/a b", "/tmp"), ("/größe", "/tmp")]
)
def test_home_is_safe(directory: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces are where temporary files are, unless that has an odd name."""
    monkeypatch.setattr(ws.tempfile, "gettempdir", lambda: directory)
    assert ws._home() == Path(used)


def test_loop_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only loop devices whose file lies in the workspace are detached."""
    name = f"{PREFIX}dead"
    listed = [
        {"name": "/dev/loop0", "back-file": "/srv/other.raw"},
        {"name": "/dev/loop1", "back-file": f"/{name}/dib_image.x/image.raw"},
        {"name": "/dev/loop2", "back-file": None},
        {"name": "/dev/loop3", "back-file": f"/{name}/dib_image.x/image.raw (deleted)"},
    ]
    argvs: list[str] = []

    def run(argv: Sequence[str]) -> str:
        argvs.append(" ".join(argv))
        return json.dumps({"loopdevices": listed})

    monkeypatch.setattr(ws, "run", run)
    ws.detach_loop_devices(name)
    assert argvs[1:] == ["losetup --detach /dev/loop1", "losetup --detach /dev/loop3"]


@pytest.mark.parametrize("said", ["", "{}", '{"loopdevices": []}', None])
def test_no_loop_devices(said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without loop devices, or without losetup, is no error at the end of a build."""

    def run(argv: Sequence[str]) -> str:
        if said is None:
            raise AmphoraImageError("cannot start losetup")
        assert "--detach" not in argv
        return said

    monkeypatch.setattr(ws, "run", run)
    ws.detach_loop_devices("x")


@pytest.mark.parametrize("signum", ws.SIGNALS)
def test_signals_wait(signum: signal.Signals) -> None:
    """A signal that comes while something is done as a whole is delivered after it, once."""
    came: list[int] = []
    before = signal.signal(signum, lambda number, _: came.append(number))
    try:
        with ws.undisturbed():
            signal.raise_signal(signum)
            signal.raise_signal(signum)
            assert came == []
        assert came == [signum]
    finally:
        signal.signal(signum, before)


def test_names_of_mount_points(space: Workspace) -> None:
    """A workspace's own path is safe, so that what is mounted in it has a safe path too."""
    assert SAFE_PATH.fullmatch(str(space.root))
    assert re.fullmatch(rf"{PREFIX}\w+", space.root.name)
