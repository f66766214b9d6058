# SPDX-License-Identifier: Apache-2.0
"""Command line and environment -> Request: the options of a build, and its variables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from amphora_image import agent_source, host, reproducible
from amphora_image.access import SETTINGS, Access
from amphora_image.errors import BadValue
from amphora_image.request import (
    PROVEN,
    RELEASES,
    Architecture,
    Backend,
    BaseOS,
    Environment,
    ImageType,
    Request,
    VhdSubformat,
    choice,
    image_types,
    output_path,
    release_of,
    size_in_gib,
)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are bad values like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise what was wrong with the command line.

        :raises BadValue: always.
        """
        raise BadValue(message, hint=f"{self.prog} --help shows all options")


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a build to a parser."""
    version = f"amphora-image {metadata.version('amphora-image')}"
    add = parser.add_argument
    add("-a", "--architecture", metavar="ARCH", help=f"{' | '.join(Architecture)} (default: amd64)")
    add("-b", "--backend", default="haproxy", help="what balances the load (default: haproxy)")
    add("-c", "--cache-dir", metavar="DIR", help="cache directory (default: ~/.cache/image-create)")
    add("-d", "--release", help=f"release of the base OS (default: {_default_releases()})")
    add("-e", "--mandatory-access-control", action="store_true", help="enforce AppArmor or SELinux")
    add("-f", "--on-disk", action="store_true", help="build on disk (-w), not in memory")
    add("-g", "--agent-ref", metavar="REF", help="amphora agent from a Git branch, tag or ref")
    proven = " and ".join(sorted(PROVEN))
    add(
        "-i",
        "--base-os",
        default="ubuntu",
        help=f"{' | '.join(BaseOS)} (default: ubuntu; only {proven} are tested)",
    )
    add("-k", "--kernel", metavar="PACKAGE", help="kernel package (default: one for clouds)")
    add("-l", "--log-file", metavar="FILE", help="log file (default: one in the cache directory)")
    add("-m", "--cpu-pinning", action="store_true", help="pin HAProxy and interrupts to vCPUs")
    add("-n", "--no-sshd", action="store_true", help="no SSH server in the image")
    add(
        "-o",
        "--output",
        default="amphora-x64-haproxy",
        metavar="FILE",
        help=("output file; the image type's suffix is added (default: amphora-x64-haproxy)"),
    )
    add("-p", "--agent-packages", action="store_true", help="amphora agent from OS packages")
    add(
        "-r",
        "--root-password",
        metavar="PASSWORD",
        help=("root password, '-': from standard input; not for production (default: disabled)"),
    )
    add(
        "-s",
        "--size",
        default="5",
        metavar="GB",
        help=("disk size, fractions allowed; at most the flavor's disk (default: 5)"),
    )
    add(
        "-t",
        "--image-type",
        default="qcow2",
        metavar="TYPES",
        help=(f"{' | '.join(ImageType)}, several with commas (default: qcow2)"),
    )
    add("-v", "--version", action="version", version=version)
    add("-w", "--working-dir", default=".", metavar="DIR", help="working directory (default: .)")
    add("-x", "--trace", action="store_true", help="trace the elements' scripts in the log")
    add("-y", "--fips", action="store_true", help="FIPS 140 mode")
    add(
        "--qemu-img-options",
        metavar="OPTIONS",
        help="of a qcow2; compression_type=zlib for hosts with a QEMU before 5.1 (default: zstd)",
    )
    add(
        "--vhd-subformat",
        default="dynamic",
        metavar="KIND",
        help=f"of a vhd: {' | '.join(VhdSubformat)} (default: dynamic)",
    )
    for setting in SETTINGS:
        if setting.help:
            add(setting.flag, metavar=setting.metavar, help=setting.help)
    add("--keep-ca", action="store_true", help="let the image trust these CAs too")
    add("--fresh", action="store_true", help="take no image or root file system from the cache")
    add("--offline", action="store_true", help="use what is cached only")
    add("--bundle", metavar="FILE", help="use what amphora-image fetch has put there only")
    add("--json", action="store_true", help="the result as JSON on standard output")
    add("--quiet", action="store_true", help="no progress")
    add("--dry-run", action="store_true", help="print the disk-image-create command and stop")


def _default_releases() -> str:
    return ", ".join(f"{base_os} {releases[0]}" for base_os, releases in RELEASES.items())


def _flag(env: Mapping[str, str], name: str, *, default: bool) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    value = env.get(name, "")
    if value.lower() not in words:
        if value:
            raise BadValue(f"{name} is {value!r}; allowed are {', '.join(words)}")
        return default
    return words[value.lower()]


def _existing(env: Mapping[str, str], name: str) -> Path | None:
    value = env.get(name)
    if not value:
        return None
    path = Path(value).expanduser().absolute()
    if not path.exists():
        raise BadValue(f"{name} is {value!r}, which does not exist")
    return path


def read_environment(env: Mapping[str, str]) -> Environment:
    """Return the settings that variables hold (specification, "Environment variables").

    :raises BadValue: one of them is not allowed.
    """
    local_paths = (
        Path(path).absolute() for path in env.get("DIB_LOCAL_ELEMENTS_PATH", "").split(":") if path
    )
    paths = tuple(local_paths)
    for path in paths:
        if not path.is_dir():
            raise BadValue(f"DIB_LOCAL_ELEMENTS_PATH is {str(path)!r}, which is no directory")
    return Environment(
        keyring=_existing(env, "DIB_APT_KEYRING"),
        elements=tuple(env.get("DIB_ELEMENTS", "").split()),
        local_elements=tuple(env.get("DIB_LOCAL_ELEMENTS", "").split()),
        local_elements_path=paths,
        elements_repo=_existing(env, "ELEMENTS_REPO_PATH"),
        dib_repo=_existing(env, "DIB_REPO_PATH"),
        local_image=_existing(env, "DIB_LOCAL_IMAGE"),
        datasources=env.get("CLOUD_INIT_DATASOURCES") or Environment.datasources,
        nftables=_flag(env, "DIB_OCTAVIA_AMP_USE_NFTABLES", default=True),
        command_line=env.get("DIB_BOOTLOADER_DEFAULT_CMDLINE", ""),
        source_date_epoch=_epoch(env),
    )


#: Times that every file of an image can hold: FAT's begin in 1980, and those that mke2fs before
#: 1.47.1 writes end in 2038.
EPOCHS = (315_532_800, 2**31 - 1)


def _epoch(env: Mapping[str, str]) -> int | None:
    value = env.get(reproducible.VARIABLE)
    if value and not (value.isdecimal() and EPOCHS[0] <= int(value) <= EPOCHS[1]):
        raise BadValue(
            f"{reproducible.VARIABLE} is {value!r}; "
            f"allowed are whole seconds since 1970, from {EPOCHS[0]} to {EPOCHS[1]}"
        )
    return int(value) if value else None


def read_access(args: argparse.Namespace, env: Mapping[str, str]) -> Access:
    """Return the way to what is downloaded; a flag beats its variables.

    :raises BadValue: a value is not allowed.
    """
    flags = {f"--{name.replace('_', '-')}": value for name, value in vars(args).items()}
    values = {setting.field: setting.value(flags, env) for setting in SETTINGS}
    return Access(**values, keep_ca=args.keep_ca)


def _path(what: str, value: str) -> Path:
    try:
        return Path.cwd() / Path(value).expanduser()
    except RuntimeError:
        raise BadValue(f"{what} is {value!r}; there is no such user") from None


def _directory(what: str, value: str) -> Path:
    """Return a path that is a directory, or at which one can be made."""
    path = _path(what, value)
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise BadValue(f"{what} is {value!r}; allowed is a directory, which {existing} is not")
    return path


def file_path(what: str, value: str) -> Path:
    """Return a path that is a file, or at which one can be made."""
    path = _path(what, value)
    if path.is_dir():
        raise BadValue(f"{what} is {value!r}; allowed is the name of a file")
    _directory(what, str(path.parent))
    return path


def read_request(args: argparse.Namespace, env: Mapping[str, str], machine: str) -> Request:
    """Return what a command line and the environment ask for; a flag beats its variable.

    :param machine: the host's machine name, see :manpage:`uname(2)`.
    :raises BadValue: a value is not allowed.
    """
    for option, value in vars(args).items():
        if value == "":
            raise BadValue(f"--{option.replace('_', '-')} is ''; leave it out or give it a value")
    architecture = (
        choice(Architecture, "-a (architecture)", args.architecture)
        if args.architecture
        else host.default_architecture(machine)
    )
    base_os = choice(BaseOS, "-i (base OS)", args.base_os)
    types = image_types(args.image_type)
    access = read_access(args, env)
    use_sshd = _flag(env, "DIB_OCTAVIA_AMP_USE_SSH", default=True)
    return Request(
        architecture=architecture,
        backend=choice(Backend, "-b (backend)", args.backend),
        base_os=base_os,
        release=release_of(base_os, architecture, args.release or env.get("DIB_RELEASE")),
        agent=agent_source.choose(
            env,
            architecture,
            ref=args.agent_ref,
            packages=args.agent_packages,
            git_base=access.git_base,
        ),
        image_types=types,
        size=size_in_gib(args.size),
        output=_output(args.output, types),
        working_dir=_directory("-w (working directory)", args.working_dir),
        cache_dir=cache_dir(args.cache_dir, env),
        kernel=args.kernel,
        log_file=file_path("-l (log file)", args.log_file) if args.log_file else None,
        qemu_img_options=args.qemu_img_options or "",
        vhd_subformat=choice(VhdSubformat, "--vhd-subformat", args.vhd_subformat),
        root_password=_root_password(args.root_password),
        mandatory_access=args.mandatory_access_control,
        on_disk=args.on_disk or _flag(env, "DIB_NO_TMPFS", default=False),
        cpu_pinning=args.cpu_pinning,
        sshd=use_sshd and not args.no_sshd,
        fips=args.fips,
        trace=args.trace,
        offline=args.offline or bool(args.bundle or env.get("DIB_OFFLINE")),
        bundle=_existing(vars(args), "bundle"),
        fresh=args.fresh,
        access=access,
        environment=read_environment(env),
    )


def _output(value: str, types: Iterable[ImageType]) -> Path:
    output = output_path(value, types, Path.cwd())
    for kind in types:
        file_path("-o (output)", f"{output}.{kind}")
    return output


def cache_dir(value: str | None, env: Mapping[str, str]) -> Path:
    """Return the cache directory that an option or a variable names.

    :raises BadValue: it can be none.
    """
    if not value and (given := env.get("DIB_IMAGE_CACHE")):
        return _directory("DIB_IMAGE_CACHE", given)
    return _directory("-c (cache directory)", value or "~/.cache/image-create")


def _root_password(value: str | None) -> str | None:
    return sys.stdin.readline().rstrip("\n") if value == "-" else value
