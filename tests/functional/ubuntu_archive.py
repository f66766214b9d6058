# SPDX-License-Identifier: Apache-2.0
"""An archive as Ubuntu's, made out of Debian's packages and signed by a key of the tests.

Suites, components, Release files and the names of packages and kernels are Ubuntu's; what is in the
packages is Debian's, but for the differences that tests/data/ubuntu has as tables and files.
Debian's packages come by apt, verified, from the mirror that this host uses.
"""

from __future__ import annotations

import fnmatch
import hashlib
import lzma
import os
import re
import shutil
import string
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import kernel_name

from amphora_image import host

DATA = Path(__file__).parents[1] / "data/ubuntu"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
COMPONENTS = ("main", "universe")
SUITES = ("", "-updates", "-security")

#: Release files: what is appended to their names, and how long they are valid from now on.
#: Ubuntu's do not expire.
ENDINGS = {"": None, ".expired": timedelta(days=-1)}
DEBIAN_KERNEL = "linux-image-cloud-amd64"

#: What the kernel's packages and the changed ones need, beyond what elements ask for.
FURTHER = ("adduser", "apt", "dhcpcd-base", "grub-efi-amd64", "linux-base", "netplan.io")


@dataclass(frozen=True)
class Package:
    """A package of the archive: the fields of its control file, and the file."""

    fields: Mapping[str, str]
    file: Path

    @property
    def name(self) -> str:
        """Its name."""
        return self.fields["Package"]

    def stanza(self, component: str) -> tuple[str, str]:
        """Return its path in the archive and its entry in Packages (deb822)."""
        source = self.fields.get("Source", self.name).split()[0]
        prefix = source[:4] if source.startswith("lib") else source[0]
        data = self.file.read_bytes()
        fields = {
            **self.fields,
            "Filename": f"pool/{component}/{prefix}/{source}/{self.file.name}",
            "Size": str(len(data)),
            "SHA256": hashlib.sha256(data).hexdigest(),
        }
        return fields["Filename"], "".join(f"{key}: {text}\n" for key, text in fields.items())


@dataclass(frozen=True)
class Archive:
    """An archive in a directory.

    :ivar root: what a web server shows below ``/ubuntu``.
    :ivar keyring: file with the public key.
    """

    root: Path
    keyring: Path
    release: str


def tables() -> dict[str, Any]:
    """Return ubuntu.toml."""
    return tomllib.loads((DATA / "ubuntu.toml").read_text())


def names(column: str) -> dict[str, str]:
    """Return a column of names.txt by package: a release's components, or ``archive``."""
    lines = (DATA / "names.txt").read_text().splitlines()
    header, *rows = [line.lstrip("# ").split() for line in lines if re.match("# name|[a-z]", line)]
    return {row[0]: row[header.index(column)] for row in rows}


def run(*argv: str | Path, **options: Any) -> str:
    """Run a program and return what it says; its failure is the test's."""
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def make_archive(directory: Path, cache: Path, release: str = "noble") -> Archive:
    """Make the archive of a release in a directory.

    :param cache: directory for what Debian's archive holds; it may be used again.
    """
    row = tables()["releases"][release]
    hows = {"debian", "agent"} if row["agent"] else {"debian"}
    wanted = [name for name, how in names("archive").items() if how in hows]
    debian = Debian(cache / row["debian"], row["debian"])
    found = debian.fetch([*wanted, *FURTHER, *row["further"]])
    packages = {package.name: package for package in found if package.name not in row["without"]}
    work = directory / "made"
    work.mkdir(parents=True)
    for change in tables()["changes"]:
        if release in change["releases"]:
            package = packages.pop(change["package"])
            made = changed(package, change, {**row, "codename": release}, work)
            packages[made.name] = made
    kernel = Debian(cache / row["kernel_of"], row["kernel_of"]).fetch_alone(DEBIAN_KERNEL)
    archive = Archive(directory / "ubuntu", directory / "keyring.gpg", release)
    with key(archive.keyring) as gpg:
        publish(archive, [*packages.values(), *kernel_packages(kernel, row, work)], row, gpg)
    return archive


