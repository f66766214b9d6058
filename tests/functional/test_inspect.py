# SPDX-License-Identifier: Apache-2.0
"""``amphora-image inspect`` on real disks: what it tells is what other programs tell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_image
import pytest
from fake_image import Nodes, directory, file, link, make_raw, nodes

from amphora_image.facts import read_facts
from amphora_image.image import read_image
from amphora_image.tree import Tree

COMMAND = "import sys; from amphora_image.cli import main; sys.exit(main())"


def inspect(*argv: object, through: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command, started by another one perhaps."""
    words = [*through, sys.executable, "-c", COMMAND, "inspect", *map(str, argv)]
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small disk."""
    return make_raw(nodes(), tmp_path_factory.mktemp("raw") / "amphora.raw")


@pytest.fixture(scope="module")
def built(debian_image: Path) -> dict[str, Any]:
    """The facts of a built image."""
    began = time.monotonic()
    done = inspect(debian_image, "--json")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 30, "ten seconds on an idle machine"
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_built_image(built: dict[str, Any], debian_image: Path) -> None:
    """The facts of a built image are what its manifest says."""
    manifest = json.loads(Path(f"{debian_image}.json").read_text())
    versions = {name: package["version"] for name, package in built["os_packages"].items()}
    assert versions == manifest["packages"]
    assert built["python_packages"].items() >= {"octavia-lib": "3.12.0"}.items()
    assert len(built["python_packages"]) == len(manifest["python_packages"])
    assert (built["os"]["id"], built["os"]["release"]) == ("debian", "trixie")
    assert built["architecture"] == "amd64"
    assert built["image"]["bytes"] == 5 * 2**30
    assert [part["name"] for part in built["partitions"]] == ["bios", "esp", "root"]
    [file_system] = built["file_systems"]
    assert (file_system["type"], file_system["errors"]) == ("ext4", "")
    assert 3 * 2**30 < file_system["free"] < file_system["size"]
    [kernel] = built["kernels"]
    assert kernel["bootable"]
    assert kernel["modules"] > 100
    assert built["boot_loader"]["name"] == "grub"
    assert "amphora-agent.service" in built["services"]["enabled"]
    assert built["listening"]["ssh"] == "the addresses in /run/amphora-sshd/listen.conf"
    assert built["logins"] == {}
    assert list(built) == sorted(built)


def test_sizes_of_built_image(built: dict[str, Any]) -> None:
    """Packages and directories together are as large as all that is used."""
    [file_system] = built["file_systems"]
    used = file_system["size"] - file_system["free"]
    by_package = sum(built["sizes"]["packages"].values())
    directories = built["sizes"]["directories"]
    by_directory = sum(size for name, size in directories.items() if "/" not in name)
    assert by_package == pytest.approx(by_directory, rel=0.01)
    assert used / 2 < by_package < used  # inode tables and the journal are used too
    assert directories["usr"] > directories["usr/lib"] > 50 * 2**20


def test_table(raw: Path) -> None:
    """On a terminal the facts are a table."""
    done = inspect(raw)
    assert done.returncode == 0, done.stderr
    for word in ("Debian 13", "trixie", "amd64", "6.1, 1 modules", "root-label", "octavia 1.0"):
        assert word in done.stdout


def test_without_privileges(raw: Path) -> None:
    """Whoever can read the file sees all of it: no capability is needed."""
    nothing = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--")
    assert inspect(raw, "--json", through=nothing).stdout == inspect(raw, "--json").stdout != ""


def real_tree(found: Nodes, tmp_path: Path) -> Tree:
    """The files read from an ext4 file system."""
    return read_image(make_raw(found, tmp_path / "a.raw")).tree


def test_files_are_as_they_were_written(tmp_path: Path) -> None:
    """Modes, owners, sizes, links and contents are those of the files, odd names too."""
    found: Nodes = {
        "etc/a file with spaces": file("x" * 5000, 0o640, 12),
        "etc/größe": file("ü"),
        "etc/empty": file(),
        "etc/large": file(bytes(range(256)) * 4096),
        "etc/link": link("large"),
        "etc/long": link("a/" * 100),
        "etc/debugfs: ls -p <2>": file("x"),
        "etc/'\"<>$(id)": file("x"),
        "usr/bin/su": file("x", 0o4755),
        "many": directory(0o711, 7),
    }
    found |= {f"many/{number}": file() for number in range(2000)}
    tree = real_tree(found, tmp_path)
    expected = fake_image.as_tree(found)
    entries = {
        path: (entry.mode, entry.uid, entry.size if entry.is_file else 0, entry.target)
        for path, entry in tree.entries.items()
        if path != "lost+found"
    }
    assert entries == {
        path: (entry.mode, entry.uid, entry.size, entry.target)
        for path, entry in expected.entries.items()
    }
    assert tree.contents == expected.contents
    assert tree.strange == ()


def test_name_with_a_newline(tmp_path: Path) -> None:
    """A name that breaks the lines of debugfs is told, not passed over."""
    tree = real_tree({"usr/bin/a\nb": file("x", 0o4755)}, tmp_path)
    assert len(tree.strange) == 2


def test_second_name_of_a_file(tmp_path: Path) -> None:
    """A hard link has the mode and content of its file and adds nothing to the size."""
    raw = make_raw({"etc/one": file("text", 0o600)}, tmp_path / "a.raw")
    where = f"{raw}?offset={fake_image.START['root']}"
    change = ["debugfs", "-w", "-R", "ln /etc/one /etc/two", where]
    subprocess.run(change, check=True, capture_output=True)
    tree = read_image(raw).tree
    assert tree.contents["etc/one"] == tree.contents["etc/two"] == b"text"
    assert tree.entries["etc/two"].permissions == 0o600
    assert {tree.entries["etc/one"].size, tree.entries["etc/two"].size} == {0, 4}


def test_disk_without_partitions(tmp_path: Path) -> None:
    """A file system that fills the disk is read as well."""
    raw = tmp_path / "plain.raw"
    tree = tmp_path / "tree"
    tree.mkdir()
    fake_image.write(nodes(), tree)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, raw, "32M"], check=True)
    facts = read_facts(read_image(raw))
    assert (facts["partition_table"], facts["os"]["id"]) == ("none", "debian")


def test_disk_with_mbr(tmp_path: Path, raw: Path) -> None:
    """A partition table of the older kind is read as well."""
    disk = tmp_path / "mbr.raw"
    subprocess.run(["cp", "--sparse=always", raw, disk], check=True)
    table = f"label: dos\nstart={fake_image.START['root'] // 512}, type=83\n"
    arguments = ["sfdisk", "--quiet", "--wipe=always", disk]
    subprocess.run(arguments, input=table, text=True, check=True)
    facts = read_facts(read_image(disk))
    assert (facts["partition_table"], facts["os"]["id"]) == ("dos", "debian")
