# SPDX-License-Identifier: Apache-2.0
"""The directories of one build, whose they are, and their end, which no signal can prevent.

A workspace is a small directory under ``/tmp`` with a locked state file. It holds mount points;
what is mounted there is seen in the sandbox alone. If a build is killed, its lock is free and the
next build removes what the state file names.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from amphora_image.errors import AmphoraImageError
from amphora_image.run import run
from amphora_image.sandbox import Mount

PREFIX = "amphora-image-"

#: What ends a build, and what waits while something is done as a whole or not at all.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Paths that may stand in diskimage-builder's shell scripts, which seldom quote.
SAFE_PATH = re.compile(r"[A-Za-z0-9_./-]+")


@dataclass
class Workspace:
    """The directories of one build.

    :ivar root: private, small, on the host's disk; its name marks all that belongs to the build.
    :ivar work: where diskimage-builder works; in the sandbox only.
    :ivar mounts: what the sandbox has to mount.
    """

    root: Path
    _state: IO[str]
    mounts: list[Mount] = field(default_factory=list)
    _removals: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """The work directory, which is to be made in the sandbox.

        Loop devices tell the path of their file from the root of its file system on, so the
        build's name is part of it below the mount point.
        """
        return self.root / "work" / self.root.name

    def work_in(self, directory: Path | None) -> None:
        """Put the work directory in memory (None) or in a new directory of another directory."""
        self.work.parent.mkdir()
        source = ""
        if directory:
            directory.mkdir(parents=True, exist_ok=True)
            source = tempfile.mkdtemp(prefix=".amphora-image-", dir=directory)
            self.owns(Path(source))
        self.mounts.append(Mount(source, str(self.work.parent)))

    def safe(self, path: Path) -> Path:
        """Return a path that diskimage-builder can use for an existing file or directory."""
        path = path.resolve()
        if SAFE_PATH.fullmatch(str(path)):
            return path
        target = self.root / f"path-{len(self.mounts)}"
        if path.is_dir():
            target.mkdir()
        else:
            target.touch()
        self.mounts.append(Mount(str(path), str(target)))
        return target

    def owns(self, path: Path) -> None:
        """Take a file or directory into the workspace: it ends with it."""
        self._removals.append(str(path))
        self._state.seek(0)
        json.dump({"pid": os.getpid(), "remove": self._removals}, self._state)
        self._state.truncate()
        self._state.flush()


def _home() -> Path:
    """Return where workspaces are: a directory with a safe name."""
    preferred = tempfile.gettempdir()
    return Path(preferred if SAFE_PATH.fullmatch(preferred) else "/tmp")  # noqa: S108


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let signals wait until the block has ended."""
    # Not pthread_sigmask(2): any other thread, one that draws progress say, would take the signal.
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def workspace() -> Iterator[Workspace]:
    """Make a workspace, and end it with all that belongs to it whatever happens."""
    remove_stale()
    with ExitStack() as ends:
        with undisturbed():
            space = _make(ends)
        yield space


def _make(ends: ExitStack) -> Workspace:
    root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_home()))
    # Under its own name only once it is locked: another build takes an unlocked one for stale.
    unlocked = root / "state.new"
    state = ends.enter_context(unlocked.open("w"))
    fcntl.flock(state, fcntl.LOCK_EX)
    space = Workspace(root, state)
    space.owns(root)
    unlocked.rename(root / "state.json")
    ends.callback(_remove, root, space._removals)
    return space


def remove_stale() -> list[str]:
    """Remove what builds that were killed left behind; return the names of their workspaces."""
    removed = []
    for state_file in _home().glob(f"{PREFIX}*/state.json"):
        if not _is_ours(state_file.parent):
            continue
        with suppress(OSError), state_file.open("r+") as state:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                removals = json.load(state)["remove"]
            except (ValueError, KeyError):  # killed while it was written
                removals = [str(state_file.parent)]
            _remove(state_file.parent, removals)
            removed.append(state_file.parent.name)
    return removed


def _is_ours(root: Path) -> bool:
    """Whether nobody else can have written what a workspace tells: anyone may write to /tmp."""
    with suppress(OSError):
        found = root.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return False


def _remove(root: Path, removals: list[str]) -> None:
    with undisturbed():
        detach_loop_devices(root.name)
        for path in map(Path, reversed(removals)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def detach_loop_devices(name: str) -> None:
    """Detach the loop devices whose file lies in a directory that belongs to a workspace."""
    with suppress(AmphoraImageError):
        devices = json.loads(
            run(["losetup", "--json", "--list", "--output", "NAME,BACK-FILE"]) or "{}"
        )
        for device in devices.get("loopdevices", []):
            if name in (device["back-file"] or ""):
                run(["losetup", "--detach", device["name"]])
