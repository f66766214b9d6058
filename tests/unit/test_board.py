# SPDX-License-Identifier: Apache-2.0
"""Virtual computers: what QEMU is told, the variables of each machine, and which an image needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from amphora_image import board
from amphora_image.board import BOARDS, VARIABLES, Board, board_for, prepare, qemu_options
from amphora_image.errors import BadValue, CheckFailed, HostError
from amphora_image.partitions import LAYOUTS
from amphora_image.request import Architecture

KINDS = [
    pytest.param(architecture, name, id=f"{architecture}-{name}")
    for architecture, boards in BOARDS.items()
    for name in boards
]


def installed(made: Board, directory: Path) -> Board:
    """The same computer, its firmware in a directory."""
    if not made.code or not made.variables:
        return made
    files = [directory / path.name for path in (made.code, made.variables)]
    for file in files:
        file.write_text(file.name)
    return replace(made, code=files[0], variables=files[1])


@pytest.mark.parametrize(("architecture", "name"), KINDS)
def test_variables_are_the_machines_own(
    tmp_path: Path, architecture: Architecture, name: str
) -> None:
    """A UEFI writes to a copy of its variables, and its code is read only; a BIOS has neither."""
    (tmp_path / "firmware").mkdir()
    made = installed(BOARDS[architecture][name], tmp_path / "firmware")
    prepare(made, tmp_path)
    options = " ".join(qemu_options(made))
    copy = tmp_path / VARIABLES
    assert (name == "bios") == (not made.code) == ("pflash" not in options) == (not copy.exists())
    if made.code and made.variables:
        assert copy.read_text() == made.variables.name
        assert f"readonly=on,file={made.code}" in options
        assert f"unit=1,file={VARIABLES}" in options


def test_secure_boot_is_secure() -> None:
    """Secure Boot has system management mode, and flash that only it may write."""
    options = " ".join(qemu_options(BOARDS[Architecture.AMD64]["secure-boot"]))
    assert "smm=on" in options
    assert "property=secure,value=on" in options


def test_processor_has_no_page_tables_of_five_levels() -> None:
    """With them a guest of TCG dies now and then as its kernel starts (QEMU issue 1023)."""
    for made in BOARDS[Architecture.AMD64].values():
        options = qemu_options(made)
        assert "la57=off" in options[options.index("-cpu") + 1].split(",")


@pytest.mark.parametrize(("architecture", "name"), KINDS)
def test_firmware_that_is_not_installed(
    tmp_path: Path, architecture: Architecture, name: str
) -> None:
    """Without the package the host is told what to install."""
    made = installed(BOARDS[architecture][name], tmp_path)
    if not made.variables:
        prepare(made, tmp_path)
        return
    made.variables.unlink()
    with pytest.raises(HostError, match="is missing") as missing:
        prepare(made, tmp_path)
    assert missing.value.hint == f"install the package {made.firmware_package}"


def test_what_can_be_built_can_be_booted() -> None:
    """There is a computer for each architecture that has a boot chain."""
    assert BOARDS.keys() == LAYOUTS.keys()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """The path of an image, beside which a manifest may be."""
    return tmp_path / "lb.qcow2"


def tell(image: Path, architecture: str) -> None:
    """Write a manifest beside an image."""
    manifest = {"request": {"architecture": architecture}}
    Path(f"{image}.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("architecture", "firmware", "program", "machine"),
    [
        ("amd64", None, "qemu-system-x86_64", "pc,graphics=off"),
        ("amd64", "secure-boot", "qemu-system-x86_64", "q35,smm=on,graphics=off"),
        ("i386", None, "qemu-system-x86_64", "pc,graphics=off"),
        ("arm64", None, "qemu-system-aarch64", "virt"),
        ("arm64", "uefi", "qemu-system-aarch64", "virt"),
        ("armhf", None, "qemu-system-arm", "virt,highmem=off"),
    ],
)
def test_computer_of_a_manifest(
    image: Path, architecture: str, firmware: str | None, program: str, machine: str
) -> None:
    """The manifest tells the architecture, and that has a firmware by default."""
    tell(image, architecture)
    found = board_for(image, firmware)
    assert (found.program, found.machine) == (program, machine)


@pytest.mark.parametrize(
    ("architecture", "firmware", "said"),
    [
        ("arm64", "bios", "--firmware is bios; for arm64 there are uefi"),
        ("i386", "uefi", "--firmware is uefi; for i386 there are bios"),
        ("ppc64le", None, "for ppc64le there are none"),
    ],
)
def test_no_computer(image: Path, architecture: str, firmware: str | None, said: str) -> None:
    """A firmware that an architecture has not is refused, with what there is."""
    tell(image, architecture)
    with pytest.raises(BadValue, match=said):
        board_for(image, firmware)


@pytest.mark.parametrize("manifest", [None, "{}", "no JSON", '{"request": {}}', "[]"])
def test_image_without_a_manifest(
    image: Path, monkeypatch: pytest.MonkeyPatch, manifest: str | None
) -> None:
    """What the manifest does not tell the image does; and if that cannot be read, it is our own."""
    if manifest:
        Path(f"{image}.json").write_text(manifest)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(board, "read_image", lambda path: path)
    image_of = {"tree": "the tree"}
    monkeypatch.setattr(Path, "tree", image_of["tree"], raising=False)
    monkeypatch.setattr(board.facts, "read_architecture", {"the tree": "armhf"}.get)
    assert board.architecture_of(image) is Architecture.ARMHF

    def damaged(path: Path) -> None:
        raise CheckFailed("no partition table")

    monkeypatch.setattr(board, "read_image", damaged)
    assert board.architecture_of(image) is Architecture.ARM64
