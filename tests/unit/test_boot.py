# SPDX-License-Identifier: Apache-2.0
"""The boot proof's pure parts: QEMU's arguments, the config drive, the log's lines that matter."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from amphora_image import boot
from amphora_image.board import BOARDS, Board
from amphora_image.errors import BadValue, BootFailed, HostError
from amphora_image.request import Architecture

COMPUTERS = [
    pytest.param(computer, id=f"{architecture}-{name}")
    for architecture, boards in BOARDS.items()
    for name, computer in boards.items()
]


class FakeProcess:
    """A process that runs until it is told its status."""

    returncode: int | None = None

    def poll(self) -> int | None:
        """The status, or None while it runs."""
        return self.returncode


@pytest.fixture
def machine(tmp_path: Path) -> boot.Machine:
    """A machine that was just switched on and has said nothing."""
    process: object = FakeProcess()
    return boot.Machine(process, tmp_path / "qmp.sock", tmp_path / "serial.log")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "disk_format"), [("a.qcow2", "qcow2"), ("a.raw", "raw"), ("a.vhd", "vpc")]
)
def test_image_is_opened_by_its_format_and_never_written(name: str, disk_format: str) -> None:
    """The suffix names QEMU's format, and writes go to a throw-away overlay."""
    argv = boot.qemu_argv(Path("/images", name), "tcg")
    (drive,) = (word for word in argv if word.startswith("id=disk"))
    assert f",file=/images/{name},format={disk_format}," in drive
    assert drive.endswith(",snapshot=on")


def test_translated_code_is_bounded() -> None:
    """What TCG has made of a guest's code does not pile up until the guest reboots."""
    argv = boot.qemu_argv(Path("/a.raw"), "tcg")
    accelerator, *options = argv[argv.index("-accel") + 1].split(",")
    assert accelerator == "tcg"
    assert any(option.startswith("tb-size=") for option in options)


def test_comma_in_a_path_is_escaped() -> None:
    """A comma in the image's path does not end the value; spaces and quotes need nothing."""
    argv = boot.qemu_argv(Path("/im, 'ages/ä.raw"), "tcg")
    assert any("file=/im,, 'ages/ä.raw,format=raw" in word for word in argv)


@pytest.mark.parametrize("name", ["a.tar", "a.img", "a"])
def test_unknown_format_is_a_bad_value(name: str) -> None:
    """A file that is no disk image is refused by its suffix, with the known ones named."""
    with pytest.raises(BadValue, match=rf"{name} .*\.qcow2, \.raw, \.vhd"):
        boot.qemu_argv(Path("/images", name), "tcg")


def test_config_drive_is_laid_out_as_by_nova() -> None:
    """Each injected file is a numbered content that the metadata gives a path to."""
    drive = boot.config_drive("an-id", {"/etc/b": "B", "/etc/a": "A"}, "#cloud-config\n")
    metadata = json.loads(drive["openstack/latest/meta_data.json"])
    network = json.loads(drive["openstack/latest/network_data.json"])
    assert metadata["uuid"] == "an-id"
    assert metadata["files"] == [
        {"path": "/etc/b", "content_path": "/content/0000"},
        {"path": "/etc/a", "content_path": "/content/0001"},
    ]
    assert (drive["openstack/content/0000"], drive["openstack/content/0001"]) == ("B", "A")
    assert drive["openstack/latest/user_data"] == "#cloud-config\n"
    assert network["links"][0]["ethernet_mac_address"] == boot.MANAGEMENT_MAC.format(1)
    assert network["networks"][0]["type"] == "ipv4_dhcp"


