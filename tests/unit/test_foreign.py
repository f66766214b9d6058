# SPDX-License-Identifier: Apache-2.0
"""What the kernel is told of the programs of other architectures."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from amphora_image import foreign
from amphora_image.errors import HostError
from amphora_image.foreign import ABIS
from amphora_image.request import Architecture


def matches(rule: str, program: bytes) -> bool:
    """Whether a rule is for a program, as the kernel compares them (``fs/binfmt_misc.c``)."""
    _, _, kind, offset, magic, mask, _, _ = rule.split(":")
    assert (kind, offset) == ("M", "")
    wanted, bits = (bytes.fromhex(text.replace("\\x", "")) for text in (magic, mask))
    assert len(wanted) == len(bits)
    start = program[: len(wanted)]
    return all(
        one & bit == other & bit for one, other, bit in zip(start, wanted, bits, strict=True)
    )


@pytest.mark.parametrize("architecture", Architecture)
def test_rule(architecture: Architecture) -> None:
    """An interpreter gets the programs of its architecture alone, and is opened at once."""
    rule = foreign.rule(architecture, Path("/usr/bin/some-interpreter"))
    assert re.fullmatch(rf":amphora-image-{architecture}:M::[^:]+:[^:]+:/usr/bin/some-\w+:PF", rule)
    assert len(rule) < 1920  # the kernel takes no more
    found = [each for each in Architecture if matches(rule, foreign.leaving_program(ABIS[each]))]
    assert found == [architecture]


@pytest.mark.parametrize(("kind", "expected"), [(1, False), (2, True), (3, True), (4, False)])
def test_kinds_of_files(kind: int, expected: bool) -> None:
    """Executables and position independent ones are run, objects and core files are not."""
    program = bytearray(foreign.leaving_program(ABIS[Architecture.ARM64]))
    struct.pack_into("<H", program, 16, kind)
    program[7] = 3  # of GNU/Linux (System V ABI, EI_OSABI)
    rule = foreign.rule(Architecture.ARM64, Path("/usr/bin/some-interpreter"))
    assert matches(rule, bytes(program)) is expected


@pytest.mark.parametrize("architecture", Architecture)
def test_program_is_whole(architecture: Architecture) -> None:
    """The segment is the whole file, and the first instruction is the one that leaves."""
    abi = ABIS[architecture]
    program = foreign.leaving_program(abi)
    wide = abi.bits == 64
    entry, segments = struct.unpack_from("<QQ" if wide else "<II", program, 24)
    place = struct.unpack_from("<6Q" if wide else "<5I", program, segments + (8 if wide else 4))
    offset, address, _, in_file, in_memory = place[:5]
    assert (offset, in_file, in_memory) == (0, len(program), len(program))
    assert program[entry - address :] == abi.leave


@pytest.mark.parametrize(
    ("machine", "architecture"), [("x86_64", "amd64"), ("aarch64", "arm64"), ("s390x", None)]
)
def test_native(monkeypatch: pytest.MonkeyPatch, machine: str, architecture: str | None) -> None:
    """One architecture is a machine's own, or none that images are built for."""
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert [each for each in Architecture if foreign.is_native(each)] == (
        [architecture] if architecture else []
    )


def test_native_programs_need_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for the host's own architecture starts nothing."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with foreign.programs(Architecture.AMD64):
        pass
    foreign.require(Architecture.AMD64)


def test_nothing_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither processor nor interpreter: the message names the package."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("shutil.which", lambda program: None)
    monkeypatch.setattr(foreign, "runs", lambda architecture: False)
    with pytest.raises(HostError, match="qemu-aarch64-static is not installed") as missing:
        foreign.require(Architecture.ARM64)
    assert missing.value.hint == "apt-get install qemu-user-static"
