# SPDX-License-Identifier: Apache-2.0
"""Whole builds in seconds: a tiny operating system, elements that go wrong, and who cleans up."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from amphora_image import plan
from amphora_image.request import GIB

DATA = Path(__file__).parents[1] / "data"
ELEMENTS = "tiny-os amphora-disk faults amphora-manifest"
SIZE = 1.5 * GIB

#: What the disk of the tests takes from the real one, which has a boot loader besides.
SHARED_WITH_DISK = ("block-device-default.yaml", "cleanup.d/95-amphora-disk", "element-deps")

#: What diskimage-builder's phases and the tests' elements call in the chroot.
PROGRAMS = """
    awk basename bash cat date dd dirname env find grep mkdir mktemp rm rmdir sed setsid sleep sort
"""
DIRECTORIES = """
    boot/efi/EFI boot/grub dev etc lib/diskimage-builder proc root run sys tmp usr/bin usr/lib64
    var/lib/dpkg var/log
"""
FILES = {
    # What looks like a boot loader.
    "boot/grub/boot.img": "x" * 510 + "\x55\xaa",
    "boot/grub/core.img": "x" * 513,
    "etc/os-release": "ID=tiny\n",
    "var/lib/dpkg/status": (
        "Package: tiny\nStatus: install ok installed\nVersion: 1.0\nArchitecture: all\n"
        "Maintainer: none\nDescription: tiny\n\n"
    ),
}

#: The installed command, without its installed script: the tests run from a checkout too.
COMMAND = "import sys; from amphora_image.cli import diskimage_create; sys.exit(diskimage_create())"

#: Seconds that anything may take on a busy machine.
PATIENCE = 120


@dataclass(frozen=True)
class Elements:
    """The tests' elements, complete, and the tar of the tiny operating system."""

    path: Path
    root: Path


def make_elements(directory: Path) -> Elements:
    """Put the tests' elements together in a directory."""
    elements = Elements(directory / "elements", directory / "root.tar")
    shutil.copytree(DATA / "elements", elements.path)
    for part in SHARED_WITH_DISK:
        target = elements.path / "amphora-disk" / part
        target.parent.mkdir(exist_ok=True)
        shutil.copy(plan.ELEMENTS / "amphora-disk" / part, target)
    tree = directory / "root"
    for name in DIRECTORIES.split():
        (tree / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib64"):
        (tree / name).symlink_to(f"usr/{name}")
    for name, text in FILES.items():
        (tree / name).write_text(text, encoding="latin-1")
    for program in PROGRAMS.split():
        _copy_program(program, tree)
    (tree / "usr/bin/sh").symlink_to("bash")
    with tarfile.open(elements.root, "w") as tar:
        tar.add(tree, ".")
    return elements


def _copy_program(name: str, tree: Path) -> None:
    program = shutil.which(name)
    assert program
    shutil.copy(program, tree / "usr/bin" / name)
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for library in re.findall(r"(/\S+) \(0x", linked):
        target = tree / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)


