# SPDX-License-Identifier: Apache-2.0
"""The boot proof: a finished image runs in QEMU, as in OpenStack, until its agent answers."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from rich.table import Table

from amphora_image import controller
from amphora_image.errors import BadValue, BootFailed, HostError
from amphora_image.run import run

T = TypeVar("T")

#: Program -> the package of Debian and Ubuntu that holds it.
PROGRAMS = {
    "genisoimage": "genisoimage",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
}
#: File name suffix of an image -> QEMU's name of the disk format (:manpage:`qemu-img(1)`).
DISK_FORMATS = {".qcow2": "qcow2", ".raw": "raw", ".vhd": "vpc"}
ACCELERATORS = ("auto", "kvm", "tcg")

#: Seconds in which an image must start systemd under KVM; a sound host needs a third of them.
KVM_PATIENCE = 20.0
#: The host's address in QEMU's user-mode network.
GATEWAY = "10.0.2.2"
#: Neutron's prefix for the addresses of its ports, and an arbitrary rest.
MANAGEMENT_MAC = "fa:16:3e:00:00:01"

#: Milestone -> the first line on the serial console that shows it.
SERIAL_MILESTONES = {
    "kernel starts": re.compile(r"Linux version \d"),
    "systemd starts": re.compile(r"running in system mode|Welcome to (?!GRUB)"),
}
#: After one of these lines nothing more will come.
FATAL = re.compile(
    r"No bootable device|Entering rescue mode|Kernel panic|KVM internal error"
    r"|Dropping to a shell|[Ee]mergency [Mm]ode"
)
#: Lines worth showing after a failure.
TROUBLE = re.compile(
    r"fail(ed|ure)|error\b|panic|exception|call trace|oops|\bBUG\b|timed out|denied|killed|fatal"
    rf"|not found|no such|dependency|{FATAL.pattern}",
    re.IGNORECASE,
)
#: A traceback's body, on the console itself or after the journal's "program[pid]: ".
_INDENTED = re.compile(r"^\s|\]:\s\s")
#: Escape sequences of a terminal: control, operating system command, other (ECMA-48).
_ESCAPE_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\a\x1b]*(\a|\x1b\\)|[ -/]*[0-~])")
_FORWARDED_PORT = re.compile(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)")


@dataclass(frozen=True)
class Report:
    """What a proof has shown.

    :param milestones: milestone -> seconds since power-on, in order; None for a line that the
        serial console did not show, as with the kernel's option ``quiet``.
    :param agent: the agent's own words: ``hostname``, ``haproxy_version``, ``api_version``.
    """

    image: str
    accelerator: str
    milestones: dict[str, float | None]
    agent: dict[str, object]
    serial_log: str

    def json(self) -> str:
        """The report as one JSON object with the fields' names as keys."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __rich__(self) -> Table:
        table = Table(
            "milestone",
            "seconds",
            title=f"{Path(self.image).name} under {self.accelerator}",
            caption="\n".join(f"{key} {value}" for key, value in self.agent.items()),
            caption_justify="left",
            min_width=60,
        )
        for milestone, seconds in self.milestones.items():
            table.add_row(milestone, "not seen" if seconds is None else f"{seconds:.1f}")
        return table


