# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a build, nothing of it is left, an older image stays, and the user is told why."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import Scene, make_program, qemu_info

#: Where a build can be stopped: on the host side, in the chroot, on the mounted disk.
PHASES = ("root", "install", "finalise")
SECONDS_TO_STOP = 10
BASE_ELEMENTS = "amphora-base amphora-disk"
QEMU_IMG = shutil.which("qemu-img")


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_undoes_all(scene: Scene, phase: str) -> None:
    """Ctrl-C and SIGTERM end a build within ten seconds, with nothing left of it."""
    signals = {signal.SIGINT: 130, signal.SIGTERM: 143}
    older = {number: scene.kept(number.name) for number in signals}
    builds = {number: scene.start(number.name, fault=f"{phase}:pause") for number in signals}
    for build in builds.values():
        build.wait_for("fault: pausing")
    assert scene.living()
    started = time.monotonic()
    for number, build in builds.items():
        build.process.send_signal(number)
    ends = {number: build.end() for number, build in builds.items()}
    assert time.monotonic() - started < SECONDS_TO_STOP
    assert {number: status for number, (status, _) in ends.items()} == signals
    assert all("Traceback" not in said and "stopped by signal" in said for _, said in ends.values())
    assert all(path.read_text() == "older" for path in older.values())
    assert scene.left_behind() == []


def test_signals_that_come_again_and_again(scene: Scene) -> None:
    """An impatient user's signals during the clean-up do not break it off."""
    build = scene.start(fault="install:pause")
    build.wait_for("fault: pausing")
    while build.process.poll() is None:
        build.process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert build.end()[0] == 130
    assert scene.left_behind() == []


@pytest.mark.parametrize("phase", PHASES)
def test_an_element_that_fails(scene: Scene, phase: str) -> None:
    """The user sees the element's last words and the log's path; nothing is left."""
    older = scene.kept()
    build = scene.start(fault=f"{phase}:fail")
    status, said = build.end()
    assert status == 1
    assert "fault: the last words of an element" in said
    assert "fault: a second line, on standard error" in said
    assert str(build.log) in said.replace("\n", "")
    assert "Traceback" not in said
    assert "hint:" not in said
    log = build.log.read_text()
    assert "diskimage-builder version" in log
    assert "fault: the last words of an element" in log
    assert older.read_text() == "older"
    assert scene.left_behind() == []


def test_sigkill(scene: Scene) -> None:
    """The kernel ends what a killed build was doing, the next build removes what it kept.

    A build that goes on meanwhile keeps all that is its own, and nobody else's state file makes a
    build remove anything.
    """
    pausing = make_program(
        scene.directory / "bin" / "qemu-img",
        # The sandbox's first process has the log as its standard output.
        'for last; do :; done; head -c 99999 /dev/zero > "$last";'
        "echo fault: pausing > /proc/1/fd/1; sleep 303",
    )
    path = f"{pausing.parent}:{os.environ['PATH']}"
    scene.kept("image")
    dying = [
        *(scene.start(phase, fault=f"{phase}:pause") for phase in PHASES),
        scene.start("image", PATH=path),
        scene.start("disk", "-f", "-w", str(scene.directory), fault="finalise:pause"),
    ]
    for build in dying:
        build.wait_for("fault: pausing")
    for build in dying:
        build.process.kill()
        build.process.wait()
    deadline = time.monotonic() + 2
    while scene.living() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert scene.living() == []
    kept = "\n".join(scene.left_behind())
    assert ".part" in kept

    precious = scene.directory / "precious"
    precious.mkdir()
    foreign = scene.temporary / "amphora-image-foreign1"
    foreign.mkdir()
    (foreign / "state.json").write_text(json.dumps({"remove": [str(precious)]}))
    os.chown(foreign, 65534, 65534)

    living = scene.start("living", fault="finalise:pause")
    living.wait_for("fault: pausing")
    after = scene.start("after")
    assert after.end()[0] == 0
    assert precious.exists()
    left = [line for line in scene.left_behind() if str(foreign) not in line]
    assert left
    (name,) = living.workspaces
    others = set().union(*(build.workspaces for build in [*dying, after]))
    assert not [line for line in left if any(other in line for other in others)]
    assert [line for line in left if line.startswith("path: ") and name in line]
    living.process.send_signal(signal.SIGTERM)
    assert living.end()[0] == 143
    assert [line for line in scene.left_behind() if str(foreign) not in line] == []
    assert (scene.directory / "image.qcow2").read_text() == "older"


