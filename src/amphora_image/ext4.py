# SPDX-License-Identifier: Apache-2.0
"""An ext4 file system inside a disk, read by e2fsprogs: no mount, no loop device, no privilege."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from amphora_image.disk import Partition, bounded
from amphora_image.errors import CheckFailed
from amphora_image.tree import MAX_CONTENT, MAX_ENTRIES, WANTED, Entry, Tree

#: The root directory's inode number (ext4's documentation, "Special inodes").
ROOT = 2
#: More levels of directories than any amphora has.
MAX_DEPTH = 64
#: Files read whole, the kernel among them, are no larger.
MAX_FILE = 32 * 1024**2
#: A symbolic link shorter than this is in its inode.
FAST_LINK = 60

#: A line of ``ls -p``, :manpage:`debugfs(8)`: inode, mode, user, group, name, size.
_LINE = re.compile(r"/(\d+)/(\d{6})/(\d+)/(\d+)/([^/]+)/(\d*)/")
_ECHO = re.compile(r"^debugfs: (.*)$", re.MULTILINE)
_FAST_LINK = re.compile(r'^Fast link dest: "(.*)"$', re.MULTILINE)


@dataclass(frozen=True)
class FileSystem:
    """The file system as its superblock and e2fsck tell it; sizes in bytes.

    :ivar errors: what ``e2fsck -fn`` complains of, empty if nothing.
    """

    label: str
    uuid: str
    size: int
    block_size: int
    free: int
    state: str
    features: tuple[str, ...]
    errors: str = ""
    type: str = "ext4"


class Ext4:
    """An ext4 file system in a partition of a raw file, read in batches of debugfs commands.

    :param raw: a path without ``?``, which debugfs takes for the beginning of an option.
    """

    def __init__(self, raw: Path, partition: Partition, scratch: Path) -> None:
        self._device = f"{raw}?offset={partition.start}"
        self._scratch = scratch

    def _ask(self, commands: Iterable[str]) -> list[str]:
        """Return the answer to each command."""
        script = self._scratch / "commands"
        script.write_text("".join(f"{command}\n" for command in commands))
        said = bounded(["debugfs", "-c", "-f", script, self._device], self._scratch)
        return _ECHO.split(said)[2::2]

    def describe(self) -> FileSystem:
        """Read the superblock, and let e2fsck look for errors.

        :raises CheckFailed: there is no superblock.
        """
        said = self._ask(["stats -h"])
        fields = dict(re.findall(r"^([\w ]+):\s+(.*)$", said[0] if said else "", re.MULTILINE))
        try:
            block_size = int(fields["Block size"])
            return FileSystem(
                label=fields["Filesystem volume name"],
                uuid=fields["Filesystem UUID"],
                size=int(fields["Block count"]) * block_size,
                block_size=block_size,
                free=int(fields["Free blocks"]) * block_size,
                state=fields["Filesystem state"],
                features=tuple(fields["Filesystem features"].split()),
                errors=self._errors(),
            )
        except (KeyError, ValueError) as error:
            raise CheckFailed("the ext4 file system's superblock cannot be read") from error

    def _errors(self) -> str:
        try:
            bounded(["e2fsck", "-f", "-n", self._device], self._scratch)
        except CheckFailed:
            said = (self._scratch / "output").read_text(errors="replace")[:4000].splitlines()
            lines = [line for line in said if line and not line.startswith(("Pass ", "e2fsck "))]
            return "; ".join(lines[:3]) or "e2fsck failed"
        return ""

    def tree(self) -> Tree:
        """Read all names, and the content of those that are wanted.

        :raises CheckFailed: there are too many, or the file system cannot be read at all.
        """
        entries, strange = self._names()
        links = {path: entry for path, entry in entries.items() if entry.is_link}
        fast = [path for path, entry in links.items() if entry.size < FAST_LINK]
        slow = [path for path, entry in links.items() if entry.size >= FAST_LINK]
        targets = {path: data.decode(errors="replace") for path, data in self._dump(slow, entries)}
        answers = self._ask(f"stat <{entries[path].inode}>" for path in fast)
        for path, answer in zip(fast, answers, strict=False):
            if found := _FAST_LINK.search(answer):
                targets[path] = found[1]
        for path, target in targets.items():
            old = entries[path]
            entries[path] = Entry(old.mode, old.uid, old.gid, old.size, target, old.inode)
        wanted = [
            path for path, entry in entries.items() if entry.is_file and WANTED.fullmatch(path)
        ]
        return Tree(entries, dict(self._dump(wanted, entries)), strange)

    def _names(self) -> tuple[dict[str, Entry], tuple[str, ...]]:
        entries: dict[str, Entry] = {}
        strange: list[str] = []
        seen = {ROOT}
        level = {"": ROOT}
        for _ in range(MAX_DEPTH):
            if not level:
                break
            answers = self._ask(f"ls -p <{inode}>" for inode in level.values())
            parents = list(level)
            level = {}
            for parent, answer in zip(parents, answers, strict=False):
                for line in filter(None, answer.splitlines()):
                    if line.startswith("/0/"):  # an unused place in the directory
                        continue
                    fields = _LINE.fullmatch(line)
                    if not fields:
                        strange.append(f"{parent}: {line}")
                        continue
                    name = fields[5]
                    if name in (".", ".."):
                        continue
                    path = f"{parent}/{name}" if parent else name
                    entry = _entry(fields)
                    if entry.is_dir and entry.inode not in seen:
                        level[path] = entry.inode
                    if entry.inode in seen and entry.is_file:
                        entry = Entry(entry.mode, entry.uid, entry.gid, inode=entry.inode)
                    seen.add(entry.inode)
                    entries[path] = entry
            if len(entries) > MAX_ENTRIES:
                raise CheckFailed(f"the file system has more than {MAX_ENTRIES} entries")
        if not entries:
            raise CheckFailed("the file system has no readable root directory")
        return entries, tuple(strange[:100])

    def _dump(self, paths: list[str], entries: dict[str, Entry]) -> Iterator[tuple[str, bytes]]:
        small = [path for path in paths if entries[path].size <= MAX_FILE]
        directory = self._scratch / "files"
        directory.mkdir(exist_ok=True)
        inodes = {entries[path].inode for path in small}
        self._ask(f"dump <{inode}> {directory}/{inode}" for inode in sorted(inodes))
        for path in small:
            file = directory / str(entries[path].inode)
            if file.is_file():
                with file.open("rb") as opened:
                    yield path, opened.read(MAX_CONTENT)

    def inodes_of(self, blocks: Iterable[int]) -> dict[int, int]:
        """Return the inode of each block that belongs to one, block -> inode."""
        said = self._ask([f"icheck {' '.join(map(str, blocks))}"])
        found = re.findall(r"^(\d+)\t(\d+)$", said[0] if said else "", re.MULTILINE)
        return {int(block): int(inode) for block, inode in found}


def _entry(fields: re.Match[str]) -> Entry:
    inode, mode, uid, gid, _, size = fields.groups()
    bits = int(mode, 8)
    counted = int(size or 0) if stat.S_ISREG(bits) or stat.S_ISLNK(bits) else 0
    return Entry(bits, int(uid), int(gid), counted, "", int(inode))
