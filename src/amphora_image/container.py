# SPDX-License-Identifier: Apache-2.0
"""The proof of a tar file: its HAProxy balances load in a container, as Octavia configures it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from amphora_image import members, network
from amphora_image.controller import Controller
from amphora_image.errors import AmphoraImageError, BadValue, HostError
from amphora_image.members import ask_http
from amphora_image.proof import HTTP, balance
from amphora_image.report import Milestone, Report
from amphora_image.run import run

#: Program -> the package of Debian and Ubuntu that holds it.
PROGRAMS = {"podman": "podman", "runc": "runc", "ip": "iproute2"}
IMAGE = "amphora"
#: Limits that a build host in a container may set as well, and the proof's own network.
OPTIONS = (
    *("--rm", "--network", "host"),
    *("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"),
)
#: Seconds from its start until HAProxy must answer.
PATIENCE = 30.0


def prove(tar: Path, *, tell: Callable[[Milestone], None] = lambda milestone: None) -> Report:
    """Import a tar file with podman and balance load with the HAProxy in it.

    Nothing of it stays: podman keeps what it imports in a temporary directory.

    :param tell: is called with each milestone that is reached.
    :returns: the report, also of a tar file that has failed.
    :raises BadValue: the file is not there.
    :raises HostError: we are not root, a program is missing, or this host gives us no network of
        our own.
    """
    if not tar.is_file():
        raise BadValue(f"{tar} is no file")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise HostError(f"{program} is not installed", f"install the package {package}")
    if os.geteuid() != 0:
        raise HostError("podman is to run as root here", "run it with sudo")
    report, began = Report(str(tar), "podman", "container", ""), time.monotonic()

    def reached(name: str, detail: str = "") -> None:
        report.milestones.append(Milestone(name, time.monotonic() - began, detail))
        tell(report.milestones[-1])

    with contextlib.ExitStack() as undo:
        undo.enter_context(network.isolated())
        network.add_vips()
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="amphora-tar-")))
        undo.enter_context(members.serving(network.MEMBERS))
        # podman refuses a run root of more than 50 characters, which TMPDIR may have.
        state = undo.enter_context(tempfile.TemporaryDirectory(prefix="amphora-tar-", dir="/run"))
        podman = ["podman", "--root", f"{directory}/root", "--runroot", state]
        podman += ["--runtime", "runc"]
        try:
            run([*podman, "import", tar.resolve(), IMAGE])
            reached("imported")
            version = run([*podman, "run", *OPTIONS, IMAGE, "haproxy", "-v"]).split()[2]
            reached("HAProxy starts", f"haproxy_version {version}")
            config = directory / "haproxy.cfg"
            config.write_text(haproxy_config(directory, version))
            with haproxy(podman, config):
                reached("HTTP balanced", balance(lambda: ask_http((network.VIP, HTTP)), wait))
        except (AmphoraImageError, OSError) as error:
            report.failure = str(error)
    return report


def wait(what: str, attempt: Callable[[], bool | None]) -> bool:
    """Repeat an attempt, for which an error means not yet, until it returns something.

    :raises OSError: it did not in :data:`PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if (result := attempt()) is not None:
                return result
        time.sleep(0.1)
    raise OSError(f"after {PATIENCE:.0f} s still missing: {what}")


def haproxy_config(directory: Path, version: str) -> str:
    """Let Octavia's code render the configuration of one HTTP listener, with its log left out."""
    controller = Controller(directory, network.GATEWAY)
    controller.listen("HTTP", HTTP, "HTTP", check_every=2)
    return controller.haproxy_config(version)


@contextlib.contextmanager
def haproxy(podman: list[str], config: Path) -> Iterator[None]:
    """Run HAProxy in a container, with no more than its configuration, for a ``with`` block."""
    mount = ["--volume", f"{config}:/etc/haproxy.cfg:ro", "--init=false"]
    command = [*podman, "run", *OPTIONS, *mount, "--name", IMAGE, IMAGE]
    with subprocess.Popen(
        [*command, "haproxy", "-db", "-f", "/etc/haproxy.cfg"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield
        except OSError as error:
            process.kill()
            said = process.communicate()[1] or ""
            raise AmphoraImageError(f"{error}\n{said[-2000:]}") from error
        finally:
            with contextlib.suppress(AmphoraImageError):
                run([*podman, "rm", "--force", "--time", "0", IMAGE])