class Debian:
    """Debian's packages of a suite, through apt with a root of its own.

    :param root: directory with apt's lists and packages.
    """

    def __init__(self, root: Path, suite: str) -> None:
        mirrors = host.look().mirrors
        assert mirrors, "this host has no mirror of Debian"
        for part in ("etc/preferences.d", "state/lists/partial", "cache/archives/partial"):
            (root / part).mkdir(parents=True, exist_ok=True)
        (root / "state/status").touch()
        (root / "etc/sources.list").write_text(
            f"deb [arch=amd64 signed-by={KEYRING}] {mirrors.archive} {suite} main\n"
        )
        options = {
            "Dir::Etc": root / "etc",
            "Dir::State": root / "state",
            "Dir::State::status": root / "state/status",
            "Dir::Cache": root / "cache",
            "APT::Install-Recommends": "false",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Sandbox::User": "root",
            "Debug::NoLocking": "true",
        }
        self._options = [f"-o{name}={value}" for name, value in options.items()]
        self._archives = root / "cache/archives"
        run("apt-get", *self._options, "--quiet=2", "update")

    def fetch(self, wanted: Sequence[str]) -> list[Package]:
        """Return the packages of these names, the essential ones and all that they depend on."""
        install = ["apt-get", *self._options, "--yes", "install", "?essential", *wanted]
        said = run(*install, "--simulate")
        run(*install, "--quiet=2", "--download-only")
        closure = re.findall(r"^Inst (\S+)", said, re.MULTILINE)
        return [self._package(fields) for fields in self._show(closure)]

    def fetch_alone(self, name: str) -> Package:
        """Return the one package that a metapackage is about."""
        (meta,) = self._show([name])
        actual = meta["Depends"].split()[0]
        run("apt-get", *self._options, "--quiet=2", "download", actual, cwd=self._archives)
        return self._package(*self._show([actual]))

    def _show(self, wanted: Sequence[str]) -> list[dict[str, str]]:
        said = run("apt-cache", *self._options, "show", "--no-all-versions", *wanted)
        return [control_fields(text) for text in said.split("\n\n") if text.strip()]

    def _package(self, fields: Mapping[str, str]) -> Package:
        version = fields["Version"].replace(":", "%3a")
        name = f"{fields['Package']}_{version}_{fields['Architecture']}.deb"
        return Package(
            {key: text for key, text in fields.items() if not key.startswith("MD5")},
            self._archives / name,
        )


def control_fields(text: str) -> dict[str, str]:
    """Return the fields of a stanza (deb822); what goes on in further lines stays in the value."""
    return dict(re.findall(r"^([\w-]+): ?(.*(?:\n[ \t].*)*)", text, re.MULTILINE))


def changed(
    package: Package, change: Mapping[str, Any], values: Mapping[str, str], work: Path
) -> Package:
    """Return a package with Ubuntu's differences."""
    tree = work / package.name
    run("dpkg-deb", "--raw-extract", package.file, tree)
    conffiles = tree / "DEBIAN/conffiles"
    for path in change.get("remove", ()):
        (tree / path).unlink()
        conffiles.write_text(conffiles.read_text().replace(f"/{path}\n", ""))
    overlay = DATA / "overlays" / package.name
    patterns = change.get("overlay", ("**/*",))
    sources = {path for pattern in patterns for path in overlay.glob(pattern) if path.is_file()}
    for source in sorted(sources):
        target = tree / source.relative_to(overlay)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text()
        if target.name == "postinst.more":
            script = target.with_suffix("")
            script.write_text(f"{script.read_text()}\n{text}")
        else:
            target.unlink(missing_ok=True)
            target.write_text(substituted(text, values) if package.name == "base-files" else text)
    control = tree / "DEBIAN/control"
    fields = control_fields(control.read_text())
    depends = [fields.get("Depends", ""), *change.get("depends", ())]
    fields["Depends"] = ", ".join(word for word in depends if word)
    for old, new in change.get("replace", {}).items():
        fields["Depends"] = fields["Depends"].replace(old, new)
    fields["Version"] += "ubuntu1"
    fields["Package"] = change.get("name", package.name)
    return packed(tree, {key: text for key, text in fields.items() if text})


