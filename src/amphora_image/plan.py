# SPDX-License-Identifier: Apache-2.0
"""Request and Host become the Plan: what disk-image-create is told. Pure: no disk, no network."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amphora_image import agent_source, reproducible
from amphora_image.access import redacted
from amphora_image.errors import BadValue
from amphora_image.host import Host
from amphora_image.image_files import DISK_TYPES
from amphora_image.request import Architecture, BaseOS, Request

#: The directory of our own elements.
ELEMENTS = Path(__file__).parent / "elements"


@dataclass(frozen=True)
class Distribution:
    """What differs by base OS.

    :ivar base: the element that makes the root file system.
    :ivar kernels: architecture -> the kernel's package.
    :ivar components: of the apt archive.
    """

    base: str
    kernels: Mapping[Architecture, str]
    components: str = ""


_RPM_KERNEL = dict.fromkeys(Architecture, "kernel-core")

DISTRIBUTIONS: Mapping[BaseOS, Distribution] = {
    BaseOS.UBUNTU: Distribution(
        "amphora-base",
        {
            Architecture.AMD64: "linux-image-virtual",
            Architecture.ARM64: "linux-image-virtual",
            Architecture.PPC64LE: "linux-image-virtual",
            Architecture.ARMHF: "linux-image-generic",
        },
        "main,universe",
    ),
    BaseOS.DEBIAN: Distribution(
        "amphora-base",
        {
            Architecture.AMD64: "linux-image-cloud-amd64",
            Architecture.ARM64: "linux-image-cloud-arm64",
            Architecture.ARMHF: "linux-image-armmp",
            Architecture.I386: "linux-image-686",
            Architecture.PPC64LE: "linux-image-powerpc64le",
        },
        "main",
    ),
    BaseOS.FEDORA: Distribution("fedora-container", _RPM_KERNEL),
    BaseOS.CENTOS: Distribution("centos-minimal", _RPM_KERNEL),
    BaseOS.ROCKY: Distribution("rocky-container", _RPM_KERNEL),
    BaseOS.RHEL: Distribution("rhel", _RPM_KERNEL),
}


def _always(_: Request) -> bool:
    return True


#: With this element DIB makes a tree and no disk.
OUR_DISK = "amphora-disk"

#: What makes a root file system an amphora: the element, and the requests that want it.
ELEMENT_ROWS: tuple[tuple[str, Callable[[Request], bool]], ...] = (
    ("amphora-agent", _always),
    ("amphora-apparmor", lambda request: request.mandatory_access and request.debian_family),
    ("amphora-ca", lambda request: request.access.ca_file is not None),
    ("amphora-certificates", _always),
    ("amphora-cloud-init", _always),
    ("amphora-cpu-pinning", lambda request: request.cpu_pinning),
    (OUR_DISK, _always),
    ("amphora-dracut", lambda request: not request.debian_family),
    ("amphora-fedora", lambda request: request.base_os is BaseOS.FEDORA),
    ("amphora-fips", lambda request: request.fips),
    ("amphora-haproxy", _always),
    ("amphora-initramfs", lambda request: request.debian_family),
    ("amphora-ipvsadm", _always),
    ("amphora-keepalived", _always),
    ("amphora-logrotate", _always),
    ("amphora-manifest", _always),
    ("amphora-network", _always),
    ("amphora-no-sshd", lambda request: not request.sshd),
    ("amphora-root-password", lambda request: request.root_password is not None),
    ("amphora-selinux", lambda request: not request.debian_family),
    ("amphora-sshd", lambda request: request.sshd),
    ("amphora-sysctl", _always),
    ("amphora-trim", _always),
)

_LSM = "landlock,lockdown,yama,integrity"

#: The kernel's command line: words, and the requests that want them.
COMMAND_LINE_ROWS: tuple[tuple[str, Callable[[Request], bool]], ...] = (
    ("fips=1", lambda request: request.fips),
    # The kernel tests each algorithm when it is loaded, also those of the certificates' RAM disk.
    ("cryptomgr.notests", lambda request: not request.fips),
    ("irqaffinity=0", lambda request: request.cpu_pinning),
    # Not bpf, for which systemd compiles and attaches a program at each boot.
    (f"lsm={_LSM},apparmor", lambda r: r.mandatory_access and r.debian_family),
    (f"lsm={_LSM}", lambda r: not r.mandatory_access and r.debian_family),
    # Of use to programs with large heaps. Here it gives the agent's small processes pages that they
    # do not fill, and keeps 45 MB of 1 GB free so that there are always such pages.
    ("transparent_hugepage=never", _always),
)

#: Debian's architecture names, where ours differ.
DEBIAN_ARCHITECTURE = {Architecture.PPC64LE: "ppc64el"}


@dataclass(frozen=True)
class Plan:
    """What disk-image-create is told.

    :ivar elements: in the order given to it; it adds what they depend on.
    :ivar options: its options.
    :ivar environment: variables laid over the caller's, without those in ``paths``. URLs may hold
        passwords, which are not shown.
    :ivar paths: variables that hold files or directories of this host, several joined with
        ``:``. The build may show them to disk-image-create under other names.
    """

    elements: tuple[str, ...]
    options: tuple[str, ...]
    environment: Mapping[str, str]
    paths: Mapping[str, tuple[Path, ...]]

    @property
    def argv(self) -> tuple[str, ...]:
        """The command."""
        return ("disk-image-create", *self.options, *self.elements)

    def variables(self) -> dict[str, str]:
        """Return all variables that the plan sets, paths included, as they may be shown."""
        joined = {name: ":".join(map(str, paths)) for name, paths in self.paths.items()}
        shown = {name: redacted(value) for name, value in self.environment.items()}
        return dict(sorted({**shown, **joined}.items()))

    def as_json(self) -> dict[str, Any]:
        """Return the plan as a document: ``elements``, ``argv`` and ``environment``."""
        return {
            "elements": list(self.elements),
            "argv": list(self.argv),
            "environment": self.variables(),
        }

    def as_shell(self) -> str:
        """Return the plan as a line to paste into a POSIX shell."""
        words = [f"{name}={shlex.quote(value)}" for name, value in self.variables().items()]
        return " ".join([*words, shlex.join(self.argv)])


def make_plan(request: Request, host: Host) -> Plan:
    """Turn what was asked into what disk-image-create is told on this host."""
    return Plan(
        elements=_elements(request),
        options=_options(request),
        environment=_environment(request, host),
        paths=_paths(request, host),
    )


def _elements(request: Request) -> tuple[str, ...]:
    env = request.environment
    if env.elements:
        ours: Iterable[str] = env.elements
    else:
        ours = (
            DISTRIBUTIONS[request.base_os].base,
            *(element for element, wanted in ELEMENT_ROWS if wanted(request)),
        )
    return tuple(dict.fromkeys((*ours, *env.local_elements)))


def _options(request: Request) -> tuple[str, ...]:
    names = DEBIAN_ARCHITECTURE if request.debian_family else {}
    architecture = names.get(request.architecture, str(request.architecture))
    return (
        # -n: no "base" element, whose packages an amphora does not need
        *("-n", "-a", architecture, "-o", "image", "-t", ",".join(_types(request))),
        *("--image-size", str(request.size)),
        *(["-x"] if request.trace else []),
        *(["--offline"] if request.offline else []),
    )


def _types(request: Request) -> list[str]:
    """Return what DIB makes: with our disk a tree only, with others' what all types are made of."""
    ours = not request.environment.elements or OUR_DISK in request.environment.elements
    wants_disk = not DISK_TYPES.isdisjoint(request.image_types)
    wants_tar = not ours and not DISK_TYPES.issuperset(request.image_types)
    return [*(["tar"] if wants_tar else []), *(["raw"] if wants_disk or ours else [])]


