# SPDX-License-Identifier: Apache-2.0
"""A virtual machine for the boot proof: a finished image runs in QEMU as in OpenStack."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
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

from amphora_image import board, network
from amphora_image.board import DEFAULT, Board
from amphora_image.errors import BadValue, BootFailed, HostError
from amphora_image.run import run

T = TypeVar("T")

#: Program -> the package of Debian and Ubuntu that holds it; the computer's own comes besides.
PROGRAMS = {
    "genisoimage": "genisoimage",
    "ip": "iproute2",
    "setpriv": "util-linux",
}
#: File name suffix of an image -> QEMU's name of the disk format (:manpage:`qemu-img(1)`).
DISK_FORMATS = {".qcow2": "qcow2", ".raw": "raw", ".vhd": "vpc"}
ACCELERATORS = ("auto", "kvm", "tcg")

#: Accelerator -> QEMU's option. By default TCG keeps 1 GiB of translated code, so when a guest
#: reboots all of its code is still there, and each write to a page that had code looks for what was
#: made of it: a kernel that unpacks itself takes minutes. 128 MiB are emptied now and then, which
#: costs next to nothing.
ACCELERATION = {"kvm": "kvm", "tcg": "tcg,tb-size=128"}

#: Seconds in which an image must start systemd under KVM; a sound host needs a third of them.
KVM_PATIENCE = 20.0
#: Seconds to wait for one thing, at least; see :attr:`Machine.patience`.
PATIENCE = 600.0
#: The host's address in QEMU's user-mode network.
GATEWAY = "10.0.2.2"
#: The TCP port of the amphora's agent.
AGENT_PORT = 9443
#: Neutron's prefix for the addresses of its ports, and an arbitrary rest.
MANAGEMENT_MAC, VIP_MAC = "fa:16:3e:00:00:{:02}", "fa:16:3e:00:01:{:02}"

#: Milestone -> the first line on the serial console that shows it.
SERIAL_MILESTONES = {
    "kernel starts": re.compile(r"Linux version \d"),
    "systemd starts": re.compile(r"running in system mode|Welcome to (?!GRUB)"),
}
#: After one of these lines nothing more will come.
FATAL = re.compile(
    r"No bootable (option or )?device|Entering rescue mode|Minimal BASH-like line editing"
    r"|Kernel panic|KVM internal error"
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
#: Seconds and process number of a line, in which what is said again differs.
_WHEN_AND_WHO = re.compile(r"^\[ *[\d.]+\] |\[\d+\](?=:)")
#: Escape sequences of a terminal: control, operating system command, other (ECMA-48).
_ESCAPE_SEQUENCE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\a\x1b]*(\a|\x1b\\)|[ -/]*[0-~])")
#: Units that the amphora's systemd gets for the proof (:manpage:`systemd.system-credentials(7)`):
#: its journal goes to the second serial port, {port}. A systemd before 256 passes them over.
CREDENTIALS = {
    "systemd.extra-unit.journal-to-serial.service": (
        "[Unit]\nDefaultDependencies=no\nAfter=systemd-journald.service\n"
        "[Service]\nStandardOutput=file:/dev/{port}\n"
        "ExecStart=/usr/bin/journalctl --boot --follow --lines=all --output=short-monotonic\n"
    ),
    "systemd.unit-dropin.sysinit.target": "[Unit]\nWants=journal-to-serial.service\n",
}


def choose_accelerator(image: Path, wanted: str = "auto", computer: Board = DEFAULT) -> str:
    """Find out what the image can run under.

    A device that opens, even a small guest that runs, does not prove that a stock kernel does:
    under nested virtualization it may hang or hit an instruction that is not emulated. So "auto"
    lets the image itself start systemd under KVM, in bounded time.

    :param wanted: one of :data:`ACCELERATORS`; all but "auto" are returned untried.
    :param computer: one of :data:`.board.BOARDS`, which this host's KVM may not be able to be.
    :returns: "kvm" or "tcg".
    :raises BadValue: as :func:`prove`.
    :raises HostError: as :func:`prove`.
    """
    if wanted not in ACCELERATORS:
        raise BadValue(f"accelerator {wanted!r} is none of {', '.join(ACCELERATORS)}")
    if wanted != "auto":
        return wanted
    native = platform.machine() in computer.hosts
    if not native or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    systemd_starts = SERIAL_MILESTONES["systemd starts"]
    try:
        log = Path(os.devnull)
        with power_on(image, {}, accelerator="kvm", log=log, computer=computer) as machine:
            machine.wait("systemd", lambda: machine.seen(systemd_starts), KVM_PATIENCE)
    except BootFailed:
        return "tcg"
    return "kvm"


@dataclass
class Machine:
    """A running virtual machine; :func:`power_on` makes it.

    :param number: 1 or 2; its agent listens on 127.0.0.1 or 127.0.0.2.
    :param lines: seconds since power-on and text of each line of the serial console so far, and of
        what QEMU itself says.
    """

    process: subprocess.Popen[bytes]
    qmp_socket: Path
    log: Path
    number: int = 1
    computer: Board = DEFAULT
    started: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        """Seconds since power-on."""
        return time.monotonic() - self.started

    @property
    def patience(self) -> float:
        """Seconds to wait for one thing: what was slow to start systemd is slow in all.

        The slowest thing of all, a reboot until the first heartbeat, takes about half of it.
        """
        started = self.seen(SERIAL_MILESTONES["systemd starts"])
        return max(PATIENCE, 30 * (started or self.elapsed))

    def seen(self, pattern: re.Pattern[str]) -> float | None:
        """Tell when the first line that the pattern is found in came, in seconds."""
        return next((seconds for seconds, line in list(self.lines) if pattern.search(line)), None)

    def wait(
        self,
        what: str,
        attempt: Callable[[], T | None],
        timeout: float,
        not_yet: tuple[type[Exception], ...] = (OSError, ValueError),
    ) -> T:
        """Repeat an attempt until it returns something.

        :param what: what is awaited, for the failure's message.
        :param attempt: None or one of the errors ``not_yet`` means not yet.
        :param timeout: seconds from power-on; less if :attr:`patience` is.
        :raises BootFailed: the time is up, QEMU has ended or the console shows a fatal line.
        """
        trouble: Exception | None = None
        began = self.elapsed
        while self.elapsed < min(timeout, began + self.patience):
            try:
                if (result := attempt()) is not None:
                    return result
            except not_yet as error:
                trouble = error
            if self.process.poll() is not None:
                raise self.failure(f"QEMU ended with {self.process.returncode}; missing: {what}")
            if self.seen(FATAL) is not None:
                raise self.failure(f"the machine stopped; missing: {what}")
            time.sleep(0.25)
        last = f" ({trouble})" if trouble else ""
        raise self.failure(f"{self.elapsed:.0f} s after power-on still missing: {what}{last}")

    def failure(self, reason: str) -> BootFailed:
        """Describe a failure with the lines of the serial console that matter."""
        console = what_matters([line for _, line in list(self.lines) if line])
        journal = what_matters(self.journal())
        lines = [*console, *(["the journal:"] if journal else []), *journal]
        message = "\n".join((reason, *(f"  {line}" for line in lines)))
        return BootFailed(message, f"the whole serial log is {self.log}")

    def reboot(self) -> None:
        """Let the amphora's systemd shut down in order and start again (:manpage:`bootup(7)`)."""
        keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
        self.qmp("send-key", keys=keys)

    def journal(self) -> list[str]:
        """The lines of the amphora's journal so far; none if its systemd is older than 256."""
        path = self.qmp_socket.with_name("journal.log")
        return path.read_text(errors="replace").splitlines() if path.exists() else []

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

    def memory_in_use(self) -> int | None:
        """MiB that the amphora cannot give to another program: MemTotal less MemAvailable.

        Its kernel tells them to the balloon (virtio 1.2, 5.5.6.4) each second; None: not yet, or it
        has no driver for it.
        """
        told = self.qmp("qom-get", path="/machine/peripheral/balloon", property="guest-stats")
        total, available = (told["stats"][f"stat-{what}-memory"] for what in ("total", "available"))
        return (total - available) >> 20 if told["last-update"] else None

    def plug_card(self) -> str:
        """Hot-plug a network card that is on the network of the VIPs; return its MAC address."""
        mac, tap = VIP_MAC.format(self.number), f"vip{self.number}"
        network.add_tap(tap)
        netdev = {"type": "tap", "id": tap, "ifname": tap, "script": "no", "downscript": "no"}
        self.qmp("netdev_add", **netdev)
        bus = {"bus": place} if (place := self.computer.hotplug_bus) else {}
        self.qmp("device_add", driver="virtio-net-pci", id="vip", netdev=tap, mac=mac, **bus)
        return mac


