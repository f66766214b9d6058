# SPDX-License-Identifier: Apache-2.0
"""Rules: an image that breaks none, and for each rule images that break it alone."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fake_image
import pytest
from fake_image import BREAKS, Break, as_image, asked, directory, file, nodes
from rich.console import Console

from amphora_image import check, disk, safety
from amphora_image.errors import BadValue
from amphora_image.image import Image, Mark
from amphora_image.partitions import ESP
from amphora_image.request import ImageType
from amphora_image.rules import Asked

DOCUMENT = (Path(__file__).parents[2] / "docs/check.rst").read_text()
NAMES = [rule.name for rule in check.RULES]


def broken(image: Image, expected: Asked | None = None) -> set[str]:
    """The names of the rules that an image breaks."""
    return {finding.rule for finding in check.findings(image, expected or asked())}


def of_disk(**changes: Any) -> Image:
    """An image with another file system."""
    image = as_image(nodes())
    assert image.file_system
    return replace(image, file_system=replace(image.file_system, **changes))


def test_good_image() -> None:
    """An image that is as it should be breaks no rule, with a manifest and without."""
    assert check.findings(as_image(nodes()), asked()) == []
    assert check.findings(as_image(nodes()), Asked()) == []


def test_good_tar() -> None:
    """A tar file has no disk, and the rules for disks leave it alone."""
    tar = Image("amphora.tar", ImageType.TAR, 1, as_image(nodes()).tree)
    assert check.findings(tar, asked()) == []


@pytest.mark.parametrize(
    ("rule", "what", "break_it"), BREAKS, ids=[f"{rule}-{what}" for rule, what, _ in BREAKS]
)
def test_broken_tree(rule: str, what: str, break_it: Break) -> None:
    """The named rule finds what is wrong, and no other rule does."""
    found = nodes()
    break_it(found)
    findings = check.findings(as_image(found), asked())
    assert {finding.rule for finding in findings} == {rule}
    assert any(what in finding.what for finding in findings)


def with_fips(command_line: str, configured: bool | None) -> Image:
    """An image whose kernel has that command line, and FIPS mode or not; None: not known."""
    found = nodes()
    menu = found["boot/grub/grub.cfg"].data.decode()
    found["boot/grub/grub.cfg"] = file(menu.replace("root=LABEL=root-label ro", command_line))
    if configured is not None:
        value = "CONFIG_CRYPTO_FIPS=y" if configured else "# CONFIG_CRYPTO_FIPS is not set"
        found[f"boot/config-{fake_image.KERNEL}"] = file(f"CONFIG_CRYPTO=y\n{value}\n")
    return as_image(found)


@pytest.mark.parametrize("configured", [True, None])
def test_fips_mode(configured: bool | None) -> None:
    """A kernel that may be in FIPS mode and is told so is what was asked for; else nobody asks."""
    image = with_fips("root=LABEL=root-label fips=1", configured)
    assert broken(image, asked(fips=True)) == set()
    assert broken(with_fips("root=LABEL=root-label ro", False), asked()) == set()


@pytest.mark.parametrize(
    ("rule", "image", "expected"),
    [
        ("size", as_image(nodes()), asked(size=2**30)),
        ("size", of_disk(size=fake_image.ROOT_SIZE - 4096), asked()),
        ("file-system", of_disk(errors="Inode 12 has an invalid mode"), asked()),
        ("loopback", of_disk(state="not clean"), asked()),
        ("loopback", of_disk(features=("extent", "needs_recovery")), asked()),
        ("loopback", of_disk(features=("extent", "encrypt")), asked()),
        ("loopback", of_disk(size=fake_image.ROOT_SIZE + 4096), asked()),
        ("boot-loader", replace(as_image(nodes()), bios=b""), asked()),
        ("boot-loader", replace(as_image(nodes()), first_sector=bytes(512)), asked()),
        ("locked-packages", as_image(nodes()), asked(packages={"haproxy": "2.0"})),
        ("locked-packages", as_image(nodes()), asked(python_packages={"octavia": "2.0"})),
        ("datasources", as_image(nodes()), asked(datasources="OpenStack")),
        ("root-password", as_image(nodes()), asked(root_password=True)),
        ("fips", with_fips("root=LABEL=root-label ro", True), asked(fips=True)),
        ("fips", with_fips("root=LABEL=root-label fips=1", False), asked(fips=True)),
        ("secrets", replace(as_image(nodes()), marks=(Mark("private key", ""),)), asked()),
        ("sshd", as_image(nodes()), asked(sshd=False)),
    ],
)
def test_broken_otherwise(rule: str, image: Image, expected: Asked) -> None:
    """What is wrong with a disk, or with what was asked, is found by the named rule alone."""
    assert broken(image, expected) == {rule}


#: Where a UEFI looks.
EFI_PARTITION = disk.Partition("esp", ESP, 3 * 2**20, 2**20)


def for_uefi(machine: int, *partitions: disk.Partition, esp: tuple[str, ...] = ()) -> Image:
    """An image for another ELF machine, with more partitions, and the files of one of them."""
    found = nodes()
    elf = bytearray(found["usr/lib/systemd/systemd"].data)
    struct.pack_into("<H", elf, 18, machine)
    found["usr/lib/systemd/systemd"] = file(bytes(elf), 0o755)
    image = as_image(found)
    return replace(image, partitions=(*image.partitions, *partitions), esp=esp)


@pytest.mark.parametrize(
    ("image", "finding"),
    [
        (for_uefi(62), None),
        (for_uefi(62, EFI_PARTITION, esp=("EFI/BOOT/BOOTX64.EFI",)), None),
        (for_uefi(62, EFI_PARTITION, esp=("EFI/BOOT/BOOTAA64.EFI",)), "BOOTX64.EFI"),
        (for_uefi(183, EFI_PARTITION, esp=("efi/boot/bootaa64.efi", "EFI/a")), None),
        (for_uefi(183, EFI_PARTITION, esp=("EFI/BOOTAA64.EFI",)), "no EFI/BOOT/BOOTAA64.EFI"),
        (for_uefi(183), "no EFI/BOOT/BOOTAA64.EFI"),
        (for_uefi(40, EFI_PARTITION, esp=("EFI/BOOT/BOOTARM.EFI",)), None),
        (for_uefi(40, EFI_PARTITION), "no EFI/BOOT/BOOTARM.EFI"),
        (for_uefi(3), None),
    ],
)
def test_uefi_finds_its_loader(image: Image, finding: str | None) -> None:
    """A disk whose firmware is a UEFI has what that starts, for its own architecture."""
    told = check.findings(image, asked())
    assert {each.rule for each in told} == ({"boot-loader"} if finding else set())
    assert all(str(finding) in each.what for each in told)


def test_bios_is_not_asked_of_other_architectures() -> None:
    """Where there is no BIOS nobody looks for its boot loader; GRUB's menu counts everywhere."""
    image = for_uefi(183, EFI_PARTITION, esp=("EFI/BOOT/BOOTAA64.EFI",))
    bare = replace(image, bios=b"", first_sector=bytes(512))
    assert check.findings(bare, asked()) == []
    renamed = replace(bare, file_system=replace(bare.file_system, label="other"))  # type: ignore[type-var]
    assert broken(renamed) == {"boot-loader"}


