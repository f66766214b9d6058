# SPDX-License-Identifier: Apache-2.0
"""The elements as files: what diskimage-builder and its lint want of them."""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from pathlib import Path

import pytest
import yaml

from amphora_image import plan
from amphora_image.request import RELEASES, Architecture, BaseOS

ELEMENTS = sorted(path for path in plan.ELEMENTS.iterdir() if path.is_dir())
#: Directories of an element whose scripts diskimage-builder runs, by their names' ending.
HOOKS = sorted(
    path
    for element in ELEMENTS
    for path in element.glob("*.d/*")
    if path.parent.name != "environment.d"
)
PROGRAMS = sorted(
    path
    for element in ELEMENTS
    for path in element.rglob("*")
    if path.is_file() and path.read_bytes().startswith(b"#!")
)
UNITS = sorted(
    path
    for element in ELEMENTS
    for path in element.glob("static/**/systemd/system/**/*")
    if path.is_file()
)
PACKAGE_LISTS = [path for e in ELEMENTS if (path := e / "package-installs.yaml").exists()]
PACKAGE_MAPS = [path for e in ELEMENTS if (path := e / "pkg-map").exists()]

#: Variables that the plan sets for every build, so that a package may depend on them.
ALWAYS_SET = {"AMPHORA_AGENT_FROM_PACKAGES", "DIB_OCTAVIA_AMP_USE_NFTABLES"}

TRACE = 'if [ "${DIB_DEBUG_TRACE:-0}" -gt 0 ]; then\n    set -x\nfi\n'
STRICT = "set -eu\nset -o pipefail\n"


def name(path: Path) -> str:
    """Return the path below the elements, as the name of a test."""
    return str(path.relative_to(plan.ELEMENTS))


def in_image(path: str) -> bool:
    """Tell whether an element puts this absolute path into the image."""
    return any((element / "static" / path.lstrip("/")).exists() for element in ELEMENTS)


@pytest.mark.parametrize("element", ELEMENTS, ids=name)
def test_readme_has_the_elements_name_as_title(element: Path) -> None:
    """A reader finds each element by its name, underlined."""
    rule = "=" * len(element.name)
    pattern = rf"({rule}\n)?{element.name}\n{rule}\n"
    assert re.match(pattern, (element / "README.rst").read_text())


@pytest.mark.parametrize("element", ELEMENTS, ids=name)
def test_readme_speaks_of_variables_that_are_read(element: Path) -> None:
    """A variable defined in a README is read by the element, by its packages or by the build."""
    readme = (element / "README.rst").read_text()
    files = [path for path in element.rglob("*") if path.is_file() and path.name != "README.rst"]
    read = "\n".join(path.read_text() for path in files)
    source = "\n".join(path.read_text() for path in plan.ELEMENTS.parent.glob("*.py"))
    for variable in re.findall(r"^``([A-Z][A-Za-z_]+)``$", readme, re.MULTILINE):
        assert variable in read + source


@pytest.mark.parametrize("program", PROGRAMS, ids=name)
def test_programs_are_executable(program: Path) -> None:
    """What begins with a shebang is run by diskimage-builder or by the image."""
    assert program.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("hook", HOOKS, ids=name)
def test_hooks_are_strict_bash(hook: Path) -> None:
    """Each hook says its licence and purpose, traces if asked, and stops at the first error."""
    text = hook.read_text()
    assert text.startswith("#!/bin/bash\n# SPDX-License-Identifier: Apache-2.0\n# ")
    assert STRICT in text
    if "dib-lint: disable=dibdebugtrace" not in text:
        assert TRACE + STRICT in text


def test_only_the_secret_hook_is_never_traced() -> None:
    """The password's hook turns tracing off, and no other hook keeps itself out of a trace."""
    untraced = [name(hook) for hook in HOOKS if TRACE not in hook.read_text()]
    assert untraced == ["amphora-root-password/extra-data.d/60-amphora-root-password"]
    text = (plan.ELEMENTS / untraced[0]).read_text()
    assert "set -x" not in text
    assert "\nset +x\n" in text


@pytest.mark.parametrize("hook", HOOKS, ids=name)
def test_hooks_have_names_that_are_run(hook: Path) -> None:
    """dib-run-parts passes over other names; the element's name keeps them apart from DIB's.

    By "then" a script comes after one of DIB's that has the highest number.
    """
    assert re.fullmatch(r"([0-9]{2}|99-then)-amphora[0-9A-Za-z_-]*", hook.name)


