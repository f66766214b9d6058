# SPDX-License-Identifier: Apache-2.0
"""Firmware of virtual machines: what QEMU is told, and the variables of each machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from amphora_image import firmware
from amphora_image.errors import HostError
from amphora_image.firmware import FIRMWARES, VARIABLES, prepare, qemu_options


@pytest.fixture
def ovmf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed UEFI."""
    (tmp_path / "ovmf").mkdir()
    for made in FIRMWARES.values():
        for name in filter(None, (made.code, made.variables)):
            (tmp_path / "ovmf" / name).write_text(name)
    monkeypatch.setattr(firmware, "OVMF", tmp_path / "ovmf")
    return tmp_path / "ovmf"


@pytest.mark.parametrize("name", FIRMWARES)
def test_variables_are_the_machines_own(ovmf: Path, tmp_path: Path, name: str) -> None:
    """A UEFI writes to a copy of its variables, and its code is read only; a BIOS has neither."""
    made = FIRMWARES[name]
    prepare(made, tmp_path)
    options = " ".join(qemu_options(made))
    assert ("pflash" in options) == bool(made.code) == (tmp_path / VARIABLES).exists()
    if made.code:
        assert (tmp_path / VARIABLES).read_text() == made.variables
        assert f"readonly=on,file={ovmf / made.code}" in options
        assert f"unit=1,file={VARIABLES}" in options


def test_secure_boot_is_secure() -> None:
    """Secure Boot has system management mode, and flash that only it may write."""
    options = " ".join(qemu_options(FIRMWARES["secure-boot"]))
    assert "smm=on" in options
    assert "property=secure,value=on" in options
    assert f"pcie-root-port,id={FIRMWARES['secure-boot'].hotplug_bus}" in options


def test_firmware_that_is_not_installed(ovmf: Path, tmp_path: Path) -> None:
    """Without the package the host is told what to install."""
    (ovmf / FIRMWARES["uefi"].variables).unlink()
    with pytest.raises(HostError, match="is missing") as missing:
        prepare(FIRMWARES["uefi"], tmp_path)
    assert missing.value.hint == "install the package ovmf"
