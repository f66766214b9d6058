# SPDX-License-Identifier: Apache-2.0
"""The one way to start a program: an argv list, no shell, a failure told once."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from amphora_image.errors import AmphoraImageError

#: Of tar, for a root file system: all that a file has.
TAR_OPTIONS = ("--numeric-owner", "--xattrs", "--xattrs-include=*")


def pipe(first: Sequence[str], second: Sequence[str]) -> None:
    """Run two programs, the second of which reads what the first writes.

    :raises AmphoraImageError: one of them failed.
    """
    with subprocess.Popen(first, stdout=subprocess.PIPE) as source:
        sink = subprocess.run(second, stdin=source.stdout, check=False)
    if source.returncode or sink.returncode:
        command = f"{shlex.join(first)} | {shlex.join(second)}"
        raise AmphoraImageError(f"{command} ended with {source.returncode}, {sink.returncode}")


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    hint: str | None = None,
    output: Path | None = None,
) -> str:
    """Run a program to its end and return what it wrote to standard output.

    :param argv: program and arguments; never joined, never given to a shell.
    :param env: the whole environment; the caller's own if None.
    :param stdin: text for standard input, which is empty if None: the place for a secret.
    :param hint: what to tell the user if it fails.
    :param output: a file for the program's standard output, where that may be more than memory
        should hold; nothing is returned then.
    :raises AmphoraImageError: it could not be started or ended with a status other than 0; the
        message holds the command to repeat and the last lines of its standard error.
    """
    command = shlex.join(map(str, argv))
    try:
        with output.open("wb") if output else nullcontext(subprocess.PIPE) as stdout:
            done = subprocess.run(
                [str(word) for word in argv],
                env=env,
                input=stdin or "",
                stdout=stdout,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
    except OSError as error:
        raise AmphoraImageError(f"cannot start {command}: {error.strerror}", hint) from error
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout or "").strip().splitlines()[-8:])
        raise AmphoraImageError(f"{command} ended with {done.returncode}\n{said}".rstrip(), hint)
    return done.stdout or ""