def test_no_file_is_carried_by_two_elements() -> None:
    """All elements are merged into one tree: a second file would win or stop the build."""
    files = Counter(
        path.relative_to(element)
        for element in ELEMENTS
        for directory in element.iterdir()
        if directory.is_dir()
        for path in directory.rglob("*")
        if path.is_file()
    )
    assert [str(path) for path, count in files.items() if count > 1] == []


@pytest.mark.parametrize("packages", PACKAGE_LISTS, ids=name)
def test_package_lists_parse(packages: Path) -> None:
    """Every package depends at most on variables that the plan always sets."""
    for options in yaml.safe_load(packages.read_text()).values():
        if options and "when" in options:
            match = re.fullmatch(r"(\w+) !?= \S+", options["when"])
            assert match is not None
            assert match[1] in ALWAYS_SET


@pytest.mark.parametrize("packages", PACKAGE_LISTS, ids=name)
def test_package_lists_name_architectures(packages: Path) -> None:
    """diskimage-builder compares what is between commas with its name of the architecture."""
    known = {str(plan.DEBIAN_ARCHITECTURE.get(each, each)) for each in Architecture}
    for options in yaml.safe_load(packages.read_text()).values():
        assert set((options or {}).get("arch", "amd64").split(",")) <= known


@pytest.mark.parametrize("mapping", PACKAGE_MAPS, ids=name)
def test_package_maps_rename_what_is_listed(mapping: Path) -> None:
    """A pkg-map has diskimage-builder's four levels and no name that nothing asks for."""
    levels = json.loads(mapping.read_text())
    assert set(levels) <= {"release", "distro", "family", "default"}
    listed = set(yaml.safe_load(mapping.with_name("package-installs.yaml").read_text()))
    families = [*levels.get("family", {}).values(), *levels.get("distro", {}).values()]
    families += [levels.get("default", {})]
    families += [
        names for distro in levels.get("release", {}).values() for names in distro.values()
    ]
    for names in families:
        assert set(names) <= listed


@pytest.mark.parametrize("element", ELEMENTS, ids=name)
def test_dependencies_are_named(element: Path) -> None:
    """What an element uses of others it depends on, in the order that dib-lint wants."""
    deps_file = element / "element-deps"
    deps = deps_file.read_text().split() if deps_file.exists() else []
    assert deps == sorted(set(deps))
    for directory, wanted in [
        ("static", "amphora-static"),
        ("package-installs.yaml", "package-installs"),
        ("pkg-map", "pkg-map"),
    ]:
        if (element / directory).exists() and element.name not in {"amphora-disk"}:
            assert wanted in deps


def test_the_plans_elements_exist() -> None:
    """The plan names no element of ours that is not here."""
    rows = {element for element, _ in plan.ELEMENT_ROWS}
    assert rows <= {element.name for element in ELEMENTS}


@pytest.mark.parametrize("unit", UNITS, ids=name)
def test_units_call_programs_by_path(unit: Path) -> None:
    """A program of ours that a unit calls is in some element's static tree, at that path."""
    for program in re.findall(r"^Exec\w+=[-+!@:]*(\S+)", unit.read_text(), re.MULTILINE):
        assert program.startswith("/")
        if program.startswith("/usr/local/"):
            assert in_image(program)


def test_masked_units_are_not_our_own() -> None:
    """A hook that masks or disables a unit means the distribution's."""
    ours = {unit.name for unit in UNITS if ".d" not in unit.parent.suffix}
    for hook in HOOKS:
        for line in re.findall(r"systemctl (?:mask|disable) (.*)", hook.read_text()):
            assert not ours & set(line.split())


def test_enabled_units_are_installed() -> None:
    """Each of our units with an [Install] section is enabled by a hook of its element."""
    for unit in UNITS:
        if "[Install]" in unit.read_text():
            element = plan.ELEMENTS / unit.relative_to(plan.ELEMENTS).parts[0]
            hooks = "".join(hook.read_text() for hook in HOOKS if element in hook.parents)
            assert re.search(rf"systemctl enable .*\b{re.escape(unit.name)}", hooks), unit.name