def test_file_system_with_a_name_that_is_none() -> None:
    """A name that hides others is told, its control characters not."""
    image = as_image(nodes())
    image = replace(image, tree=replace(image.tree, strange=("usr: /12/104755/0/0/\x1b[2Jevil",)))
    [finding] = check.findings(image, asked())
    assert finding.rule == "file-system"
    assert finding.what.endswith("?[2Jevil")


def test_missing_package() -> None:
    """A package that is not there is found, without a manifest too."""
    found = nodes()
    status = found["var/lib/dpkg/status"]
    without = status.data.replace(b"Package: haproxy\n", b"Package: other\n")
    found["var/lib/dpkg/status"] = replace(status, data=without)
    assert broken(as_image(found), Asked()) == {"packages"}
    assert broken(as_image(found)) == {"packages", "locked-packages"}


def test_no_package_database() -> None:
    """An image without any package database is no amphora."""
    found = nodes()
    del found["var/lib/dpkg/status"]
    assert broken(as_image(found)) == {"packages"}


def test_agent_without_octavia() -> None:
    """The commands alone are no agent."""
    found = {path: node for path, node in nodes().items() if "dist-info" not in path}
    assert broken(as_image(found), Asked()) == {"agent"}


def test_no_kernel() -> None:
    """Without a kernel neither boots anything nor are there modules."""
    found = {path: node for path, node in nodes().items() if fake_image.KERNEL not in path}
    assert broken(as_image(found)) == {"kernel", "boot-loader"}


def test_many_findings() -> None:
    """All findings are told, but of a thousand files that break one rule only some."""
    found = nodes()
    found |= {f"tmp/file-{number}": file("x", uid=number) for number in range(1000)}
    found |= {f"usr/share/{number}": file("x", uid=7) for number in range(1000)}
    findings = check.findings(as_image(found), asked())
    assert {finding.rule for finding in findings} == {"caches", "ownership"}
    assert [f.what for f in findings if f.what.startswith("and ")] == ["and 980 files more"] * 2


@pytest.mark.parametrize(
    "path",
    [
        "opt/amphora-agent/lib/python3.13/site-packages/thing/tests/key.pem",
        "usr/lib/x86_64-linux-gnu/libgnutls.so.30.34.3",
    ],
)
def test_known_test_keys(path: str) -> None:
    """Keys that a package ships for its own tests are no secret."""
    found = nodes()
    found[path] = file(fake_image.PRIVATE_KEY)
    assert broken(as_image(found)) == set()


def test_expected_root_password() -> None:
    """A password that was asked for is none that breaks a rule."""
    found = nodes()
    found["etc/shadow"] = file("root:$y$j9T$hash:20000::::::\n", 0o640)
    assert broken(as_image(found), asked(root_password=True)) == set()