def test_what_matters_keeps_trouble_and_the_end() -> None:
    """Failures, whole tracebacks and the last lines stay; the rest goes."""
    lines = [
        *(f"[  OK  ] Reached target number {number}." for number in range(50)),
        "[FAILED] Failed to start amphora-agent.service - amphora agent.",
        *(f"[  OK  ] Reached target number {number}." for number in range(50, 100)),
        "[   12.3] python3[345]: Traceback (most recent call last):",
        '[   12.3] python3[345]:   File "a.py", line 1, in <module>',
        "[   12.3] python3[345]: octavia.common.Odd: what now",
        *(f"[  OK  ] Reached target number {number}." for number in range(100, 150)),
    ]
    assert boot.what_matters(lines, count=12) == [lines[50], *lines[101:104], *lines[-4:]]


def test_what_matters_is_said_once() -> None:
    """What a service repeats for ever, each time by another process, does not hide the cause."""
    cause = "[    1.0] lb agent[9]: haproxy: not found"
    again = [
        line.format(number)
        for number in range(10, 90)
        for line in (
            "[   {0}.0] lb health[{0}]: Traceback (most recent call last):",
            "[   {0}.1] lb health[{0}]:   in connect",
            "[   {0}.2] lb health[{0}]: ConnectionRefusedError: line 17",
        )
    ]
    assert boot.what_matters([cause, *again]) == [cause, *again[:3]]


def test_what_matters_is_bounded() -> None:
    """However much went wrong, only the first and the last lines are shown."""
    lines = [f"error {number}" for number in range(1000)]
    assert boot.what_matters(lines) == lines[:10] + lines[-20:]
    assert boot.what_matters(lines[:30]) == lines[:30]


@pytest.mark.parametrize(
    ("milestone", "line", "shows"),
    [
        ("kernel starts", "[    0.000000] Linux version 6.12.1 (gcc-14)", True),
        ("kernel starts", "Loading Linux 6.12.1 ...", False),
        ("systemd starts", "Welcome to Debian GNU/Linux 13 (trixie)!", True),
        ("systemd starts", "[ 1.5] systemd[1]: systemd 257 running in system mode (+PAM)", True),
        ("systemd starts", "Welcome to GRUB!", False),
    ],
)
def test_serial_milestones(milestone: str, line: str, shows: bool) -> None:
    """Each milestone of the serial console is told from the lines around it."""
    assert (boot.SERIAL_MILESTONES[milestone].search(line) is not None) is shows


@pytest.mark.parametrize(
    "line",
    [
        "No bootable device.",
        "Entering rescue mode...",
        "[    2.1] Kernel panic - not syncing: VFS: Unable to mount root fs",
        "ALERT!  UUID=1 does not exist.  Dropping to a shell!",
        "You are in emergency mode. After logging in, type ...",
    ],
)
def test_fatal_line_ends_the_wait(machine: boot.Machine, line: str) -> None:
    """A machine that has given up is not waited for, and its words are in the message."""
    machine.lines.append((1.0, line))
    with pytest.raises(BootFailed, match="the machine stopped; missing: the agent") as failure:
        machine.wait("the agent", lambda: None, timeout=60)
    assert line in str(failure.value)
    assert str(machine.log) in (failure.value.hint or "")


def test_ended_machine_is_not_waited_for(machine: boot.Machine) -> None:
    """When QEMU ends, the wait ends and tells its status."""
    machine.process.returncode = 1
    with pytest.raises(BootFailed, match="QEMU ended with 1; missing: the agent"):
        machine.wait("the agent", lambda: None, timeout=60)


def test_wait_is_bounded_and_tells_the_last_error(machine: boot.Machine) -> None:
    """The time limit ends the wait, and the last error says what was in the way."""

    def attempt() -> None:
        raise ConnectionResetError("reset by peer")

    with pytest.raises(BootFailed, match=r"still missing: the agent \(reset by peer\)"):
        machine.wait("the agent", attempt, timeout=0.05)


