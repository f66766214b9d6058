# SPDX-License-Identifier: Apache-2.0
"""A root file system's tar becomes an OCI image, in one file that every container tool loads.

The file is an OCI image layout (Image Format Specification 1.1) and a ``docker save`` archive at
once: both are tar files that name the same blobs, so podman, skopeo and ``docker load`` take it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from amphora_image.request import Architecture

#: Architecture -> the names of the Go language, which OCI uses.
PLATFORMS: Mapping[Architecture, Mapping[str, str]] = {
    Architecture.AMD64: {"architecture": "amd64"},
    Architecture.ARM64: {"architecture": "arm64", "variant": "v8"},
    Architecture.ARMHF: {"architecture": "arm", "variant": "v7"},
    Architecture.I386: {"architecture": "386"},
    Architecture.PPC64LE: {"architecture": "ppc64le"},
}

MEDIA = "application/vnd.oci.image"
#: The quickest level: the file is loaded once and thrown away.
LEVEL = 1
CHUNK = 1024**2


def write_oci(
    tar: Path,
    file: Path,
    *,
    name: str,
    architecture: Architecture,
    created: datetime,
) -> None:
    """Write an image of one layer.

    :param tar: the root file system.
    :param name: what the image is called; loaded, it is ``localhost/NAME:latest``.
    :param created: the time that the image tells; files in the archive have it too.
    """
    layer = tar.with_suffix(".layer")
    tag = f"localhost/{re.sub('[^a-z0-9._-]', '-', name.lower()).strip('._-')}:latest"
    when = created.astimezone(UTC).isoformat(timespec="seconds")
    try:
        diff_id, digest = _compress(tar, layer)
        platform = {"os": "linux", **PLATFORMS[architecture]}
        config = _json(
            {
                **platform,
                "created": when,
                "config": {"Cmd": ["/sbin/init"], "Labels": _labels(name, when)},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
            }
        )
        size = layer.stat().st_size
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": f"{MEDIA}.manifest.v1+json",
                "config": _descriptor(f"{MEDIA}.config.v1+json", config),
                "layers": [
                    {
                        "mediaType": f"{MEDIA}.layer.v1.tar+gzip",
                        "digest": f"sha256:{digest}",
                        "size": size,
                    }
                ],
            }
        )
        index = {
            "schemaVersion": 2,
            "manifests": [
                {
                    **_descriptor(f"{MEDIA}.manifest.v1+json", manifest),
                    "platform": platform,
                    "annotations": {"org.opencontainers.image.ref.name": tag},
                }
            ],
        }
        docker = [
            {"Config": _blob(config), "RepoTags": [tag], "Layers": [f"blobs/sha256/{digest}"]}
        ]
        documents = {
            "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
            "index.json": _json(index),
            "manifest.json": _json(docker),
            _blob(config): config,
            _blob(manifest): manifest,
        }
        seconds = int(created.timestamp())
        with tarfile.open(file, "w") as archive:
            for name, content in documents.items():
                archive.addfile(_member(name, len(content), seconds), io.BytesIO(content))
            with layer.open("rb") as content_of_layer:
                archive.addfile(_member(f"blobs/sha256/{digest}", size, seconds), content_of_layer)
    finally:
        layer.unlink(missing_ok=True)


def _compress(tar: Path, layer: Path) -> tuple[str, str]:
    """Compress a layer; return the SHA-256 of what went in and of what came out."""
    plain = hashlib.sha256()
    with (
        tar.open("rb") as source,
        layer.open("wb") as target,
        gzip.GzipFile("", "wb", LEVEL, target, mtime=0) as packed,
    ):
        while chunk := source.read(CHUNK):
            plain.update(chunk)
            packed.write(chunk)
    with layer.open("rb") as content:
        return plain.hexdigest(), hashlib.file_digest(content, "sha256").hexdigest()


def _labels(name: str, when: str) -> dict[str, str]:
    """Return annotations by their predefined keys (Image Format Specification, "Annotations")."""
    told = {
        "title": name,
        "description": "Amphora of OpenStack Octavia",
        "created": when,
        "version": metadata.version("amphora-image"),
    }
    return {f"org.opencontainers.image.{key}": value for key, value in told.items()}


def _json(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _blob(content: bytes) -> str:
    return f"blobs/sha256/{hashlib.sha256(content).hexdigest()}"


def _descriptor(media_type: str, content: bytes) -> dict[str, str | int]:
    digest = hashlib.sha256(content).hexdigest()
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def _member(name: str, size: int, when: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, when, 0o644
    return member