def test_image_without_sshd() -> None:
    """Without an SSH server there is nothing to say about its settings."""
    found = nodes()
    del found["usr/sbin/sshd"]
    assert broken(as_image(found), asked(sshd=False)) == set()


def test_enabled_sshd_where_none_was_asked() -> None:
    """A unit of sshd that is enabled is found even if the program is not there."""
    found = nodes()
    del found["usr/sbin/sshd"]
    found["etc/systemd/system/multi-user.target.wants/ssh.service"] = fake_image.link("/x")
    assert broken(as_image(found), asked(sshd=False)) == {"sshd"}


def test_every_rule_is_broken_somewhere() -> None:
    """No rule is without an image that breaks it."""
    [parameters] = [mark for mark in test_broken_otherwise.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    otherwise = {rule for rule, *_ in parameters.args[1]}
    assert {rule for rule, *_ in BREAKS} | otherwise == set(NAMES)


def test_rules_are_documented() -> None:
    """Each rule has a name of its own, and its name, reason and fix are in the document."""
    assert len(set(NAMES)) == len(NAMES)
    text = " ".join(DOCUMENT.split())
    missing = {
        part
        for rule in check.RULES
        for part in (f"``{rule.name}``", " ".join(rule.why.split()), " ".join(rule.fix.split()))
        if part not in text
    }
    assert missing == set()


def findings_of(*paths: str) -> list[check.Finding]:
    """Findings of an image that holds caches."""
    return check.findings(as_image({**nodes(), **{p: file("x") for p in paths}}), asked())


def test_json() -> None:
    """The JSON object tells of every rule whether it holds, and what breaks it."""
    document = json.loads(check.as_json("a", findings_of("tmp/x")))
    assert document["passed"] is False
    assert document["rules"] == {name: name != "caches" for name in NAMES}
    assert document["findings"][0]["what"] == "/tmp/x"
    assert set(document["findings"][0]) == {"rule", "severity", "what", "why", "fix"}
    assert json.loads(check.as_json("a", []))["passed"] is True


def test_junit() -> None:
    """The XML file has a test case for each rule, and a failure with all that breaks it."""
    suite = ElementTree.fromstring(check.as_junit("a", findings_of("tmp/<x>", "tmp/\x01")))  # noqa: S314
    assert suite.attrib["tests"] == str(len(NAMES))
    assert suite.attrib["failures"] == "1"
    assert [case.attrib["name"] for case in suite] == NAMES
    [failure] = suite.iter("failure")
    assert failure.text
    assert {"/tmp/<x>", "/tmp/?"} <= set(failure.text.splitlines())


def test_table() -> None:
    """The table names every rule, and shows what breaks one as it is written."""
    console = Console(width=200, record=True, quiet=True)
    with console.capture() as capture:
        Console(file=console.file)
        console.quiet = False
        console.print(check.as_table("a", findings_of("tmp/[red]x")))
    shown = capture.get()
    assert all(name in shown for name in NAMES)
    assert "/tmp/[red]x" in shown
    assert f"{len(NAMES)} rules, 1 broken" in shown


def test_manifest(tmp_path: Path) -> None:
    """The manifest tells what was asked."""
    path = tmp_path / "image.json"
    for expected in (asked(), asked(root_password=True), asked(sshd=False), asked(fips=True)):
        path.write_text(fake_image.manifest(expected))
        assert check.read_manifest(path) == expected


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"schema": "x", "request": {}}', "{"])
def test_bad_manifest(tmp_path: Path, text: str) -> None:
    """What is no manifest is refused by its name."""
    path = tmp_path / "image.json"
    path.write_text(text)
    with pytest.raises(BadValue, match=r"image\.json' cannot be used"):
        check.read_manifest(path)


def test_check_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest beside the image counts, and an option beats it."""
    image = tmp_path / "amphora.raw"
    Path(f"{image}.json").write_text(fake_image.manifest(asked()))
    monkeypatch.setattr(check, "read_image", lambda *_: as_image(nodes()))
    assert check.check_image(image) == []
    for options, rule in (
        ({"size": Decimal(1)}, "size"),
        ({"no_sshd": True}, "sshd"),
        ({"root_password": True}, "root-password"),
    ):
        found = check.check_image(image, **options)  # type: ignore[arg-type]
        assert {finding.rule for finding in found} == {rule}
    with pytest.raises(BadValue, match="cannot be used"):
        check.check_image(image, manifest=tmp_path / "missing.json")


def test_patterns_take_names_as_they_are() -> None:
    """A directory of the build host is looked for as it is written, dots and all."""
    *_, last = safety.patterns(Asked(directories=("/srv/a.b",)))
    assert last.whole.search(b"x /srv/a.b/c")
    assert not last.whole.search(b"x /srv/aXb/c")


def test_directories_are_not_files() -> None:
    """Empty directories where caches were are none."""
    found = nodes()
    found["var/lib/apt/lists/partial"] = directory()
    assert broken(as_image(found)) == set()
