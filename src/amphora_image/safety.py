# SPDX-License-Identifier: Apache-2.0
"""What keeps an amphora safe, and its image clean: one small function a rule, as in ``rules``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from amphora_image import facts
from amphora_image.image import Image, Pattern
from amphora_image.rules import Asked, words
from amphora_image.tree import Tree

SYSCTLS = Path(__file__).parent / "elements/amphora-sysctl/static/etc/sysctl.d/90-amphora.conf"

#: Programs with set-user-ID or set-group-ID of packages that an amphora has.
SETUID = words(
    """
    chage chfn chsh crontab dbus-daemon-launch-helper expiry fusermount3 gpasswd mount newgrp
    pam_extrausers_chkpwd passwd ssh-agent ssh-keysign su sudo umount unix_chkpwd
    """
)
#: Path -> permissions, where these alone are right.
MODES: Mapping[str, frozenset[int]] = {
    "etc/shadow": frozenset({0o640, 0o600, 0o000}),
    "etc/gshadow": frozenset({0o640, 0o600, 0o000}),
    "etc/passwd": frozenset({0o644}),
    "etc/octavia": frozenset({0o750, 0o700}),
    "etc/octavia/certs": frozenset({0o700}),
    "var/lib/octavia/certs": frozenset({0o700}),
    "root": frozenset({0o700, 0o550}),
    "tmp": frozenset({0o1777}),
    "var/tmp": frozenset({0o1777}),
}
ROOT_OWNED = re.compile(r"(bin|boot|etc|lib\d*|opt|root|sbin|usr)(/.*)?")
COMPILERS = re.compile(
    r"(usr/)?(local/)?s?bin/([\w]+-linux-gnu\w*-)?"
    r"(cc|c\+\+|gcc|g\+\+|cpp|clang|clang\+\+|tcc|rustc|cargo|go|make|ld|as)(-[\d.]+)?"
    r"|usr/lib(exec)?/gcc/.+/cc1(plus)?"
)
#: Files that are a machine's or a person's own.
PRIVATE = re.compile(
    r"etc/octavia/certs/.+|var/lib/octavia/certs/.+|etc/octavia/amphora-agent\.conf"
    r"|var/lib/cloud/.+|var/lib/systemd/random-seed|etc/ssl/private/.+"
    r"|(root|home/[^/]+)/\.(\w+_history|netrc|git-credentials|pypirc|viminfo)"
    r"|(root|home/[^/]+)/\.(ssh/id_[^.]+|config/pip/pip\.conf|aws/credentials)"
)
#: Keys that packages ship for their own tests; a library of cryptography tests itself when loaded.
TEST_DATA = re.compile(
    r".*/(site|dist)-packages/.*/(tests?|testing)/.*|usr/lib/[^/]+/libgnutls\.so\.[0-9.]+"
)
CACHES = re.compile(
    r"(root|home/[^/]+)/\.cache/.+|var/lib/apt/lists/.+|var/cache/apt/(archives/.+\.deb|.+\.bin)"
    r"|var/cache/(dnf|yum|man|ldconfig)/.+|(var/)?tmp/.+|var/log/journal/.+"
)
BUILD_TRACES = re.compile(
    r"etc/dib[-_].+|usr/sbin/policy-rc\.d|etc/apt/apt\.conf\.d/[^/]*(proxy|dib)[^/]*"
    r"|etc/resolv\.conf\.ORIG|lib/diskimage-builder/.+|tmp/(in_target\.d|ccache)/.+"
)

PRIVATE_KEY = Pattern(
    "private key",
    b"-----BEGIN ",
    re.compile(
        rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----\r?\n(?:[\w-]+: .*\r?\n)*(?:\r?\n)?[\w+/=]{40}"
    ),
)


def patterns(asked: Asked) -> list[Pattern]:
    """Return what the data of an image is searched for."""
    paths = {r"/amphora-image-\w{8}/": b"/amphora-image-", r"/dib_(build|image)\.\w": b"/dib_"}
    paths |= {rf"{re.escape(name)}\b": name.encode() for name in asked.directories}
    return [
        PRIVATE_KEY,
        *(Pattern("build path", needle, re.compile(p.encode())) for p, needle in paths.items()),
    ]


def check_host_keys(image: Image, _: Asked) -> Iterator[str]:
    """No SSH host key is in the image."""
    for path, _entry in image.tree.match(r"etc/ssh/ssh_host_.*"):
        yield f"/{path} would be the same in all amphorae"


def check_machine_id(image: Image, _: Asked) -> Iterator[str]:
    """The machine's identity is empty: each amphora makes its own."""
    for path in ("etc/machine-id", "var/lib/dbus/machine-id", "etc/hostname"):
        text = image.tree.text(path).strip()
        if text not in ("", "uninitialized"):
            yield f"/{path} is {text[:64]!r}"
    if not image.tree.get("etc/machine-id"):
        yield "/etc/machine-id is missing, so that it cannot be made where / is read-only"
    for path, _entry in image.tree.match(r"etc/udev/rules\.d/70-persistent-.*"):
        yield f"/{path} names another machine's cards"


