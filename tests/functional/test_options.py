# SPDX-License-Identifier: Apache-2.0
"""What each option of a build does, seen in the built image and in what is left beside it.

Three builds have all of them: options that leave each other alone share one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND, ProvePart
from fake_image import run as amphora_image

from amphora_image import agent_source, proof
from amphora_image.agent_locks.check_imports import COMMANDS
from amphora_image.image import Image, Pattern, read_image

PASSWORD = "correct horse battery staple"
KERNEL = "linux-image-amd64"
#: The tree of a build that works on disk, from the directory of -w on.
TREE = ".amphora-image-*/amphora-image-*/dib_build.*/mnt/etc/debian_version"


@dataclass(frozen=True)
class Built:
    """An image and what was said of it.

    :ivar on_disk: whether its tree was seen in the working directory.
    :ivar facts: of ``amphora-image inspect``.
    """

    file: Path
    log: str
    manifest: dict[str, Any]
    facts: dict[str, Any]
    image: Image
    on_disk: bool

    @property
    def command_line(self) -> list[str]:
        """The words that the kernel is given."""
        words: list[str] = self.facts["boot_loader"]["command_line"].split()
        return words

    def text(self, path: str) -> str:
        """A file's content."""
        return self.image.tree.text(path)


Build = Callable[..., Built]


@pytest.fixture(scope="module")
def build(debian_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Build a Debian amphora with more options."""

    def built(*options: str, patterns: Sequence[Pattern] = ()) -> Built:
        directory = tmp_path_factory.mktemp("options")
        work = directory / "work"
        work.mkdir()
        log, file = directory / "build.log", directory / "lb.qcow2"
        common = ("-i", "debian", "-c", debian_cache, "-l", log, "-o", file, "-w", work)
        on_disk = False
        with subprocess.Popen([COMMAND, *common, *options]) as building:
            while building.poll() is None:
                on_disk = on_disk or any(work.glob(TREE))
                time.sleep(0.2)
        assert building.returncode == 0
        assert list(work.iterdir()) == []
        return Built(
            file,
            log.read_text(),
            json.loads(Path(f"{file}.json").read_text()),
            json.loads(amphora_image("inspect", file, "--json").stdout),
            read_image(file, patterns),
            on_disk,
        )

    return built


@pytest.fixture(scope="module")
def git_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of Git repositories: Octavia as it is installed here, and a commit after its release.

    The branch is that of the newest series.
    """
    base = tmp_path_factory.mktemp("git")
    released = metadata.distribution("octavia")
    repository = base / agent_source.PROJECT
    unwanted = shutil.ignore_patterns("__pycache__", "tests")
    shutil.copytree(str(released.locate_file("octavia")), repository / "octavia", ignore=unwanted)
    required = [line for line in released.requires or () if "extra ==" not in line]
    (repository / "requirements.txt").write_text("\n".join(required))
    (repository / "setup.cfg").write_text("".join(settings_of(released)))
    (repository / "setup.py").write_text("import setuptools\nsetuptools.setup(pbr=True)\n")
    (repository / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["pbr>=6", "setuptools>=64"]\nbuild-backend = "pbr.build"\n'
    )
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "tag.gpgSign=no"]
    for words in (
        ("init", "-q", "-b", f"stable/{agent_source.NEWEST}"),
        ("add", "."),
        ("commit", "-q", "-m", "release"),
        ("tag", "-a", "-m", "release", released.version),
        ("commit", "-q", "--allow-empty", "-m", "a fix"),
    ):
        subprocess.run([*git, *words], cwd=repository, check=True)
    return f"{base.as_uri()}/"


def settings_of(released: metadata.Distribution) -> Iterator[str]:
    """The lines of setup.cfg by which pbr packs Octavia as it was released."""
    yield "[metadata]\nname = octavia\n[files]\npackages = octavia\n[entry_points]\n"
    for group in sorted(released.entry_points.groups):
        yield f"{group} =\n"
        for point in released.entry_points.select(group=group):
            yield f"    {point.name} = {point.value}\n"


@pytest.mark.parametrize(
    "image",
    [
        "login",
        pytest.param("hardened", marks=pytest.mark.options),
        pytest.param("packaged", marks=pytest.mark.options),
    ],
)
def test_check(image: str, request: pytest.FixtureRequest) -> None:
    """``amphora-image check`` takes the image for what was asked."""
    file = request.getfixturevalue(image).file
    assert json.loads(amphora_image("check", file, "--json").stdout)["findings"] == []


