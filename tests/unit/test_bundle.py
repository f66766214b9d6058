# SPDX-License-Identifier: Apache-2.0
"""What a bundle holds, and that nothing else is ever taken from one."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amphora_image import bundle
from amphora_image import workspace as ws
from amphora_image.bundle import KEYRING, SCHEMA, opened, require_same, unpack, write
from amphora_image.errors import BadValue
from amphora_image.host import Host, Mirrors
from amphora_image.manifest import sha256_of
from amphora_image.plan import make_plan
from amphora_image.request import BaseOS, Request

NAMES = {"rootfs/debian-x.tar.zst": "rootfs", "agent/amd64-y.tar.zst": "agent", KEYRING: "keys"}
HERE = Host(BaseOS.DEBIAN, Mirrors("http://mirror.example.org/debian"), {BaseOS.DEBIAN: Path("/k")})


@pytest.fixture(autouse=True)
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is started."""
    monkeypatch.setattr(ws, "_home", lambda: tmp_path)
    monkeypatch.setattr(ws, "detach_loop_devices", lambda _: None)
    monkeypatch.setattr(bundle, "run", lambda *_, **__: "mmdebstrap 1.0\n")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """What goes into a bundle."""
    made = {name: tmp_path / "from" / name for name in NAMES}
    for name, path in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NAMES[name])
    return made


def index_of(files: dict[str, Path], request: Request) -> dict[str, Any]:
    """The index of a bundle of these files."""
    return {
        "schema": SCHEMA,
        "asked": bundle.asked(request, make_plan(request, HERE)),
        "mirrors": vars(HERE.mirrors),
        "base_os": HERE.base_os,
        "members": {name: {"sha256": sha256_of(path)} for name, path in files.items()},
    }


@pytest.fixture
def made(tmp_path: Path, files: dict[str, Path], a_request: Callable[..., Request]) -> Path:
    """A bundle of a plain request."""
    return write(tmp_path / "bundle.tar", index_of(files, a_request()), files)


def test_round_trip(made: Path, tmp_path: Path) -> None:
    """What is written is what is unpacked, and the index comes first."""
    index = unpack(made, tmp_path / "to")
    assert {name: (tmp_path / "to" / name).read_text() for name in NAMES} == NAMES
    assert index["members"].keys() == NAMES.keys()
    with tarfile.open(made) as tar:
        assert tar.getnames()[0] == "index.json"
        assert {(member.uid, member.mtime, member.uname) for member in tar} == {(0, 0, "")}


def test_the_same_bytes(
    made: Path, tmp_path: Path, files: dict[str, Path], a_request: Callable[..., Request]
) -> None:
    """Two bundles of the same are the same."""
    again = write(tmp_path / "again.tar", index_of(files, a_request()), files)
    assert again.read_bytes() == made.read_bytes()


def test_whole_or_not_at_all(
    made: Path, files: dict[str, Path], tmp_path: Path, a_request: Callable[..., Request]
) -> None:
    """If one cannot be written, the older file stays and nothing else does."""
    before, index = made.read_bytes(), index_of(files, a_request())
    files["rootfs/debian-x.tar.zst"].unlink()
    with pytest.raises(FileNotFoundError):
        write(made, index, files)
    assert made.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"bundle.tar", "from"}


def member(name: str, **fields: Any) -> tarfile.TarInfo:
    """A member of a tar file."""
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


#: What somebody may put behind a bundle's own members.
STRANGERS = {
    "unknown": member("rootfs/other.tar.zst"),
    "twice": member("rootfs/debian-x.tar.zst"),
    "absolute": member("/etc/passwd"),
    "upwards": member("rootfs/../../etc/passwd"),
    "link": member(KEYRING, type=tarfile.SYMTYPE, linkname="/etc/shadow"),
    "hard link": member(KEYRING, type=tarfile.LNKTYPE, linkname="/etc/shadow"),
    "device": member(KEYRING, type=tarfile.CHRTYPE),
    "directory": member("rootfs", type=tarfile.DIRTYPE),
    "second index": member("index.json"),
}


@pytest.mark.parametrize(
    ("what", "listed"),
    # With a good name and in the index it were no stranger.
    [(what, False) for what in STRANGERS]
    + [(what, True) for what in STRANGERS if what != "unknown"],
)
def test_strangers(
    tmp_path: Path,
    files: dict[str, Path],
    a_request: Callable[..., Request],
    what: str,
    listed: bool,
) -> None:
    """What has no place in a bundle stops it, even if its index names it; nothing is made of it."""
    stranger, index = STRANGERS[what], index_of(files, a_request())
    if listed:
        index["members"][stranger.name] = {"sha256": sha256_of(Path("/dev/null"))}
    path = tmp_path / "bundle.tar"
    kept = {name: file for name, file in files.items() if name != stranger.name or what == "twice"}
    write(path, index, kept)
    with tarfile.open(path, "a") as tar:
        tar.addfile(stranger)
    with pytest.raises(BadValue, match=r"damaged: .* (has no place in it|is not what)") as caught:
        unpack(path, tmp_path / "to")
    assert caught.value.exit_code == 3
    assert "amphora-image fetch" in str(caught.value.hint)
    found = {path for path in (tmp_path / "to").rglob("*") if not path.is_dir()}
    assert found <= {tmp_path / "to" / name for name in NAMES}
    assert not [path for path in found if path.is_symlink()]


