# SPDX-License-Identifier: Apache-2.0
"""An OCI image: its documents name each other by their digests."""

from __future__ import annotations

import gzip
import hashlib
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from amphora_image.oci import PLATFORMS, write_oci
from amphora_image.request import Architecture

CREATED = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A root file system's tar, which may be anything here."""
    (tmp_path / "root.tar").write_bytes(b"tree" * 1000)
    return tmp_path / "root.tar"


def files_of(archive: Path) -> dict[str, bytes]:
    """The files of a tar, each once."""
    found: dict[str, bytes] = {}
    with tarfile.open(archive) as members:
        for member in members:
            assert member.name not in found
            assert (member.mtime, member.mode, member.uid) == (CREATED.timestamp(), 0o644, 0)
            file = members.extractfile(member)
            assert file
            found[member.name] = file.read()
    return found


def written(tar: Path, name: str, architecture: Architecture) -> tuple[dict[str, bytes], Any]:
    """The files of a new image, and a function that gives the content of a descriptor."""
    file = tar.with_name("lb.oci")
    write_oci(tar, file, name=name, architecture=architecture, created=CREATED)
    assert sorted(path.name for path in tar.parent.iterdir()) == ["lb.oci", "root.tar"]
    files = files_of(file)

    def content(descriptor: dict[str, Any]) -> bytes:
        blob = files["blobs/" + descriptor["digest"].replace(":", "/")]
        assert len(blob) == descriptor["size"]
        return blob

    return files, content


@pytest.mark.parametrize("architecture", Architecture)
def test_layout(tar: Path, architecture: Architecture) -> None:
    """index.json leads to the manifest, that to the configuration and the layer, by digest."""
    files, content = written(tar, "lb", architecture)
    for name, blob in files.items():
        if name.startswith("blobs/"):
            assert name == f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}"
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    [entry] = json.loads(files["index.json"])["manifests"]
    manifest = json.loads(content(entry))
    config = json.loads(content(manifest["config"]))
    [layer] = manifest["layers"]
    assert gzip.decompress(content(layer)) == tar.read_bytes()
    assert config["rootfs"]["diff_ids"] == [
        f"sha256:{hashlib.sha256(tar.read_bytes()).hexdigest()}"
    ]
    platform = PLATFORMS[architecture]
    assert (
        {key: config[key] for key in platform}
        == platform
        == {key: entry["platform"][key] for key in platform}
    )
    assert config["os"] == "linux"
    assert config["created"] == "2026-01-02T00:00:00+00:00"


def test_docker_archive(tar: Path) -> None:
    """manifest.json names the same blobs for a docker that knows no layouts."""
    files, content = written(tar, "lb", Architecture.AMD64)
    [entry] = json.loads(files["index.json"])["manifests"]
    manifest = json.loads(content(entry))
    [docker] = json.loads(files["manifest.json"])
    assert docker["Config"].endswith(manifest["config"]["digest"].partition(":")[2])
    assert docker["Layers"][0].endswith(manifest["layers"][0]["digest"].partition(":")[2])
    assert docker["RepoTags"] == ["localhost/lb:latest"]


@pytest.mark.parametrize(
    ("name", "tag"),
    [("amphora-x64-haproxy", "amphora-x64-haproxy"), ("Größe 1!", "gr--e-1"), ("_a.B_", "a.b")],
)
def test_tag(tar: Path, name: str, tag: str) -> None:
    """Whatever an image is called, its tag is one (OCI Distribution Specification)."""
    files, _ = written(tar, name, Architecture.AMD64)
    [entry] = json.loads(files["index.json"])["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": f"localhost/{tag}:latest"}


def test_the_same_twice(tar: Path) -> None:
    """From the same tar and time come the same bytes."""
    first, second = (written(tar, "lb", Architecture.AMD64)[0] for _ in range(2))
    assert first == second
