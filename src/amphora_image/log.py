# SPDX-License-Identifier: Apache-2.0
"""What a build says: every line to a file, one line a phase to the terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.status import Status
from rich.text import Text

from amphora_image.access import SECRET, redacted

#: diskimage-builder's phases, in words.
PHASES = {
    "root": "root file system and packages",
    "extra-data": "agent and settings",
    "pre-install": "before installation",
    "install": "installation",
    "post-install": "after installation",
    "post-root": "after installation",
    "pre-finalise": "boot loader",
    "finalise": "boot loader",
    "cleanup": "clean-up",
}
_SCRIPT = re.compile(r"dib-run-parts Running \S*/([a-z-]+)\.d/(\S+)$")
_OURS = re.compile(r"phase: (.+)")
_DOING = re.compile(r"^(Setting up|Unpacking|Get:\d+|Selecting|I: |Prepared|Installed) ?(.*)$")

#: Lines that tell nothing about a failure: shell traces, DIB's timing tables, apt's progress.
_NOISE = re.compile(
    r"^\s*$|^\+|^dib-run-parts|^(Setting up|Unpacking|Selecting|Preparing to|Get:|Hit:|Ign:)"
    r"|^(Reading|Building|Fetched|Copying hooks|\(Reading)|^Unmount |^Killing chroot"
    r"|^rm: |^umount|profiledir|^removed |exec_sudo|^INFO diskimage_builder"
)

#: What a known line of the log means for the user, the first that fits.
HINTS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), hint)
    for pattern, hint in (
        (
            r"No space left on device|cannot copy extracted data|Disk quota exceeded"
            r"|Could not allocate (block|inode) in ext2 filesystem",
            "no space: make the image larger (-s), or build on a disk with room (-f -w DIRECTORY)",
        ),
        (
            r"BADSIG|invalid signature|[Bb]ad signature",
            "a file of the archive is not what was signed: something on the way changed it; "
            "name another mirror (--mirror)",
        ),
        (
            r"NO_PUBKEY|no public key|is not signed|EXPKEYSIG|signature verification failed",
            "the archive's signature is not trusted: install the archive's keyring package, "
            "or set DIB_APT_KEYRING to a file with its keys",
        ),
        (
            r"[Cc]ertificate verif|CERTIFICATE_VERIFY_FAILED|invalid peer certificate"
            r"|self.signed certificate|certificate is NOT trusted",
            "a TLS certificate is not trusted: name the certificate of your CA with --ca-file",
        ),
        (
            r"Release file for \S+ is (expired|not valid yet)",
            "the mirror is not kept up to date any more, or this host's clock is wrong: "
            "see date, or name another mirror (--mirror)",
        ),
        (
            r"Hash Sum mismatch|File has unexpected size",
            "a file of the mirror is not the one that its signed index names: the mirror is being "
            "updated, or something on the way changes files; try again later, or name another "
            "mirror (--mirror)",
        ),
        (
            r"\b40[34]\s+(Not Found|Forbidden)",
            "a file is not on the mirror: the mirror is not complete, or -d or its URL is wrong "
            "(--mirror, --index-url)",
        ),
        (
            r"\b5\d\d\s+(Internal|Bad Gateway|Service|Gateway)",
            "the mirror or a proxy is out of order: try again later, or name another mirror "
            "(--mirror, --index-url)",
        ),
        (
            r"Redirection loop",
            "the mirror sends its clients in a circle: name its own URL, or another mirror "
            "(--mirror)",
        ),
        (
            r"Error reading from server|Connection timed out|Remote end closed",
            "the connection to a mirror broke off, each time that it was tried: check the network "
            "and proxies, or name another mirror (--mirror, --index-url)",
        ),
        (
            r"Could not resolve|Failed to fetch|Connection (failed|refused|timed out)"
            r"|Unable to connect|dns error|error sending request|tcp connect error"
            r"|Temporary failure in name resolution|Network is unreachable",
            "a mirror cannot be reached: check the network and proxies, "
            "or name another mirror (--mirror, --index-url)",
        ),
        (
            r"Unable to locate package|has no installation candidate|Unable to correct problems",
            "a package is not in the archive: check -d, -k and the mirror's components",
        ),
        (r"command not found|No such file or directory: '", "a tool is missing on this host"),
    )
)


#: Characters of a line that are shown.
WIDTH = 500


def hint_for(lines: Iterable[str]) -> str | None:
    """Return what the user can do about a failure that these lines tell of, if that is known."""
    text = "\n".join(lines)
    return next((hint for pattern, hint in HINTS if pattern.search(text)), None)


def that_matter(lines: Iterable[str], most: int = 30) -> list[str]:
    """Return the last lines of a log that can tell why a build failed."""
    return [line[:WIDTH] for line in lines if not _NOISE.search(line)][-most:]


def phase_of(line: str) -> tuple[str, str] | None:
    """Return the phase that a line begins, diskimage-builder's or our own, and its script."""
    if line.startswith("+"):  # the shell's trace (-x) says what is run, not what has begun
        return None
    if match := _SCRIPT.search(line):
        phase, script = match.groups()
        return PHASES.get(phase, phase), script
    if match := _OURS.fullmatch(line):
        return match[1], ""
    return None


class BuildLog:
    """The log of one build; a context manager that closes its file.

    :param path: of the log file, which is made anew.
    :param console: where the progress goes.
    :param secrets: texts that are never written.
    :ivar seconds: phase -> seconds that it took, in the order of their first beginning.
    """

    def __init__(self, path: Path, console: Console, secrets: Iterable[str] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.lines: list[str] = []
        self.seconds: dict[str, float] = {}
        self._file: IO[str] = path.open("w", encoding="utf-8", errors="replace")
        self._console = console
        longest_first = sorted(secrets, key=len, reverse=True)
        self._secret = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._status: Status | None = None
        self._phase = ""
        self._started = self._phase_started = time.monotonic()

    def __enter__(self) -> BuildLog:
        """Return the log."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file and end the line of the phase."""
        self._end_phase(failed=error is not None)
        self._file.close()

    def line(self, text: str) -> None:
        """Take one line of output."""
        text = self._secret.sub(SECRET, redacted(text.rstrip()))
        self.lines.append(text)
        self._file.write(f"{time.monotonic() - self._started:8.2f} {text}\n")
        self._file.flush()
        if found := phase_of(text):
            self.phase(*found)
        elif self._status and (doing := _DOING.match(text)):
            self._show(" ".join(doing.groups()))

    def phase(self, name: str, now: str = "") -> None:
        """Begin a phase, or go on with it; tell what is going on now."""
        if name != self._phase:
            self._end_phase()
            self._phase, self._phase_started = name, time.monotonic()
            if self._console.is_terminal:
                self._status = self._console.status("")
                self._status.start()
        self._show(now)

    def _show(self, now: str) -> None:
        if self._status:
            room = max(self._console.width - len(self._phase) - 12, 10)
            # A Text, as programs may say what looks like rich's markup.
            self._status.update(Text.assemble(self._phase, " ", (now[:room], "dim")))

    def _end_phase(self, *, failed: bool = False) -> None:
        if self._status:
            self._status.stop()
            self._status = None
        if self._phase:
            took = time.monotonic() - self._phase_started
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + took
            mark = "[red]failed[/red]" if failed else f"{took:6.1f} s"
            self._console.print(f"{mark}  {self._phase}", highlight=False)
            self._phase = ""
