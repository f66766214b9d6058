# SPDX-License-Identifier: Apache-2.0
"""Other releases and architectures than the default's: built here, checked, and booted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND, ProvePart
from mirror import serve
from ubuntu_archive import KEYRING, index, key, sign

from amphora_image import facts, host, proof
from amphora_image.board import BOARDS, board_for
from amphora_image.check import check_image
from amphora_image.image import read_image
from amphora_image.request import Architecture

#: Seconds for a proof: other architectures are emulated throughout.
PATIENCE = 7200
#: The last milestone of a proof.
LAST = list(proof.SINGLE)[-1]


@dataclass(frozen=True)
class Base:
    """A release of Debian for an architecture.

    :ivar secured: whether each mirror has its security updates whole; else there are none.
    :ivar reaches: the last milestone that its agent must reach.
    """

    release: str
    architecture: Architecture
    secured: bool = True
    reaches: str = LAST


BASES = [
    pytest.param(base, id=f"{base.release}-{base.architecture}", marks=mark)
    for base, mark in (
        (Base("bookworm", Architecture.AMD64), pytest.mark.bases),
        # The last release with a kernel for it. There are no wheels for these two: their agent is
        # that of the release's packages, octavia 11, which does less of what Octavia asks today.
        (Base("bookworm", Architecture.I386, False, "strangers refused"), pytest.mark.bases),
        (Base("trixie", Architecture.ARM64), pytest.mark.arm),
        (Base("bookworm", Architecture.ARMHF, False, "strangers refused"), pytest.mark.arm),
    )
]


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    """What the image is made of."""
    found: Base = request.param
    return found


@pytest.fixture(scope="module")
def image(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian amphora of it.

    AMPHORA_TEST_CACHE names a cache directory, in which it may be already.
    """
    directory = tmp_path_factory.mktemp("base")
    cache = os.environ.get("AMPHORA_TEST_CACHE", directory / "cache")
    what = ["-i", "debian", "-d", base.release, "-a", base.architecture]
    places = ["-c", cache, "-o", directory / "lb"]
    served = nullcontext(([], {})) if base.secured else without_security(base, directory)
    with served as (more, variables):
        command = [COMMAND, *what, *places, *more]
        subprocess.run(command, env={**os.environ, **variables}, check=True)
    return directory / "lb.qcow2"


@pytest.fixture(scope="module")
def found(image: Path) -> dict[str, Any]:
    """The image's facts."""
    return facts.read_facts(read_image(image))


@contextmanager
def without_security(base: Base, directory: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Serve security updates that hold nothing, signed; yield options and variables for them."""
    mirrors = host.look().mirrors
    assert mirrors, "this host has no mirror of Debian"
    root, own, keyring = (directory / name for name in ("ubuntu", "own.gpg", "keyring.gpg"))
    name = f"{base.release}-security"
    suite = root / "dists" / name
    index(suite / f"main/binary-{base.architecture}/Packages", b"")
    fields = {
        **{"Origin": "Debian", "Suite": name, "Codename": name, "Components": "main"},
        **{"Architectures": base.architecture, "Date": "Wed, 25 Nov 2026 00:00:00 UTC"},
    }
    with key(own) as gpg:
        sign(suite, fields, gpg, "")
    keyring.write_bytes(KEYRING.read_bytes() + own.read_bytes())
    with serve(root) as security:
        places = ["--mirror", mirrors.archive, "--security-mirror", security.url]
        yield places, {"DIB_APT_KEYRING": str(keyring)}


def test_it_passes_the_check(image: Path) -> None:
    """No rule for an amphora is broken."""
    assert check_image(image) == []


def test_it_is_for_the_architecture(found: dict[str, Any], base: Base) -> None:
    """All programs are the architecture's, and the kernel speaks on its serial port."""
    assert found["architecture"] == base.architecture
    kinds = {package["architecture"] for package in found["os_packages"].values()}
    assert kinds == {base.architecture, "all"}
    (kernel,) = found["kernels"]
    assert kernel["bootable"]
    port = "ttyAMA0" if base.architecture.startswith("arm") else "ttyS0"
    words = found["boot_loader"]["command_line"].split()
    assert any(word.startswith(f"console={port}") for word in words)


def test_computer_is_the_architectures(image: Path, base: Base) -> None:
    """Without its manifest too, an image tells on what it is to be started."""
    bare = image.with_name("bare.qcow2")
    bare.symlink_to(image)
    expected = next(iter(BOARDS[base.architecture].values()))
    assert board_for(image) == board_for(bare) == expected


def test_it_works(base: Base, image: Path, prove_part: ProvePart) -> None:
    """The image does what Octavia wants of an amphora: all of it, but for an agent of packages."""
    names = list(proof.SINGLE)
    wanted = names[: names.index(base.reaches) + 1]
    prove_part(image, wanted, accel="tcg", timeout=PATIENCE)