@dataclass
class Build:
    """One run of the command.

    :ivar output: without the type's suffix.
    """

    process: subprocess.Popen[str]
    output: Path
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def image(self) -> Path:
        """The finished image."""
        return Path(f"{self.output}.qcow2")

    @property
    def manifest(self) -> dict[str, object]:
        """The finished image's manifest."""
        document: dict[str, object] = json.loads(Path(f"{self.image}.json").read_text())
        return document

    @property
    def workspaces(self) -> set[str]:
        """The names of the workspaces that the log tells of."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return set(re.findall(r"amphora-image-\w{8}", text))

    def wait_for(self, text: str) -> None:
        """Wait until the log has a text."""
        deadline = time.monotonic() + PATIENCE
        while not (self.log.exists() and text in self.log.read_text(errors="replace")):
            assert self.process.poll() is None, f"ended early: {self.end()}"
            assert time.monotonic() < deadline, f"no {text!r} in {self.log.read_text()[-2000:]}"
            time.sleep(0.05)

    def end(self, patience: float = PATIENCE) -> tuple[int, str]:
        """Wait for the end; return the exit status and what standard error says."""
        _, said = self.process.communicate(timeout=patience)
        return self.process.returncode, said


@dataclass
class Scene:
    """A directory for the builds of one test, and what must not be left of them.

    :ivar directory: all paths of the builds are below it.
    :ivar mark: an environment variable that all their processes have, ``NAME=value``.
    """

    directory: Path
    elements: Elements
    mark: str = field(default_factory=lambda: f"TINY_SCENE={uuid.uuid4().hex}")
    builds: list[Build] = field(default_factory=list)

    @property
    def temporary(self) -> Path:
        """TMPDIR of the builds."""
        return self.directory / "tmp"

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the environment of a build."""
        name, _, value = self.mark.partition("=")
        unwanted = {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH"}
        return {
            **{key: text for key, text in os.environ.items() if key not in unwanted},
            "DIB_ELEMENTS": ELEMENTS,
            "DIB_LOCAL_ELEMENTS_PATH": str(self.elements.path),
            # DIB imports its Python parts anew a dozen times: keep them compiled.
            "PYTHONPYCACHEPREFIX": str(self.elements.path.parent / "pycache"),
            "TINY_ROOT": str(self.elements.root),
            "TMPDIR": str(self.temporary),
            name: value,
            **extra,
        }

    def start(
        self,
        name: str = "lb",
        *arguments: str,
        fault: str = "",
        program: Sequence[str] = (sys.executable, "-c", COMMAND),
        **extra: str,
    ) -> Build:
        """Start the build of ``NAME.qcow2``, all of it below the scene's directory."""
        self.temporary.mkdir(exist_ok=True)
        output = self.directory / name
        log = self.directory / f"{name}.log"
        given = {"-i": "debian", "-s": "1.5", "-c": self.directory / "cache"}
        words = [*(str(word) for pair in given.items() for word in pair), "-o", str(output)]
        process = subprocess.Popen(
            [*program, *words, "-l", str(log), *arguments],
            env=self.environment(TINY_FAULT=fault, **extra),
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.builds.append(Build(process, output, log))
        return self.builds[-1]

    def kept(self, name: str = "lb") -> Path:
        """Make an older output file, which a build that fails must keep."""
        path = self.directory / f"{name}.qcow2"
        path.write_text("older")
        return path

    def left_behind(self) -> list[str]:
        """Return what is there of the builds: mounts, loop devices, processes, directories."""
        return sorted([*self._mounts(), *self._loop_devices(), *self._processes(), *self._paths()])

    def living(self) -> list[str]:
        """Return what of the builds the kernel ends with them: mounts and processes."""
        return [*self._mounts(), *self._processes()]

    def _names(self) -> set[str]:
        return {str(self.directory)}.union(*(build.workspaces for build in self.builds))

    def _mounts(self) -> Iterator[str]:
        for line in Path("/proc/mounts").read_text().splitlines():
            if any(name in line for name in self._names()):
                yield f"mount: {line}"

    def _loop_devices(self) -> Iterator[str]:
        for file in Path("/sys/block").glob("loop*/loop/backing_file"):
            with suppress(OSError):
                backing = file.read_text().strip()
                if any(name in backing for name in self._names()):
                    yield f"loop device: {file.parts[3]} of {backing}"

    def _processes(self) -> Iterator[str]:
        for pid in processes_with(self.mark):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                yield f"process: {pid} {words}"

    def _paths(self) -> Iterator[str]:
        for path in self.directory.rglob("*"):
            if path.name.endswith(".part") or path.parent == self.temporary:
                yield f"path: {path}"
        for build in self.builds:
            workspaces = (Path("/tmp", name) for name in build.workspaces)
            yield from (f"path: {path}" for path in workspaces if path.exists())

    def clear(self) -> None:
        """End what a failed test left."""
        for pid in processes_with(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for build in self.builds:
            build.process.communicate(timeout=PATIENCE)
        for device in self._loop_devices():
            subprocess.run(["losetup", "--detach", f"/dev/{device.split()[2]}"], check=False)


def processes_with(mark: str) -> list[int]:
    """Return the processes whose environment has ``NAME=value``, see proc_pid_environ(5)."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parts[2]))
    return found


def make_program(path: Path, script: str) -> Path:
    """Make a shell script that stands in for a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    return path


def qemu_info(image: Path) -> Mapping[str, object]:
    """Return what qemu-img tells of an image, after it has checked it."""
    if image.suffix == ".qcow2":
        subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)
    said = subprocess.run(
        ["qemu-img", "info", "--output=json", str(image)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    facts: Mapping[str, object] = json.loads(said)
    return facts
