# SPDX-License-Identifier: Apache-2.0
"""The boot proof, with QEMU and a real image."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from amphora_image import boot, container, network, proof
from amphora_image.board import BOARDS
from amphora_image.check import Finding
from amphora_image.oci import write_oci
from amphora_image.page import write_page
from amphora_image.report import Milestone, Report, Span
from amphora_image.request import Architecture


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test leaves a temporary file, a process, a thread, a mount or a network."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = left(tmp_path)
    yield
    assert left(tmp_path) == before
    assert not list(scratch.iterdir())


def left(directory: Path) -> dict[str, set[str]]:
    """What a test might leave: processes, ours or such that use its files, threads, mounts ..."""
    children = Path("/proc/self/task").glob("*/children")
    mounts = Path("/proc/mounts").read_text().splitlines()
    return {
        "children": {pid for path in children for pid in words_of(path).split()},
        "others": {str(path) for path in cmdlines() if str(directory) in words_of(path)},
        "threads": {thread.name for thread in threading.enumerate()},
        "mounts": {line for line in mounts if str(directory) in line},
        "run": {path.name for path in Path("/run").glob("amphora-*")},
        "networks": {path.name for path in Path("/proc/sys/net/ipv4/conf").iterdir()},
    }


def words_of(file: Path) -> str:
    """The words of a file of a process, in one line; none once that has ended."""
    with contextlib.suppress(OSError):
        return file.read_bytes().decode(errors="replace").replace("\0", " ")
    return ""


def cmdlines() -> Iterator[Path]:
    """The arguments of all processes (:manpage:`proc(5)`), each of which may end at any moment."""
    yield from Path("/proc").glob("[0-9]*/cmdline")


def machines_of(image: Path) -> list[str]:
    """List the numbers of the QEMU processes that have the image in their arguments."""
    name = str(image.resolve()).replace(",", ",,")
    found = ((path.parent.name, words_of(path)) for path in cmdlines())
    return [pid for pid, words in found if words.startswith("qemu-system") and name in words]


@pytest.mark.parametrize(
    "topology", ["single", pytest.param("active-standby", marks=pytest.mark.standby)]
)
def test_debian_amphorae_balance_load(debian_image: Path, tmp_path: Path, topology: str) -> None:
    """Amphorae of the image do all that Octavia wants."""
    before = debian_image.stat()
    log = tmp_path / "serial.log"
    count, steps = proof.TOPOLOGIES[topology]
    report = proof.prove(debian_image, log=log, topology=topology)
    assert report.failure == ""
    names = [each.name for each in report.milestones]
    seconds = [each.seconds for each in report.milestones if each.seconds is not None]
    assert names == [*boot.SERIAL_MILESTONES, *steps]
    assert len(seconds) == len(names)
    assert seconds == sorted(seconds)
    assert report.agent["api_version"] == "1.0"
    assert str(report.agent["hostname"]).startswith("amphora-")
    assert report.units
    logs = list(tmp_path.glob("serial.log*"))
    assert len(logs) == count
    assert all("Linux version" in log.read_text() for log in logs)
    assert debian_image.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("kind", ["tar", "oci"])
def test_debian_balances_load_in_a_container(debian_image: Path, tmp_path: Path, kind: str) -> None:
    """The HAProxy of the image's tar file, or of an OCI image of it, does so, and is gone then."""
    file = debian_image.with_suffix(".tar")
    if kind == "oci":
        file, tar = tmp_path / "lb.oci", file
        now = datetime.now(UTC)
        write_oci(tar, file, name="lb", architecture=Architecture.AMD64, created=now)
    report = container.prove(file)
    assert report.failure == ""
    assert [each.name for each in report.milestones] == list(container.STEPS)


@pytest.fixture
def empty_disk(tmp_path: Path) -> Path:
    """A disk of 16 MB with nothing on it, and a name that QEMU must be told with care."""
    image = tmp_path / "an empty, 'quoted' dïsk.raw"
    with image.open("wb") as file:
        file.truncate(16 * 1024**2)
    return image


