# SPDX-License-Identifier: Apache-2.0
"""Whatever a mirror does wrong: an error or a recovery, in bounded time, never a wrong image."""

from __future__ import annotations

import time
from collections.abc import Callable

import mirror
import pytest
from mirror import On, Request
from tiny import Build, Scene
from ubuntu_archive import Archive

from amphora_image import plan

#: A machine and no amphora: what else there is asks no mirror.
ELEMENTS = "amphora-base amphora-disk amphora-initramfs amphora-manifest"

#: An index, and a package that every root file system has.
RELEASE, INDEX, PACKAGE = "/noble/InRelease$", "/by-hash/", "/libc6_"

#: Seconds until apt has given up; it waits 30 for an answer, and asks four times.
PATIENCE = 240


def expired(request: Request) -> bytes:
    """Return the suite's InRelease that is valid no more."""
    return request.file.with_name("InRelease.expired").read_bytes()


def build_from(
    scene: Scene, archive: Archive, fault: mirror.Fault, *options: str
) -> tuple[Build, str]:
    """Build from an archive behind a mirror; return the build and what it said."""
    with mirror.serve(archive.root, fault) as bad:
        build = scene.start(
            "lb",
            *("-i", "ubuntu", *options),
            DIB_ELEMENTS=ELEMENTS,
            DIB_LOCAL_ELEMENTS_PATH=str(plan.ELEMENTS),
            BASE_OS_MIRROR=bad.url,
            DIB_APT_KEYRING=str(archive.keyring),
            no_proxy="127.0.0.1",
        )
        _, said = build.process.communicate(timeout=PATIENCE)
    return build, said.replace("\n", " ")


#: What is asked for, how the mirror answers, what the user reads of it, and the hint.
ERRORS: dict[str, tuple[str, Callable[[Request], None], str, str]] = {
    "bad signature": (RELEASE, mirror.says(mirror.changed), "BADSIG", "not what was signed"),
    "expired": (RELEASE, mirror.says(expired), "is expired", "clock is wrong"),
    "release is refused": (RELEASE, mirror.refuses(503), "503", "out of order"),
    "release is cut": (RELEASE, mirror.cuts, "Remote end closed", "broke off"),
    "wrong index": (INDEX, mirror.says(mirror.changed), "Hash Sum mismatch", "being updated"),
    "wrong package": (PACKAGE, mirror.says(mirror.changed), "Hash Sum mismatch", "being updated"),
    "not found": (PACKAGE, mirror.refuses(404), "404", "not complete"),
    "server error": (PACKAGE, mirror.refuses(500), "500", "out of order"),
    "cut": (PACKAGE, mirror.cuts, "Remote end closed", "broke off"),
    "stall": (PACKAGE, mirror.stalls, "timed out", "broke off"),
    "redirected in a circle": (PACKAGE, mirror.redirects, "Redirection loop", "circle"),
}


#: Takes minutes: apt waits, and asks again.
SLOW = {"stall"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.ubuntu] * (name in SLOW)) for name in ERRORS],
)
def test_a_mirror_that_stays_bad(scene: Scene, ubuntu_archive: Archive, name: str) -> None:
    """The build fails with the cause and a hint, in bounded time, and keeps an older image."""
    pattern, answer, cause, hint = ERRORS[name]
    older = scene.kept()
    build, said = build_from(scene, ubuntu_archive, On(pattern, answer))
    assert build.process.returncode == 1
    assert cause in said
    assert hint in said
    assert "Traceback" not in said
    assert older.read_text() == "older"
    assert scene.left_behind() == []


#: What is asked for, how the mirror answers at first, and how often.
PASSING: dict[str, tuple[str, Callable[[Request], None], int | None]] = {
    "server error": (PACKAGE, mirror.refuses(500), 2),
    "cut": (PACKAGE, mirror.cuts, 2),
    # apt asks for the same index by its name.
    "index not found by its hash": (INDEX, mirror.refuses(404), None),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_mirror_that_recovers(scene: Scene, ubuntu_archive: Archive, name: str) -> None:
    """What goes wrong for a while, or has another way, does not stop a build."""
    build, said = build_from(scene, ubuntu_archive, On(*PASSING[name]))
    assert build.process.returncode == 0, said
    assert build.manifest["packages"]


def test_a_package_that_is_not_there(scene: Scene, ubuntu_archive: Archive) -> None:
    """A kernel that Ubuntu does not have is named, with a hint."""
    started = time.monotonic()
    kernel = "linux-image-cloud-amd64"
    build, said = build_from(scene, ubuntu_archive, mirror.no_fault, "-k", kernel)
    assert build.process.returncode == 1
    assert f"Unable to locate package {kernel}" in said
    assert "hint: a package is not in the archive: check -d, -k" in said
    assert time.monotonic() - started < PATIENCE
