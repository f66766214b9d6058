# SPDX-License-Identifier: Apache-2.0
"""What was asked: one frozen, validated value that knows neither hosts nor diskimage-builder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from amphora_image.access import Access
from amphora_image.agent_source import AgentSource
from amphora_image.errors import BadValue

GIB = 1024**3
E = TypeVar("E", bound=StrEnum)


class Architecture(StrEnum):
    """Architectures by Debian's names; ``aarch64`` is read as ``arm64``."""

    I386 = "i386"
    AMD64 = "amd64"
    ARMHF = "armhf"
    ARM64 = "arm64"
    PPC64LE = "ppc64le"


class Backend(StrEnum):
    """What balances the load."""

    HAPROXY = "haproxy"


class BaseOS(StrEnum):
    """Distributions that an amphora can be made of."""

    UBUNTU = "ubuntu"
    DEBIAN = "debian"
    FEDORA = "fedora"
    CENTOS = "centos"
    ROCKY = "rocky"
    RHEL = "rhel"


class ImageType(StrEnum):
    """File formats; the value is the file's suffix."""

    QCOW2 = "qcow2"
    TAR = "tar"
    RAW = "raw"
    VHD = "vhd"
    OCI = "oci"
    SQUASHFS = "squashfs"


class VhdSubformat(StrEnum):
    """How a VHD keeps what is empty: not at all, or as it is."""

    DYNAMIC = "dynamic"
    FIXED = "fixed"


#: Names that other tools use for the same thing.
ALIASES = {
    "aarch64": "arm64",
    "x86_64": "amd64",
    "ppc64el": "ppc64le",
    "ubuntu-minimal": "ubuntu",
    "centos-minimal": "centos",
}

#: Releases of each base OS; the first is the default.
RELEASES: Mapping[BaseOS, tuple[str, ...]] = {
    BaseOS.UBUNTU: ("noble", "jammy"),
    BaseOS.DEBIAN: ("trixie", "bookworm"),
    BaseOS.FEDORA: ("43", "42"),
    BaseOS.CENTOS: ("10-stream", "9-stream"),
    BaseOS.ROCKY: ("10", "9"),
    BaseOS.RHEL: ("9", "10"),
}

#: Debian and Ubuntu are built by our own base element, the others by diskimage-builder's.
DEBIAN_FAMILY = frozenset({BaseOS.UBUNTU, BaseOS.DEBIAN})

#: Base systems of which the tests boot an image; of the others they see parts of a build alone.
PROVEN = frozenset({BaseOS.UBUNTU, BaseOS.DEBIAN})

#: Architectures of each base OS, where not all of them have a kernel.
ARCHITECTURES: Mapping[BaseOS, frozenset[Architecture]] = {
    BaseOS.UBUNTU: frozenset(Architecture) - {Architecture.I386},
    BaseOS.DEBIAN: frozenset(Architecture),
    **dict.fromkeys(
        (BaseOS.FEDORA, BaseOS.CENTOS, BaseOS.ROCKY, BaseOS.RHEL),
        frozenset({Architecture.AMD64, Architecture.ARM64, Architecture.PPC64LE}),
    ),
}

#: The smallest disk that holds the image, in GiB.
MINIMUM_SIZE: Mapping[bool, Decimal] = {True: Decimal("1.5"), False: Decimal(3)}
MAXIMUM_SIZE = Decimal(2048)

#: Names of packages by Debian Policy, 5.6.7, and of rpm; a version or release may follow.
PACKAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._:=/~-]*")


def choice(kind: type[E], what: str, value: str) -> E:
    """Return the member of an enumeration that a user named.

    :raises BadValue: there is none.
    """
    try:
        return kind(ALIASES.get(value, value))
    except ValueError:
        raise BadValue(f"{what} is {value!r}; allowed are {', '.join(kind)}") from None


def image_types(value: str) -> tuple[ImageType, ...]:
    """Return the image types of a list with commas, each once, in the order given.

    :raises BadValue: one of them is unknown, or there is none.
    """
    names = [name.strip() for name in value.split(",")]
    return tuple(dict.fromkeys(choice(ImageType, "-t (image type)", name) for name in names))


def size_in_gib(value: str) -> Decimal:
    """Return the size of the disk in GiB, fractions allowed (specification, ``-s``).

    :raises BadValue: not a number in range.
    """
    allowed = f"a number of gigabytes up to {MAXIMUM_SIZE}, such as 2 or 2.5"
    try:
        size = Decimal(value)
    except InvalidOperation:
        raise BadValue(f"-s (size) is {value!r}; allowed is {allowed}") from None
    if not size.is_finite() or not 0 < size <= MAXIMUM_SIZE:
        raise BadValue(f"-s (size) is {value!r}; allowed is {allowed}")
    return Decimal(f"{size:f}")  # "1e2" is written as 100