@pytest.fixture(scope="module")
def login(build: Build, git_base: str) -> Built:
    """``-r PASSWORD -g REF --git-base URL``; the image is searched for the password."""
    options = ("-r", PASSWORD, "-g", f"stable/{agent_source.NEWEST}", "--git-base", git_base)
    return build(*options, patterns=[pattern(PASSWORD)])


def test_root_password(login: Built) -> None:
    """Root's hash is that of the password, and no other user has one."""
    held = field_of_shadow(login)
    assert held == hashed(PASSWORD, held)
    assert held != hashed(f"{PASSWORD} ", held)
    assert login.facts["logins"].keys() == {"root"}
    assert login.facts["logins"]["root"]["keys"] == 0


def test_root_password_is_told_nowhere(login: Built) -> None:
    """The password is in no file of the image, no log and no manifest; its hash in one file."""
    held = field_of_shadow(login)
    told = [login.log, json.dumps(login.manifest)]
    assert not [text for text in told for secret in (PASSWORD, held) if secret in text]
    assert login.image.marks == ()
    marks = read_image(login.file, [pattern(held)]).marks
    assert {mark.path for mark in marks} == {"etc/shadow"}


def test_agent_from_git(login: Built) -> None:
    """The agent is that of the branch's last commit, everything else that of its series."""
    release = metadata.version("octavia").split(".")
    expected = ".".join([*release[:-1], str(int(release[-1]) + 1), "dev1"])
    newest = agent_source.SERIES[agent_source.NEWEST]
    for packages in (login.facts["python_packages"], login.manifest["python_packages"]):
        assert packages["octavia"] == expected
        assert packages["octavia-lib"].startswith(newest.octavia_lib)
    assert login.manifest["request"]["agent"]["ref"] == f"stable/{agent_source.NEWEST}"


def test_not_on_disk(login: Built) -> None:
    """Without -f the tree is in memory, whatever -w says."""
    assert not login.on_disk


def pattern(text: str) -> Pattern:
    """A pattern that is a text."""
    needle = text.encode()
    return Pattern("secret", needle, re.compile(re.escape(needle)))


def field_of_shadow(built: Built) -> str:
    """Root's hash."""
    [line] = [line for line in built.text("etc/shadow").splitlines() if line.startswith("root:")]
    return line.split(":")[1]


def hashed(password: str, like: str) -> str:
    """The hash of a password with another's kind and salt, :manpage:`crypt(5)`."""
    _, kind, salt, _ = like.split("$")
    assert kind == "6"
    command = ["openssl", "passwd", "-6", "-salt", salt, "-stdin"]
    return subprocess.check_output(command, input=f"{password}\n", text=True).strip()


@pytest.fixture(scope="module")
def hardened(build: Build) -> Built:
    """``-e -f -k KERNEL -m -n -y``."""
    return build("-e", "-f", "-k", KERNEL, "-m", "-n", "-y")


@pytest.mark.options
def test_on_disk(hardened: Built) -> None:
    """The tree was in the directory of -w, of which nothing is left."""
    assert hardened.on_disk


@pytest.mark.options
def test_mandatory_access_control(hardened: Built) -> None:
    """AppArmor is the kernel's module and starts, and HAProxy's profile is not disabled."""
    [modules] = [word for word in hardened.command_line if word.startswith("lsm=")]
    assert "apparmor" in modules.removeprefix("lsm=").split(",")
    assert "apparmor.service" in hardened.facts["services"]["enabled"]
    assert "apparmor" in hardened.facts["os_packages"]
    names = {path for path, _ in hardened.image.tree.under("etc/apparmor.d")}
    assert "etc/apparmor.d/amphora-haproxy" in names
    assert "etc/apparmor.d/disable/amphora-haproxy" not in names


@pytest.mark.options
def test_kernel(hardened: Built) -> None:
    """The package of -k brings the one kernel, and not the one for clouds."""
    [kernel] = hardened.facts["kernels"]
    assert kernel["version"].endswith("-amd64")
    assert "cloud" not in kernel["version"]
    assert KERNEL in hardened.facts["os_packages"]
    assert "linux-image-cloud-amd64" not in hardened.facts["os_packages"]
    assert kernel["version"] in hardened.facts["boot_loader"]["entries"][0]


