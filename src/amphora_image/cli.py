# SPDX-License-Identifier: Apache-2.0
"""Both faces of the command, and the only reader of the environment's settings."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from amphora_image import agent, agent_source, bundle, cache, check, host
from amphora_image.board import FIRMWARES
from amphora_image.build import build, signals_interrupt
from amphora_image.build_all import Line, SomeFailed, build_all, jobs_here, plan_builds, read_lines
from amphora_image.errors import AmphoraImageError, BootFailed, CheckFailed, Interrupted
from amphora_image.facts import as_table as facts_table
from amphora_image.facts import read_facts
from amphora_image.image import read_image
from amphora_image.options import Parser, add_build_options, cache_dir, file_path, read_request
from amphora_image.plan import make_plan
from amphora_image.request import GIB, PROVEN, BaseOS, Request, size_in_gib
from amphora_image.verify import verify

EPILOG = """\
examples:
  %(prog)s                   Ubuntu, amphora-x64-haproxy.qcow2, 5 GB
  %(prog)s -i debian -s 2    for a flavor with a disk of 2 GB
  %(prog)s -t raw,vhd -o lb  lb.raw and lb.vhd from one build
  BASE_OS_MIRROR=http://mirror.example.org/ubuntu %(prog)s

Variables of the environment and exit codes: docs/reference.rst
"""


#: What a user is told before a build or of a plan, and of which requests.
WARNINGS: tuple[tuple[str, Callable[[Request], bool]], ...] = (
    (
        "-r sets a root password; not for production",
        lambda request: request.root_password is not None,
    ),
    (
        "-y: Ubuntu's ordinary kernels have no FIPS mode; -k names one of Ubuntu Pro that has",
        lambda request: request.fips and request.base_os is BaseOS.UBUNTU and not request.kernel,
    ),
    (
        "images of this base OS are not tested: none was ever booted",
        lambda request: request.base_os not in PROVEN,
    ),
)


def _build(args: argparse.Namespace) -> None:
    asked = read_request(args, os.environ, platform.machine())
    with signals_interrupt(), bundle.opened(asked, host.look()) as (request, here):
        plan = make_plan(request, here)
        console = Console(stderr=True, quiet=args.quiet)
        _warn(request, console)
        if args.dry_run:
            print(json.dumps(plan.as_json(), indent=2) if args.json else plan.as_shell())
            return
        files = build(request, plan, console)
    if args.json:
        print(
            json.dumps({"files": list(map(str, files)), "manifests": [f"{f}.json" for f in files]})
        )
    else:
        print(*files, sep="\n")


def _warn(request: Request, console: Console) -> None:
    for warning in (text for text, concerns in WARNINGS if concerns(request)):
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _fetch(args: argparse.Namespace) -> None:
    request = read_request(args, os.environ, platform.machine())
    target = file_path("-o (bundle)", args.output)
    console = Console(stderr=True, quiet=args.quiet)
    with signals_interrupt():
        made = bundle.fetch(request, host.look(), target, console)
    print(json.dumps({"files": [str(made)]}) if args.json else made)


def _plan(args: argparse.Namespace) -> None:
    asked = read_request(args, os.environ, platform.machine())
    with bundle.opened(asked, host.look()) as (request, here):
        plan = make_plan(request, here)
    _warn(request, Console(stderr=True, quiet=args.quiet))
    print(plan.as_shell() if args.shell else json.dumps(plan.as_json(), indent=2))


def _lock(args: argparse.Namespace) -> None:
    series = [args.series] if args.series else agent_source.SERIES
    print(*agent.refresh_locks(os.environ, series, constraints=args.constraints), sep="\n")


def _build_all(args: argparse.Namespace) -> None:
    text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
    parser = Parser(prog="amphora-image build-all", allow_abbrev=False)
    add_build_options(parser)

    def read(line: Line) -> Request:
        variables = {**os.environ, **line.variables}
        return read_request(parser.parse_args(line.options), variables, platform.machine())

    builds = plan_builds(read_lines(text), read)
    jobs = args.jobs or jobs_here(len(builds))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with signals_interrupt():
        done = build_all(builds, jobs, lambda name, said: console.print(Text(f"{name}: {said}")))
    if args.json:
        rows = [
            {"line": build.line.number, "exit_code": status, "seconds": seconds, "files": files}
            for build, status, seconds, files in done
        ]
        print(json.dumps(rows, indent=2))
    else:
        print(*(file for *_, files in done for file in files), sep="\n")
    if failed := {build.name: status for build, status, *_ in done if status}:
        raise SomeFailed(failed)


def _cache(args: argparse.Namespace) -> None:
    directory = cache_dir(args.cache_dir, os.environ)
    if args.action == "list":
        found = cache.entries(directory)
    else:
        found = cache.prune(directory, int(max(args.limit, 0) * GIB))
    if args.json:
        print(json.dumps([entry.as_json() for entry in found], indent=2))
        return
    table = Table("layer", "entry", "MB", "last use", title=str(directory))
    for entry in found:
        row = entry.as_json()
        table.add_row(row["layer"], row["name"], f"{entry.bytes / 1e6:.0f}", row["used"])
    Console().print(table)


def _inspect(args: argparse.Namespace) -> None:
    with signals_interrupt():
        facts = read_facts(read_image(Path(args.image)))
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        Console().print(facts_table(facts))


def _check(args: argparse.Namespace) -> None:
    image = Path(args.image)
    junit = file_path("--junit", args.junit) if args.junit else None
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


def _findings(image: Path) -> list[check.Finding]:
    try:
        return check.check_image(image)
    except AmphoraImageError as error:  # a proof of minutes is not lost for it
        return [check.Finding("all", "error", str(error), "", "")]


def _verify_reproducible(args: argparse.Namespace) -> None:
    request = read_request(args, os.environ, platform.machine())
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with signals_interrupt():
        found = verify(
            request, args.words[1:], lambda name, said: console.print(Text(f"{name}: {said}"))
        )
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        Console(highlight=False).print(found.as_table())
    if found.differing:
        raise CheckFailed(f"{', '.join(found.differing)} differ between two builds of one request")


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
                firmware=args.firmware,
                topology=args.topology,
                timeout=args.timeout,
                tell=tell,
            )
        if args.report:
            write_page(report, Path(args.report), _findings(image))
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
    except (AmphoraImageError, OSError, Interrupted) as error:
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
        add_build_options(parser)
        _build(parser.parse_args(argv))

    return _guarded(work)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``amphora-image VERB``; return the exit code."""

    def work() -> None:
        words = sys.argv[1:] if argv is None else argv
        args = _verbs().parse_args(words)
        args.words = words
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

    add_build_options(verb("build", _build, "Build an image; the same as diskimage-create.sh."))
    fetched = verb("fetch", _fetch, "Put all that a build downloads into a file, for --bundle.")
    add_build_options(fetched)
    fetched.set_defaults(output="bundle.tar")
    several = verb("build-all", _build_all, "Build several images, side by side.")
    several.add_argument(
        "file", metavar="FILE", help="a line of build options for each image; '-': standard input"
    )
    several.add_argument(
        "--jobs", type=int, metavar="N", help="builds at a time (default: by processors and memory)"
    )
    several.add_argument("--json", action="store_true", help="the results as JSON")
    kept = verb("cache", _cache, "Show what builds keep for each other, or remove the least used.")
    kept.add_argument("action", choices=("list", "prune"))
    kept.add_argument("-c", "--cache-dir", metavar="DIR", help="default: ~/.cache/image-create")
    kept.add_argument(
        "--limit",
        type=float,
        default=8,
        metavar="GB",
        help="prune: what may stay, 0 for none (default: 8)",
    )
    kept.add_argument("--json", action="store_true", help="the entries as JSON")
    plan = verb("plan", _plan, "Show what disk-image-create would be told, as JSON.")
    add_build_options(plan)
    plan.add_argument("--shell", action="store_true", help="as a line to paste into a shell")
    again = verb(
        "verify-reproducible",
        _verify_reproducible,
        "Build an image twice, and see that both are the same bytes.",
    )
    add_build_options(again)
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
    boot.add_argument("--container", action="store_true", help="a tar or oci file: use podman")
    boot.add_argument("--firmware", choices=FIRMWARES, help="default: the architecture's first")
    boot.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto")
    boot.add_argument("--log", help="serial log (default: IMAGE.serial.log in this directory)")
    boot.add_argument("--timeout", type=float, default=3600, help="seconds in all (default: 3600)")
    boot.add_argument("--report", metavar="FILE", help="the report as a page of HTML as well")
    boot.add_argument("--topology", choices=("single", "active-standby"), default="single")
    boot.add_argument("--json", action="store_true", help="the report as JSON")
    lock = verb("lock", _lock, "Refresh the agent's locked requirements.")
    lock.add_argument("--series", help="an OpenStack series (default: all that are locked)")
    lock.add_argument("--constraints", help="file or URL of the series' upper constraints")
    return parser
