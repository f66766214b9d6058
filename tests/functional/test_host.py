# SPDX-License-Identifier: Apache-2.0
"""A machine that cannot build says so at once: what is missing, and what to do about it."""

from __future__ import annotations

import sys
import time

import pytest
from tiny import COMMAND, Scene

from amphora_image import host

#: A user who is not root but can read the tests' Python wherever it is.
NOBODY = "exec setpriv --reuid 65534 --clear-groups --inh-caps +dac_read_search " + (
    '--ambient-caps +dac_read_search "$@"'
)
TOOLS = " ".join({*host.TOOLS, *host.APT_TOOLS} - {"qemu-img"})
ONLY_SOME_TOOLS = (
    f'mkdir bin; for tool in {TOOLS}; do ln -s "$(command -v $tool)" bin; done; PATH=$PWD/bin'
)
NO_ADMINISTRATION = 'exec setpriv --inh-caps -sys_admin --bounding-set -sys_admin "$@"'
NO_LOOP_DEVICES = (
    "mount -t tmpfs tmpfs tmp; cp -a /dev/null /dev/zero /dev/urandom /dev/fd tmp;"
    "mkdir tmp/pts;"
    "mount --move tmp /dev"
)
LITTLE_MEMORY = (
    "sed 's/^MemAvailable:.*/MemAvailable: 300000 kB/' /proc/meminfo > meminfo;"
    "mount --bind meminfo /proc/meminfo"
)
MEMORY_FOR_A_BUILD_ON_DISK = LITTLE_MEMORY.replace("300000", "2000000")
SMALL_DISK = "mkdir small; mount -t tmpfs -o size=64m tmpfs small"
NO_KEYRINGS = "mount -t tmpfs tmpfs /usr/share/keyrings"

#: What a machine lacks (commands in its own mount namespace), options, the message, the hint.
FAULTS = {
    "not root": (NOBODY, "", "needs root", "sudo"),
    "no tool": (ONLY_SOME_TOOLS, "", "not installed: qemu-img", "apt-get install qemu-utils"),
    "no namespaces": (NO_ADMINISTRATION, "", "no private mount", "--privileged"),
    "no memory": (LITTLE_MEMORY, "", "292 MiB of memory are free", ""),
    "no space to work": (SMALL_DISK, "-f -w small", "small has 64 MiB free; 4096", "-w"),
    "no space to work, no memory": (
        f"{SMALL_DISK}; {MEMORY_FOR_A_BUILD_ON_DISK}",
        "-w small",
        "small has 64 MiB free; 4096",
        "-w",
    ),
    "no space for the output": (SMALL_DISK, "-o small/lb", "small has 64 MiB free; 1024", "-o"),
    "a full disk": (f"{SMALL_DISK}; fallocate -l 64m small/x", "-o small/lb", "has 0 MiB", "-o"),
    # Ubuntu's are brought along.
    "no keys": (NO_KEYRINGS, "", "debian-archive-keyring.gpg", "debian-archive-keyring"),
}


@pytest.mark.parametrize(("lack", "options", "message", "hint"), FAULTS.values(), ids=FAULTS)
def test_a_host_that_cannot_build(
    scene: Scene, lack: str, options: str, message: str, hint: str
) -> None:
    """Exit code 2 within seconds, what is wrong, a hint, and nothing made."""
    script = f'set -eu; {lack}; exec "$@"'
    program = ["unshare", "--mount", "bash", "-c", script, "bash", sys.executable, "-c", COMMAND]
    build = scene.start("lb", *options.split(), program=program)
    status, said = build.end()
    assert time.monotonic() - build.started < 10
    assert status == 2, said
    assert "Traceback" not in said
    assert message in said
    assert hint in said.partition("hint:")[2]
    assert not (scene.directory / "cache").exists()
    assert not build.log.exists()
    assert scene.left_behind() == []


def test_a_host_without_loop_devices(scene: Scene) -> None:
    """A container without loop devices can build: nothing is mounted from a file."""
    script = f'set -eu; {NO_LOOP_DEVICES}; exec "$@"'
    program = ["unshare", "--mount", "bash", "-c", script, "bash", sys.executable, "-c", COMMAND]
    status, said = scene.start("lb", program=program).end()
    assert status == 0, said
    assert scene.left_behind() == []