@contextlib.contextmanager
def power_on(
    image: Path,
    drive: Mapping[str, str],
    *,
    accelerator: str,
    log: Path,
    number: int = 1,
    computer: Board = DEFAULT,
) -> Iterator[Machine]:
    """Run an image for the time of a ``with`` block; then, or if we die, QEMU is killed.

    :param drive: the config drive's files, as of :func:`config_drive`.
    :param number: as of :class:`Machine`.
    :param accelerator: "kvm" or "tcg".
    :param computer: one of :data:`.board.BOARDS`.
    :param log: where to write the serial console's lines; overwritten.
    :raises BadValue: the image is not there or of no known format.
    :raises HostError: a program is missing.
    """
    if not image.is_file():
        raise BadValue(f"{image} is no file")
    for program, package in (*PROGRAMS.items(), (computer.program, computer.package)):
        if shutil.which(program) is None:
            raise HostError(f"{program} is not installed", f"install the package {package}")
    with contextlib.ExitStack() as undo:
        directory = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="amphora-boot-")))
        write_config_drive(drive, directory)
        board.prepare(computer, directory)
        argv = qemu_argv(image.resolve(), accelerator, number, computer)
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
        machine = Machine(process, directory / "qmp.sock", log, number, computer)
        reader = threading.Thread(target=_read_console, args=(machine, log_file))
        reader.start()
        undo.callback(reader.join)
        undo.callback(process.kill)
        yield machine


