#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check what needs no cloud of a run of tempest: its settings, its tests, the image's properties.

The Python that runs it has to have tempest and the plugins of ``requirements/tempest.txt``.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import json
import logging
import re
import sys
import tempfile
import unittest
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: Architecture of a manifest -> its name in Glance (Glance, "Useful image properties").
ARCHITECTURES = {
    "amd64": "x86_64",
    "arm64": "aarch64",
    "armhf": "armv7l",
    "i386": "i686",
    "ppc64le": "ppc64le",
}
#: Disk format of Glance -> suffix of an image file.
SUFFIXES = {"qcow2": ".qcow2", "raw": ".raw", "vhd": ".vhd"}


def wrong_options(config: Path) -> Iterator[str]:
    """Tell the settings of a tempest configuration that nobody reads, or that have a wrong type."""
    from oslo_config import cfg
    from tempest.config import CONF, TempestConfigPrivate

    TempestConfigPrivate(parse_conf=False)  # registers all options, those of plugins too
    cfg.CONF([], default_config_files=[str(config)])
    sections: dict[str, dict[str, list[str]]] = {}
    cfg.ConfigParser(str(config), sections).parse()
    for section, options in sections.items():
        for option in options:
            try:
                getattr(cfg.CONF if section == "DEFAULT" else cfg.CONF[section], option)
            except cfg.NoSuchOptError:
                yield f"[{section}] {option} is an option of neither tempest nor a plugin"
            except cfg.ConfigFileValueError as error:
                yield f"[{section}] {option}: {error}"
    cfg.CONF.clear()
    CONF.set_config_path(str(config))  # which tests read when they are imported


def wrong_tests(include_list: Path) -> Iterator[str]:
    """Tell the lines of an include list that name no test, and the tests that would be skipped."""
    tests = dict(plugin_tests())
    for line in include_list.read_text().splitlines():
        pattern = line.partition("#")[0].strip()  # as stestr reads such a list
        found = [case for name, case in tests.items() if pattern and re.search(pattern, name)]
        if pattern and not found:
            yield f"{pattern} names no test of a plugin"
        yield from (f"{each.id()} is skipped: {why}" for each in found if (why := skipped(each)))


def plugin_tests() -> Iterator[tuple[str, unittest.TestCase]]:
    """Find all tests of tempest's plugins by their names, as tempest itself does."""
    from tempest.test_discover.plugins import TempestTestPluginManager

    def cases(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
        for each in suite:
            if isinstance(each, unittest.TestSuite):
                yield from cases(each)
            else:
                yield each

    for directory, top in TempestTestPluginManager().get_plugin_load_tests_tuple().values():
        suite = unittest.TestLoader().discover(directory, top_level_dir=top)
        yield from ((case.id(), case) for case in cases(suite))


def skipped(case: unittest.TestCase) -> str:
    """Tell why the settings alone make tempest skip a test; empty if they do not."""
    for place in (type(case), getattr(case, case._testMethodName)):
        if getattr(place, "__unittest_skip__", False):
            return str(place.__unittest_skip_why__)
    try:
        type(case).skip_checks()  # which looks at settings alone
    except unittest.SkipTest as skip:
        return str(skip)
    return ""


def wrong_properties(settings: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Tell where an image, by its manifest, is not what Glance, Nova and Octavia are told of it."""
    parser = configparser.ConfigParser()
    parser.read_string(settings.read_text())
    image, properties, flavor = (parser[name] for name in ("image", "properties", "flavor"))
    size, base_os = float(manifest["request"]["size"]), manifest["request"]["base_os"]
    architecture = ARCHITECTURES[manifest["request"]["architecture"]]
    suffix = SUFFIXES.get(image["disk_format"])
    wrong = {
        f"min_disk is {image['min_disk']}; the disk has {size:g} GB": (
            image.getint("min_disk") < size
        ),
        f"the flavor's disk is {flavor['disk']}; min_disk is {image['min_disk']}": (
            flavor.getint("disk") < image.getint("min_disk")
        ),
        f"the flavor's ram is {flavor['ram']}; min_ram is {image['min_ram']}": (
            flavor.getint("ram") < image.getint("min_ram")
        ),
        f"architecture is {properties['architecture']}; the image's is {architecture}": (
            properties["architecture"] != architecture
        ),
        f"os_distro is {properties['os_distro']}; the image's is {base_os}": (
            properties["os_distro"] != base_os
        ),
        f"disk_format is {image['disk_format']}; the files are {', '.join(manifest['files'])}": (
            not any(Path(name).suffix == suffix for name in manifest["files"])
        ),
        f"amp_image_tag is {parser['controller_worker']['amp_image_tag']}; "
        f"the image's is {image['tag']}": (
            parser["controller_worker"]["amp_image_tag"] != image["tag"]
        ),
    }
    yield from (message for message, holds in wrong.items() if holds)


def main() -> int:
    """Check all that is named; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "tempest.conf")
    parser.add_argument("--tests", type=Path, default=HERE / "tests.txt", help="include list")
    parser.add_argument("--image", type=Path, default=HERE / "image.conf", help="its properties")
    parser.add_argument("--manifest", type=Path, help="IMAGE.json, to hold the properties against")
    args = parser.parse_args()
    config, tests = args.config.absolute(), args.tests.absolute()
    logging.disable()
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):  # for its log
        wrong = [*wrong_options(config)]
        if not wrong:  # tests that are read with wrong settings tell nothing
            wrong += wrong_tests(tests)
    if args.manifest:
        wrong += wrong_properties(args.image, json.loads(args.manifest.read_text()))
    for message in wrong:
        print(message)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