def check_secrets(image: Image, _: Asked) -> Iterator[str]:
    """Nobody's private keys, passwords or history are in the image."""
    for mark in image.marks:
        if mark.kind == PRIVATE_KEY.kind and not TEST_DATA.fullmatch(mark.path):
            yield f"a private key in {f'/{mark.path}' if mark.path else 'data of a deleted file'}"
    for path, entry in image.tree.match(PRIVATE.pattern):
        if entry.is_file:
            yield f"/{path} is a machine's or a person's own"
    for path, _entry in image.tree.match(r"etc/apt/(auth\.conf|auth\.conf\.d/.+|sources\.list.*)"):
        if re.search(r"^\s*(machine|login|password)\s|://[^/\s@]+@", image.tree.text(path), re.M):
            yield f"/{path} holds a password"


def check_caches(image: Image, _: Asked) -> Iterator[str]:
    """No package lists, archives, caches of pip or temporary files."""
    files = [path for path, entry in image.tree.match(CACHES.pattern) if entry.is_file]
    yield from (f"/{path}" for path in files[:20])
    if len(files) > 20:
        yield f"and {len(files) - 20} files more"


def check_resolver(image: Image, _: Asked) -> Iterator[str]:
    """No name server of the build host is asked."""
    for server in re.findall(
        r"^\s*(?:nameserver|search|domain)\s+.*$", image.tree.text("etc/resolv.conf"), re.MULTILINE
    ):
        yield f"/etc/resolv.conf says {server.strip()!r}"


def check_build_traces(image: Image, _: Asked) -> Iterator[str]:
    """Nothing tells of the machine that built the image, or keeps services from starting."""
    for path, entry in image.tree.match(BUILD_TRACES.pattern):
        if not entry.is_dir:
            yield f"/{path} is the build's"
    for mark in image.marks:
        if mark.kind == "build path" and mark.path:
            yield f"/{mark.path} names a directory of the build host"


def check_compiler(image: Image, _: Asked) -> Iterator[str]:
    """No compiler."""
    for path, _entry in image.tree.match(COMPILERS.pattern):
        yield f"/{path}"


def check_logins(image: Image, _: Asked) -> Iterator[str]:
    """Nobody but root, where that was asked, can log in; nobody but root is root."""
    for name, user in facts.read_logins(image.tree).items():
        if name != "root" or user["keys"]:
            yield f"{name} can log in: password {user['password']}, {user['keys']} SSH keys"
    for line in image.tree.text("etc/passwd").splitlines():
        name, *fields = line.split(":")
        if fields[1:2] == ["0"] and name != "root":
            yield f"{name} has root's user number"


def check_root_password(image: Image, asked: Asked) -> Iterator[str]:
    """Root has a password if, and only if, one was asked for."""
    has = facts.read_logins(image.tree).get("root", {}).get("password", False)
    if has and not asked.root_password:
        yield "root has a password that nobody asked for, or an empty one"
    if asked.root_password and not has:
        yield "root has no password, but one was asked for"


