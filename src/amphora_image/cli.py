# SPDX-License-Identifier: Apache-2.0
"""Both faces of the command, and the only reader of the environment's settings."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from amphora_image import agent, check, host
from amphora_image.build import build, signals_interrupt
from amphora_image.errors import AmphoraImageError, BadValue, BootFailed, CheckFailed, Interrupted
from amphora_image.facts import as_table as facts_table
from amphora_image.facts import read_facts
from amphora_image.image import read_image
from amphora_image.plan import make_plan
from amphora_image.request import (
    RELEASES,
    Architecture,
    Backend,
    BaseOS,
    Environment,
    ImageType,
    Request,
    choice,
    image_types,
    output_path,
    release_of,
    size_in_gib,
)

EPILOG = """\
examples:
  %(prog)s                   Ubuntu, amphora-x64-haproxy.qcow2, 5 GB
  %(prog)s -i debian -s 2    for a flavor with a disk of 2 GB
  %(prog)s -t raw,vhd -o lb  lb.raw and lb.vhd from one build
  BASE_OS_MIRROR=http://mirror.example.org/ubuntu %(prog)s

Variables of the environment and exit codes: docs/reference.rst
"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are bad values like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise what was wrong with the command line.

        :raises BadValue: always.
        """
        raise BadValue(message, hint=f"{self.prog} --help shows all options")


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    version = f"amphora-image {metadata.version('amphora-image')}"
    add = parser.add_argument
    add("-a", "--architecture", metavar="ARCH", help=f"{' | '.join(Architecture)} (default: amd64)")
    add("-b", "--backend", default="haproxy", help="what balances the load (default: haproxy)")
    add("-c", "--cache-dir", metavar="DIR", help="cache directory (default: ~/.cache/image-create)")
    add("-d", "--release", help=f"release of the base OS (default: {_default_releases()})")
    add("-e", "--mandatory-access-control", action="store_true", help="enforce AppArmor or SELinux")
    add("-f", "--on-disk", action="store_true", help="build on disk (-w), not in memory")
    add("-g", "--agent-ref", metavar="REF", help="amphora agent from a Git branch, tag or ref")
    add("-i", "--base-os", default="ubuntu", help=f"{' | '.join(BaseOS)} (default: ubuntu)")
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
    add("--offline", action="store_true", help="use what is cached only")
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
        mirror=_url(env, "BASE_OS_MIRROR") or _url(env, "DIB_DISTRIBUTION_MIRROR"),
        security_mirror=_url(env, "DIB_DEBIAN_SECURITY_MIRROR"),
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
    )


def _url(env: Mapping[str, str], name: str) -> str | None:
    value = env.get(name)
    if value and not re.fullmatch(r"(https?|file)://[!-~]+", value):
        raise BadValue(f"{name} is {value!r}; allowed are http, https and file URLs")
    if value and "@" in value.split("/")[2]:
        raise BadValue(
            f"{name} holds a user or password, which would stay in the image",
            hint="let a proxy on this host add it, or allow this host's address",
        )
    return value or None


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


def _file(what: str, value: str) -> Path:
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
    use_sshd = _flag(env, "DIB_OCTAVIA_AMP_USE_SSH", default=True)
    return Request(
        architecture=architecture,
        backend=choice(Backend, "-b (backend)", args.backend),
        base_os=base_os,
        release=release_of(base_os, architecture, args.release or env.get("DIB_RELEASE")),
        agent=agent.choose(env, ref=args.agent_ref, packages=args.agent_packages),
        image_types=types,
        size=size_in_gib(args.size),
        output=_output(args.output, types),
        working_dir=_directory("-w (working directory)", args.working_dir),
        cache_dir=_cache_dir(args.cache_dir, env),
        kernel=args.kernel,
        log_file=_file("-l (log file)", args.log_file) if args.log_file else None,
        qemu_img_options=args.qemu_img_options or "",
        root_password=_root_password(args.root_password),
        mandatory_access=args.mandatory_access_control,
        on_disk=args.on_disk or _flag(env, "DIB_NO_TMPFS", default=False),
        cpu_pinning=args.cpu_pinning,
        sshd=use_sshd and not args.no_sshd,
        fips=args.fips,
        trace=args.trace,
        offline=args.offline or bool(env.get("DIB_OFFLINE")),
        environment=read_environment(env),
    )


def _output(value: str, types: Iterable[ImageType]) -> Path:
    output = output_path(value, types, Path.cwd())
    for kind in types:
        _file("-o (output)", f"{output}.{kind}")
    return output


def _cache_dir(value: str | None, env: Mapping[str, str]) -> Path:
    if not value and (given := env.get("DIB_IMAGE_CACHE")):
        return _directory("DIB_IMAGE_CACHE", given)
    return _directory("-c (cache directory)", value or "~/.cache/image-create")


def _root_password(value: str | None) -> str | None:
    return sys.stdin.readline().rstrip("\n") if value == "-" else value


def _build(args: argparse.Namespace) -> None:
    request = read_request(args, os.environ, platform.machine())
    plan = make_plan(request, host.look())
    if args.dry_run:
        print(json.dumps(plan.as_json(), indent=2) if args.json else plan.as_shell())
        return
    console = Console(stderr=True, quiet=args.quiet)
    if request.root_password is not None:
        console.print("[yellow]warning:[/yellow] -r sets a root password; not for production")
    files = build(request, plan, console)
    if args.json:
        print(
            json.dumps({"files": list(map(str, files)), "manifests": [f"{f}.json" for f in files]})
        )
    else:
        print(*files, sep="\n")


def _plan(args: argparse.Namespace) -> None:
    plan = make_plan(read_request(args, os.environ, platform.machine()), host.look())
    print(plan.as_shell() if args.shell else json.dumps(plan.as_json(), indent=2))


def _lock(args: argparse.Namespace) -> None:
    series = [args.series] if args.series else agent.SERIES
    print(*agent.refresh_locks(os.environ, series, constraints=args.constraints), sep="\n")


def _inspect(args: argparse.Namespace) -> None:
    with signals_interrupt():
        facts = read_facts(read_image(Path(args.image)))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        Console().print(facts_table(facts))


def _check(args: argparse.Namespace) -> None:
    image = Path(args.image)
    junit = _file("--junit", args.junit) if args.junit else None
    with signals_interrupt():
        found = check.check_image(
            image,
            manifest=Path(args.manifest) if args.manifest else None,
            size=size_in_gib(args.size) if args.size else None,
            no_sshd=args.no_sshd,
            root_password=args.root_password_expected,
        )
    if junit:
        junit.write_text(check.as_junit(image.name, found))
    if args.json:
        print(check.as_json(image.name, found))
    else:
        Console().print(check.as_table(image.name, found))
    if broken := {finding.rule: None for finding in found}:
        raise CheckFailed(f"{image} breaks {len(broken)} of the rules: {', '.join(broken)}")


def _boot(args: argparse.Namespace) -> None:
    # The controller's side is an extra: amphora-image[prove].
    from amphora_image import container, proof
    from amphora_image.page import write_page
    from amphora_image.report import Milestone

    image = Path(args.image)
    log = Path(args.log or f"{image.name}.serial.log")
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def tell(done: Milestone) -> None:
        console.print(f"{done.seconds:6.1f} s  {done.name}: {done.detail}")

    with signals_interrupt():
        if args.container:
            report = container.prove(image, tell=tell)
        else:
            report = proof.prove(
                image,
                log=log,
                accel=args.accel,
                topology=args.topology,
                timeout=args.timeout,
                tell=tell,
            )
    if args.report:
        write_page(report, Path(args.report))
    if args.json:
        print(report.json())
    else:
        Console().print(report)
    if not report.passed:
        raise BootFailed(report.failure, None if args.container else f"the serial log is {log}")


def _guarded(work: Callable[[], None]) -> int:
    """Run the work; return the exit code, and tell a failure to the user without a traceback."""
    console = Console(stderr=True, soft_wrap=True)
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return Interrupted(2).exit_code
    except (AmphoraImageError, OSError) as error:
        console.print(Text("error: ", "red") + Text(str(error), ""), highlight=False)
        if hint := getattr(error, "hint", None):
            console.print(Text("hint: ", "yellow") + Text(hint, ""), highlight=False)
        return int(getattr(error, "exit_code", AmphoraImageError.exit_code))
    return 0


def diskimage_create(argv: Sequence[str] | None = None) -> int:
    """Run ``diskimage-create.sh``; return the exit code."""

    def work() -> None:
        parser = Parser(
            prog="diskimage-create.sh",
            description="Build an image for the amphorae of OpenStack Octavia.",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_build_options(parser)
        _build(parser.parse_args(argv))

    return _guarded(work)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``amphora-image VERB``; return the exit code."""

    def work() -> None:
        args = _verbs().parse_args(argv)
        args.work(args)

    return _guarded(work)