@pytest.fixture
def endless_disk(tmp_path: Path) -> Path:
    """A disk whose first sector is code that does nothing for ever: a jump to itself."""
    image = tmp_path / "endless.raw"
    image.write_bytes(b"\xeb\xfe" + bytes(508) + b"\x55\xaa" + bytes(1024**2))
    return image


def test_disk_that_does_not_boot_fails_at_once(empty_disk: Path, tmp_path: Path) -> None:
    """The firmware's own words end the wait, and nothing but the log is left."""
    log = tmp_path / "serial.log"
    began = time.monotonic()
    report = proof.prove(empty_disk, log=log, accel="tcg", timeout=120)
    assert time.monotonic() - began < 60
    assert "agent answers: the machine stopped" in report.failure
    assert "No bootable device" in report.failure
    assert report.missing == list(proof.SINGLE)[1:]
    assert "No bootable device" in log.read_text()


def test_machine_that_does_nothing_fails_in_time(endless_disk: Path, tmp_path: Path) -> None:
    """A machine that goes on for ever without a word is ended when the time is up."""
    report = proof.prove(endless_disk, log=tmp_path / "serial.log", accel="tcg", timeout=5)
    assert re.match(r"agent answers: \d+ s after power-on still missing", report.failure)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_proof(endless_disk: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A signal ends the proof and all that it started; the exit code tells which."""
    log = tmp_path / "serial.log"
    with command("boot", endless_disk, "--accel", "tcg", "--log", log) as proving:
        wait_until(lambda: log.exists() and "Booting from Hard Disk" in log.read_text())
        assert len(machines_of(endless_disk)) == 1
        proving.send_signal(number)
        _, said = proving.communicate(timeout=60)
    assert proving.returncode == 128 + number
    assert said.splitlines()[-1].startswith(f"error: stopped by signal {number.value}")


def test_interrupted_container(debian_image: Path) -> None:
    """So it is with a container that runs."""
    tar = debian_image.with_suffix(".tar")
    with command("boot", "--container", tar) as proving:
        wait_until(lambda: any("haproxy.cfg" in words_of(path) for path in cmdlines()))
        proving.terminate()
        _, said = proving.communicate(timeout=120)
    assert proving.returncode == 128 + signal.SIGTERM, said


def command(*argv: object) -> subprocess.Popen[str]:
    """Start ``amphora-image``."""
    program = "import sys; from amphora_image.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", program, *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True)


def wait_until(holds: Callable[[], bool], seconds: float = 300) -> None:
    """Wait for something, a long time on a busy host."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_damaged_image_fails_with_qemus_own_words(tmp_path: Path) -> None:
    """What QEMU says of an image that it cannot open is in the message."""
    image = tmp_path / "a.qcow2"
    image.write_bytes(b"no disk image at all")
    report = proof.prove(image, log=tmp_path / "serial.log", accel="tcg", timeout=60)
    assert re.search(r"QEMU ended with 1(.|\n)*not in qcow2 format", report.failure)


def test_machine_dies_with_whoever_started_it(empty_disk: Path, tmp_path: Path) -> None:
    """QEMU does not outlive its starter, even one that is killed and can undo nothing."""
    program = (
        "import pathlib, sys, time; from amphora_image import boot, network\n"
        "image, log = map(pathlib.Path, sys.argv[1:])\n"
        "with network.isolated(), "
        "boot.power_on(image, {}, accelerator='tcg', log=log) as machine:\n"
        "    machine.wait('QEMU', lambda: machine.qmp('query-status'), 60)\n"
        "    print('on', flush=True)\n"
        "    time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", program, empty_disk, tmp_path / "serial.log"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # nobody can remove its files
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as starter:
        assert starter.stdout is not None
        said, machines = starter.stdout.readline(), machines_of(empty_disk)
        starter.kill()
    assert (said, len(machines)) == ("on\n", 1)
    wait_until(lambda: not machines_of(empty_disk), 30)


def test_networks_are_the_proofs_own() -> None:
    """In the block there is the proof's bridge alone; afterwards all is as before."""

    def links() -> set[str]:
        return {path.name for path in Path("/proc/sys/net/ipv4/conf").iterdir()}

    before = links()
    with network.isolated():
        network.add_tap("vip1")
        assert links() == {"all", "default", "lo", "vip", "vip1"}
        with socket.create_server((network.GATEWAY, 80)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    assert links() == before


REPORT = Report(
    image="a.qcow2",
    accelerator="tcg",
    topology="single",
    serial_log="a.log",
    milestones=[Milestone("kernel starts", 1.0), Milestone("agent answers", 60.0, "api_version 1")],
    missing=["HTTP balanced"],
    units=[Span("cloud-init.service", 5.0, 25.0)],
    failure="HTTP balanced: timed out",
)


def test_page_in_a_browser(tmp_path: Path) -> None:
    """A browser shows the page: its tables are whole, its bars have their widths."""
    page, picture = tmp_path / "proof.html", tmp_path / "proof.png"
    write_page(REPORT, page, [Finding("setuid", "error", "/srv/su", "why", "fix")])
    script = """<script>
    const bars = [...document.querySelectorAll(".bar")].map(bar => bar.getBoundingClientRect());
    document.title = [document.querySelectorAll("tr").length, bars.length,
                      bars.every(bar => bar.width >= 2 && bar.height > 5),
                      Math.round(bars[1].left - bars[0].right),
                      getComputedStyle(document.querySelector(".verdict")).backgroundColor,
                      document.body.scrollWidth <= window.innerWidth].join();
    </script>"""
    page.write_text(page.read_text() + script)
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,800"]
    browser += [f"--user-data-dir={tmp_path}/profile", f"file://{page}"]
    dom = subprocess.check_output([*browser, "--dump-dom"], text=True, timeout=120)
    assert "<title>8,3,true,0,rgb(179, 38, 30),true</title>" in dom
    subprocess.check_call([*browser, f"--screenshot={picture}"], timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_config_drive_is_what_cloud_init_looks_for(tmp_path: Path) -> None:
    """The label is config-2, and names stay as they are: long and in lower case."""
    drive = boot.config_drive("an-id", {"/etc/a": "A"}, "#cloud-config\n")
    boot.write_config_drive(drive, tmp_path)
    iso = tmp_path / "config.iso"
    isoinfo = shutil.which("isoinfo")
    assert isoinfo is not None
    listed = subprocess.check_output([isoinfo, "-R", "-f", "-i", iso], text=True).split()
    label = subprocess.check_output([isoinfo, "-d", "-i", iso], text=True)
    content = [isoinfo, "-R", "-i", iso, "-x", "/openstack/content/0000"]
    assert "Volume id: config-2" in label
    assert {f"/{path}" for path in drive} <= set(listed)
    assert subprocess.check_output(content, text=True) == "A"
    assert list(tmp_path.glob("config*")) == [iso]


@pytest.mark.parametrize(("firmware", "secure"), [("uefi", False), ("secure-boot", True)])
def test_uefi_starts_the_disk(
    debian_image: Path, tmp_path: Path, firmware: str, secure: bool
) -> None:
    """A UEFI finds the boot loader, and with Secure Boot all that it starts is signed."""
    log = tmp_path / "serial.log"
    with (
        network.isolated(),
        boot.power_on(
            debian_image,
            {},
            accelerator="tcg",
            log=log,
            computer=BOARDS[Architecture.AMD64][firmware],
        ) as machine,
    ):
        started = boot.SERIAL_MILESTONES["systemd starts"]
        machine.wait("systemd", lambda: machine.seen(started), machine.patience)
    said = log.read_text(errors="replace")
    assert "efi: EFI v" in said
    assert ("secureboot: Secure boot enabled" in said) == secure