def prove(image: Path, *, log: Path, accel: str = "auto", timeout: float = 600.0) -> Report:
    """Boot an image as Octavia does and see its agent serve the controller and nobody else.

    The image is not written to. The serial log stays, whatever the outcome.

    :param image: a disk image; its suffix tells its format, see :data:`DISK_FORMATS`.
    :param log: where to write the serial console's lines, each after its seconds since power-on.
    :param accel: one of :data:`ACCELERATORS`.
    :param timeout: seconds from power-on for the whole proof.
    :raises BadValue: the image or the accelerator is none that can be used.
    :raises HostError: a program is missing.
    :raises BootFailed: the image did not do it; the message ends with the log's lines that matter.
    """
    accelerator = choose_accelerator(image, accel)
    credentials = controller.Credentials.create()
    drive = config_drive(
        credentials.amphora_id,
        controller.injected_files(credentials, GATEWAY),
        controller.USER_DATA,
    )
    with power_on(image, drive, accelerator=accelerator, log=log) as machine:
        port = machine.wait("QEMU's control socket", machine.agent_port, timeout)

        def ask(path: str) -> controller.Answer:
            return controller.ask(
                port, path, credentials, client_pem=credentials.client_pem, timeout=machine.patience
            )

        def all_refused() -> bool:
            return all(
                controller.refuses(port, credentials, client_pem, timeout=machine.patience)
                for client_pem in (None, credentials.stranger_pem)
            )

        answer = machine.wait("the agent's answer", lambda: ask("/"), timeout)
        answered = machine.elapsed
        if answer.server_der != credentials.server_der:
            raise machine.failure("the agent shows a certificate that was not injected")
        if not machine.wait("the agent's refusal of strangers", all_refused, timeout):
            raise machine.failure("the agent serves a client without the controller's certificate")
        refused = machine.elapsed
        info = machine.wait("the agent's information", lambda: ask("/1.0/info"), timeout)
        return Report(
            image=str(image),
            accelerator=accelerator,
            milestones={
                **{name: machine.seen(line) for name, line in SERIAL_MILESTONES.items()},
                "agent answers": answered,
                "strangers refused": refused,
            },
            agent=info.body,
            serial_log=str(log),
        )


def choose_accelerator(image: Path, wanted: str = "auto") -> str:
    """Find out what the image can run under.

    A device that opens, even a small guest that runs, does not prove that a stock kernel does:
    under nested virtualization it may hang or hit an instruction that is not emulated. So "auto"
    lets the image itself start systemd under KVM, in bounded time.

    :param wanted: one of :data:`ACCELERATORS`; all but "auto" are returned untried.
    :returns: "kvm" or "tcg".
    :raises BadValue: as :func:`prove`.
    :raises HostError: as :func:`prove`.
    """
    if wanted not in ACCELERATORS:
        raise BadValue(f"accelerator {wanted!r} is none of {', '.join(ACCELERATORS)}")
    if wanted != "auto":
        return wanted
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    systemd_starts = SERIAL_MILESTONES["systemd starts"]
    try:
        with power_on(image, {}, accelerator="kvm", log=Path(os.devnull)) as machine:
            machine.wait("systemd", lambda: machine.seen(systemd_starts), KVM_PATIENCE)
    except BootFailed:
        return "tcg"
    return "kvm"


