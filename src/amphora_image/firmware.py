# SPDX-License-Identifier: Apache-2.0
"""What starts a virtual machine's disk: a BIOS, or a UEFI with or without Secure Boot."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from amphora_image.errors import HostError

#: Where the package ``ovmf`` of Debian and Ubuntu has its files.
OVMF = Path("/usr/share/OVMF")
#: The file of a machine's own UEFI variables, in QEMU's working directory.
VARIABLES = "variables.fd"


@dataclass(frozen=True)
class Firmware:
    """A firmware, and the machine that QEMU has to be for it.

    :ivar machine: as of QEMU's ``-machine``.
    :ivar options: further options of QEMU.
    :ivar hotplug_bus: the bus to plug cards into; None for the machine's only one.
    :ivar code: file name of a UEFI; empty for a BIOS, which QEMU brings along.
    :ivar variables: file name of the variables as they are at first.
    """

    machine: str
    options: tuple[str, ...] = ()
    hotplug_bus: str | None = None
    code: str = ""
    variables: str = ""


#: Secure Boot needs system management mode, which only a PCI Express machine has; cards are plugged
#: into a root port there.
FIRMWARES: Mapping[str, Firmware] = {
    "bios": Firmware("pc"),
    "uefi": Firmware("pc", code="OVMF_CODE_4M.fd", variables="OVMF_VARS_4M.fd"),
    "secure-boot": Firmware(
        "q35,smm=on",
        options=(
            *("-global", "driver=cfi.pflash01,property=secure,value=on"),
            *("-device", "pcie-root-port,id=card-port"),
        ),
        hotplug_bus="card-port",
        code="OVMF_CODE_4M.ms.fd",
        variables="OVMF_VARS_4M.ms.fd",
    ),
}


def prepare(firmware: Firmware, directory: Path) -> None:
    """Give a machine its own UEFI variables, as its maker would.

    :param directory: QEMU's working directory.
    :raises HostError: the firmware is not installed.
    """
    if not firmware.code:
        return
    for name in (firmware.code, firmware.variables):
        if not (OVMF / name).is_file():
            raise HostError(f"{OVMF / name} is missing", hint="install the package ovmf")
    shutil.copyfile(OVMF / firmware.variables, directory / VARIABLES)


def qemu_options(firmware: Firmware) -> list[str]:
    """Return QEMU's options for a firmware."""
    flash = "if=pflash,format=raw"
    files = (
        (
            f"{flash},unit=0,readonly=on,file={OVMF / firmware.code}",
            f"{flash},unit=1,file={VARIABLES}",
        )
        if firmware.code
        else ()
    )
    drives = [word for file in files for word in ("-drive", file)]
    # graphics=off lets the BIOS talk on the serial console.
    return ["-machine", f"{firmware.machine},graphics=off", *firmware.options, *drives]
