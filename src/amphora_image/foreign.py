# SPDX-License-Identifier: Apache-2.0
"""Programs of another architecture than this machine's, for the time of a build.

A build runs programs of the image. Where the processor cannot, QEMU's user-mode emulation does,
which the kernel starts for them (binfmt_misc, kernel documentation ``admin-guide/binfmt-misc``).
What a distribution has registered for that is used; else a keeper, :func:`main`, registers it and
takes it away again. It ends when its standard input does, so it outlives a build that is killed.

The kernel has one register for all containers. A file of it, a byte for each architecture, is the
lock: each keeper holds it shared, and the last one, who gets it alone, takes away what a keeper has
registered.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from amphora_image.errors import AmphoraImageError, HostError
from amphora_image.request import Architecture
from amphora_image.run import run

#: The package of Debian and Ubuntu that holds all interpreters.
PACKAGE = "qemu-user-static"

#: Of the names under which keepers register.
PREFIX = "amphora-image-"

#: What a keeper covers in its mount namespace with what it needs.
OWN = Path("/sys")

#: What a keeper says when programs run.
READY = "ready"

#: Name of a machine by :manpage:`uname(2)` -> its architecture.
MACHINES: Mapping[str, Architecture] = {
    "x86_64": Architecture.AMD64,
    "i686": Architecture.I386,
    "armv7l": Architecture.ARMHF,
    "aarch64": Architecture.ARM64,
    "ppc64le": Architecture.PPC64LE,
}


@dataclass(frozen=True)
class Abi:
    """What a program of an architecture looks like, and what interprets it.

    :ivar bits: of an address, 32 or 64.
    :ivar machine: ``e_machine`` of its ELF header (System V ABI, "ELF header").
    :ivar leave: machine code of ``exit(0)``.
    :ivar interpreter: its program of :data:`PACKAGE`.
    :ivar flags: ``e_flags`` that kernels insist on.
    """

    bits: int
    machine: int
    leave: bytes
    interpreter: str
    flags: int = 0


#: All of them are little endian.
ABIS: Mapping[Architecture, Abi] = {
    # xor edi, edi; mov eax, 60; syscall
    Architecture.AMD64: Abi(64, 62, bytes.fromhex("31ffb83c0000000f05"), "qemu-x86_64-static"),
    # xor ebx, ebx; mov eax, 1; int 0x80
    Architecture.I386: Abi(32, 3, bytes.fromhex("31dbb801000000cd80"), "qemu-i386-static"),
    # mov x0, 0; mov x8, 93; svc 0
    Architecture.ARM64: Abi(
        64, 183, bytes.fromhex("000080d2a80b80d2010000d4"), "qemu-aarch64-static"
    ),
    # mov r0, 0; mov r7, 1; svc 0. The flags: version 5 of the embedded ABI
    Architecture.ARMHF: Abi(
        32, 40, bytes.fromhex("0000a0e30170a0e3000000ef"), "qemu-arm-static", flags=0x5000000
    ),
    # li r3, 0; li r0, 1; sc. The flags: version 2 of the ABI
    Architecture.PPC64LE: Abi(
        64, 21, bytes.fromhex("000060380100003802000044"), "qemu-ppc64le-static", flags=2
    ),
}

#: The ELF header's first 16 bytes: magic, class (1: 32 bits, 2: 64), little endian, version 1.
_IDENT = b"\x7fELF%c\x01\x01" + bytes(9)
#: Where a program without relocations may lie in memory on all of them.
_BASE = 0x400000


def is_native(architecture: Architecture) -> bool:
    """Whether it is this machine's own architecture."""
    return MACHINES.get(platform.machine()) is architecture


