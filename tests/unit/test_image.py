# SPDX-License-Identifier: Apache-2.0
"""Facts and trees, headers of disk images, and the search through data."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from fake_image import as_image, as_tree, file, link, nodes
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from amphora_image import disk, facts, image, tree
from amphora_image.errors import BadValue, CheckFailed
from amphora_image.image import Pattern
from amphora_image.request import ImageType
from amphora_image.tree import Entry, Tree

FACTS = facts.read_facts(as_image(nodes()))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", "amd64"),
        ("os", {"id": "debian", "release": "trixie", "name": "Debian 13"}),
        ("partition_table", "gpt"),
        ("python_packages", {"octavia": "1.0"}),
        ("logins", {}),
    ],
)
def test_fact(name: str, value: object) -> None:
    """A fact is what the files say."""
    assert FACTS[name] == value


def test_kernel_and_boot_loader() -> None:
    """The kernel is described with all that belongs to it."""
    [kernel] = FACTS["kernels"]
    assert kernel == {
        "version": "6.1",
        "bootable": True,
        "initramfs_bytes": 2**20 + 1,
        "modules": 1,
        "dependencies": True,
        "fips": None,
    }
    assert FACTS["boot_loader"] == {
        "name": "grub",
        "signature": True,
        "entries": ["Amphora"],
        "command_line": "root=LABEL=root-label ro",
        "efi": [],
    }


def test_services() -> None:
    """A link in a .wants directory enables, a link to /dev/null masks."""
    services = FACTS["services"]
    assert "amphora-agent.service" in services["enabled"]
    assert services["masked"] == ["haproxy.service", "keepalived.service"]


def test_unit_with_drop_in() -> None:
    """A drop-in adds to the settings of its unit, and a unit in /etc hides another."""
    found = as_tree(
        {
            "usr/lib/systemd/system/a.service": file("[Unit]\nAfter=x\n[Service]\nType=oneshot\n"),
            "usr/lib/systemd/system/a.service.d/z.conf": file("[Unit]\nAfter=y z\n"),
            "usr/lib/systemd/system/b.service": file("[Unit]\nAfter=x\n"),
            "etc/systemd/system/b.service": file("[Unit]\nAfter=w\n"),
        }
    )
    assert facts.read_unit(found, "a.service") == {"After": ["x", "y z"], "Type": ["oneshot"]}
    assert facts.read_unit(found, "b.service") == {"After": ["w"]}
    assert facts.read_unit(found, "c.service") == {}


def test_logins() -> None:
    """A hash, an empty password or a key lets someone in; a lock or a star does not."""
    users = ("hashed", "empty", "locked", "starred", "keyed")
    passwd = "".join(f"{name}:x:1000:1000::/home/{name}:/bin/sh\n" for name in users)
    found = as_tree(
        {
            "etc/passwd": file(f"{passwd}old:$1$hash:7:7::/:/bin/sh\nbroken\n"),
            "etc/shadow": file(
                "hashed:$y$x:1:\nempty::1:\nlocked:!$y$x:1:\nstarred:*:1:\nkeyed:!:1"
            ),
            "home/keyed/.ssh/authorized_keys": file("# mine\nssh-ed25519 A\n\nssh-rsa B\n"),
        }
    )
    logins = facts.read_logins(found)
    assert set(logins) == {"hashed", "empty", "keyed", "old"}
    assert logins["keyed"]["keys"] == 2
    assert not logins["keyed"]["password"]


def test_listening() -> None:
    """What listens is sshd, the agent and sockets on a port."""
    unit = "usr/lib/systemd/system"
    wants = "etc/systemd/system/sockets.target.wants"
    found = as_tree(
        {
            "usr/sbin/sshd": file(),
            "etc/ssh/sshd_config": file("Port 2222\n#Port 22\nListenAddress 192.0.2.1\n"),
            f"{unit}/web.socket": file("[Socket]\nListenStream=80\n"),
            f"{unit}/local.socket": file("[Socket]\nListenStream=/run/x\n"),
            f"{wants}/web.socket": link(f"/{unit}/web.socket"),
            f"{wants}/local.socket": link(f"/{unit}/local.socket"),
        }
    )
    listening = facts.read_listening(found)
    assert listening["ssh"] == "192.0.2.1, port 2222"
    assert listening["sockets"] == {"web.socket": ["80"]}
    assert facts.read_listening(as_tree({}))["ssh"] is None


def test_package_sizes() -> None:
    """A file is its package's through a merged /usr too; what is of none is told as such."""
    sizes = facts.read_package_sizes(as_tree(nodes()))
    assert sizes["systemd"] == 20
    assert sizes[""] > 2**20


def test_directory_sizes() -> None:
    """Each directory holds what is below it; small ones and deep ones are left out."""
    found = as_tree({"a/b/c/d/e": file(b"x" * 2**20), "a/f": file(b"x" * 10), "g/h": file("x")})
    sizes = facts.read_directory_sizes(found)
    assert sizes == {"a": 2**20 + 10, "a/b": 2**20, "a/b/c": 2**20}


