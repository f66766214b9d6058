# SPDX-License-Identifier: Apache-2.0
"""Finished images by what they are made of: every input counts, and what is taken is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from amphora_image import cache, image_cache
from amphora_image.access import Access
from amphora_image.agent_source import FromGit, Locked, Packaged
from amphora_image.host import Host, Mirrors
from amphora_image.image_cache import Key, Made, digests_of, keep, key_of, take
from amphora_image.plan import make_plan
from amphora_image.request import (
    Architecture,
    BaseOS,
    Environment,
    ImageType,
    Request,
    VhdSubformat,
)

STATE = ["0123", "4567"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a small package in the place of ours."""
    package = tmp_path / "package"
    (package / "elements/a/install.d").mkdir(parents=True)
    (package / "build.py").write_text("code")
    (package / "elements/a/install.d/10-a").write_text("script")
    monkeypatch.setattr(image_cache, "PACKAGE", package)
    return package


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the tools; the host has no others."""
    for name in image_cache.TOOLS:
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("#!/bin/sh")
    monkeypatch.setattr(image_cache.shutil, "which", lambda name: str(tmp_path / "bin" / name))
    return tmp_path / "bin"


@pytest.fixture
def keyring(tmp_path: Path) -> Path:
    """A keyring."""
    (tmp_path / "keys.gpg").write_bytes(b"keys")
    return tmp_path / "keys.gpg"


@pytest.fixture
def entry(
    package: Path,
    tools: Path,
    keyring: Path,
    a_request: Callable[..., Request],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path | None]:
    """A function that gives the entry of a request, some things changed."""

    def of(
        environ: Mapping[str, str] = {},
        state: list[str] | None = STATE,
        archive: str = "http://mirror.example.org/debian",
        **changes: Any,
    ) -> Path | None:
        monkeypatch.setattr(image_cache.archives, "ask", lambda *_: state)
        request = a_request(cache_dir=tmp_path / "cache", **changes)
        host = Host(BaseOS.DEBIAN, Mirrors(archive), {BaseOS.DEBIAN: keyring})
        key = key_of(request, make_plan(request, host), environ)
        return key and key.entry

    return of


#: What differs in a request, each of which makes another image.
REQUESTS: dict[str, dict[str, Any]] = {
    "release": {"release": "bookworm"},
    "architecture": {"architecture": Architecture.I386},
    "agent's series": {"agent": Locked("2026.1")},
    "agent's source": {"agent": Packaged()},
    "image types": {"image_types": (ImageType.RAW,)},
    "more image types": {"image_types": (ImageType.QCOW2, ImageType.TAR)},
    "size": {"size": Decimal(2)},
    "kernel": {"kernel": "linux-image-amd64"},
    "qcow2 options": {"qemu_img_options": "compression_type=zlib"},
    "VHD's kind": {"vhd_subformat": VhdSubformat.FIXED},
    "mandatory access control": {"mandatory_access": True},
    "CPU pinning": {"cpu_pinning": True},
    "no sshd": {"sshd": False},
    "FIPS": {"fips": True},
    "trace": {"trace": True},
    "data sources": {"environment": Environment(datasources="ConfigDrive, Ec2")},
    "iptables": {"environment": Environment(nftables=False)},
    "command line": {"environment": Environment(command_line="quiet")},
    "mirror": {"access": Access(mirror="http://mirror.example.org/other")},
    "index": {"access": Access(index="https://mirror.example.org/simple")},
    "variable of DIB": {"environ": {"DIB_SOMETHING": "1"}},
    "variable of uv": {"environ": {"UV_DEFAULT_INDEX": "https://mirror.example.org/simple"}},
    "time": {"environment": Environment(source_date_epoch=1795593600)},
    "state of the archives": {"state": ["0123", "4568"]},
    "host's mirror": {"archive": "http://mirror.example.org/near"},
}


def test_the_same_again(entry: Callable[..., Path | None], tmp_path: Path) -> None:
    """The same request has the same entry, whatever its files are called and where work is done."""
    same = entry(
        output=tmp_path / "other",
        working_dir=tmp_path,
        log_file=tmp_path / "log",
        on_disk=True,
        environ={"HOME": "/elsewhere", "http_proxy": "http://mirror.example.org:3128"},
        access=Access(https_proxy="http://mirror.example.org:3128", no_proxy="localhost"),
    )
    assert same == entry()
    assert same
    assert same.parent == tmp_path / "cache/images"


@pytest.mark.parametrize("what", REQUESTS)
def test_every_change_of_a_request_is_another_entry(
    entry: Callable[..., Path | None], what: str
) -> None:
    """Whatever is asked for in another way, on the command line or by a variable, counts."""
    assert entry(**REQUESTS[what]) not in (entry(), None)


def test_every_field_of_a_request_is_thought_of(a_request: Callable[..., Request]) -> None:
    """A field that is new has to be put in one of these tables."""
    counted = {name for change in REQUESTS.values() for name in change}
    never_known = {name for change in UNKNOWABLE.values() for name in change}
    no_matter = {"output", "working_dir", "log_file", "on_disk", "cache_dir", "fresh"}
    no_matter |= {"bundle"}  # it sets offline
    only_one = {"backend"}
    assert set(vars(a_request())) == (
        (counted | never_known) - {"environ", "state", "archive"} | no_matter | only_one
    )


@pytest.mark.parametrize("change", ["code", "script", "new", "mode", "tool", "keyring", "DIB"])
def test_every_change_of_a_file_is_another_entry(
    entry: Callable[..., Path | None],
    package: Path,
    tools: Path,
    keyring: Path,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Our code, our elements, the tools and the keys count by what they are."""
    before = entry()
    match change:
        case "code":
            (package / "build.py").write_text("c0de")
        case "script":
            (package / "elements/a/install.d/10-a").write_text("skript")
        case "new":
            (package / "elements/a/install.d/20-a").touch()
        case "mode":
            (package / "elements/a/install.d/10-a").chmod(0o755)
        case "tool":
            os.utime(tools / "qemu-img", (1, 1))
        case "keyring":
            keyring.write_bytes(b"k3ys")
        case "DIB":
            monkeypatch.setattr(image_cache.metadata, "version", lambda _: "99")
    assert entry() not in (before, None)