def _environment(request: Request, host: Host) -> dict[str, str]:
    env = request.environment
    distribution = DISTRIBUTIONS[request.base_os]
    kernel = request.kernel or distribution.kernels[request.architecture]
    command_line = [words for words, wanted in COMMAND_LINE_ROWS if wanted(request)]
    command_line += [env.command_line] if env.command_line else []
    variables = {
        "AMPHORA_AGENT_FROM_PACKAGES": str(int(isinstance(request.agent, agent_source.Packaged))),
        "AMPHORA_KERNEL_PACKAGE": kernel,
        "CLOUD_INIT_DATASOURCES": env.datasources,
        "DIB_APT_LOCAL_CACHE": "0",  # one apt cache for two builds is locked by the first
        "DIB_BOOTLOADER_DEFAULT_CMDLINE": " ".join(command_line),
        "DIB_INIT_SYSTEM": "systemd",
        "DIB_NO_TIMESTAMP": "1",  # the log has its own
        "DIB_NO_TMPFS": "1",  # the build has its own tmpfs, which ends with it
        "DIB_OCTAVIA_AMP_USE_NFTABLES": str(env.nftables),
        "DIB_PYTHON_VERSION": "3",
        "DIB_RELEASE": request.release,
        "DISTRO_NAME": str(request.base_os),
        **agent_source.environment(request.agent),
        **request.access.environment(),
    }
    if request.debian_family:
        variables["AMPHORA_APT_COMPONENTS"] = distribution.components
        variables["AMPHORA_APT_SOURCES"] = "\n".join(apt_sources(request, host))
    else:
        variables["AMPHORA_SELINUX"] = "enforcing" if request.mandatory_access else "permissive"
    if env.source_date_epoch is not None:
        variables[reproducible.VARIABLE] = str(env.source_date_epoch)
    return variables