def qemu_argv(
    image: Path, accelerator: str, number: int = 1, computer: Board = DEFAULT
) -> list[str]:
    """List QEMU's arguments for a machine like the one Nova makes: one CPU, 1 GB, virtio.

    Its serial console is standard output. ``config.iso``, ``journal.log`` and ``qmp.sock`` are in
    its working directory.

    :param image: absolute path.
    :raises BadValue: its suffix is not in :data:`DISK_FORMATS`.
    """
    if image.suffix not in DISK_FORMATS:
        raise BadValue(
            f"{image.name} is no disk image that can boot; known are {', '.join(DISK_FORMATS)}"
        )
    file = str(image).replace(",", ",,")  # QEMU's escape for a comma in a value
    forward = f"hostfwd=tcp:127.0.0.{number}:{AGENT_PORT}-:{AGENT_PORT}"
    smbios = (
        f"type=11,value=io.systemd.credential.binary:{name}={encoded(text)}"
        for name, text in credentials(computer).items()
    )
    return [
        *(computer.program, "-nodefaults", "-display", "none"),
        *("-serial", "stdio", "-chardev", "file,id=journal,path=journal.log"),
        *("-drive", "id=config,file=config.iso,format=raw,if=none,readonly=on"),
        *board.qemu_options(computer),
        *("-boot", "strict=on"),  # the disk only
        *("-accel", ACCELERATION[accelerator], "-smp", "1", "-m", "1024"),
        *(word for told in smbios for word in ("-smbios", told)),
        *("-qmp", "unix:qmp.sock,server=on,wait=off"),
        # snapshot: writes go to an overlay without a name, the image is opened read-only.
        "-drive",
        f"id=disk,file={file},format={DISK_FORMATS[image.suffix]},if=none,snapshot=on",
        *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
        *("-device", "virtio-balloon-pci,id=balloon,guest-stats-polling-interval=1"),
        # What the amphora reaches of this host is what is in our network namespace.
        *("-netdev", f"user,id=management,{forward}"),
        "-device",
        f"virtio-net-pci,netdev=management,mac={MANAGEMENT_MAC.format(number)},romfile=",
    ]


def credentials(computer: Board) -> dict[str, str]:
    """Return the credentials that a computer hands to the amphora's systemd, name -> text."""
    return {name: text.format(port=computer.journal) for name, text in CREDENTIALS.items()}


def encoded(text: str) -> str:
    """Return a text in Base64 (RFC 4648, section 4)."""
    return base64.b64encode(text.encode()).decode()


def config_drive(
    amphora_id: str, files: Mapping[str, str], user_data: str, number: int = 1
) -> dict[str, str]:
    """List the files of a config drive as Nova writes them, in the one version "latest".

    :param files: absolute path in the amphora -> text.
    :param user_data: a cloud-config document.
    :param number: as of :class:`Machine`.
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
                {
                    "id": "link0",
                    "type": "ovs",
                    "ethernet_mac_address": MANAGEMENT_MAC.format(number),
                    "mtu": 1500,
                }
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

    What is said again and again, as by a service that tries for ever, is shown the first time.

    :param count: how many at most: a third of them the first, where causes are, the rest the last.
    """
    chosen, in_traceback, said = [], False, set()
    for number, line in enumerate(lines):
        before, in_traceback = (
            in_traceback,
            "Traceback (" in line or (in_traceback and _INDENTED.search(line) is not None),
        )
        is_end = number >= len(lines) - count // 3
        text = _WHEN_AND_WHO.sub("", line)
        if text not in said and (before or in_traceback or is_end or TROUBLE.search(line)):
            said.add(text)
            chosen.append(line)
    first = count // 3
    return chosen if len(chosen) <= count else chosen[:first] + chosen[first - count :]


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