def test_facts_of_nothing() -> None:
    """An image without any file has facts, and a table."""
    nothing = image.Image("empty.tar", ImageType.TAR, 0, Tree({}))
    assert facts.read_facts(nothing)["os_packages"] is None
    with Console(quiet=True).capture():
        Console(file=io.StringIO()).print(facts.as_table(facts.read_facts(nothing)))


def test_table_shows_names_as_they_are() -> None:
    """Neither markup nor escape sequences of an image reach the terminal."""
    found = nodes()
    found["usr/lib/os-release"] = file('PRETTY_NAME="[/red]\x1b[2J Debian"\n')
    out = io.StringIO()
    Console(file=out, width=200).print(facts.as_table(facts.read_facts(as_image(found))))
    assert "[/red]?[2J Debian" in out.getvalue()


@pytest.mark.parametrize(
    ("path", "resolved"),
    [
        ("lib/x", "usr/lib/x"),
        ("absolute", "usr/lib/x"),
        ("deep/up", "usr/lib/x"),
        ("above", "usr"),
        ("nothing", "missing/there"),
        ("no/such/../file", "no/file"),
        ("/lib//./x", "usr/lib/x"),
    ],
)
def test_resolve(path: str, resolved: str) -> None:
    """Links are followed as if the tree were the whole world."""
    found = as_tree(
        {
            "lib": link("usr/lib"),
            "usr/lib/x": file(),
            "absolute": link("/lib/x"),
            "deep/up": link("../lib/x"),
            "above": link("../../../usr"),
            "nothing": link("missing/there"),
        }
    )
    assert found.resolve(path) == resolved


def test_resolve_ends() -> None:
    """Links that lead to each other end."""
    entries = {name: Entry(stat.S_IFLNK, target=other) for name, other in ("ab", "ba")}
    assert Tree(entries).resolve("a") in {"a", "b"}


@given(st.dictionaries(st.text("ab", min_size=1, max_size=2), st.text("ab/.", max_size=9)))
def test_resolve_stays_inside(links: dict[str, str]) -> None:
    """Whatever links say, the result is a path in the tree."""
    found = Tree({name: Entry(stat.S_IFLNK, target=to) for name, to in links.items()})
    for name in links:
        parts = found.resolve(name).split("/")
        assert ".." not in parts
        assert not found.resolve(name).startswith("/")


def image_file(path: Path, data: bytes) -> Path:
    """A file."""
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"QFI\xfb" + bytes(600), ImageType.QCOW2),
        (bytes(257) + b"ustar\x0000" + bytes(600), ImageType.TAR),
        (bytes(510) + b"\x55\xaa", ImageType.RAW),
        (bytes(1080) + b"\x53\xef" + bytes(600), ImageType.RAW),
        (bytes(1024) + b"conectix" + bytes(504), ImageType.VHD),
        (b"conectix" + bytes(2000), ImageType.VHD),
    ],
)
def test_detect(tmp_path: Path, data: bytes, kind: ImageType) -> None:
    """The content tells the format, whatever the name."""
    assert disk.detect(image_file(tmp_path / "image.txt", data)) is kind


