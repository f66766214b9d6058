# SPDX-License-Identifier: Apache-2.0
"""The record of what was made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import manifest
from amphora_image.agent_source import FromGit
from amphora_image.errors import AmphoraImageError
from amphora_image.host import Host
from amphora_image.plan import make_plan
from amphora_image.request import Environment, ImageType, Request

#: As apt keeps it: an InRelease file is a Release file with a signature around it.
RELEASE = """\
-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA256

Origin: Debian
Label: Debian
Suite: stable
Codename: trixie
Date: Sat, 06 Sep 2025 08:11:13 UTC
Description: Debian 13: Released
SHA256:
 0123 1484 contrib/Codename: no
-----BEGIN PGP SIGNATURE-----
"""
ARCHIVE = {
    "suite": "stable",
    "codename": "trixie",
    "origin": "Debian",
    "date": "Sat, 06 Sep 2025 08:11:13 UTC",
    "sha256": hashlib.sha256(RELEASE.encode()).hexdigest(),
}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What programs print, by their name; what they were asked is under the key "argv"."""
    answers: dict[str, str] = {}

    def run(argv: Sequence[object]) -> str:
        answers["argv"] = " ".join(map(str, argv))
        return answers[str(argv[0])]

    monkeypatch.setattr(manifest, "run", run)
    return answers


def debian_tree(root: Path) -> Path:
    """A tree with dpkg's database and one archive."""
    for name in ("dpkg", "apt/lists"):
        (root / "var/lib" / name).mkdir(parents=True)
    (root / "var/lib/dpkg/status").touch()
    (root / "var/lib/apt/lists/mirror_dists_trixie_InRelease").write_text(RELEASE)
    return root


def test_collect_on_debian(said: dict[str, str], tmp_path: Path) -> None:
    """Installed packages are told, removed ones are not; the tree's database is asked."""
    said["dpkg-query"] = "ii |haproxy|3.0.11-1\nrc |gcc|14\nii |kmod|34\n"
    assert manifest.collect(debian_tree(tmp_path)) == {
        "packages": {"haproxy": "3.0.11-1", "kmod": "34"},
        "python_packages": {},
        "archives": [ARCHIVE],
    }
    assert f"--admindir={tmp_path}/var/lib/dpkg" in said["argv"]


def test_collect_elsewhere(said: dict[str, str], tmp_path: Path) -> None:
    """Where there is no dpkg, rpm is asked inside the tree."""
    said["chroot"] = "zlib|1.3-1\nhaproxy|3.0-2\n"
    assert list(manifest.collect(tmp_path)["packages"].items()) == [
        ("haproxy", "3.0-2"),
        ("zlib", "1.3-1"),
    ]
    assert said["argv"].startswith(f"chroot {tmp_path} rpm -qa")


def test_compose(a_request: Callable[..., Request]) -> None:
    """The manifest is a JSON document with all that its schema promises."""
    request = a_request(image_types=(ImageType.QCOW2, ImageType.RAW))
    held = {"packages": {"haproxy": "3"}, "python_packages": {}, "archives": []}
    files = {"lb.qcow2": {"sha256": "0" * 64, "bytes": 1}}
    plan = make_plan(request, Host())
    document = manifest.compose(request, plan, held, {"disk": 1.234}, files)
    assert json.loads(json.dumps(document)) == document
    assert list(document) == [
        *("schema", "created", "request", "plan", "tools"),
        *("packages", "python_packages", "archives", "seconds", "files"),
    ]
    assert document["schema"] == "amphora-image-manifest-1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document["created"])
    assert document["seconds"] == {"disk": 1.2}
    assert document["plan"] == plan.as_json()
    assert set(document["tools"]) == {"amphora-image", "diskimage-builder", "uv"}
    assert all(document["tools"].values())


def test_asked(a_request: Callable[..., Request]) -> None:
    """A request is told in plain words and numbers, every value of it."""
    request = a_request(
        size=Decimal("2.5"),
        agent=FromGit("stable/2026.1"),
        environment=Environment(local_elements_path=(Path("/a"), Path("/b"))),
        image_types=(ImageType.QCOW2, ImageType.TAR),
    )
    document = manifest.asked(request)
    assert set(document) == set(vars(request))
    assert document["size"] == "2.5"
    assert document["output"] == "/here/lb"
    assert document["image_types"] == ["qcow2", "tar"]
    assert document["agent"]["ref"] == "stable/2026.1"
    assert document["environment"]["local_elements_path"] == ["/a", "/b"]


@given(st.binary())
def test_sha256(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """The checksum is that of the file's bytes."""
    path = tmp_path_factory.getbasetemp() / "content"
    path.write_bytes(content)
    assert manifest.sha256_of(path) == hashlib.sha256(content).hexdigest()


def test_main(said: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The element's command writes what a tree holds to a file."""
    said["dpkg-query"] = "ii |haproxy|3\n"
    root, file = debian_tree(tmp_path / "root"), tmp_path / "contents.json"
    monkeypatch.setattr(manifest.sys, "argv", ["manifest", str(root), str(file)])
    manifest.main()
    assert json.loads(file.read_text())["packages"] == {"haproxy": "3"}


def test_main_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that cannot be read ends the command with its reason."""

    def run(_: object) -> str:
        raise AmphoraImageError("dpkg-query ended with 1")

    monkeypatch.setattr(manifest, "run", run)
    monkeypatch.setattr(manifest.sys, "argv", ["manifest", str(tmp_path), str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="manifest: dpkg-query ended with 1"):
        manifest.main()
