# SPDX-License-Identifier: Apache-2.0
"""Programs run where nothing of them can stay: private mount and PID namespaces.

diskimage-builder leaves mounts and processes behind when it fails. Here its mounts are in a mount
namespace and its processes in a PID namespace whose first process is :func:`main`. When that one
ends, or the build that started it ends for any reason, SIGKILL included, the kernel ends every
process and drops every mount (:manpage:`pid_namespaces(7)`, :manpage:`mount_namespaces(7)`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from amphora_image.errors import AmphoraImageError
from amphora_image.run import run

#: Seconds for what a program left in the background to end by itself, its log filter for one.
STRAGGLERS = 2.0


@dataclass(frozen=True)
class Mount:
    """A mount in the sandbox: of ``source`` (a path: bind, empty: tmpfs) on ``target``."""

    source: str
    target: str


@dataclass(frozen=True)
class Command:
    """A program of the sandbox: argv, its whole environment and its working directory."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str


def start(mounts: Sequence[Mount], commands: Sequence[Command]) -> subprocess.Popen[str]:
    """Start a sandbox that makes the mounts and runs the commands until one fails.

    Its output is the commands' output and error together; its status is the last command's.
    Killing it kills all that it started.
    """
    process = subprocess.Popen(
        [
            # Dies with this process, and takes the first process of the namespace along.
            *("setpriv", "--pdeathsig", "KILL", "--"),
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"),
            *(sys.executable, "-m", "amphora_image.sandbox"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C on the terminal is for the build alone
    )
    job = {"mounts": list(map(asdict, mounts)), "commands": list(map(asdict, commands))}
    assert process.stdin
    with process.stdin as stdin:
        json.dump(job, stdin)
    return process


def _mount(mount: Mount) -> None:
    if mount.source:
        run(["mount", "--bind", mount.source, mount.target])
    else:
        run(["mount", "-t", "tmpfs", "-o", "mode=0755,size=90%", "tmpfs", mount.target])


def _reap() -> None:
    deadline = time.monotonic() + STRAGGLERS
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.02)


def main() -> int:
    """Run the job that standard input holds; return the status of its last command."""
    os.umask(0o022)  # what the caller's umask hides would be hidden in the image
    job = json.load(sys.stdin)
    try:
        for mount in job["mounts"]:
            _mount(Mount(**mount))
        for command in (Command(**command) for command in job["commands"]):
            status = subprocess.call(
                command.argv, env=command.env, cwd=command.cwd, stdin=subprocess.DEVNULL
            )
            _reap()
            if status:
                return status
    except (AmphoraImageError, OSError) as error:
        print(f"sandbox: {error}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