@dataclass
class Machine:
    """A running virtual machine; :func:`power_on` makes it.

    :param lines: seconds since power-on and text of each line of the serial console so far, and of
        what QEMU itself says.
    """

    process: subprocess.Popen[bytes]
    qmp_socket: Path
    log: Path
    started: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        """Seconds since power-on."""
        return time.monotonic() - self.started

    @property
    def patience(self) -> float:
        """Seconds to wait for one step on the network: what is slow to boot is slow to answer."""
        return max(2.0, self.elapsed / 20)

    def seen(self, pattern: re.Pattern[str]) -> float | None:
        """Tell when the first line that the pattern is found in came, in seconds."""
        return next((seconds for seconds, line in list(self.lines) if pattern.search(line)), None)

    def wait(self, what: str, attempt: Callable[[], T | None], timeout: float) -> T:
        """Repeat an attempt until it returns something.

        :param what: what is awaited, for the failure's message.
        :param attempt: None or an error of the network means not yet.
        :param timeout: seconds from power-on.
        :raises BootFailed: the time is up, QEMU has ended or the console shows a fatal line.
        """
        trouble: Exception | None = None
        while self.elapsed < timeout:
            try:
                if (result := attempt()) is not None:
                    return result
            except (OSError, http.client.HTTPException, ValueError) as error:
                trouble = error
            if self.process.poll() is not None:
                raise self.failure(f"QEMU ended with {self.process.returncode}; missing: {what}")
            if self.seen(FATAL) is not None:
                raise self.failure(f"the machine stopped; missing: {what}")
            time.sleep(0.25)
        last = f" ({trouble})" if trouble else ""
        raise self.failure(f"{timeout:.0f} s after power-on still missing: {what}{last}")

    def failure(self, reason: str) -> BootFailed:
        """Describe a failure with the lines of the serial console that matter."""
        lines = what_matters([line for _, line in list(self.lines) if line])
        message = "\n".join((reason, *(f"  {line}" for line in lines)))
        return BootFailed(message, f"the whole serial log is {self.log}")

    def qmp(self, command: str, **arguments: object) -> Any:
        """Send QEMU one command (QEMU Machine Protocol) and return what it returns.

        :raises OSError: QEMU does not listen (yet), or refuses the command.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.qmp_socket))
            with connection.makefile("rw", encoding="utf-8") as stream:
                stream.readline()  # the greeting
                _execute(stream, "qmp_capabilities", {})
                return _execute(stream, command, arguments)

    def agent_port(self) -> int | None:
        """Look up the loopback port that QEMU chose to forward to the agent."""
        usernet = self.qmp("human-monitor-command", **{"command-line": "info usernet"})
        found = _FORWARDED_PORT.search(usernet)
        return int(found[1]) if found else None


@contextlib.contextmanager
def power_on(
    image: Path, drive: Mapping[str, str], *, accelerator: str, log: Path
) -> Iterator[Machine]:
    """Run an image for the time of a ``with`` block; then, or if we die, QEMU is killed.

    :param drive: the config drive's files, as of :func:`config_drive`.
    :param accelerator: "kvm" or "tcg".
    :param log: where to write the serial console's lines; overwritten.
    :raises BadValue: the image is not there or of no known format.
    :raises HostError: a program is missing.
    """
    if not image.is_file():
        raise BadValue(f"{image} is no file")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise HostError(f"{program} is not installed", f"install the package {package}")
    with contextlib.ExitStack() as undo:
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="amphora-boot-")))
        write_config_drive(drive, directory)
        argv = qemu_argv(image.resolve(), accelerator)
        log_file = undo.enter_context(log.open("w", encoding="utf-8"))
        process = undo.enter_context(
            subprocess.Popen(
                # The kernel kills QEMU when the thread that started it ends.
                ["setpriv", "--pdeathsig", "KILL", "--", *argv],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
        machine = Machine(process, directory / "qmp.sock", log)
        reader = threading.Thread(target=_read_console, args=(machine, log_file))
        reader.start()
        undo.callback(reader.join)
        undo.callback(process.kill)
        yield machine


def qemu_argv(image: Path, accelerator: str) -> list[str]:
    """List QEMU's arguments for a machine like the one Nova makes: one CPU, 1 GB, virtio.

    Its serial console is standard output. ``config.iso`` and ``qmp.sock`` are in its working
    directory.

    :param image: absolute path.
    :raises BadValue: its suffix is not in :data:`DISK_FORMATS`.
    """
    if image.suffix not in DISK_FORMATS:
        raise BadValue(
            f"{image.name} is no disk image that can boot; known are {', '.join(DISK_FORMATS)}"
        )
    file = str(image).replace(",", ",,")  # QEMU's escape for a comma in a value
    forward = f"hostfwd=tcp:127.0.0.1:0-:{controller.AGENT_PORT}"
    return [
        "qemu-system-x86_64",
        *("-nodefaults", "-vga", "std", "-display", "none", "-no-reboot"),
        # graphics=off lets the BIOS talk on the serial console, strict=on boot the disk only.
        *("-machine", "pc,graphics=off", "-boot", "strict=on"),
        *("-accel", accelerator, "-cpu", "max", "-smp", "1", "-m", "1024"),
        *("-serial", "stdio", "-qmp", "unix:qmp.sock,server=on,wait=off"),
        # snapshot: writes go to an overlay without a name, the image is opened read-only.
        "-drive",
        f"id=disk,file={file},format={DISK_FORMATS[image.suffix]},if=none,snapshot=on",
        *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
        *("-drive", "file=config.iso,format=raw,media=cdrom,readonly=on"),
        # restrict: the guest reaches neither this host's services nor any other network.
        *("-netdev", f"user,id=management,restrict=on,{forward}"),
        *("-device", f"virtio-net-pci,netdev=management,mac={MANAGEMENT_MAC},romfile="),
    ]


def config_drive(amphora_id: str, files: Mapping[str, str], user_data: str) -> dict[str, str]:
    """List the files of a config drive as Nova writes them, in the one version "latest".

    :param files: absolute path in the amphora -> text.
    :param user_data: a cloud-config document.
    :returns: path on the drive -> text.
    """
    contents = {f"content/{number:04}": text for number, text in enumerate(files.values())}
    name = f"amphora-{amphora_id}"
    documents: dict[str, object] = {
        "meta_data.json": {
            "uuid": amphora_id,
            "name": name,
            "hostname": name,
            "launch_index": 0,
            "availability_zone": "nova",
            "files": [
                {"path": path, "content_path": f"/{content}"}
                for path, content in zip(files, contents, strict=True)
            ],
        },
        "network_data.json": {
            "links": [
                {"id": "link0", "type": "ovs", "ethernet_mac_address": MANAGEMENT_MAC, "mtu": 1500}
            ],
            "networks": [{"id": "network0", "type": "ipv4_dhcp", "link": "link0"}],
            "services": [],
        },
        "vendor_data.json": {},
        "vendor_data2.json": {},
    }
    latest = {name: json.dumps(document) for name, document in documents.items()}
    latest["user_data"] = user_data
    return {f"openstack/{path}": text for path, text in contents.items()} | {
        f"openstack/latest/{name}": text for name, text in latest.items()
    }


def write_config_drive(drive: Mapping[str, str], directory: Path) -> None:
    """Write ``config.iso``, with the program and the options that Nova uses.

    :param drive: path on the drive -> text.
    :param directory: where the image goes, and for a moment the tree it is made of.
    """
    tree = directory / "config"
    tree.mkdir(mode=0o700)
    for path, text in drive.items():
        file = tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    naming = ("-ldots", "-allow-lowercase", "-allow-multidot", "-l", "-J", "-r")
    run(["genisoimage", "-quiet", *naming, "-V", "config-2", "-o", directory / "config.iso", tree])
    shutil.rmtree(tree)


def what_matters(lines: Sequence[str], count: int = 30) -> list[str]:
    """Pick the lines of a serial log that tell why something failed, and where it ended.

    :param count: how many at most: the last ones.
    """
    chosen, in_traceback = [], False
    for number, line in enumerate(lines):
        before, in_traceback = (
            in_traceback,
            "Traceback (" in line or (in_traceback and _INDENTED.search(line) is not None),
        )
        is_end = number >= len(lines) - count // 3
        if before or in_traceback or is_end or TROUBLE.search(line):
            chosen.append(line)
    return chosen[-count:]


def _read_console(machine: Machine, log: IO[str]) -> None:
    """Take down what QEMU writes, line by line, until it ends."""
    assert machine.process.stdout is not None
    for raw in machine.process.stdout:
        seconds = machine.elapsed
        text = _ESCAPE_SEQUENCE.sub("", raw.decode(errors="replace")).replace("\r", "").rstrip()
        machine.lines.append((seconds, text))
        log.write(f"[{seconds:8.3f}] {text}\n")
        log.flush()


def _execute(stream: IO[str], command: str, arguments: Mapping[str, object]) -> Any:
    """Exchange one QMP command for its reply; events in between are of no interest here."""
    stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    stream.flush()
    replies = (json.loads(line) for line in stream)
    hung_up = {"error": {"desc": "QEMU hung up"}}
    reply = next((reply for reply in replies if "event" not in reply), hung_up)
    if "error" in reply:
        raise OSError(f"{command}: {reply['error']['desc']}")
    return reply["return"]