def _verbs() -> argparse.ArgumentParser:
    parser = Parser(prog="amphora-image", description=__doc__, allow_abbrev=False)
    parser.description = "Build and prove images for the amphorae of OpenStack Octavia."
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, work: Callable[[argparse.Namespace], None], text: str) -> Parser:
        added = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(work=work)
        return added

    _add_build_options(verb("build", _build, "Build an image; the same as diskimage-create.sh."))
    plan = verb("plan", _plan, "Show what disk-image-create would be told, as JSON.")
    _add_build_options(plan)
    plan.add_argument("--shell", action="store_true", help="as a line to paste into a shell")
    inspect = verb("inspect", _inspect, "Show what an image holds, without mounting it.")
    inspect.add_argument("image", metavar="IMAGE", help="a qcow2, raw, vhd or tar file")
    inspect.add_argument("--json", action="store_true", help="the facts as JSON")
    checked = verb("check", _check, "Hold an image against the rules for amphorae.")
    checked.add_argument("image", metavar="IMAGE", help="a qcow2, raw, vhd or tar file")
    checked.add_argument("--json", action="store_true", help="the findings as JSON")
    checked.add_argument("--junit", metavar="FILE", help="write the findings as JUnit XML too")
    checked.add_argument("--manifest", metavar="FILE", help="manifest (default: IMAGE.json)")
    checked.add_argument("-n", "--no-sshd", action="store_true", help="no SSH server is expected")
    checked.add_argument("--root-password-expected", action="store_true", help="root may log in")
    checked.add_argument("-s", "--size", metavar="GB", help="disk size that is expected")
    boot = verb("boot", _boot, "Boot an image in QEMU and balance load with it.")
    boot.add_argument("image", metavar="IMAGE", help="a qcow2, raw or vhd file; not written to")
    boot.add_argument("--container", action="store_true", help="IMAGE is a tar file: use podman")
    boot.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    boot.add_argument("--log", help="serial log (default: IMAGE.serial.log in this directory)")
    boot.add_argument("--timeout", type=float, default=1200, help="seconds in all (default: 1200)")
    boot.add_argument("--report", metavar="FILE", help="the report as a page of HTML as well")
    boot.add_argument("--topology", choices=("single", "active-standby"), default="single")
    boot.add_argument("--json", action="store_true", help="the report as JSON")
    lock = verb("lock", _lock, "Refresh the agent's locked requirements.")
    lock.add_argument("--series", help="an OpenStack series (default: all that are locked)")
    lock.add_argument("--constraints", help="file or URL of the series' upper constraints")
    return parser