def test_compiled_code_does_not_count(entry: Callable[..., Path | None], package: Path) -> None:
    """What Python itself writes beside the code changes nothing."""
    before = entry()
    (package / "__pycache__").mkdir()
    (package / "__pycache__/build.cpython-311.pyc").write_bytes(b"x")
    assert entry() == before


UNKNOWABLE: dict[str, dict[str, Any]] = {
    "root password": {"root_password": "secret"},
    "offline": {"offline": True},
    "Git": {"agent": FromGit("master")},
    "other base OS": {"base_os": BaseOS.FEDORA, "release": "43", "size": Decimal(5)},
    "archives that do not answer": {"state": None},
    "local elements": {
        "environment": Environment(
            local_elements=("mine",), local_elements_path=(Path("/elements"),)
        )
    },
    "elements in the place of ours": {
        "environment": Environment(local_elements_path=(Path("/elements"),))
    },
    "other elements": {"environment": Environment(elements=("vm", "debian-minimal"))},
    "a checkout of elements": {"environment": Environment(elements_repo=Path("/repo"))},
    "a checkout of DIB": {"environment": Environment(dib_repo=Path("/repo"))},
    "a cloud image": {"environment": Environment(local_image=Path("/image"))},
}


@pytest.mark.parametrize("what", UNKNOWABLE)
def test_what_cannot_be_known_has_no_entry(entry: Callable[..., Path | None], what: str) -> None:
    """What others may change without our knowing is built each time."""
    assert entry(**UNKNOWABLE[what]) is None


@pytest.fixture
def key(tmp_path: Path) -> Key:
    """A key."""
    return Key(tmp_path / "cache/images/debian", STATE)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[ImageType, Path]:
    """Image files; they are copied without a program."""
    made = {kind: tmp_path / f"lb.{kind}" for kind in (ImageType.QCOW2, ImageType.TAR)}
    for kind, file in made.items():
        file.write_text(f"content of {kind}")
    monkeypatch.setattr(image_cache, "run", lambda argv: shutil.copyfile(*argv[-2:]))
    return made


def made_of(files: Mapping[ImageType, Path], state: list[str] = STATE) -> Made:
    """What was made, of archives of this state."""
    rows = [{"sha256": digest} for digest in reversed(state)]
    return Made({"archives": rows, "packages": {"haproxy": "3"}}, digests_of(files))


def test_kept_files_are_taken(key: Key, files: dict[ImageType, Path], tmp_path: Path) -> None:
    """What was kept is taken, byte by byte, with what is known of it."""
    assert take(key, files) is None
    made = made_of(files)
    keep(key, files, made)
    wanted = {kind: tmp_path / f"new.{kind}" for kind in files}
    assert take(key, wanted) == made
    assert {kind: file.read_text() for kind, file in wanted.items()} == {
        kind: file.read_text() for kind, file in files.items()
    }


def test_an_archive_that_changed_during_the_build(key: Key, files: dict[ImageType, Path]) -> None:
    """An image of archives of another state than the key tells is not kept."""
    keep(key, files, made_of(files, ["0123", "9999"]))
    assert take(key, files) is None


@pytest.mark.parametrize("damage", ["changed", "cut", "gone", "no record"])
def test_a_damaged_entry_is_not_taken(key: Key, files: dict[ImageType, Path], damage: str) -> None:
    """What is not whole any more is a miss, and the next build takes its place."""
    keep(key, files, made_of(files))
    kept = key.entry / "qcow2"
    match damage:
        case "changed":
            kept.write_text("content of qc0w2")
        case "cut":
            kept.write_text("")
        case "gone":
            kept.unlink()
        case "no record":
            (key.entry / image_cache.RECORD).unlink()
    assert take(key, files) is None
    for kind, file in files.items():
        file.write_text(f"content of {kind}")
    keep(key, files, made_of(files))
    assert take(key, files) == made_of(files)
    assert [found.path for found in cache.entries(key.entry.parents[1])] == [key.entry]