@pytest.mark.parametrize("phase", ["install", "finalise"])
def test_a_daemon_of_an_element(scene: Scene, phase: str) -> None:
    """What an element leaves running neither outlives the build nor holds it up."""
    build = scene.start(fault=f"{phase}:daemon")
    status, said = build.end()
    assert status == 0, said
    assert time.monotonic() - build.started < 60
    qemu_info(build.image)
    assert scene.left_behind() == []


def test_an_image_too_small(scene: Scene) -> None:
    """A root file system larger than its disk is a failure with a hint."""
    older = scene.kept()
    build = scene.start(fault="root:fill", TINY_MEBIBYTES="1600")
    status, said = build.end()
    assert status == 1
    assert "Could not allocate block" in said
    assert "hint: no space: make the image larger (-s)" in said
    assert older.read_text() == "older"
    assert scene.left_behind() == []


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mounted file system with room for no more than a build asks for at its start."""
    directory = tmp_path_factory.mktemp("small")
    tmpfs = ["mount", "-t", "tmpfs", "-o", "size=1100m", "tmpfs", str(directory)]
    subprocess.run(tmpfs, check=True)
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_an_output_disk_that_fills_up(scene: Scene, small_disk: Path) -> None:
    """No space for the image file, once the build is on its way, is a failure with a hint."""
    older = small_disk / "lb.qcow2"
    older.write_text("older")
    program = scene.directory / "bin" / "qemu-img"
    make_program(program, f'fallocate -l 1099m {small_disk}/filler; exec {QEMU_IMG} "$@"')
    path = f"{program.parent}:{os.environ['PATH']}"
    status, said = scene.start("lb", "-o", str(older), PATH=path).end()
    assert status == 1
    assert "hint: no space" in said
    assert older.read_text() == "older"
    assert {path.name for path in small_disk.iterdir()} == {"lb.qcow2", "filler"}
    assert scene.left_behind() == []


def test_an_output_that_is_a_directory(scene: Scene) -> None:
    """What cannot become a file is refused before any work."""
    (scene.directory / "lb.qcow2").mkdir()
    status, said = scene.start().end()
    assert status == 3
    assert "lb.qcow2'; allowed is the name of a file" in said
    assert scene.left_behind() == []


def test_a_mirror_that_does_not_answer(scene: Scene) -> None:
    """An unreachable mirror fails within seconds, and the hint names it."""
    build = scene.start(
        DIB_ELEMENTS=BASE_ELEMENTS, BASE_OS_MIRROR="http://127.0.0.1:9/debian", **NO_PROXY
    )
    status, said = build.end()
    assert status == 1
    assert "127.0.0.1" in said
    assert "hint: a mirror cannot be reached" in said
    assert time.monotonic() - build.started < 45
    assert scene.left_behind() == []


def test_an_archive_that_nobody_trusts(scene: Scene) -> None:
    """A mirror signed by a key that is in no keyring is refused, with a hint."""
    site = scene.directory / "site"
    _sign_release(site / "dists" / "trixie", scene.directory / "gnupg")
    with served(site) as url:
        build = scene.start(DIB_ELEMENTS=BASE_ELEMENTS, BASE_OS_MIRROR=url, **NO_PROXY)
        status, said = build.end()
    assert status == 1
    assert re.search(r"NO_PUBKEY|not signed|signature", said)
    assert "hint: the archive's signature is not trusted" in said
    assert scene.left_behind() == []


NO_PROXY = {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}


def _sign_release(directory: Path, keys: Path) -> None:
    directory.mkdir(parents=True)
    keys.mkdir(mode=0o700)
    release = directory / "Release"
    release.write_text(
        "Origin: test\nSuite: stable\nCodename: trixie\nComponents: main\nArchitectures: amd64\n"
        "Date: Sat, 01 Nov 2025 00:00:00 UTC\nSHA256:\n"
    )
    gpg = ["gpg", "--homedir", str(keys), "--batch", "--quiet", "--passphrase", ""]
    key = ["--quick-generate-key", "Test <test@mirror.example.org>", "ed25519", "sign", "never"]
    subprocess.run([*gpg, *key], check=True, capture_output=True)
    signed = ["--output", str(directory / "InRelease"), "--clearsign", str(release)]
    subprocess.run([*gpg, *signed], check=True, capture_output=True)
    subprocess.run(["gpgconf", "--homedir", str(keys), "--kill", "all"], check=True)


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Serve a directory by HTTP; yield its URL."""
    handler = functools.partial(QuietHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""