def apt_sources(request: Request, host: Host) -> list[str]:
    """Return the lines of sources.list(5), or none where mmdebstrap's own are used.

    A mirror that was asked for comes first, then the build host's own if it runs the same base
    OS: that mirror is known to answer.

    :raises BadValue: a security mirror stands alone.
    """
    access = request.access
    known = host.mirrors if host.base_os == request.base_os else None
    archive = access.mirror or (known and known.archive)
    if not archive:
        if access.security_mirror:
            raise BadValue(
                f"the security mirror is {access.security_mirror!r} without an archive",
                hint="name the archive as well: --mirror or BASE_OS_MIRROR",
            )
        return []
    archive = archive.rstrip("/")
    security = access.security_mirror or (None if access.mirror else known and known.security)
    if request.base_os is BaseOS.DEBIAN:
        security = security or f"{archive}-security"
    components = DISTRIBUTIONS[request.base_os].components.replace(",", " ")
    release = request.release
    return [
        f"deb {archive} {release} {components}",
        f"deb {archive} {release}-updates {components}",
        f"deb {(security or archive).rstrip('/')} {release}-security {components}",
    ]


def _paths(request: Request, host: Host) -> dict[str, tuple[Path, ...]]:
    env = request.environment
    repo_elements = (env.elements_repo / "elements",) if env.elements_repo else ()
    keyring = env.keyring or (host.keyrings.get(request.base_os) if request.debian_family else None)
    paths: dict[str, tuple[Path, ...]] = {
        "DIB_IMAGE_CACHE": (request.cache_dir,),
        "ELEMENTS_PATH": (*env.local_elements_path, ELEMENTS, *repo_elements),
        "UV_CACHE_DIR": (request.cache_dir / "uv",),
    }
    optional = {
        "AMPHORA_CA_FILE": request.access.ca_file,
        "DIB_APT_KEYRING": keyring,
        "DIB_LOCAL_IMAGE": env.local_image,
        "PYTHONPATH": env.dib_repo,
    }
    paths.update({name: (path,) for name, path in optional.items() if path})
    return paths