@given(st.binary(max_size=5000))
def test_detect_anything(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Any bytes are a format or a bad value."""
    path = image_file(tmp_path_factory.getbasetemp() / "anything", data)
    try:
        assert disk.detect(path) in ImageType
    except BadValue as error:
        assert str(path) in str(error)  # noqa: PT017


HEADER = struct.pack(
    ">4sIQIIQIIQQIIQQQQII",
    b"QFI\xfb",
    3,
    0,
    0,
    16,
    2**30,
    0,
    2,
    196608,
    65536,
    1,
    0,
    0,
    0,
    0,
    0,
    4,
    104,
)


def test_sound_qcow2_header() -> None:
    """A header that stays in its file is taken, in both versions."""
    disk.check_qcow2(HEADER, 2**20)
    disk.check_qcow2(HEADER[:4] + struct.pack(">I", 2) + HEADER[8:], 2**20)


@given(st.integers(0, 103), st.binary(min_size=1, max_size=40), st.integers(0, 2**40))
def test_any_qcow2_header(at: int, data: bytes, length: int) -> None:
    """A changed header is taken or refused, and what names another file never taken."""
    changed = HEADER[:at] + data + HEADER[at + len(data) :]
    try:
        disk.check_qcow2(changed, length)
    except CheckFailed:
        return
    assert changed[8:16] == bytes(8)
    assert not changed[72 + 7] & 4 or changed[4:8] == struct.pack(">I", 2)


def vhd(kind: int = 3, size: int = 2**30, blocks: tuple[int, ...] = (4, 0xFFFFFFFF)) -> bytes:
    """A VHD file of a few blocks of 512 bytes."""
    footer = bytearray(512)
    struct.pack_into(">8s8xQ24xQ12x", footer, 0, b"conectix", 512, size)
    struct.pack_into(">I", footer, 60, kind)
    dynamic = bytearray(1024)
    struct.pack_into(">8s8xQIII", dynamic, 0, b"cxsparse", 1536, 0, len(blocks), 512)
    table = struct.pack(f">{len(blocks)}I", *blocks).ljust(512, b"\xff")
    return bytes(footer + dynamic) + table + bytes(1024) + bytes(footer)


def test_sound_vhd(tmp_path: Path) -> None:
    """A whole VHD, dynamic or fixed, is taken."""
    disk.check_vhd(image_file(tmp_path / "a", vhd()))
    disk.check_vhd(image_file(tmp_path / "a", vhd(kind=2)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (vhd()[:-1], "truncated"),
        (b"", "truncated"),
        (vhd(kind=4), "its type is 4"),
        (vhd(size=2**60), "allowed are"),
        (vhd().replace(b"cxsparse", b"nothing!"), "dynamic header"),
        (vhd(blocks=(4, 4)), "overlap"),
        (vhd(blocks=(2**31,)), "overlap or lie outside"),
        (
            vhd().replace(struct.pack(">QII", 1536, 0, 2), struct.pack(">QII", 1536, 0, 2**31)),
            "table",
        ),
    ],
)
def test_hostile_vhd(tmp_path: Path, data: bytes, message: str) -> None:
    """A VHD with a parent, with overlapping blocks or without its end is refused."""
    with pytest.raises(CheckFailed, match=message):
        disk.check_vhd(image_file(tmp_path / "a", data))


WORD = Pattern("word", b"word", re.compile(rb"words?!"))


def test_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns are found once, across borders of chunks and behind holes, in their part alone."""
    monkeypatch.setattr(image, "CHUNK", 4096)
    monkeypatch.setattr(image, "ZEROS", bytes(4096))
    path = tmp_path / "data"
    path.touch()
    os.truncate(path, 2**20)
    offsets = (0, 5000, 8190, 600_000, 2**20 - 6)
    with path.open("r+b") as opened:
        for offset in offsets:
            opened.seek(offset)
            opened.write(b"words!")
        opened.seek(7000)
        opened.write(b"wording")
    found = image.search(path, [WORD], 0, 2**20)
    assert list(found) == [("word", offset) for offset in offsets]
    assert list(image.search(path, [WORD], 100, 8192)) == [("word", 5000)]
    assert list(image.search(path, [], 0, 2**20)) == []


def test_search_ends(tmp_path: Path) -> None:
    """Of what is everywhere enough is found."""
    path = image_file(tmp_path / "data", b"words!" * 1000)
    assert len(list(image.search(path, [WORD], 0, 6000))) == image.MAX_MARKS


def tar_file(path: Path, files: dict[str, bytes]) -> Path:
    """A tar file."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.uid, info.mode = 7, 0o640
            tar.addfile(info, io.BytesIO(data))
    return path


def test_read_tar(tmp_path: Path) -> None:
    """Names, owners and contents of a tar file, and where the data of each file is."""
    path = tar_file(tmp_path / "a.tar", {"./etc/passwd": b"root", "srv/x": b"x" * 600})
    found, places = tree.read_tar(path)
    assert found.contents == {"etc/passwd": b"root"}
    assert found.entries["etc/passwd"] == Entry(stat.S_IFREG | 0o640, 7, 0, 4)
    offset = path.read_bytes().index(b"xxx")
    assert tree.at_offset(places, offset + 599) == "srv/x"
    assert tree.at_offset(places, 0) == ""


@pytest.mark.parametrize("data", [b"", bytes(10240), b"x" * 600])
def test_no_tar(tmp_path: Path, data: bytes) -> None:
    """A tar file without entries, or that is none, is refused."""
    with pytest.raises(CheckFailed, match="tar file"):
        tree.read_tar(image_file(tmp_path / "a.tar", data))


def test_read_image_of_tar(tmp_path: Path) -> None:
    """Private keys in a tar file are found with the file's name."""
    path = tar_file(tmp_path / "a.tar", {"srv/a": b"x", "srv/b": b"some words!"})
    found = image.read_image(path, [WORD])
    assert found.marks == (image.Mark("word", "srv/b"),)
    assert found.kind is ImageType.TAR


def test_big_endian_machine() -> None:
    """The byte order of the ELF header counts."""
    big = b"\x7fELF\x02\x02\x01" + bytes(9) + struct.pack(">HH", 2, 21)
    found = as_tree({"usr/lib/systemd/systemd": file(big)})
    assert facts.read_architecture(found) == "ppc64le"
    assert facts.read_architecture(replace(found, contents={})) == "unknown"
