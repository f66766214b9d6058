# SPDX-License-Identifier: Apache-2.0
"""What is shipped for tempest: what needs neither tempest nor a cloud to be seen."""

from __future__ import annotations

import configparser
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from amphora_image.controller import config
from amphora_image.initramfs import DRIVERS

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "tempest/image.conf"
DOCUMENT = (ROOT / "docs/tempest.rst").read_text()


@pytest.fixture(scope="module")
def wrong() -> Callable[..., list[str]]:
    """What ``tempest/check.py``, which is no module of the package, finds wrong with properties."""
    check = runpy.run_path(str(ROOT / "tempest/check.py"))

    def found(settings: Path, image: Mapping[str, Any]) -> list[str]:
        return list(check["wrong_properties"](settings, image))

    return found


def manifest(**request: Any) -> dict[str, Any]:
    """A manifest of the README's image, some of the request changed."""
    asked = {"size": "5", "base_os": "debian", "architecture": "amd64", **request}
    return {"request": asked, "files": {"lb.qcow2": {}, "lb.tar": {}}}


def test_fitting_image(wrong: Callable[..., list[str]]) -> None:
    """The README's image is what the shipped file says of it; a smaller one fits as well."""
    assert wrong(IMAGE, manifest()) == []
    assert wrong(IMAGE, manifest(size="2")) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"size": "5.5"}, "min_disk is 5; the disk has 5.5 GB"),
        ({"architecture": "arm64"}, "architecture is x86_64; the image's is aarch64"),
        ({"base_os": "ubuntu"}, "os_distro is debian; the image's is ubuntu"),
    ],
)
def test_other_image(
    wrong: Callable[..., list[str]], request_: dict[str, str], message: str
) -> None:
    """An image that is not what the file says of it is told."""
    assert wrong(IMAGE, manifest(**request_)) == [message]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\ndisk = 5", "\ndisk = 4", "the flavor's disk is 4; min_disk is 5"),
        ("\nram = 1024", "\nram = 512", "the flavor's ram is 512; min_ram is 1024"),
        ("= qcow2", "= vhd", "disk_format is vhd; the files are lb.qcow2, lb.tar"),
        ("image_tag = amphora", "image_tag = lb", "amp_image_tag is lb; the image's is amphora"),
    ],
)
def test_properties_that_do_not_fit(
    wrong: Callable[..., list[str]], tmp_path: Path, old: str, new: str, message: str
) -> None:
    """So are properties of which one does not fit the other."""
    text = IMAGE.read_text()
    assert text.count(old) == 1
    changed = tmp_path / "image.conf"
    changed.write_text(text.replace(old, new))
    assert wrong(changed, manifest()) == [message]


def test_document_tells_every_property() -> None:
    """The commands of the document have each value of the file, and the file each of theirs."""
    parser = configparser.ConfigParser()
    parser.read_string(IMAGE.read_text())
    told = {
        *(f"--{name.replace('_', '-')} {value}" for name, value in parser["image"].items()),
        *(f"--property {name}={value}" for name, value in parser["properties"].items()),
        *(f"--{name} {value}" for name, value in parser["flavor"].items()),
        *(f"\n   {name} = {value}\n" for name, value in parser["controller_worker"].items()),
    }
    assert {words for words in told if words not in DOCUMENT} == set()
    assert DOCUMENT.count("--property ") == len(parser["properties"])


def test_octavia_knows_its_options() -> None:
    """Each option of octavia.conf in the document is one of Octavia's."""
    section = DOCUMENT.partition("[controller_worker]\n")[2].partition("\n\n")[0]
    names = [line.split(" = ")[0].strip() for line in section.splitlines()]
    known = {option.name for option in config.controller_worker_opts}
    assert len(names) > 3
    assert set(names) - known == set()


def test_image_has_the_drivers() -> None:
    """The disk's bus that Nova is told is one that the initramfs has a driver of."""
    assert "hw_disk_bus = virtio" in IMAGE.read_text()
    assert {"virtio_pci", "virtio_blk", "virtio_scsi"} <= set(DRIVERS)


def test_every_group_of_tests_has_its_reason() -> None:
    """Before each group of tests a sentence tells what of the image they use."""
    groups = (ROOT / "tempest/tests.txt").read_text().split("\n\n")
    assert all(group.startswith("# ") and "." in group.splitlines()[0] for group in groups)
    assert len(groups) > 8