def substituted(text: str, values: Mapping[str, str]) -> str:
    """Return a text with ``$name`` replaced."""
    return string.Template(text).substitute(values)


def packed(tree: Path, fields: Mapping[str, str]) -> Package:
    """Make a package of a directory."""
    (tree / "DEBIAN").mkdir(exist_ok=True)
    text = "".join(f"{key}: {value}\n" for key, value in fields.items())
    (tree / "DEBIAN/control").write_text(text)
    version = fields["Version"].partition(":")[2] or fields["Version"]
    file = tree.with_name(f"{fields['Package']}_{version}_{fields['Architecture']}.deb")
    run("dpkg-deb", "-Zgzip", "-z1", "--root-owner-group", "--build", tree, file)
    return Package(fields, file)


def kernel_packages(debian: Package, row: Mapping[str, Any], work: Path) -> Iterator[Package]:
    """Yield Ubuntu's kernel packages with Debian's kernel in them, and the metapackages."""
    abi, first = row["kernel"], row["first_kernel"]
    version = f"{abi}-generic"
    image, modules = work / f"linux-image-{version}", work / f"linux-modules-{version}"
    run("dpkg-deb", "--extract", debian.file, modules)
    (modules / "usr/lib").rename(modules / "lib")
    shutil.rmtree(modules / "usr")
    (old,) = (path.name for path in (modules / "lib/modules").iterdir())
    tree = (modules / "lib/modules" / old).rename(modules / "lib/modules" / version)
    for path in (modules / "boot").iterdir():
        path.rename(path.with_name(path.name.replace(old, version)))
    unpack_modules(tree)
    if row["zstd"]:
        run("zstd", "--quiet", "-3", "-T0", "--rm", *sorted(tree.rglob("*.ko")))
    configuration = modules / f"boot/config-{version}"
    text = configuration.read_text()
    configuration.write_text(
        text.replace("CONFIG_CRYPTO_FIPS=y", "# CONFIG_CRYPTO_FIPS is not set")
    )
    (image / "boot").mkdir(parents=True)
    vmlinuz = (modules / f"boot/vmlinuz-{version}").rename(image / f"boot/vmlinuz-{version}")
    kernel_name.rename(vmlinuz, old, version)
    vmlinuz.chmod(0o600)
    (image / "DEBIAN").mkdir()
    postinst = image / "DEBIAN/postinst"
    postinst.write_text(
        f"#!/bin/sh\nset -e\ndepmod {version}\n"
        f"run-parts --exit-on-error --arg={version} --arg=/boot/vmlinuz-{version} "
        "/etc/kernel/postinst.d\n"
    )
    postinst.chmod(0o755)
    common = {
        "Architecture": "amd64",
        "Maintainer": "Tests <tests@example.org>",
        "Description": "Stands in for Ubuntu's",
        "Source": "linux",
    }
    number = f"{abi}.{abi.rpartition('-')[2]}"
    yield packed(
        image,
        {
            "Package": image.name,
            "Version": number,
            "Depends": f"kmod, linux-base, initramfs-tools | linux-initramfs-tool, {modules.name}",
            **common,
        },
    )
    yield packed(modules, {"Package": modules.name, "Version": number, **common})
    for name in (name for name, how in names("archive").items() if how == "made"):
        for build in (first, abi):
            meta = work / f"{name}-{build}"
            meta.mkdir()
            fields = {
                "Package": name,
                "Version": f"{build}.{build.rpartition('-')[2]}",
                "Depends": f"linux-image-{build}-generic",
                **common,
                "Source": "linux-meta",
            }
            yield packed(meta, fields)