def test_agent_waits_for_its_files() -> None:
    """The agent's unit is skipped until the configuration and both certificates are there."""
    unit = plan.ELEMENTS / "amphora-agent/static/usr/lib/systemd/system/amphora-agent.service"
    assert re.findall(r"^ConditionPathExists=(.*)$", unit.read_text(), re.MULTILINE) == [
        "/etc/octavia/amphora-agent.conf",
        "/etc/octavia/certs/server.pem",
        "/etc/octavia/certs/client_ca.pem",
    ]


def test_agent_is_tried_after_each_stage_of_cloud_init() -> None:
    """Files come at cloud-init's local stage or at its network stage, which has had two names."""
    units = plan.ELEMENTS / "amphora-agent/static/usr/lib/systemd/system"
    agent = (units / "amphora-agent.service").read_text()
    assert re.search(r"^After=.*\bcloud-init-local\.service\b", agent, re.MULTILINE)
    for stage in ("cloud-init-network", "cloud-init"):
        text = (units / f"{stage}.service.d/amphora-agent.conf").read_text()
        assert "ExecStartPost=-/bin/systemctl --no-block start amphora-agent.service\n" in text


def test_certificates_are_mounted_before_cloud_init_writes() -> None:
    """cloud-init's local stage comes after the RAM disk, and not at all without it."""
    element = plan.ELEMENTS / "amphora-certificates"
    unit = (element / "static/usr/lib/systemd/system/amphora-certificates.service").read_text()
    assert re.search(r"^Before=.*\bcloud-init-local\.service\b", unit, re.MULTILINE)
    assert "RequiredBy=cloud-init-local.service\n" in unit
    script = (element / "static/usr/local/lib/amphora/certificates").read_text()
    for directory in ("/etc/octavia/certs", "/var/lib/octavia/certs", "/var/lib/cloud"):
        assert directory in script


def test_sysctl_keys_are_set_once() -> None:
    """A key that is set twice hides one of its two reasons."""
    conf = plan.ELEMENTS / "amphora-sysctl/static/etc/sysctl.d/90-amphora.conf"
    keys = re.findall(r"^([a-z0-9_.]+) = \S", conf.read_text(), re.MULTILINE)
    assert len(keys) > 30
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("release", RELEASES[BaseOS.FEDORA])
def test_fedora_has_container_files(release: str) -> None:
    """Each release has a file, by whose name diskimage-builder finds it."""
    file = plan.ELEMENTS / "amphora-fedora/containerfiles" / release
    assert f"FROM fedora:{release}\n" in file.read_text()


def test_no_archive_is_named() -> None:
    """No element names a package archive's host: mirrors are the build's business."""
    pattern = re.compile(r"\b(deb\.debian|archive\.ubuntu|security\.ubuntu|pypi)\.org|ubuntu\.com")
    for element in ELEMENTS:
        for path in element.rglob("*"):
            assert not (path.is_file() and pattern.search(path.read_text())), path


@pytest.mark.parametrize(
    "unit", ["amphora-netns", "haproxy-", "octavia-keepalived", "octavia-keepalivedlvs-"]
)
def test_units_of_the_agent_do_not_wait_for_cloud_init(unit: str) -> None:
    """The units that the agent writes start and stop without sysinit.target, and come first."""
    texts = [path.read_text() for path in UNITS if path.parent.name == f"{unit}.service.d"]
    lines = "".join(texts).splitlines()
    assert "DefaultDependencies=no" in lines
    assert "StartupCPUWeight=10000" in lines
    for dependency in ("Conflicts", "Before"):
        assert f"{dependency}=shutdown.target" in lines


def test_rsyslog_reads_the_socket_that_systemd_makes() -> None:
    """The socket unit and rsyslog's input name the same path: it is how rsyslog finds it."""
    agent = plan.ELEMENTS / "amphora-agent/static"
    unit = (agent / "usr/lib/systemd/system/amphora-log.socket").read_text()
    rsyslog = (agent / "etc/rsyslog.d/05-amphora-socket.conf").read_text()
    [path] = re.findall(r"^ListenDatagram=(.*)$", unit, re.MULTILINE)
    assert re.findall(r'Socket="(.*?)"', rsyslog) == [path]
    assert "Service=rsyslog.service" in unit.splitlines()
