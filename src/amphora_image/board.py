# SPDX-License-Identifier: Apache-2.0
"""The virtual computers that images start on: one for each architecture and firmware."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from amphora_image import facts
from amphora_image.errors import AmphoraImageError, BadValue, HostError
from amphora_image.host import default_architecture
from amphora_image.image import read_image
from amphora_image.request import Architecture

#: The file of a machine's own UEFI variables, in QEMU's working directory.
VARIABLES = "variables.fd"


@dataclass(frozen=True)
class Board:
    """What QEMU has to be told of a computer.

    :ivar program: of QEMU.
    :ivar package: of Debian and Ubuntu that holds it.
    :ivar machine: as of its ``-machine``.
    :ivar cpu: as of its ``-cpu``.
    :ivar options: further options: how the CD-ROM ``config`` and the second serial port, for the
        character device ``journal``, are attached, to name two.
    :ivar journal: what the guest calls that port.
    :ivar hosts: names of machines, see :manpage:`uname(2)`, whose KVM can be it.
    :ivar hotplug_bus: the bus to plug cards into; None for the machine's only one.
    :ivar code: a UEFI; None for a BIOS, which QEMU brings along.
    :ivar variables: its variables as they are at first.
    :ivar firmware_package: of Debian and Ubuntu that holds both.
    """

    program: str
    package: str
    machine: str
    cpu: str
    options: tuple[str, ...]
    journal: str
    hosts: tuple[str, ...]
    hotplug_bus: str | None = None
    code: Path | None = None
    variables: Path | None = None
    firmware_package: str = ""


#: Cards are plugged into a root port where the bus is PCI Express.
_PORT = "card-port"
_ROOT_PORT = ("-device", f"pcie-root-port,id={_PORT}")
_OVMF, _AAVMF = Path("/usr/share/OVMF"), Path("/usr/share/AAVMF")

_PC = Board(
    "qemu-system-x86_64",
    "qemu-system-x86",
    # graphics=off lets the BIOS talk on the serial console.
    machine="pc,graphics=off",
    # All that the accelerator can do but page tables of five levels: with them a guest of TCG dies
    # now and then as its kernel starts (QEMU issue 1023), and 1 GB needs none.
    cpu="max,la57=off",
    options=("-vga", "std", "-serial", "chardev:journal", "-device", "ide-cd,drive=config"),
    journal="ttyS1",
    hosts=("x86_64",),
)
_PC_UEFI = replace(
    _PC,
    code=_OVMF / "OVMF_CODE_4M.fd",
    variables=_OVMF / "OVMF_VARS_4M.fd",
    firmware_package="ovmf",
)
_VIRT = Board(
    "qemu-system-aarch64",
    "qemu-system-arm",
    machine="virt",
    # Not all that the accelerator can do: it signs each pointer in software, and has vector
    # registers of 256 bytes to save whenever programs take turns.
    cpu="cortex-a72",
    options=(
        *("-device", "pci-serial,chardev=journal"),
        *("-device", "virtio-scsi-pci", "-device", "scsi-cd,drive=config"),
        *("-device", "virtio-keyboard-pci"),
        *_ROOT_PORT,
    ),
    journal="ttyS0",
    hosts=("aarch64",),
    hotplug_bus=_PORT,
    code=_AAVMF / "AAVMF_CODE.fd",
    variables=_AAVMF / "AAVMF_VARS.fd",
    firmware_package="qemu-efi-aarch64",
)

#: Architecture -> name of a firmware -> the computer; the first firmware is the default.
BOARDS: Mapping[Architecture, Mapping[str, Board]] = {
    Architecture.AMD64: {
        "bios": _PC,
        "uefi": _PC_UEFI,
        # Secure Boot needs system management mode, which only a PCI Express machine has.
        "secure-boot": replace(
            _PC_UEFI,
            machine="q35,smm=on,graphics=off",
            options=(
                *_PC.options,
                *("-global", "driver=cfi.pflash01,property=secure,value=on"),
                *_ROOT_PORT,
            ),
            hotplug_bus=_PORT,
            code=_OVMF / "OVMF_CODE_4M.ms.fd",
            variables=_OVMF / "OVMF_VARS_4M.ms.fd",
        ),
    },
    Architecture.I386: {"bios": _PC},
    Architecture.ARM64: {"uefi": _VIRT},
    Architecture.ARMHF: {
        "uefi": replace(
            _VIRT,
            program="qemu-system-arm",
            # What lies above 4 GiB is out of reach for kernels without large physical addresses.
            machine="virt,highmem=off",
            cpu="cortex-a15",
            hosts=(),
            code=_AAVMF / "AAVMF32_CODE.fd",
            variables=_AAVMF / "AAVMF32_VARS.fd",
            firmware_package="qemu-efi-arm",
        )
    },
}
FIRMWARES = tuple(dict.fromkeys(name for boards in BOARDS.values() for name in boards))
DEFAULT = _PC


def board_for(image: Path, firmware: str | None = None) -> Board:
    """Return the computer that an image is for.

    :param firmware: one of :data:`FIRMWARES`; None: the architecture's first.
    :raises BadValue: there is none with that firmware.
    """
    architecture = architecture_of(image)
    boards = BOARDS.get(architecture, {})
    name = firmware or next(iter(boards), "not given")
    if name not in boards:
        raise BadValue(
            f"--firmware is {name}; for {architecture} there are {', '.join(boards) or 'none'}"
        )
    return boards[name]


def architecture_of(image: Path) -> Architecture:
    """Tell what an image is for: by the manifest beside it, or else by what it holds.

    What cannot be read is taken for this machine's own; its boot will tell what is wrong.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads(Path(f"{image}.json").read_text())
        return Architecture(manifest["request"]["architecture"])
    with suppress(AmphoraImageError, ValueError):
        return Architecture(facts.read_architecture(read_image(image).tree))
    return default_architecture(platform.machine())


def prepare(board: Board, directory: Path) -> None:
    """Give a machine its own UEFI variables, as its maker would.

    :param directory: QEMU's working directory.
    :raises HostError: the firmware is not installed.
    """
    if not board.code or not board.variables:
        return
    for file in (board.code, board.variables):
        if not file.is_file():
            raise HostError(
                f"{file} is missing", hint=f"install the package {board.firmware_package}"
            )
    shutil.copyfile(board.variables, directory / VARIABLES)


def qemu_options(board: Board) -> list[str]:
    """Return QEMU's options for a computer, without its firmware's name."""
    flash = "if=pflash,format=raw"
    files = (
        (f"{flash},unit=0,readonly=on,file={board.code}", f"{flash},unit=1,file={VARIABLES}")
        if board.code
        else ()
    )
    drives = [word for file in files for word in ("-drive", file)]
    return ["-machine", board.machine, "-cpu", board.cpu, *drives, *board.options]
