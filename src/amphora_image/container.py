# SPDX-License-Identifier: Apache-2.0
"""The proof of a container's image: its HAProxy balances load, as Octavia configures it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from amphora_image import members, network
from amphora_image.controller import Controller
from amphora_image.errors import AmphoraImageError, BadValue, HostError
from amphora_image.members import ask_http
from amphora_image.proof import HTTP, NOT_YET, balance
from amphora_image.report import Milestone, Report
from amphora_image.request import ImageType
from amphora_image.run import run

#: Program -> the package of Debian and Ubuntu that holds it.
PROGRAMS = {"podman": "podman", "runc": "runc", "ip": "iproute2"}
#: What podman calls the image here.
IMAGE = "amphora"
#: How the name of a file ends that holds an image and not a root file system.
ARCHIVE = f".{ImageType.OCI}"
#: Limits that a build host in a container may set as well, and the proof's own network.
OPTIONS = (
    *("--rm", "--network", "host"),
    *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
)
#: Of the listener, at a time: each takes four files of those that OPTIONS allow.
CONNECTIONS = 100
#: Seconds to wait for an answer of HAProxy: on a busy host podman copies long before it starts it.
PATIENCE = 300.0


def prove(file: Path, *, tell: Callable[[Milestone], None] = lambda milestone: None) -> Report:
    """Give podman a file and balance load with the HAProxy in it.

    Nothing of it stays: podman keeps its images in a temporary directory.

    :param file: a root file system's tar, or an archive with an OCI image: its name ends in
        :data:`ARCHIVE`.
    :param tell: is called with each milestone that is reached.
    :returns: the report, also of a file that has failed.
    :raises BadValue: the file is not there.
    :raises HostError: we are not root, a program is missing, or this host gives us no network of
        our own.
    """
    if not file.is_file():
        raise BadValue(f"{file} is no file")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise HostError(f"{program} is not installed", f"install the package {package}")
    if os.geteuid() != 0:
        raise HostError("podman is to run as root here", "run it with sudo")
    report, began = Report(str(file), "podman", "container", ""), time.monotonic()
    with contextlib.ExitStack() as undo:
        undo.enter_context(network.isolated())
        network.add_vips()
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="amphora-tar-")))
        undo.enter_context(members.serving(network.MEMBERS))
        # podman refuses a run root of more than 50 characters, which TMPDIR may have.
        state = undo.enter_context(tempfile.TemporaryDirectory(prefix="amphora-tar-", dir="/run"))
        podman = ["podman", "--root", f"{directory}/root", "--runroot", state]
        podman += ["--runtime", "runc"]
        undo.callback(remove_containers, podman)
        for number, (name, step) in enumerate(STEPS.items()):
            try:
                detail = step(Box(podman, file.resolve(), directory))
            except (AmphoraImageError, *NOT_YET) as error:
                report.failure = f"{name}: {error}"
                report.milestones.append(Milestone(name))
                report.missing = list(STEPS)[number + 1 :]
                break
            report.milestones.append(Milestone(name, time.monotonic() - began, detail))
            tell(report.milestones[-1])
    return report


@dataclass(frozen=True)
class Box:
    """What the steps work with.

    :param podman: the program, with the options that keep its files in temporary directories.
    :param directory: for files of the steps.
    """

    podman: Sequence[str]
    file: Path
    directory: Path

    @property
    def version(self) -> str:
        """The version of the HAProxy in the file, for instance ``3.0.11-1``."""
        return run([*self.podman, "run", *OPTIONS, IMAGE, "haproxy", "-v"]).split()[2]


def imported(box: Box) -> str:
    """Podman takes the file for an image."""
    if box.file.suffix == ARCHIVE:
        # "Loaded image: localhost/amphora:latest"
        name = run([*box.podman, "load", "--quiet", "--input", box.file]).split()[-1]
        run([*box.podman, "tag", name, IMAGE])
        return name
    run([*box.podman, "import", box.file, IMAGE])
    return ""


def haproxy_starts(box: Box) -> str:
    """HAProxy tells its version."""
    return f"haproxy_version {box.version}"


def http_balanced(box: Box) -> str:
    """HAProxy shares requests between the members."""
    config = box.directory / "haproxy.cfg"
    config.write_text(haproxy_config(box.directory, box.version))
    with haproxy(box.podman, config) as process:
        return balance(lambda: ask_http((network.VIP, HTTP)), partial(wait, process))


#: Milestones of a file, in order.
STEPS: dict[str, Callable[[Box], str]] = {
    "imported": imported,
    "HAProxy starts": haproxy_starts,
    "HTTP balanced": http_balanced,
}


def remove_containers(podman: Sequence[str]) -> None:
    """End all that runs in containers, and what keeps their files in use."""
    with contextlib.suppress(AmphoraImageError):
        run([*podman, "rm", "--all", "--force", "--time", "0"])


def wait(process: subprocess.Popen[str], what: str, attempt: Callable[[], bool | None]) -> bool:
    """Repeat an attempt, for which an error means not yet, until it returns something.

    :raises OSError: it did not in :data:`PATIENCE`, or the process has ended.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(*NOT_YET):
            if (result := attempt()) is not None:
                return result
        if process.poll() is not None:
            raise OSError(f"HAProxy ended with {process.returncode}; missing: {what}")
        time.sleep(0.1)
    raise OSError(f"after {PATIENCE:.0f} s still missing: {what}")


def haproxy_config(directory: Path, version: str) -> str:
    """Let Octavia's code render the configuration of one HTTP listener, with its log left out."""
    controller = Controller(directory, network.GATEWAY)
    controller.listen("HTTP", HTTP, "HTTP", check_every=2, connection_limit=CONNECTIONS)
    return controller.haproxy_config(version)


@contextlib.contextmanager
def haproxy(podman: Sequence[str], config: Path) -> Iterator[subprocess.Popen[str]]:
    """Run HAProxy in a container, with no more than its configuration, for a ``with`` block.

    :raises AmphoraImageError: the block has failed; the message has what HAProxy said.
    """
    mount = ["--volume", f"{config}:/etc/haproxy.cfg:ro", "--init=false"]
    with subprocess.Popen(
        [*podman, "run", *OPTIONS, *mount, IMAGE, "haproxy", "-db", "-f", "/etc/haproxy.cfg"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        except NOT_YET as error:
            process.kill()
            said = process.communicate()[1] or ""
            raise AmphoraImageError(f"{error}\n{said[-2000:]}") from error
        finally:
            remove_containers(podman)
            process.kill()
