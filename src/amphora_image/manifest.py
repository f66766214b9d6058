# SPDX-License-Identifier: Apache-2.0
"""The record of what was made: what was asked, what went in, what came out."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from amphora_image import agent, archives
from amphora_image.access import SECRET, redacted
from amphora_image.errors import AmphoraImageError
from amphora_image.plan import Plan
from amphora_image.request import Request
from amphora_image.run import run

SCHEMA = "amphora-image-manifest-1"


def collect(root: Path) -> dict[str, Any]:
    """Return what a root file system holds: OS packages, the agent's packages, archives.

    :returns: ``packages`` and ``python_packages`` (name -> version) and ``archives`` (a list of
        rows as of :func:`archives.recorded`).
    """
    return {
        "packages": os_packages(root),
        "python_packages": agent.packages(root),
        "archives": archives.recorded(root),
    }


def os_packages(root: Path) -> dict[str, str]:
    """Return the installed packages of dpkg's or rpm's database, name -> version."""
    if (root / "var/lib/dpkg/status").exists():
        columns = "${db:Status-Abbrev}|${Package}|${Version}\n"
        database = root / "var/lib/dpkg"
        said = run(["dpkg-query", f"--admindir={database}", "--show", f"--showformat={columns}"])
        rows = [line.split("|") for line in said.splitlines()]
        return {name: version for state, name, version in rows if state.startswith("ii")}
    said = run(["chroot", root, "rpm", "-qa", "--queryformat", "%{NAME}|%{VERSION}-%{RELEASE}\n"])
    return dict(sorted(line.split("|", 1) for line in said.splitlines()))


def compose(
    request: Request,
    plan: Plan,
    contents: Mapping[str, Any],
    seconds: Mapping[str, float],
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Put the manifest together.

    :param contents: as :func:`collect` returns it.
    :param seconds: phase -> seconds.
    :param files: file name -> ``sha256``, ``bytes``.
    """
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "request": asked(request),
        "plan": plan.as_json(),
        "tools": {
            name: metadata.version(name) for name in ("amphora-image", "diskimage-builder", "uv")
        },
        **contents,
        "seconds": {phase: round(value, 1) for phase, value in seconds.items()},
        "files": dict(files),
    }


def asked(request: Request) -> dict[str, Any]:
    """Return the request as JSON values, passwords as stars."""
    shown = {
        name: value
        for name, value in vars(request).items()
        if name not in {"access", "environment", "agent", "root_password"}
    }
    document = {
        **shown,
        "agent": vars(request.agent),
        "root_password": SECRET if request.root_password is not None else None,
        "access": vars(request.access),
        "environment": vars(request.environment),
    }
    plain: dict[str, Any] = json.loads(redacted(json.dumps(document, default=str)))
    return plain


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> None:
    """Write what a tree holds to a file, for the element ``amphora-trim``."""
    parser = argparse.ArgumentParser(prog="python -m amphora_image.manifest")
    parser.add_argument("root", type=Path)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    try:
        args.file.write_text(json.dumps(collect(args.root)))
    except AmphoraImageError as error:
        sys.exit(f"manifest: {error}")


if __name__ == "__main__":
    main()
