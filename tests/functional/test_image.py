# SPDX-License-Identifier: Apache-2.0
"""What the specification asks of an image ("Testing"), on a Debian amphora that was just built."""

from __future__ import annotations

import hashlib
import json
import runpy
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import COMMAND, OPTIONS

#: Packages that make a machine an amphora.
REQUIRED = (
    *("haproxy", "keepalived", "ipvsadm", "cloud-init", "python3", "rsyslog", "logrotate"),
    *("iproute2", "nftables", "openssh-server", "systemd", "linux-image-cloud-amd64"),
)

COMMANDS = (
    *("amphora-agent", "amphora-health-checker", "amphora-interface"),
    *("haproxy-vrrp-check", "prometheus-proxy"),
)

#: Directories that are mount points of a running system; a tar need not hold them.
NOT_IN_TAR = ("./proc", "./sys")


def run(*argv: object) -> str:
    """Run a program that has to succeed; return its output."""
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def attached(raw: Path, start: int, size: int) -> Iterator[str]:
    """Yield a loop device for a part of a file."""
    where = ("--offset", start, "--sizelimit", size, "--read-only")
    device = run("losetup", "--find", "--show", *where, raw).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@pytest.fixture(scope="module")
def raw_image(debian_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk as a raw file."""
    raw = tmp_path_factory.mktemp("raw") / "image.raw"
    run("qemu-img", "convert", "-O", "raw", debian_image, raw)
    return raw


@pytest.fixture(scope="module")
def partitions(raw_image: Path) -> dict[str, tuple[int, int]]:
    """Name of each partition -> start and size, bytes."""
    table = json.loads(run("sfdisk", "--json", raw_image))["partitiontable"]
    assert table["label"] == "gpt"
    sector = table.get("sectorsize", 512)
    return {
        part["name"]: (part["start"] * sector, part["size"] * sector)
        for part in table["partitions"]
    }


@pytest.fixture(scope="module")
def root(
    raw_image: Path,
    partitions: dict[str, tuple[int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The root file system, mounted read-only by a loop device."""
    directory = tmp_path_factory.mktemp("root")
    with attached(raw_image, *partitions["root"]) as device:
        # noload: a read-only loop device cannot replay a journal; a clean one has none to replay
        run("mount", "-o", "ro,noload", device, directory)
        try:
            yield directory
        finally:
            run("umount", directory)


def test_size(debian_image: Path) -> None:
    """The virtual size is the default of -s."""
    info = json.loads(run("qemu-img", "info", "--output=json", debian_image))
    assert info["virtual-size"] == 5 * 2**30
    assert info["format"] == "qcow2"


def test_root_file_system_is_clean(raw_image: Path, partitions: dict[str, tuple[int, int]]) -> None:
    """The root file system fills its partition and has no error."""
    with attached(raw_image, *partitions["root"]) as device:
        run("e2fsck", "-f", "-n", device)
        fields = run("dumpe2fs", "-h", device)
    blocks = int(fields.split("Block count:")[1].split()[0])
    size = int(fields.split("Block size:")[1].split()[0])
    assert partitions["root"][1] - blocks * size < size


def test_root_file_system_mounts_via_loopback(root: Path) -> None:
    """A loop device is enough to mount it, and it is a Debian."""
    assert "ID=debian" in (root / "etc/os-release").read_text()


def test_kernel_has_initramfs_modules_and_boot_entry(root: Path) -> None:
    """One kernel, its initramfs and its modules are installed, and GRUB's entry names them."""
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    version = kernel.name.removeprefix("vmlinuz-")
    # Linux/x86 boot protocol: "HdrS" at offset 0x202 of a bzImage
    assert kernel.read_bytes()[0x202:0x206] == b"HdrS"
    assert (root / f"boot/initrd.img-{version}").stat().st_size > 2**20
    assert (root / f"usr/lib/modules/{version}/modules.dep").exists()
    entry = (root / "boot/grub/grub.cfg").read_text()
    assert f"linux /boot/vmlinuz-{version} root=LABEL=" in entry
    assert f"initrd /boot/initrd.img-{version}" in entry


def test_boot_loader_is_where_the_bios_looks(
    raw_image: Path, partitions: dict[str, tuple[int, int]], root: Path
) -> None:
    """The first sector leads to GRUB's core image in the BIOS boot partition."""
    start, _ = partitions["bios"]
    core = bytearray((root / "boot/grub/core.img").read_bytes())
    with raw_image.open("rb") as disk:
        sector = disk.read(512)
        disk.seek(start)
        written = disk.read(len(core))
    assert sector[510:] == b"\x55\xaa"
    assert struct.unpack_from("<Q", sector, 0x5C)[0] * 512 == start
    struct.pack_into("<Q", core, 0x1F4, start // 512 + 1)
    assert written == bytes(core)


def test_efi_system_partition(
    raw_image: Path, partitions: dict[str, tuple[int, int]], root: Path
) -> None:
    """A UEFI finds the signed shim by itself, shim finds GRUB, and GRUB the menu."""
    start, _ = partitions["esp"]
    listed = run("mdir", "-/", "-b", "-i", f"{raw_image}@@{start}", "::/EFI").split()
    assert {name for name in listed if not name.endswith("/")} == {
        "::/EFI/BOOT/BOOTX64.EFI",
        "::/EFI/BOOT/grubx64.efi",
        "::/EFI/debian/grub.cfg",
    }
    menu = run("mtype", "-i", f"{raw_image}@@{start}", "::/EFI/debian/grub.cfg")
    assert "configfile ($root)/boot/grub/grub.cfg" in menu
    assert not (root / "boot/efi").exists()


def test_required_packages_are_installed(root: Path) -> None:
    """The database of dpkg says that each required package is installed and configured."""
    status = run(
        "dpkg-query",
        f"--admindir={root}/var/lib/dpkg",
        "--show",
        "--showformat=${Package} ${db:Status-Abbrev}\n",
    )
    states = dict(line.split() for line in status.splitlines())
    assert {name: states.get(name) for name in REQUIRED} == dict.fromkeys(REQUIRED, "ii")
    assert set(states.values()) == {"ii"}


def test_no_compiler_and_no_pip(root: Path) -> None:
    """What builds Python packages is not in the image."""
    tools = ("gcc", "cc", "make", "pip", "pip3", "git")
    assert [tool for tool in tools if (root / "usr/bin" / tool).exists()] == []
    assert not list(root.glob("opt/amphora-agent/lib/python3*/site-packages/pip"))


def test_agent_commands_start(root: Path) -> None:
    """Each command that an image starts is there with the environment's own Python."""
    for command in COMMANDS:
        first = (root / "opt/amphora-agent/bin" / command).read_text().splitlines()[0]
        assert first == "#!/opt/amphora-agent/bin/python3"
        assert (root / "usr/bin" / command).is_symlink()


def test_modules_of_packages_are_compiled(root: Path) -> None:
    """All modules of cloud-init have byte code, and the program for it has its name again."""
    modules = root / "usr/lib/python3/dist-packages/cloudinit"
    compiled = {path.name.split(".")[0] for path in modules.glob("__pycache__/*.pyc")}
    assert compiled == {path.stem for path in modules.glob("*.py")} != set()
    assert (root / "usr/bin/py3compile").exists()
    assert "py3compile" not in (root / "var/lib/dpkg/diversions").read_text()


#: What stands for Octavia's command and the library that it imports last: file -> text.
STAND_INS = {
    "octavia/__init__.py": "",
    "octavia/cmd/__init__.py": "",
    "octavia/cmd/interface.py": """\
import os, sys
def main():
    print(os.environ["WORD"], os.readlink("/proc/self/ns/net"), *sys.argv[1:])
    print(sys.stdin.read(), file=sys.stderr)
    return 7
""",
    "pyroute2.py": "IPRoute = None\n",
    "agent.py": "import amphora_fork, time\namphora_fork.serve()\ntime.sleep(600)\n",
}
#: In the image: a process beside an agent, and a command in a network of its own.
ASK = """\
mount -t tmpfs none "$1/run"
mount -t proc none "$1/proc"
mount --bind "$2" "$1/tmp"
exec chroot "$1" /bin/sh -e -c '
    PYTHONPATH=/tmp /opt/amphora-agent/bin/python3 /tmp/agent.py &
    until [ -S /run/amphora-interface.socket ]; do sleep 0.1; done
    export WORD=there
    echo input | unshare --net sh -c "readlink /proc/self/ns/net; amphora-interface up eth9" ||
        echo "status $?"
'
"""


def test_fork_of_the_agent_does_the_work_of_a_command(root: Path, tmp_path: Path) -> None:
    """It has its arguments, variables, streams and network, and the command ends as it does."""
    for name, text in STAND_INS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    alone = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
    done = subprocess.run(
        [*alone, "sh", "-e", "-c", ASK, "sh", root, tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    network, answer, status = done.stdout.splitlines()
    assert answer == f"there {network} up eth9"
    assert status == "status 7"
    assert done.stderr == "input\n\n"
    assert network != str(Path("/proc/self/ns/net").readlink())


def test_root_cannot_log_in(root: Path) -> None:
    """Without -r the root account has no password that fits."""
    (line,) = (
        line for line in (root / "etc/shadow").read_text().splitlines() if line.startswith("root:")
    )
    assert line.split(":")[1][:1] in {"*", "!"}


def test_nothing_of_the_build_is_left(root: Path) -> None:
    """No host key, machine id, package cache, name server or path of the build host stays."""
    assert not list((root / "etc/ssh").glob("ssh_host_*"))
    assert (root / "etc/machine-id").read_text().strip() in {"", "uninitialized"}
    assert not list((root / "var/cache/apt/archives").glob("*.deb"))
    assert not [path for path in (root / "var/lib/apt/lists").rglob("*") if path.is_file()]
    resolv = root / "etc/resolv.conf"
    assert resolv.is_symlink() or not resolv.exists() or "nameserver" not in resolv.read_text()
    assert not (root / "usr/sbin/policy-rc.d").exists()


def test_checksum_and_manifest(debian_image: Path) -> None:
    """The files beside the image describe it."""
    digest = hashlib.sha256(debian_image.read_bytes()).hexdigest()
    checksum = Path(f"{debian_image}.sha256").read_text()
    assert checksum == f"{digest}  {debian_image.name}\n"
    manifest = json.loads(Path(f"{debian_image}.json").read_text())
    assert manifest["files"][debian_image.name] == {
        "sha256": digest,
        "bytes": debian_image.stat().st_size,
    }
    assert manifest["packages"]["haproxy"]
    assert manifest["python_packages"]["octavia"]
    assert manifest["archives"][0]["date"]
    assert "amphora-haproxy" in manifest["plan"]["elements"]


def test_same_build_again(debian_image: Path, debian_cache: Path, tmp_path: Path) -> None:
    """With nothing changed a build is a copy of the image from the cache, with its own manifest."""
    sums, manifests = [], []
    for name in ("one", "two"):  # the first is one of the kind, if the archive has changed
        command = [COMMAND, *OPTIONS, "-c", debian_cache, "-o", tmp_path / name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        sums.append((tmp_path / f"{name}.qcow2.sha256").read_text().split()[0])
        manifests.append(json.loads((tmp_path / f"{name}.qcow2.json").read_text()))
    first, again = manifests
    assert "nothing has changed since the same image was built" in said
    assert sums[0] == sums[1] == hashlib.sha256((tmp_path / "two.qcow2").read_bytes()).hexdigest()
    assert again["packages"] == first["packages"]
    assert again["files"].keys() == {"two.qcow2", "two.tar"}
    assert again["request"]["output"] == str(tmp_path / "two")


def test_properties_for_the_cloud_fit(debian_image: Path) -> None:
    """The image is what ``tempest/image.conf`` tells Glance, Nova and Octavia of it."""
    check = runpy.run_path(str(Path(__file__).parents[2] / "tempest/check.py"))
    manifest = json.loads(Path(f"{debian_image}.json").read_text())
    settings = check["HERE"] / "image.conf"
    assert list(check["wrong_properties"](settings, manifest)) == []


def test_tar_holds_the_same_tree(debian_image: Path, root: Path) -> None:
    """The tar file has the same files, owners, modes and sizes as the disk."""
    with tarfile.open(debian_image.with_suffix(".tar")) as tar:
        in_tar = {
            member.name: (member.mode, member.uid, member.gid, member.size)
            for member in tar
            if member.isfile() and not member.name.startswith(NOT_IN_TAR)
        }
        links = {member.name for member in tar.getmembers() if member.islnk()}
    on_disk = {}
    for path in root.rglob("*"):
        name = f"./{path.relative_to(root)}"
        if path.is_file() and not path.is_symlink() and name not in links:
            status = path.stat()
            mode = status.st_mode & 0o7777
            on_disk[name] = (mode, status.st_uid, status.st_gid, status.st_size)
    assert {name: on_disk.get(name) for name in in_tar} == in_tar
    assert set(on_disk) - set(in_tar) == set()


def test_podman_runs_the_tar(debian_image: Path) -> None:
    """The tar file imports as a container image in which HAProxy runs (specification)."""
    name = "localhost/amphora-image-test:latest"
    podman = ("podman", "--cgroup-manager=cgroupfs", "--runtime=runc")
    run(*podman, "import", debian_image.with_suffix(".tar"), name)
    try:
        limits = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024", "--network=host")
        version = run(*podman, "run", "--rm", *limits, name, "haproxy", "-v")
    finally:
        run(*podman, "rmi", "--force", name)
    assert version.startswith("HAProxy version")