def check_sshd(image: Image, asked: Asked) -> Iterator[str]:
    """No SSH server where none was wanted; else one that takes keys only."""
    sshd = facts.read_sshd(image.tree)
    enabled = facts.read_services(image.tree)["enabled"]
    if asked.sshd is False:
        if sshd["installed"]:
            yield "/usr/sbin/sshd is there, but was not asked for (-n)"
        yield from (f"{unit} is enabled" for unit in enabled if re.match(r"sshd?\.", unit))
    elif asked.sshd and not sshd["installed"]:
        yield "/usr/sbin/sshd is missing"
    if sshd["installed"]:
        for key in ("passwordauthentication", "permitrootlogin", "kbdinteractiveauthentication"):
            if (value := sshd["settings"].get(key, "unset")) != "no":
                yield f"sshd's {key} is {value}, not no"


def check_fips(image: Image, asked: Asked) -> Iterator[str]:
    """The kernel is told to be in FIPS 140 mode, and has one, if that was asked for."""
    if not asked.fips or not image.file_system:
        return
    if "fips=1" not in facts.read_boot_loader(image)["command_line"].split():
        yield "the kernel's command line is without fips=1"
    for kernel in facts.read_kernels(image.tree):
        if kernel["fips"] is False:
            yield f"the kernel {kernel['version']} is made without FIPS mode (CONFIG_CRYPTO_FIPS)"


def check_sysctls(image: Image, _: Asked) -> Iterator[str]:
    """Every kernel setting of the element amphora-sysctl is in force after all files are read."""
    in_force = _sysctls(image.tree)
    for key, value in _settings(SYSCTLS.read_text()).items():
        if in_force.get(key) != value:
            yield f"{key} is {in_force.get(key, 'unset')}, not {value}"


def _sysctls(tree: Tree) -> dict[str, str]:
    # sysctl.d(5): by file name, a file in /etc hides one of the same name in /usr/lib.
    files = {path.rpartition("/")[2]: path for path, _ in tree.under("usr/lib/sysctl.d")}
    files |= {path.rpartition("/")[2]: path for path, _ in tree.under("etc/sysctl.d")}
    paths = [files[name] for name in sorted(files) if name.endswith(".conf")]
    in_force: dict[str, str] = {}
    for path in paths:
        in_force |= _settings(tree.text(path))
    return in_force


def _settings(text: str) -> dict[str, str]:
    lines = re.findall(r"^\s*-?([\w./-]+)\s*=\s*(.*?)\s*$", text, re.MULTILINE)
    return {key.replace("/", "."): " ".join(value.split()) for key, value in lines}


def check_ownership(image: Image, _: Asked) -> Iterator[str]:
    """Root owns the system."""
    strangers = [
        f"/{path} belongs to user {entry.uid}"
        for path, entry in image.tree.match(ROOT_OWNED.pattern)
        if entry.uid
    ]
    yield from strangers[:20]
    if len(strangers) > 20:
        yield f"and {len(strangers) - 20} files more"


def check_modes(image: Image, _: Asked) -> Iterator[str]:
    """What must be private is private, and what must be there for all is so."""
    for path, allowed in MODES.items():
        entry = image.tree.get(path)
        if not entry:
            yield f"/{path} is missing"
        elif entry.permissions not in allowed:
            names = ", ".join(f"{mode:04o}" for mode in sorted(allowed))
            yield f"/{path} has the mode {entry.permissions:04o}; allowed: {names}"


def check_world_writable(image: Image, _: Asked) -> Iterator[str]:
    """Nobody can write to what others read, but to directories with the sticky bit."""
    for path, entry in image.tree.entries.items():
        sticky = entry.is_dir and entry.permissions & 0o1000
        if entry.mode & 0o002 and not entry.is_link and not sticky and not path.startswith("dev/"):
            yield f"/{path} has the mode {entry.permissions:04o}"


def check_setuid(image: Image, _: Asked) -> Iterator[str]:
    """Only known programs of the base OS run with another user's rights."""
    for path, entry in image.tree.entries.items():
        known = path.startswith("usr/") and path.rpartition("/")[2] in SETUID
        if entry.is_file and entry.permissions & 0o6000 and not known:
            yield f"/{path} has the mode {entry.permissions:04o}"