def unpack_modules(tree: Path) -> None:
    """Unpack modules, which Debian compresses with xz."""
    for file in sorted(tree.rglob("*.ko.xz")):
        file.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
        file.unlink()


@contextmanager
def key(keyring: Path) -> Iterator[list[str]]:
    """Make a signing key that is gone afterwards; yield gpg's command line to use it."""
    with tempfile.TemporaryDirectory(prefix="key-", dir="/tmp") as home:
        gpg = ["gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", ""]
        user = "Archive of the tests <tests@example.org>"
        try:
            run(*gpg, "--quick-generate-key", user, "rsa2048", "sign", "never", stderr=-3)
            run(*gpg, "--output", keyring, "--export")
            yield gpg
        finally:
            run("gpgconf", "--homedir", home, "--kill", "all")


def publish(
    archive: Archive, packages: Iterable[Package], row: Mapping[str, Any], gpg: Sequence[str]
) -> None:
    """Write pool and suites of an archive."""
    known = names(archive.release)
    rules = tables()["suites"]
    oldest = f"{row['first_kernel']}."
    entries: dict[tuple[str, str], list[str]] = {}
    for package in packages:
        suite = next(
            (
                suite
                for suite, patterns in rules.items()
                if any(fnmatch.fnmatch(package.name, pattern) for pattern in patterns)
                and not package.fields["Version"].startswith(oldest)
            ),
            "",
        )
        component = known.get(package.name, "main")
        path, stanza = package.stanza(component)
        target = archive.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package.file, target)
        entries.setdefault((suite, component), []).append(stanza)
    for suite in SUITES:
        directory = archive.root / "dists" / (archive.release + suite)
        for component in COMPONENTS:
            text = "\n".join(entries.get((suite, component), ()))
            index(directory / component / "binary-amd64/Packages", text.encode())
        for ending, lifetime in ENDINGS.items():
            fields = release_fields(archive.release, suite, row["version"], lifetime)
            sign(directory, fields, gpg, ending)


def index(path: Path, data: bytes) -> None:
    """Write an index and its compressed form, both also by their hashes."""
    by_hash = path.parent / "by-hash/SHA256"
    by_hash.mkdir(parents=True)
    for target, content in ((path, data), (path.with_name(f"{path.name}.xz"), lzma.compress(data))):
        target.write_bytes(content)
        os.link(target, by_hash / hashlib.sha256(content).hexdigest())


def release_fields(
    release: str, suite: str, version: str, lifetime: timedelta | None
) -> dict[str, str]:
    """Return the fields of a Release file as Ubuntu's has them.

    :param lifetime: from now on, negative for the past; then the file has Valid-Until.
    """
    now = datetime.now(UTC)
    fields = {
        "Origin": "Ubuntu",
        "Label": "Ubuntu",
        "Suite": release + suite,
        "Version": version,
        "Codename": release,
        "Date": format_datetime(now - timedelta(days=7), usegmt=True),
        "Architectures": "amd64",
        "Components": " ".join(COMPONENTS),
        "Description": f"Ubuntu {release.title()} {version}",
        "Acquire-By-Hash": "yes",
    }
    if lifetime:
        fields["Valid-Until"] = format_datetime(now + lifetime, usegmt=True)
    return fields


def sign(directory: Path, fields: Mapping[str, str], gpg: Sequence[str], ending: str) -> None:
    """Write Release, Release.gpg and InRelease of a suite's directory."""
    lines = [f"{key}: {text}" for key, text in fields.items()]
    lines.append("SHA256:")
    for path in sorted(directory.glob("*/binary-*/Packages*")):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        lines.append(f" {digest} {len(data)} {path.relative_to(directory)}")
    release = directory / f"Release{ending}"
    release.write_text("\n".join(lines) + "\n")
    for name, option in (("InRelease", "--clear-sign"), ("Release.gpg", "--detach-sign")):
        run(*gpg, "--armor", "--output", directory / f"{name}{ending}", option, release)
