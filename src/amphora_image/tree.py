# SPDX-License-Identifier: Apache-2.0
"""What an image's root file system holds, as a plain value; read from a tar file here."""

from __future__ import annotations

import io
import re
import stat
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from amphora_image.errors import CheckFailed

#: More entries than any amphora has, ten times over.
MAX_ENTRIES = 300_000
#: Bytes that are read of a file's beginning.
MAX_CONTENT = 2 * 1024**2
#: Bytes of one header of a tar file, which tarfile would take into memory whole.
MAX_HEADER = 1024**2
MAX_LINKS = 40

#: Files of which the content is read.
WANTED = re.compile(
    r"etc/(?!ssl/|ca-certificates|alternatives/|apparmor).+"
    r"|boot/(grub/(grub\.cfg|boot\.img|core\.img)|vmlinuz-.+|config-.+)"
    r"|usr/lib/(os-release|systemd/systemd|systemd/system/.+|sysctl\.d/.+)"
    r"|usr/lib/modules/[^/]+/modules\.(dep|builtin)"
    r"|usr/local/.+"
    r"|opt/amphora-agent/(pyvenv\.cfg|bin/.+)"
    r"|usr/bin/(amphora-|haproxy-vrrp|prometheus-proxy).*"
    r"|var/lib/dpkg/(status|info/[^/]+\.list)"
    r"|(root|home/[^/]+)/\.ssh/authorized_keys2?"
)


@dataclass(frozen=True)
class Entry:
    """A name in the tree.

    :ivar mode: type and permissions, :manpage:`inode(7)`.
    :ivar size: bytes; 0 for a hard link's second name.
    :ivar target: of a symbolic link, as it is written.
    :ivar inode: its number; 0 in a tar file.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    size: int = 0
    target: str = ""
    inode: int = 0

    @property
    def permissions(self) -> int:
        """The last four octal digits of the mode."""
        return stat.S_IMODE(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)


@dataclass(frozen=True)
class Tree:
    """A root file system; all paths are relative: ``etc/passwd``.

    :ivar contents: path -> first bytes, of the files that :data:`WANTED` matches.
    :ivar strange: lines and names that cannot be a file's of ours, for people to look at.
    """

    entries: Mapping[str, Entry]
    contents: Mapping[str, bytes] = field(default_factory=dict)
    strange: tuple[str, ...] = ()

    def resolve(self, path: str) -> str:
        """Return the path with all symbolic links followed; what does not exist stays as it is."""
        todo = list(reversed(PurePosixPath("/", path).parts[1:]))
        done: list[str] = []
        links = 0
        while todo:
            part = todo.pop()
            if part == "..":
                done = done[:-1]
                continue
            entry = self.entries.get("/".join([*done, part]))
            if entry is None or not entry.is_link or links == MAX_LINKS:
                done.append(part)
                continue
            links += 1
            if entry.target.startswith("/"):
                done = []
            todo += reversed([part for part in entry.target.split("/") if part not in ("", ".")])
        return "/".join(done)

    def get(self, path: str) -> Entry | None:
        """Return what a path leads to, links followed."""
        return self.entries.get(self.resolve(path))

    def text(self, path: str) -> str:
        """Return a file's content, links followed; empty if it is not there."""
        return self.contents.get(self.resolve(path), b"").decode(errors="replace")

    def under(self, directory: str) -> Iterator[tuple[str, Entry]]:
        """Yield all paths below a directory, without following links."""
        prefix = f"{directory}/"
        return ((path, entry) for path, entry in self.entries.items() if path.startswith(prefix))

    def match(self, pattern: str) -> Iterator[tuple[str, Entry]]:
        """Yield the paths that a regular expression matches as a whole."""
        whole = re.compile(pattern)
        return ((path, entry) for path, entry in self.entries.items() if whole.fullmatch(path))


class _Headers(io.FileIO):
    """A tar file of which nothing large is ever read: only headers."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise CheckFailed(f"the tar file has a header of {size} bytes; damaged or hostile")
        return super().read(size) or b""


#: Types of a tar file's members -> types of files.
_TYPES = {
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def read_tar(path: Path) -> tuple[Tree, list[tuple[int, str]]]:
    """Read a tar file without unpacking it.

    :returns: its tree, and offset and path of each regular file's data, sorted.
    :raises CheckFailed: it is damaged, has too many entries, or one that leads out of the tree.
    """
    entries: dict[str, Entry] = {}
    contents: dict[str, bytes] = {}
    places: list[tuple[int, str]] = []
    with _Headers(path, "r") as headers, path.open("rb") as data:
        try:
            with tarfile.open(fileobj=headers, mode="r:") as tar:
                for member in _members(tar, path.stat().st_size):
                    name = _safe_name(member)
                    if not name:
                        continue
                    linked = entries.get(_safe_link(member)) if member.islnk() else None
                    if linked:
                        entries[name] = Entry(linked.mode, linked.uid, linked.gid)
                        continue
                    kind = _TYPES.get(member.type, stat.S_IFREG)
                    entries[name] = Entry(
                        kind | stat.S_IMODE(member.mode),
                        member.uid,
                        member.gid,
                        member.size if kind == stat.S_IFREG else 0,
                        member.linkname if member.issym() else "",
                    )
                    if member.isreg():
                        places.append((member.offset_data, name))
                        if WANTED.fullmatch(name):
                            data.seek(member.offset_data)
                            contents[name] = data.read(min(member.size, MAX_CONTENT))
        except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
            raise CheckFailed(f"the tar file cannot be read: {error}") from error
    if not entries:
        raise CheckFailed("the tar file is empty")
    return Tree(entries, contents), sorted(places)


def _members(tar: tarfile.TarFile, size: int) -> Iterator[tarfile.TarInfo]:
    count = 0
    while member := tar.next():
        # It would keep them all.
        tar.members.clear()  # type: ignore[attr-defined]
        count += 1
        if count > MAX_ENTRIES:
            raise CheckFailed(f"the tar file has more than {MAX_ENTRIES} entries")
        if member.isreg() and member.offset_data + member.size > size:
            raise CheckFailed(f"the tar file is truncated in {member.name!r}")
        yield member


def _safe_name(member: tarfile.TarInfo) -> str:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or len(name) > 4096:
        raise CheckFailed(
            f"the tar file holds {name[:100]!r}; allowed are relative paths without '..'",
            hint="unpacking it could write outside the directory: do not",
        )
    return str(PurePosixPath(name)) if PurePosixPath(name).parts else ""


def _safe_link(member: tarfile.TarInfo) -> str:
    return str(PurePosixPath(member.linkname.lstrip("/")))


def at_offset(places: list[tuple[int, str]], offset: int) -> str:
    """Return the file whose data a byte of the tar file is part of."""
    index = bisect_right(places, (offset, "\U0010ffff")) - 1
    return places[index][1] if index >= 0 else ""
