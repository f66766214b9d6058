# SPDX-License-Identifier: Apache-2.0
"""The way that operators build amphorae today: diskimage-builder with its own elements, and pip."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from configparser import ConfigParser
from pathlib import Path

from amphora_image import agent_source, host, plan, sandbox
from amphora_image.workspace import Workspace, workspace
from bench.measure import Run, Span, measure, spans

ELEMENTS = Path(__file__).parent / "elements"

#: Those of diskimage-builder that the script of Octavia's repository names; the last one stands for
#: Octavia's own.
NAMES = (
    *("base", "vm", "block-device-mbr", "debian-minimal", "cloud-init"),
    *("cloud-init-datasources", "established-amphora"),
)

#: Where the kernel makes no partition nodes: a disk without a partition table, GRUB by block list.
UNPARTITIONED = """\
- local_loop:
    name: image0
- mkfs:
    name: mkfs_root
    base: image0
    mount:
      mount_point: /
      fstab:
        options: defaults
        fsck-passno: 1
"""

#: What the elements are told, whatever the host.
VARIABLES = {
    "DIB_APT_LOCAL_CACHE": "0",  # no package from an earlier build
    "DIB_APT_MINIMAL_CREATE_INTERFACES": "0",
    "DIB_CLOUD_INIT_DATASOURCES": "ConfigDrive",
    "DIB_NO_TMPFS": "1",  # it is in a tmpfs already, as it would be by itself
    "DIB_PYTHON_VERSION": "3",
    "DIB_RELEASE": "trixie",
    "DISTRO_NAME": "debian",
}

PIP_FILES = (
    *(Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf")),
    *(Path.home() / ".pip/pip.conf", Path.home() / ".config/pip/pip.conf"),
)
PIP_OPTIONS = {"index-url": "PIP_INDEX_URL", "trusted-host": "PIP_TRUSTED_HOST"}

#: The lines that begin a step: of dib-run-parts, dib-block-device, or diskimage-builder itself.
STEPS = (
    (r"Running \S*/root\.d/08-debootstrap$", "mmdebstrap"),
    (r"Running \S*/root\.d/75-debian-minimal-baseinstall$", "apt: upgrade, base packages"),
    (r"Running \S*/pre-install\.d/\S+$", "apt: tools"),
    (r"Running \S*/install\.d/01-package-installs$", "apt: packages, compiler"),
    (r"Running \S*/install\.d/12-debian-locale-gen$", "locales"),
    (r"Running \S*/install\.d/75-established-agent$", "agent: venv, pip"),
    (r"Running \S*/install\.d/99-package-uninstalls$", "apt: compiler removed"),
    (r"Running \S*/post-install\.d/90-established-compiler$", "apt: compiler removed"),
    (r"Running \S*/finalise\.d/50-bootloader$", "apt: boot loader"),
    (r"Converting image using qemu-img convert$", "qemu-img, zlib"),
    (r"Create image file \[", "disk: mkfs, tree copied"),
    (r"Running \S*/cleanup\.d/\S+$", "disk: trimmed, unmounted"),
    (r"Running \S*/\w+(-\w+)?\.d/\S+$", "other scripts"),
)
_STEPS = tuple((re.compile(pattern), name) for pattern, name in STEPS)


def begins(line: str) -> str | None:
    """Return the step that a line of diskimage-builder's output begins."""
    return next((name for pattern, name in _STEPS if pattern.search(line)), None)


def steps(run: Run) -> list[Span]:
    """Divide a build into its steps."""
    return spans(run, begins)


def has_partition_nodes() -> bool:
    """Whether this host can make partition nodes as diskimage-builder does, by device-mapper."""
    return Path("/dev/mapper/control").exists() and bool(shutil.which("kpartx"))


def deviation() -> str:
    """Say in what the composition differs from the stock one on this host."""
    if has_partition_nodes():
        return "stock block devices (MBR)"
    return "no device-mapper here: an unpartitioned disk instead of an MBR"


def constraints(lock: str) -> str:
    """Return a lock as pip's constraints: without hashes, which would forbid all others."""
    return re.sub(r" *\\\n *--hash=\S+", "", lock)


def pip_settings(files: Iterable[Path], environ: Mapping[str, str]) -> dict[str, str]:
    """Return what pip inside the image needs of the host's settings, as variables.

    File URLs are left out: there are no such files inside.

    :param files: pip's, the last one counts most (pip's documentation, "Configuration").
    """
    parser = ConfigParser(interpolation=None)
    parser.read(files)
    found = {}
    for option, variable in PIP_OPTIONS.items():
        values = [parser.get(part, option, fallback="") for part in ("install", "global")]
        value = next(filter(None, (environ.get(variable, ""), *values)), "")
        if value and "file:" not in value:
            found[variable] = value
    return found


def authorities() -> Path:
    """Return the file with the certificate authorities that the host trusts."""
    named = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    return Path(named or "/etc/ssl/certs/ca-certificates.crt")


def environment(space: Workspace, size: int) -> dict[str, str]:
    """Return the environment of a build; ``size`` of the disk in GiB."""
    pins = space.root / "constraints.txt"
    pins.write_text(constraints(agent_source.lock_of(agent_source.NEWEST).read_text()))
    masquerade = "amphora-agent/static/usr/local/lib/amphora/lvs-masquerade-nftables"
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PIP_")},
        **pip_settings(PIP_FILES, os.environ),
        **VARIABLES,
        "BENCH_CA": str(authorities()),
        "BENCH_CONSTRAINTS": str(pins),
        "BENCH_MASQUERADE": str(plan.ELEMENTS / masquerade),
        "DIB_IMAGE_SIZE": str(size),
        "ELEMENTS_PATH": str(ELEMENTS),
        "TMP_DIR": str(space.work),
        "USER": "root",
    }
    if mirrors := host.look().mirrors:
        variables["DIB_DISTRIBUTION_MIRROR"] = mirrors.archive
        security = mirrors.security or f"{mirrors.archive.rstrip('/')}-security"
        variables["DIB_DEBIAN_SECURITY_MIRROR"] = security
    if not has_partition_nodes():
        variables["DIB_BLOCK_DEVICE_CONFIG"] = UNPARTITIONED
    return variables


def build(output: Path, log: Path, *, size: int) -> Run:
    """Build the image with empty caches, in memory and in namespaces of its own, and measure it.

    :param output: a path without spaces, as diskimage-builder wants it.
    :param size: of the disk, GiB.
    :raises Failed: it failed; nothing stays mounted or attached.
    """
    with workspace() as space:
        space.work_in(None)
        script = Path(sysconfig.get_path("scripts")) / "disk-image-create"
        argv = [
            *(sys.executable, str(script), "-a", "amd64", "-t", "qcow2", "-o", str(output)),
            *("--image-cache", str(space.root / "cache"), *NAMES),
        ]
        env = environment(space, size)
        commands = [
            sandbox.Command(["mkdir", str(space.work)], env, str(space.root)),
            sandbox.Command(argv, env, str(space.work)),
        ]
        return measure(sandbox.start(space.mounts, commands), log)