def release_of(base_os: BaseOS, architecture: Architecture, value: str | None) -> str:
    """Return the release asked for, or the newest that has a kernel for the architecture.

    :raises BadValue: the base OS has no such release, or no kernel for the architecture.
    """
    if architecture not in ARCHITECTURES[base_os]:
        allowed = ", ".join(arch for arch in Architecture if arch in ARCHITECTURES[base_os])
        raise BadValue(
            f"-a (architecture) is {str(architecture)!r}; {base_os} has kernels for {allowed}",
            hint="-i debian has a kernel for every architecture",
        )
    # Debian 13 has no kernel for i386 (its release notes, section 5.1).
    releases = [
        release
        for release in RELEASES[base_os]
        if (architecture, release) != (Architecture.I386, "trixie")
    ]
    if value is None:
        return releases[0]
    if value not in releases:
        raise BadValue(
            f"-d (release of {base_os} for {architecture}) is {value!r}; "
            f"allowed are {', '.join(releases)}"
        )
    return value


def output_path(value: str, types: Iterable[ImageType], directory: Path) -> Path:
    """Return the absolute output path without the type's suffix.

    :raises BadValue: it names a directory or has a control character.
    """
    if value.endswith("/") or Path(value).name in {"", ".."}:
        raise BadValue(f"-o (output) is {value!r}; allowed is the name of a file")
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise BadValue(f"-o (output) is {value!r}; control characters are not allowed")
    path = directory / value
    if path.suffix in {f".{image_type}" for image_type in types}:
        path = path.with_suffix("")
    return path


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The variables of the specification, read once by the command line.

    :ivar keyring: file with the archive's keys.
    :ivar elements: what replaces our elements, if anything.
    :ivar local_elements: what is added to them.
    :ivar local_elements_path: directories with the user's elements.
    :ivar elements_repo: a checkout of tripleo-image-elements.
    :ivar dib_repo: a checkout of diskimage-builder that is used instead of the installed one.
    :ivar local_image: a cloud image of the base OS, which RHEL needs.
    :ivar datasources: what cloud-init may read its data from.
    :ivar nftables: use nftables instead of iptables.
    :ivar command_line: words added to the kernel's command line.
    :ivar source_date_epoch: the build's time, seconds since 1970, if it is to be reproducible.
    """

    keyring: Path | None = None
    elements: tuple[str, ...] = ()
    local_elements: tuple[str, ...] = ()
    local_elements_path: tuple[Path, ...] = ()
    elements_repo: Path | None = None
    dib_repo: Path | None = None
    local_image: Path | None = None
    datasources: str = "ConfigDrive"
    nftables: bool = True
    command_line: str = ""
    source_date_epoch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One image, or several file formats of it, asked for by a user.

    :ivar size: of the disk, GiB.
    :ivar output: absolute path without the type's suffix.
    :ivar qemu_img_options: of a qcow2, as of ``qemu-img create -o``.
    :ivar vhd_subformat: of a VHD.
    :ivar bundle: file that stands in for the network; then ``offline`` is set.
    :ivar root_password: clear text; never shown.
    """

    base_os: BaseOS
    release: str
    architecture: Architecture
    agent: AgentSource
    output: Path
    working_dir: Path
    cache_dir: Path
    backend: Backend = Backend.HAPROXY
    image_types: tuple[ImageType, ...] = (ImageType.QCOW2,)
    size: Decimal = Decimal(5)
    kernel: str | None = None
    log_file: Path | None = None
    qemu_img_options: str = ""
    vhd_subformat: VhdSubformat = VhdSubformat.DYNAMIC
    root_password: str | None = field(default=None, repr=False)
    mandatory_access: bool = False
    on_disk: bool = False
    cpu_pinning: bool = False
    sshd: bool = True
    fips: bool = False
    trace: bool = False
    offline: bool = False
    bundle: Path | None = None
    fresh: bool = False
    access: Access = field(default_factory=Access)
    environment: Environment = field(default_factory=Environment)

    def __post_init__(self) -> None:
        """Hold what concerns more than one value.

        :raises BadValue: they do not fit together.
        """
        env = self.environment
        minimum = MINIMUM_SIZE[self.debian_family]
        if self.size < minimum:
            raise BadValue(
                f"-s (size) is {self.size}; {self.base_os} needs at least {minimum} gigabytes"
            )
        if env.local_elements and not env.local_elements_path:
            raise BadValue(
                f"DIB_LOCAL_ELEMENTS is {' '.join(env.local_elements)!r}; "
                "it needs DIB_LOCAL_ELEMENTS_PATH",
                hint="set DIB_LOCAL_ELEMENTS_PATH to the directory that holds these elements",
            )
        if self.kernel is not None and not PACKAGE_NAME.fullmatch(self.kernel):
            raise BadValue(
                f"-k (kernel package) is {self.kernel!r}; allowed is the name of a package"
            )
        if self.base_os is BaseOS.RHEL and env.local_image is None:
            raise BadValue(
                "-i (base OS) is 'rhel'; it needs DIB_LOCAL_IMAGE",
                hint="set DIB_LOCAL_IMAGE to the KVM guest image that you downloaded",
            )
        if self.root_password is not None and (
            not self.root_password or re.search(r"[\x00-\x1f\x7f]", self.root_password)
        ):
            raise BadValue("-r (root password) is empty or has a control character; give a text")

    @property
    def debian_family(self) -> bool:
        """Whether the base OS is installed by apt."""
        return self.base_os in DEBIAN_FAMILY

    @property
    def outputs(self) -> dict[ImageType, Path]:
        """The file of each image type."""
        return {kind: Path(f"{self.output}.{kind}") for kind in self.image_types}
