# SPDX-License-Identifier: Apache-2.0
"""No element asks Ubuntu for a package that it does not have."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from diskimage_builder.paths import get_path
from ubuntu_archive import names

from amphora_image import packages, plan
from amphora_image.request import Architecture, BaseOS

#: Elements that the RedHat family alone has (tests/functional/test_rpm.py).
OF_REDHAT = {"amphora-dracut", "amphora-fedora", "amphora-selinux"}
ELEMENTS = {
    path.name: path
    for path in sorted(plan.ELEMENTS.iterdir())
    if path.is_dir() and path.name not in OF_REDHAT
}
ARCHITECTURES = {Architecture.AMD64: "amd64", Architecture.ARM64: "arm64"}
RELEASES = ("noble", "jammy")


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("architecture", "debian"), list(ARCHITECTURES.items()))
@pytest.mark.parametrize(("nftables", "packaged"), list(product(("True", "False"), ("0", "1"))))
def test_names(
    monkeypatch: pytest.MonkeyPatch,
    release: str,
    architecture: Architecture,
    debian: str,
    nftables: str,
    packaged: str,
) -> None:
    """Every package of every element for it, and the kernel, is one that the release has."""
    variables = {
        "AMPHORA_AGENT_FROM_PACKAGES": packaged,
        "ARCH": debian,
        "DIB_OCTAVIA_AMP_USE_NFTABLES": nftables,
        "DIB_RELEASE": release,
        "DISTRO_NAME": "ubuntu",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tools = Path(get_path("elements"))
    wanted = packages.collect(ELEMENTS, str(plan.ELEMENTS), tools)
    kernel = plan.DISTRIBUTIONS[BaseOS.UBUNTU].kernels[architecture]
    assert set(wanted) | {kernel} <= set(names(release))


def test_the_table_is_used() -> None:
    """The table of names is long enough to hold what an image needs, and has both components."""
    for release in RELEASES:
        assert set(names(release).values()) == {"main", "universe"}