def test_wait_for_one_thing_is_bounded(
    machine: boot.Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thing is not waited for as long as the whole proof may take."""
    monkeypatch.setattr(boot, "PATIENCE", 0.05)
    machine.lines.append((0.0001, "Welcome to Debian!"))
    with pytest.raises(BootFailed, match="0 s after power-on still missing: the agent"):
        machine.wait("the agent", lambda: None, timeout=60)


@pytest.mark.parametrize(("started", "patience"), [(8.0, 600.0), (40.0, 1200.0)])
def test_slow_machine_gets_more_time(
    machine: boot.Machine, started: float, patience: float
) -> None:
    """What took longer to start systemd may take longer for all that follows."""
    machine.lines.append((started, "Welcome to Debian!"))
    assert machine.patience == patience


def test_wait_returns_what_the_attempt_returns(machine: boot.Machine) -> None:
    """None is not yet; anything else, False too, is the result."""
    results = iter([None, False])
    assert machine.wait("an answer", lambda: next(results), timeout=60) is False


def test_missing_program_is_a_host_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without QEMU is told which package to install, before anything is started."""
    monkeypatch.setattr("shutil.which", lambda program: None)
    image = tmp_path / "a.qcow2"
    image.touch()
    with (
        pytest.raises(HostError, match="genisoimage is not installed") as failure,
        boot.power_on(image, {}, accelerator="tcg", log=tmp_path / "log"),
    ):
        pass
    assert failure.value.hint == "install the package genisoimage"


def test_missing_image_is_a_bad_value(tmp_path: Path) -> None:
    """An image that is not there is named."""
    with (
        pytest.raises(BadValue, match=r"none\.qcow2"),
        boot.power_on(tmp_path / "none.qcow2", {}, accelerator="tcg", log=tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize(
    ("lines", "accelerator"),
    [
        ([(1.0, "Linux version 6.12.1"), (2.0, "Welcome to Debian!")], "kvm"),
        ([(1.0, "Linux version 6.12.1")], "tcg"),
        ([(1.0, "KVM internal error. Suberror: 1")], "tcg"),
    ],
)
def test_kvm_is_taken_only_if_systemd_starts_under_it(
    machine: boot.Machine,
    monkeypatch: pytest.MonkeyPatch,
    lines: list[tuple[float, str]],
    accelerator: str,
) -> None:
    """A kernel that starts under KVM and then hangs is not enough."""

    @contextlib.contextmanager
    def power_on(
        image: Path, drive: Mapping[str, str], *, accelerator: str, log: Path, computer: Board
    ) -> Iterator[boot.Machine]:
        assert accelerator == "kvm"
        machine.lines.extend(lines)
        yield machine

    monkeypatch.setattr(boot, "power_on", power_on)
    monkeypatch.setattr(boot, "KVM_PATIENCE", 0.05)
    monkeypatch.setattr("os.access", lambda path, mode: True)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert boot.choose_accelerator(Path("/a.qcow2")) == accelerator


def test_tcg_where_there_is_no_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without access to the device nothing is tried."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert boot.choose_accelerator(Path("/a.qcow2")) == "tcg"


@pytest.mark.parametrize(
    ("architecture", "host"), [("arm64", "x86_64"), ("amd64", "aarch64"), ("armhf", "aarch64")]
)
def test_tcg_for_another_architecture(
    monkeypatch: pytest.MonkeyPatch, architecture: str, host: str
) -> None:
    """KVM is for a host's own architecture: another is not tried."""
    monkeypatch.setattr("os.access", lambda path, mode: True)
    monkeypatch.setattr("platform.machine", lambda: host)
    computer = next(iter(BOARDS[Architecture(architecture)].values()))
    assert boot.choose_accelerator(Path("/a.qcow2"), computer=computer) == "tcg"


@pytest.mark.parametrize("wanted", ["kvm", "tcg"])
def test_accelerator_can_be_forced(wanted: str) -> None:
    """What the user asks for is not tried first."""
    assert boot.choose_accelerator(Path("/a.qcow2"), wanted) == wanted


def test_unknown_accelerator_is_a_bad_value() -> None:
    """An accelerator that we do not know is refused, with the known ones named."""
    with pytest.raises(BadValue, match="'xen' is none of auto, kvm, tcg"):
        boot.choose_accelerator(Path("/a.qcow2"), "xen")


def test_machines_of_a_pair_differ() -> None:
    """The second amphora has another address for its agent and another card."""
    first, second = (boot.qemu_argv(Path("/a.raw"), "tcg", number) for number in (1, 2))
    different = [(one, two) for one, two in zip(first, second, strict=True) if one != two]
    assert [
        two.replace("127.0.0.2", "127.0.0.1").replace(":02,", ":01,") for _, two in different
    ] == [one for one, _ in different]
    assert len(different) == 2


def test_journal_is_told_with_a_failure(machine: boot.Machine) -> None:
    """What the journal has of the failure follows what the console has."""
    machine.lines.append((1.0, "[FAILED] Failed to start a.service"))
    journal = machine.qmp_socket.with_name("journal.log")
    journal.write_text("[ 1.0] lb a[3]: fine\n" * 50 + "[ 2.0] lb a[3]: permission denied\n")
    said = str(machine.failure("no answer")).splitlines()
    assert said[:3] == ["no answer", "  [FAILED] Failed to start a.service", "  the journal:"]
    assert said[-1] == "  [ 2.0] lb a[3]: permission denied"
    assert len(said) < 20


@pytest.mark.parametrize("computer", COMPUTERS)
def test_units_for_the_proof_come_by_smbios(computer: Board) -> None:
    """The amphora's systemd gets each unit whole, as a credential that is binary."""
    argv = boot.qemu_argv(Path("/a.raw"), "tcg", computer=computer)
    strings = [word for word, before in zip(argv[1:], argv, strict=False) if before == "-smbios"]
    prefix = "type=11,value=io.systemd.credential.binary:"
    units = dict(string.removeprefix(prefix).split("=", 1) for string in strings)
    texts = {name: base64.b64decode(text).decode() for name, text in units.items()}
    assert texts.keys() == boot.CREDENTIALS.keys()
    assert any(f"file:/dev/{computer.journal}\n" in text for text in texts.values())
    assert not any("," in text for text in units.values())


@pytest.mark.parametrize("computer", COMPUTERS)
def test_every_computer_has_what_the_proof_attaches(computer: Board) -> None:
    """The config drive, the journal's port and the bus for the VIP's card are the computer's."""
    argv = boot.qemu_argv(Path("/a.raw"), "tcg", computer=computer)
    words = " ".join(argv)
    assert argv[0] == computer.program
    assert "id=config,file=config.iso" in words
    assert ",drive=config" in words
    assert "id=journal,path=journal.log" in words
    assert "chardev:journal" in words or "chardev=journal" in words
    assert words.index("-serial stdio") == words.index("-serial")
    if computer.hotplug_bus:
        assert f"pcie-root-port,id={computer.hotplug_bus}" in words


@pytest.mark.parametrize(("last_update", "mebibytes"), [(1795575863, 154), (0, None)])
def test_memory_is_what_the_balloon_tells(
    machine: boot.Machine, monkeypatch: pytest.MonkeyPatch, last_update: int, mebibytes: int | None
) -> None:
    """Memory in use is what is not available, and unknown before the amphora's kernel has told."""
    known = {"stat-total-memory": 967 << 20, "stat-available-memory": 813 << 20}
    unknown = dict.fromkeys(known, 2**64 - 1)
    told = {"stats": known if last_update else unknown, "last-update": last_update}
    monkeypatch.setattr(machine, "qmp", lambda command, **arguments: told)
    assert machine.memory_in_use() == mebibytes


def test_machine_has_the_balloon_that_is_asked() -> None:
    """The device that is asked for the memory is one of the machine's."""
    assert any("id=balloon" in word for word in boot.qemu_argv(Path("/a.raw"), "tcg"))