def flipped(data: bytes, text: bytes) -> bytes:
    """Data with one bit changed where a text begins."""
    place = data.rindex(text)
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "changed": lambda data: flipped(data, b"rootfs\0"),
    "cut": lambda data: data[:-11_000],
    "cut in the index": lambda data: data[:600],
    "empty": lambda _: b"",
    "no tar": lambda _: b"x" * 2000,
    "index is no JSON": lambda data: flipped(data, b'{\n  "asked"'),
    "other schema": lambda data: flipped(data, SCHEMA.encode()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage(made: Path, tmp_path: Path, how: str) -> None:
    """A bundle that is not as it was made is refused."""
    made.write_bytes(DAMAGE[how](made.read_bytes()))
    with pytest.raises(BadValue, match=r"--bundle is .*, which is damaged: .+"):
        unpack(made, tmp_path / "to")


def test_a_member_that_is_missing(
    tmp_path: Path, files: dict[str, Path], a_request: Callable[..., Request]
) -> None:
    """A bundle has all that its index names."""
    index = index_of(files, a_request())
    del files[KEYRING]
    path = write(tmp_path / "bundle.tar", index, files)
    with pytest.raises(BadValue, match=r"damaged: it lacks keyring\.gpg"):
        unpack(path, tmp_path / "to")


def test_an_index_alone(tmp_path: Path) -> None:
    """A tar file whose index has the wrong form is damaged, not a crash."""
    for index in ([], {"schema": SCHEMA}, {"schema": SCHEMA, "members": [1]}):
        with tarfile.open(tmp_path / "bundle.tar", "w") as tar:
            text = json.dumps(index).encode()
            tar.addfile(member("index.json", size=len(text)), io.BytesIO(text))
        with pytest.raises(BadValue, match="damaged"):
            unpack(tmp_path / "bundle.tar", tmp_path / "to")


def test_opened(made: Path, tmp_path: Path, a_request: Callable[..., Request]) -> None:
    """A build has the bundle's cache, keys and mirrors, whatever its host has; its log stays."""
    request = a_request(bundle=made, cache_dir=tmp_path / "cache", offline=True)
    elsewhere = Host(BaseOS.UBUNTU, Mirrors("http://mirror.example.org/other"))
    with opened(request, elsewhere) as (inside, there):
        plan = make_plan(inside, there)
        assert plan.environment["AMPHORA_APT_SOURCES"].startswith("deb http://mirror.example.org/d")
        assert plan.paths["DIB_APT_KEYRING"][0].read_text() == "keys"
        cache = inside.cache_dir
        assert (cache / "rootfs/debian-x.tar.zst").read_text() == "rootfs"
        assert inside.log_file
        assert inside.log_file.parent == tmp_path / "cache/logs"
    assert not cache.exists()


def test_without_a_bundle(a_request: Callable[..., Request]) -> None:
    """A request without one stays as it is."""
    request = a_request()
    with opened(request, HERE) as found:
        assert found == (request, HERE)


def test_other_options(made: Path, tmp_path: Path, a_request: Callable[..., Request]) -> None:
    """All that differs is told, what the bundle has and what was asked for."""
    changes = {"release": "bookworm", "sshd": False, "cache_dir": tmp_path / "cache"}
    request = a_request(bundle=made, **changes)
    with pytest.raises(BadValue) as caught, opened(request, HERE):
        pass
    said = str(caught.value)
    assert "release (-d): the bundle has trixie, asked for is bookworm" in said
    assert "elements: the bundle has amphora-sshd, asked for is amphora-no-sshd" in said
    assert "kernel" not in said
    assert caught.value.hint
    assert not list((tmp_path / "cache").glob(".bundle-*"))


def test_files_may_differ(made: Path, tmp_path: Path, a_request: Callable[..., Request]) -> None:
    """Size, types and places of the files are not what a bundle is about."""
    request = a_request(bundle=made, cache_dir=tmp_path, size=3, output=tmp_path / "other")
    with opened(request, HERE):
        pass


def test_same_document() -> None:
    """What only one side has is told as well."""
    with pytest.raises(BadValue, match="a: the bundle has 1, asked for is None"):
        require_same({"a": 1}, {})
    with pytest.raises(BadValue, match="agent: the bundle has no more, asked for is ref=x"):
        require_same({"agent": {"source": "git"}}, {"agent": {"source": "git", "ref": "x"}})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"base_os": BaseOS.ROCKY, "release": "10"}, "not of rocky"),
        ({"bundle": Path("/bundle.tar")}, "not of another bundle"),
    ],
)
def test_what_cannot_be_fetched(
    a_request: Callable[..., Request], changes: dict[str, Any], what: str
) -> None:
    """A base OS without apt, and what is in a bundle already."""
    if "base_os" in changes:
        changes["size"] = 5
    with pytest.raises(BadValue, match=what):
        bundle.fetch(a_request(**changes), HERE, Path("/x"), bundle.Console(quiet=True))