@pytest.mark.options
def test_cpu_pinning(hardened: Built, tmp_path: Path) -> None:
    """Interrupts stay on the first CPU, and HAProxy has all others for itself."""
    assert "irqaffinity=0" in hardened.command_line
    assert "irqbalance.service" in hardened.facts["services"]["masked"]
    unit = hardened.text("usr/lib/systemd/system/haproxy-.service.d/amphora-cpu-pinning.conf")
    assert "Slice=haproxy.slice" in unit.splitlines()
    path = "etc/systemd/system-generators/amphora-cpu-pinning"
    assert hardened.image.tree.entries[path].permissions == 0o755
    last = os.sysconf("SC_NPROCESSORS_ONLN") - 1
    assert last > 0, "one CPU is not pinned"
    subprocess.run(["sh", "-s", tmp_path], input=hardened.text(path), text=True, check=True)
    allowed = {
        file.parent.name.removesuffix(".d"): file.read_text().splitlines()[-1]
        for file in tmp_path.glob("*/amphora-cpu-pinning.conf")
    }
    assert allowed == {
        **dict.fromkeys(("init.scope", "system.slice", "user.slice"), "AllowedCPUs=0"),
        "haproxy.slice": f"AllowedCPUs=1-{last}",
    }


@pytest.mark.options
def test_no_sshd(hardened: Built) -> None:
    """No SSH server is installed, and none that is brought later starts."""
    assert hardened.facts["listening"]["ssh"] is None
    assert hardened.image.tree.get("usr/sbin/sshd") is None
    assert "openssh-server" not in hardened.facts["os_packages"]
    units = {"ssh.service", "ssh.socket", "sshd.service", "sshd.socket"}
    assert units <= set(hardened.facts["services"]["masked"])


@pytest.mark.options
def test_fips(hardened: Built) -> None:
    """The kernel has FIPS mode and is told to be in it, so it tests what it loads."""
    assert "fips=1" in hardened.command_line
    assert "cryptomgr.notests" not in hardened.command_line
    assert hardened.facts["kernels"][0]["fips"] is True


@pytest.mark.options
def test_it_balances_load(hardened: Built, tmp_path: Path) -> None:
    """In FIPS mode and confined it does all that Octavia wants, and is denied nothing."""
    log = tmp_path / "serial.log"
    report = proof.prove(hardened.file, log=log)
    assert report.failure == ""
    assert [each.name for each in report.milestones[2:]] == list(proof.SINGLE)
    said = log.read_text(errors="replace")
    assert f"Linux version {hardened.facts['kernels'][0]['version']} " in said
    assert "AppArmor: AppArmor initialized" in said
    assert "fips mode: enabled" in said
    assert 'profile="amphora-haproxy"' not in said


@pytest.fixture(scope="module")
def packaged(build: Build) -> Built:
    """``-p``."""
    return build("-p")


@pytest.mark.options
def test_agent_is_the_distributions(packaged: Built) -> None:
    """The commands are those of a package and run by the system's Python; ours are not there."""
    assert "python3-octavia" in packaged.facts["os_packages"]
    assert packaged.facts["python_packages"] == {} == packaged.manifest["python_packages"]
    for command in COMMANDS:
        first = packaged.text(f"usr/bin/{command}").splitlines()[0]
        assert first.removeprefix("#!").strip() == "/usr/bin/python3"
    ours = {path for path, _ in packaged.image.tree.under("opt/amphora-agent")}
    assert ours == {"opt/amphora-agent/bin", "opt/amphora-agent/bin/check-imports"}
    link = packaged.image.tree.entries["usr/bin/octavia-agent-lvs-masquerade"]
    assert link.target == "/usr/local/bin/lvs-masquerade.sh"


@pytest.mark.options
def test_services_of_the_controller_are_not_there(packaged: Built) -> None:
    """Of the packages' services none is Octavia's."""
    enabled = packaged.facts["services"]["enabled"]
    assert [name for name in enabled if name.startswith("octavia")] == []


@pytest.mark.options
def test_distributions_agent_balances_load(packaged: Built, prove_part: ProvePart) -> None:
    """Older than the controller as it is, the distribution's agent does all but one of it.

    Its sender of heartbeats is not told of new settings, as that of later releases is.
    """
    prove_part(packaged.file, [name for name in proof.SINGLE if name != "agent configured"])
