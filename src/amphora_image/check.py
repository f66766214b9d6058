# SPDX-License-Identifier: Apache-2.0
"""Image and manifest -> findings: the table of rules, and how findings are shown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from amphora_image import rules, safety
from amphora_image.errors import BadValue
from amphora_image.facts import printable
from amphora_image.image import Image, read_image
from amphora_image.manifest import SCHEMA
from amphora_image.request import GIB
from amphora_image.rules import Asked, Check

#: It would not work or would not be safe; it is larger or less tidy than it should be.
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Rule:
    """A rule: its name, what checks it, why it is one, and what mends an image that breaks it."""

    name: str
    check: Check
    why: str
    fix: str
    severity: str = ERROR


@dataclass(frozen=True)
class Finding:
    """A rule that an image breaks, and by what."""

    rule: str
    severity: str
    what: str
    why: str
    fix: str


REBUILD = "build the image again; do not change a finished one"

RULES = (
    Rule(
        "size",
        rules.check_size,
        "Nova starts no server whose flavor's disk is smaller, and what is unused is lost.",
        "build with -s and a size that the flavor has",
    ),
    Rule(
        "file-system",
        rules.check_file_system,
        "An amphora with a damaged root file system stops at boot, or later.",
        f"copy the image again and compare its checksum, or {REBUILD}",
    ),
    Rule(
        "loopback",
        rules.check_loopback,
        "Who looks into an image mounts it read-only, which cannot replay a journal.",
        REBUILD,
    ),
    Rule(
        "kernel",
        rules.check_kernel,
        "A kernel without its own initramfs and modules finds neither disk nor network.",
        "choose another kernel package (-k), or look for errors of update-initramfs in the log",
    ),
    Rule(
        "boot-loader",
        rules.check_boot_loader,
        "The firmware must find GRUB, and GRUB the kernel.",
        "see the log for errors of the element amphora-disk",
    ),
    Rule(
        "packages",
        rules.check_packages,
        "The agent and its templates call these programs.",
        "leave the elements of amphora-image in DIB_ELEMENTS, see the log for errors of apt",
    ),
    Rule(
        "locked-packages",
        rules.check_locked_packages,
        "An image that differs from its manifest was changed after it was built.",
        "use the manifest of this image, or build again",
    ),
    Rule(
        "agent",
        rules.check_agent,
        "Without the agent the controller waits for the amphora in vain.",
        "see the log for errors of the element amphora-agent",
    ),
    Rule(
        "services",
        rules.check_services,
        "What is not enabled does not start; the packages' own services are in the agent's way.",
        "systemctl enable or mask in an element's install.d",
    ),
    Rule(
        "order",
        rules.check_order,
        "Keys that cloud-init writes before the RAM disk is mounted are on the disk for ever.",
        "keep the units of the elements amphora-certificates and amphora-agent",
    ),
    Rule(
        "certificates",
        rules.check_certificates,
        "Private keys of tenants must never reach a disk.",
        "use the element amphora-certificates, and a kernel with brd, dm-crypt and xts (-k)",
    ),
    Rule(
        "datasources",
        rules.check_datasources,
        "cloud-init asks a network that may be a tenant's for data, or waits for it.",
        "set CLOUD_INIT_DATASOURCES",
    ),
    Rule(
        "host-keys",
        safety.check_host_keys,
        "Who has the image could be every amphora to those who log in.",
        "remove them in a cleanup.d script; amphora-trim does",
    ),
    Rule(
        "machine-id",
        safety.check_machine_id,
        "Amphorae with one identity get one DHCP lease, and their logs are mixed up.",
        "empty /etc/machine-id and remove /etc/hostname in cleanup.d; amphora-trim does",
    ),
    Rule(
        "secrets",
        safety.check_secrets,
        "An image is shared with everyone who may start a server from it.",
        "find the element that writes them; change what was seen",
    ),
    Rule(
        "caches",
        safety.check_caches,
        "Nothing in an amphora reads them, and each one pays for them.",
        "remove them in a cleanup.d script; amphora-trim does",
        WARNING,
    ),
    Rule(
        "resolver",
        safety.check_resolver,
        "An amphora asks no name server; queries would tell of tenants' members.",
        "leave /etc/resolv.conf to the element amphora-network",
    ),
    Rule(
        "build-traces",
        safety.check_build_traces,
        "They tell of the build host, and policy-rc.d keeps services from starting.",
        "remove them in a cleanup.d script; amphora-trim does",
    ),
    Rule(
        "compiler",
        safety.check_compiler,
        "It serves an intruder only, and takes a hundred megabytes.",
        "install build tools for the phase alone: uninstall: in package-installs.yaml",
    ),
    Rule(
        "logins",
        safety.check_logins,
        "The controller needs no login, so nobody else should have one.",
        "remove the users and keys that an element adds",
    ),
    Rule(
        "root-password",
        safety.check_root_password,
        "Who has the image can guess a password that it holds; all amphorae share it.",
        "build without -r; --root-password-expected for an image that is to have one",
    ),
    Rule(
        "sshd",
        safety.check_sshd,
        "Each server that listens is one to be attacked.",
        "use amphora-no-sshd (-n), or keep the settings of amphora-sshd",
    ),
    Rule(
        "fips",
        safety.check_fips,
        "A kernel that is not in FIPS mode tests no algorithm and refuses none.",
        "name a kernel that has it with -k (Ubuntu's are part of Ubuntu Pro), or leave out -y",
    ),
    Rule(
        "sysctls",
        safety.check_sysctls,
        "The defaults are those of a desktop: few ports, short queues, small buffers.",
        "use the element amphora-sysctl, and no file after 90-amphora.conf for its keys",
    ),
    Rule(
        "ownership",
        safety.check_ownership,
        "What another user owns that user can change, and root runs it.",
        "chown in the element that wrote them; amphora-static does",
    ),
    Rule(
        "modes",
        safety.check_modes,
        "Password hashes and keys are for root, temporary directories for all, with care.",
        "install -m in the element that wrote them",
    ),
    Rule(
        "world-writable",
        safety.check_world_writable,
        "HAProxy's user, and who takes it over, could change them.",
        "chmod o-w in the element that wrote them",
    ),
    Rule(
        "setuid",
        safety.check_setuid,
        "Each such program is a way to root.",
        "chmod a-s, or remove the package that brings it",
    ),
)


def check_image(
    path: Path,
    *,
    manifest: Path | None = None,
    size: Decimal | None = None,
    no_sshd: bool = False,
    root_password: bool = False,
) -> list[Finding]:
    """Read an image and return what is wrong with it, all of it, in the order of the rules.

    :param manifest: what the build recorded; the file ``IMAGE.json`` if None and if there is one.
    :param size: of the disk in GiB; what the manifest says if None.
    :param no_sshd: no SSH server is expected, whatever the manifest says.
    :param root_password: root is expected to have a password, whatever the manifest says.
    :raises BadValue: image or manifest is no such file.
    :raises CheckFailed: the image cannot be read at all.
    """
    beside = Path(f"{path}.json")
    record = manifest or (beside if beside.is_file() else None)
    asked = read_manifest(record) if record else Asked()
    if size is not None:
        asked = replace(asked, size=int(size * GIB))
    if no_sshd:
        asked = replace(asked, sshd=False)
    if root_password:
        asked = replace(asked, root_password=True)
    return findings(read_image(path, safety.patterns(asked)), asked)


def findings(image: Image, asked: Asked) -> list[Finding]:
    """Return what breaks a rule."""
    return [
        Finding(rule.name, rule.severity, printable(what)[:1000], rule.why, rule.fix)
        for rule in RULES
        for what in rule.check(image, asked)
    ]


def read_manifest(path: Path) -> Asked:
    """Return what a manifest tells of the image that was asked for.

    :raises BadValue: it is none.
    """
    try:
        record = json.loads(path.read_text())
        request = record["request"]
        if record["schema"] != SCHEMA:
            raise ValueError(f"its schema is {record['schema']!r}, not {SCHEMA!r}")
        directories = {request["working_dir"], request["cache_dir"]}
        return Asked(
            size=int(Decimal(request["size"]) * GIB),
            sshd=bool(request["sshd"]),
            root_password=request["root_password"] is not None,
            fips=bool(request.get("fips")),
            datasources=str(request["environment"]["datasources"]),
            packages=record.get("packages"),
            python_packages=record.get("python_packages"),
            # A short path is too common to mean the build host's.
            directories=tuple(sorted(name for name in directories if name.count("/") > 1)),
        )
    except (OSError, ValueError, ArithmeticError, KeyError, TypeError) as error:
        raise BadValue(f"the manifest {str(path)!r} cannot be used: {error}") from error


def as_json(name: str, found: Iterable[Finding]) -> str:
    """Return the findings as a JSON object: ``image``, ``passed``, ``rules``, ``findings``."""
    listed = [asdict(finding) for finding in found]
    broken = {finding["rule"] for finding in listed}
    document: Mapping[str, Any] = {
        "image": name,
        "passed": not listed,
        "rules": {rule.name: rule.name not in broken for rule in RULES},
        "findings": listed,
    }
    return json.dumps(document, indent=2)


def as_junit(name: str, found: Iterable[Finding]) -> str:
    """Return the findings as JUnit XML, a test case for each rule."""
    by_rule: dict[str, list[Finding]] = {}
    for finding in found:
        by_rule.setdefault(finding.rule, []).append(finding)
    suite = ElementTree.Element(
        "testsuite",
        name=f"amphora-image check {printable(name)}",
        tests=str(len(RULES)),
        failures=str(len(by_rule)),
        errors="0",
    )
    for rule in RULES:
        case = ElementTree.SubElement(suite, "testcase", classname="amphora-image", name=rule.name)
        if broken := by_rule.get(rule.name):
            failure = ElementTree.SubElement(case, "failure", message=broken[0].what)
            failure.text = "\n".join([*(each.what for each in broken), rule.why, rule.fix])
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def as_table(name: str, found: list[Finding]) -> Table:
    """Return the findings as a table for people; broken rules once, with all that breaks them."""
    broken = Counter(finding.rule for finding in found)
    caption = f"{len(RULES)} rules, {len(broken)} broken"
    table = Table("rule", "", "what", title=Text(printable(name)), caption=caption)
    for rule in RULES:
        whats = [finding.what for finding in found if finding.rule == rule.name]
        if not whats:
            table.add_row(rule.name, "[green]ok[/green]", "")
            continue
        told = "\n".join([*whats, f"Why: {rule.why}", f"Fix: {rule.fix}"])
        table.add_row(rule.name, f"[red]{rule.severity}[/red]", Text(told))
    return table
