# SPDX-License-Identifier: Apache-2.0
"""A small repository of signed RPMs, made on the spot with Debian's rpm and createrepo_c.

The names are those that elements ask for in the RedHat family (tests/data/rpm/names.txt). What the
packages hold is in tests/data/rpm/packages.toml: programs of this host, units, a few files, most of
them nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny import Elements
from ubuntu_archive import key, run

from amphora_image import plan
from amphora_image.request import BaseOS

DATA = Path(__file__).parents[1] / "data/rpm"

UNIT = "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"

#: What only people read.
UNREAD = re.compile(r"/etc/.*|.*/share/(bash-completion|bug|doc|lintian|locale|man)/.*")

SPEC = """\
Name: tests
Version: 1
Release: 1
Summary: Packages of the tests
License: Apache-2.0
AutoReqProv: no
%global debug_package %{{nil}}
%global _build_id_links none
%global __os_install_post %{{nil}}
%global _binary_payload w.ufdio
%description
%install
cp --archive {payload}/*/. %{{buildroot}}
{packages}
"""
PACKAGE = """\
%package -n {name}
Summary: {name} of the tests
AutoReqProv: no
{provides}
%description -n {name}
%files -n {name}
%defattr(-,root,root)
{files}
"""


@dataclass(frozen=True)
class Repository:
    """A repository in a directory.

    :ivar root: what a web server shows.
    :ivar key: file with the public key, armored.
    """

    root: Path
    key: Path

    def environment(self, url: str) -> dict[str, str]:
        """Return what the element rpm-os is told of the repository at a URL."""
        base = " ".join(tables()["base"])
        return {"RPM_BASE": base, "RPM_KEY": str(self.key), "RPM_REPOSITORY": url}


def tables() -> dict[str, Any]:
    """Return packages.toml."""
    return tomllib.loads((DATA / "packages.toml").read_text())


def names(column: str) -> dict[str, str]:
    """Return a column of names.txt by package: the repository in a release, or ``no``."""
    lines = (DATA / "names.txt").read_text().splitlines()
    header, *rows = [line.lstrip("# ").split() for line in lines if re.match(r"# name |\w", line)]
    return {row[0]: row[header.index(column)] for row in rows}


def make_elements(directory: Path, base_os: BaseOS) -> Elements:
    """Put the element rpm-os into a directory, in the place of the one that makes a base OS."""
    name = plan.DISTRIBUTIONS[base_os].base
    shutil.copytree(DATA / "elements/rpm-os", directory / name)
    return Elements(directory, directory)


def make_repository(directory: Path) -> Repository:
    """Make a repository, and the key that has signed it, in a directory."""
    made = Repository(directory / "repository", directory / "key.asc")
    made.root.mkdir(parents=True)
    keyring = directory / "keyring.gpg"
    with key(keyring) as gpg:
        run(*gpg, "--armor", "--output", made.key, "--export")
        words = {
            "boot_image": "x" * 510 + "\x55\xaa",
            "kernel_image": "\0" * 0x202 + "HdrS",  # what tells that a file is a kernel
            "key": made.key.read_text(),
            "minor": str(Path("/usr/bin/python3").resolve()).rpartition(".")[2],
        }
        payload = directory / "payload"
        packages = make_payload(payload, words)
        build(directory, payload, packages, made.root)
        home = gpg[gpg.index("--homedir") + 1]
        macros = {
            "__gpg": shutil.which("gpg"),
            "_gpg_name": "tests@example.org",
            "_gpg_path": home,
        }
        defines = [f"--define={name} {value}" for name, value in macros.items()]
        run("rpmsign", *defines, "--addsign", *sorted(made.root.glob("*.rpm")), stderr=-3)
    run("createrepo_c", "--quiet", "--no-database", made.root)
    return made


@dataclass(frozen=True)
class Payload:
    """What the packages hold, each below its name in a directory.

    :ivar words: what stands for ``{word}`` in texts and paths.
    """

    root: Path
    words: Mapping[str, str]

    def filled(self, text: str) -> str:
        """Return a text with the words put in."""
        return re.sub(r"\{(\w+)\}", lambda found: self.words.get(found[1], found[0]), text)

    def add_programs(self, package: str, programs: str) -> None:
        """Add programs of this host."""
        for program in programs.split():
            path = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
            assert path, f"{program} is not on this host"
            copy(Path(path), self.root / package)

    def add_debian(self, package: str, sources: str) -> None:
        """Add the files of Debian packages of this host."""
        listed = run("dpkg-query", "--listfiles", *self.filled(sources).split()).splitlines()
        for path in dict.fromkeys(listed):
            if not UNREAD.fullmatch(path):
                copy(Path(path), self.root / package, follow_links=False)

    def add_libraries(self, package: str) -> None:
        """Add the libraries of this host that all programs and libraries are linked to."""
        binaries = [path for path in self.root.rglob("*") if path.is_file() and is_elf(path)]
        linked = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False)
        for path in dict.fromkeys(re.findall(r"(/\S+) \(0x", linked.stdout)):
            copy(Path(path), self.root / package)

    def add_units(self, package: str, units: str) -> None:
        """Add units of systemd that can be enabled."""
        for unit in units.split():
            write(self.root / package / "usr/lib/systemd/system" / unit, UNIT)

    def add_links(self, package: str, links: Mapping[str, str]) -> None:
        """Add symbolic links, path -> target; they replace what is there."""
        for path, target in links.items():
            link = self.root / package / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(self.filled(target))

    def add_files(self, package: str, files: Mapping[str, str], modes: Mapping[str, int]) -> None:
        """Add files, path -> text, and directories, whose path ends with ``/``."""
        for path, text in files.items():
            file = self.root / package / self.filled(path)
            if path.endswith("/"):
                file.mkdir(parents=True, exist_ok=True)
            else:
                write(file, self.filled(text))
            usual = 0o755 if path.endswith("/") or text.startswith("#!") else 0o644
            file.chmod(modes.get(path, usual))


def make_payload(root: Path, words: Mapping[str, str]) -> list[str]:
    """Write what the tables say that the packages hold; return the names of all packages."""
    table = tables()
    payload = Payload(root, words)
    for package, programs in table["programs"].items():
        payload.add_programs(package, programs)
    for package, sources in table["debian"].items():
        payload.add_debian(package, sources)
    payload.add_libraries("glibc")
    for package, units in table["units"].items():
        payload.add_units(package, units)
    for package, links in table["links"].items():
        payload.add_links(package, links)
    for package, files in table["files"].items():
        payload.add_files(package, files, table["modes"])
    for package, version in table["kernels"].items():
        of_version = Payload(root, {**words, "kernel": version})
        of_version.add_files(package, table["kernel"], table["modes"])
    made = {path.name for path in root.iterdir()}
    return sorted({*names("name"), *table["base"], *table["further"], *made})


def write(file: Path, text: str) -> None:
    """Write a file into a directory that may have to be made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode("latin-1"))


def copy(path: Path, tree: Path, *, follow_links: bool = True) -> None:
    """Copy a file of this host to the same place in a tree whose /bin, /lib ... are in /usr."""
    if path.is_dir():
        return
    below = path.relative_to("/")
    target = tree / (below if below.parts[0] == "usr" else Path("usr", below))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copy2(path, target, follow_symlinks=follow_links)


def is_elf(path: Path) -> bool:
    """Tell whether a file is a program or a library."""
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def build(directory: Path, payload: Path, packages: Iterable[str], target: Path) -> None:
    """Build the packages out of their payload."""
    texts = []
    for name in packages:
        files = "\n".join(listing(payload / name))
        provides = "Provides: system-release(releasever) = 1" if name == "release" else ""
        texts.append(PACKAGE.format(name=name, files=files, provides=provides))
    spec = directory / "tests.spec"
    spec.write_text(SPEC.format(payload=payload, packages="\n".join(texts)))
    macros = {"_topdir": directory / "rpmbuild", "_rpmdir": target, "_rpmfilename": "%%{NAME}.rpm"}
    defines = [f"--define={name} {value}" for name, value in macros.items()]
    run("rpmbuild", "-bb", "--quiet", *defines, spec, stderr=-3)


def listing(tree: Path) -> Iterator[str]:
    """Yield the lines of %files for a tree: its files, and directories that are empty."""
    for path in sorted(tree.rglob("*")):
        below = f"/{path.relative_to(tree)}"
        if path.is_symlink() or not path.is_dir():
            yield below
        elif not any(path.iterdir()):
            yield f"%dir {below}"
