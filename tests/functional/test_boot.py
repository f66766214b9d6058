# SPDX-License-Identifier: Apache-2.0
"""The boot proof, with QEMU and a real image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from amphora_image import boot
from amphora_image.errors import BootFailed


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of the test go, so that none that is left is overlooked."""
    path = tmp_path / "scratch"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


def machines_of(image: Path) -> list[str]:
    """List the numbers of the QEMU processes that have the image in their arguments."""
    name = str(image.resolve()).replace(",", ",,").encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            argv = (process / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if argv.startswith(b"qemu-system") and name in argv:
            found.append(process.name)
    return found


def test_debian_amphora_serves_its_controller_alone(
    debian_image: Path, tmp_path: Path, scratch: Path
) -> None:
    """The image boots to an agent that serves the controller and refuses all others."""
    before = debian_image.stat()
    report = boot.prove(debian_image, log=tmp_path / "serial.log")
    seconds = [value for value in report.milestones.values() if value is not None]
    assert list(report.milestones) == [
        "kernel starts",
        "systemd starts",
        "agent answers",
        "strangers refused",
    ]
    assert len(seconds) == len(report.milestones)
    assert seconds == sorted(seconds)
    assert report.agent["api_version"] == "1.0"
    assert str(report.agent["hostname"]).startswith("amphora-")
    assert "Linux version" in (tmp_path / "serial.log").read_text()
    assert debian_image.stat().st_mtime_ns == before.st_mtime_ns
    assert not machines_of(debian_image)
    assert not list(scratch.iterdir())


@pytest.fixture
def empty_disk(tmp_path: Path) -> Path:
    """A disk of 16 MB with nothing on it, and a name that QEMU must be told with care."""
    image = tmp_path / "an empty, 'quoted' dïsk.raw"
    with image.open("wb") as file:
        file.truncate(16 * 1024**2)
    return image


def test_disk_that_does_not_boot_fails_at_once(
    empty_disk: Path, tmp_path: Path, scratch: Path
) -> None:
    """The firmware's own words end the wait, and nothing but the log is left."""
    log = tmp_path / "serial.log"
    began = time.monotonic()
    with pytest.raises(BootFailed, match="No bootable device") as failure:
        boot.prove(empty_disk, log=log, accel="tcg", timeout=120)
    assert time.monotonic() - began < 60
    assert str(log) in (failure.value.hint or "")
    assert "No bootable device" in log.read_text()
    assert not machines_of(empty_disk)
    assert not list(scratch.iterdir())


def test_damaged_image_fails_with_qemus_own_words(tmp_path: Path) -> None:
    """What QEMU says of an image that it cannot open is in the message."""
    image = tmp_path / "a.qcow2"
    image.write_bytes(b"no disk image at all")
    with pytest.raises(BootFailed, match=r"QEMU ended with 1(.|\n)*not in qcow2 format"):
        boot.prove(image, log=tmp_path / "serial.log", accel="tcg", timeout=60)


def test_machine_dies_with_whoever_started_it(empty_disk: Path, tmp_path: Path) -> None:
    """QEMU does not outlive its starter, even one that is killed and can undo nothing."""
    program = (
        "import pathlib, sys, time; from amphora_image import boot\n"
        "image, log = map(pathlib.Path, sys.argv[1:])\n"
        "with boot.power_on(image, {}, accelerator='tcg', log=log) as machine:\n"
        "    machine.wait('QEMU', machine.agent_port, 60)\n"
        "    print('on', flush=True)\n"
        "    time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", program, empty_disk, tmp_path / "serial.log"]
    env = {**os.environ, "TMPDIR": tempfile.gettempdir()}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as starter:
        assert starter.stdout is not None
        said, machines = starter.stdout.readline(), machines_of(empty_disk)
        starter.kill()
    assert (said, len(machines)) == ("on\n", 1)
    deadline = time.monotonic() + 5
    while machines_of(empty_disk) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not machines_of(empty_disk)


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