def leaving_program(abi: Abi) -> bytes:
    """Return a program that does nothing but end with status 0: an ELF file of one segment."""
    word, header_size, segment_size = ("Q", 64, 56) if abi.bits == 64 else ("I", 52, 32)
    code = header_size + segment_size
    size = code + len(abi.leave)
    header = struct.pack(
        f"<16sHHI3{word}I6H",
        *(_IDENT % (abi.bits // 32), 2, abi.machine, 1, _BASE + code, header_size, 0, abi.flags),
        *(header_size, segment_size, 1, 0, 0, 0),
    )
    loaded, readable_and_executable, alignment = 1, 5, 0x10000
    place = (0, _BASE, _BASE, size, size)
    if abi.bits == 64:
        segment = struct.pack("<2I6Q", loaded, readable_and_executable, *place, alignment)
    else:
        segment = struct.pack("<8I", loaded, *place, readable_and_executable, alignment)
    return header + segment + abi.leave


def rule(architecture: Architecture, interpreter: Path) -> str:
    """Return the line that registers an interpreter for an architecture's programs.

    P: it learns how a program was called; F: it is opened now, so that a chroot need not have it.
    """
    abi = ABIS[architecture]
    # Executables and what else can be executed (types 2 and 3), whatever their operating system is.
    magic = _IDENT % (abi.bits // 32) + struct.pack("<HH", 2, abi.machine)
    mask = b"\xff" * 7 + b"\0" + b"\xff" * 8 + b"\xfe\xff\xff\xff"
    escaped = ("".join(f"\\x{byte:02x}" for byte in text) for text in (magic, mask))
    return ":".join(("", f"{PREFIX}{architecture}", "M", "", *escaped, str(interpreter), "PF"))


def runs(architecture: Architecture, directory: Path | None = None) -> bool:
    """Try whether programs of an architecture run here, in a chroot that holds no interpreter.

    :param directory: where to try, if not where temporary files are.
    """
    with tempfile.TemporaryDirectory(dir=directory) as root:
        program = Path(root, "leave")
        program.write_bytes(leaving_program(ABIS[architecture]))
        program.chmod(0o700)
        try:
            run(["chroot", root, "/leave"])
        except AmphoraImageError:
            return False
    return True


def require(architecture: Architecture) -> None:
    """Refuse an architecture whose programs cannot run here.

    :raises HostError: neither the processor nor an interpreter runs them.
    """
    interpreter = ABIS[architecture].interpreter
    if not (is_native(architecture) or shutil.which(interpreter) or runs(architecture)):
        raise HostError(
            f"programs for {architecture} do not run here, and {interpreter} is not installed",
            hint=f"apt-get install {PACKAGE}",
        )


@contextmanager
def programs(architecture: Architecture) -> Iterator[None]:
    """Let programs of an architecture run on this machine for the time of a ``with`` block.

    :raises HostError: they cannot.
    """
    if is_native(architecture):
        yield
        return
    argv = [sys.executable, "-m", "amphora_image.foreign", architecture]
    # Its standard input ends with the block, or with this process.
    with subprocess.Popen(
        ["unshare", "--mount", "--", *argv],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as keeper:
        assert keeper.stdout
        said = keeper.stdout.readline().strip()
        if said != READY:
            raise HostError(
                f"programs for {architecture} do not run here: {said}{keeper.stdout.read()}",
                hint=f"in a container: install {PACKAGE} on the machine that runs it",
            )
        yield


@contextmanager
def _registered(architecture: Architecture) -> Iterator[None]:
    """Register what is missing; the last one to leave takes away what was registered.

    To be called in a mount namespace of its own.
    """
    # Where nothing of ours can lie. In /tmp programs may not be allowed.
    run(["mount", "-t", "tmpfs", "tmpfs", OWN])
    register = OWN / "register"
    register.mkdir()
    run(["mount", "-t", "binfmt_misc", "binfmt_misc", register])
    with (register / "status").open("r+b", buffering=0) as lock:
        _lock(lock, architecture, fcntl.LOCK_SH)
        try:
            if not runs(architecture, OWN):
                _register(architecture, register)
            yield
        finally:
            # Another keeper goes on, or nothing had to be registered.
            with suppress(BlockingIOError, FileNotFoundError):
                _lock(lock, architecture, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (register / f"{PREFIX}{architecture}").write_text("-1")


def _lock(file: IO[bytes], architecture: Architecture, kind: int) -> None:
    fcntl.lockf(file, kind, 1, ABIS[architecture].machine)


def _register(architecture: Architecture, register: Path) -> None:
    interpreter = shutil.which(ABIS[architecture].interpreter)
    if not interpreter:
        raise HostError(f"{ABIS[architecture].interpreter} is not installed")
    with suppress(FileExistsError):  # another keeper came first
        (register / "register").write_text(rule(architecture, Path(interpreter)))
    if not runs(architecture, OWN):
        raise HostError(f"{interpreter} does not run them")


def main() -> int:
    """Let an architecture's programs run until standard input ends; say so when they do."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the build gets them too, and ends this
    os.umask(0o077)
    try:
        with _registered(Architecture(sys.argv[1])):
            print(READY, flush=True)
            sys.stdin.read()
    except (AmphoraImageError, OSError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
