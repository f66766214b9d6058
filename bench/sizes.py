# SPDX-License-Identifier: Apache-2.0
"""What takes the room in an image, package by package, and why each of them is there.

An element asked for a package (its ``package-installs``), or the kernel was asked for, or dpkg
calls it essential, or one of these depends on it (dpkg's status file, Debian Policy, chapter 7).
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from diskimage_builder.element_dependencies import get_elements
from diskimage_builder.paths import get_path

from amphora_image.facts import read_package_sizes
from amphora_image.image import read_image
from amphora_image.packages import wanted
from amphora_image.run import run
from amphora_image.tree import Tree

#: Where the agent's Python packages are: ours, and the established way's.
SITE = re.compile(r"(opt/amphora-agent(?:-venv)?/lib/python3\.\d+/site-packages)/([^/]+)(/.*)?")
#: Files of no package: a pattern of their paths, what they are, and why they are there.
UNOWNED = (
    (r"boot/initrd\.img-.+", "(initramfs)", "made on the build host or by the kernel's package"),
    (r"boot/grub/.+", "(GRUB's files)", "written for the disk"),
    (r".+/__pycache__/.+", "(byte code)", "compiled when Python's packages were set up"),
    (r"var/lib/dpkg/.+", "(dpkg's database)", "dpkg"),
    (r"var/(lib|cache)/apt/.+", "(apt's lists)", "apt"),
    (r"usr/lib/locale/.+", "(locales)", "generated"),
    (r"usr/lib/modules/.+/modules\..+", "(module indexes)", "depmod"),
)


def asked(
    elements: Sequence[str], paths: Iterable[Path], variables: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return package -> elements that ask for it, by the distribution's names.

    :param elements: as disk-image-create is given them.
    :param paths: of elements, beside diskimage-builder's own.
    :param variables: that elements read, ``DISTRO_NAME`` among them.
    """
    tools = Path(get_path("elements"))
    path = ":".join(map(str, [*paths, tools]))
    found = {name: Path(place) for name, place in get_elements(list(elements), path)}
    env = {**os.environ, "ARCH": "amd64", "ELEMENTS_PATH": path, **variables}
    with tempfile.TemporaryDirectory() as scratch:
        outfile = Path(scratch, "package-installs.json")
        squash = tools / "package-installs/bin/package-installs-squash"
        words = [f"--elements={' '.join(found)}", f"--path={path}", str(outfile)]
        run([sys.executable, squash, *words], env=env)
        by_element = wanted(json.loads(outfile.read_text()))
    by_package: dict[str, list[str]] = {}
    for element, names in sorted(by_element.items()):
        for name in _mapped(found[element] / "pkg-map", names, tools, env):
            by_package.setdefault(name, []).append(element)
    return by_package


def _mapped(
    pkg_map: Path, names: Sequence[str], tools: Path, env: Mapping[str, str]
) -> Sequence[str]:
    if not pkg_map.exists():
        return names
    program = tools / "pkg-map/bin/pkg-map"
    words = ["--missing-ok", "--pkg-map", str(pkg_map), *names]
    said: str = run([sys.executable, program, *words], env=env)
    return said.split()


def paragraphs(status: str) -> dict[str, dict[str, str]]:
    """Return the installed packages of dpkg's status file, name -> fields."""
    found = {}
    for paragraph in re.sub(r"\n[ \t]+", " ", status).split("\n\n"):
        fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields
    return found


def names_in(relation: str) -> Iterator[str]:
    """Yield each package of a relationship field; versions, architectures, "or" are passed over.

    >>> list(names_in("libc6 (>= 2.38), python3:any | python3-minimal"))
    ['libc6', 'python3', 'python3-minimal']
    """
    for word in re.split(r"[,|]", relation):
        if name := re.match(r"\s*([a-z0-9][a-z0-9.+-]*)", word):
            yield name[1]


def reasons(status: str, roots: Mapping[str, str]) -> dict[str, str]:
    """Return package -> why it is installed.

    :param status: dpkg's status file.
    :param roots: package -> why it was asked for.
    """
    installed = paragraphs(status)
    needs = {name: _needed(fields, installed) for name, fields in installed.items()}
    why = {name: reason for name, reason in roots.items() if name in installed}
    for name, fields in installed.items():
        if fields.get("Essential") == "yes":
            why.setdefault(name, "essential")
    _follow(why, needs)
    for name in list(why):
        for other in _alternatives(installed[name].get("Recommends", ""), installed):
            why.setdefault(other, f"recommended by {name}")
    _follow(why, needs)
    # What is left and needed by nothing that is left was asked for by a script, if by anyone.
    left = {name: needs[name] for name in installed if name not in why}
    needed = {other for others in left.values() for other in others}
    why |= {name: "a script, or nobody any more" for name in left if name not in needed}
    _follow(why, needs)
    return dict.fromkeys(left, "each other") | why


def _needed(fields: Mapping[str, str], installed: Mapping[str, Mapping[str, str]]) -> list[str]:
    relations = (fields.get(name, "") for name in ("Pre-Depends", "Depends"))
    return [name for relation in relations for name in _alternatives(relation, installed)]


def _alternatives(relation: str, installed: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the installed packages that satisfy a relation, be it as what they provide."""
    found = []
    for want in names_in(relation):
        if want in installed:
            found.append(want)
        else:
            found += [
                name
                for name, fields in installed.items()
                if want in names_in(fields.get("Provides", ""))
            ]
    return found


def _follow(why: dict[str, str], needs: Mapping[str, Sequence[str]]) -> None:
    """Give all that is needed, directly or not, a reason, by the shortest way."""
    queue = deque(why)
    while queue:
        name = queue.popleft()
        for needed in needs[name]:
            if needed not in why:
                why[needed] = f"needed by {name}"
                queue.append(needed)


def unowned(tree: Tree) -> tuple[Counter[str], dict[str, str]]:
    """Return the bytes of files of no package by what they are, and why they are there."""
    lines = (
        line.rpartition("/")
        for path, _ in tree.match(r"var/lib/dpkg/info/[^/]+\.list")
        for line in tree.text(path).splitlines()
    )
    resolve = cache(tree.resolve)
    listed = {f"{resolve(directory)}/{name}" for directory, _, name in lines}
    sizes: Counter[str] = Counter()
    why: dict[str, str] = {}
    for path, entry in tree.entries.items():
        if entry.is_file and entry.size and path not in listed:
            name, reason = _unowned(path)
            sizes[name] += entry.size
            why[name] = reason
    return sizes, why


def _unowned(path: str) -> tuple[str, str]:
    if found := SITE.fullmatch(path):
        return f"(agent) {found[2].split('.dist-info')[0].split('-')[0]}", "the agent's environment"
    for pattern, name, reason in UNOWNED:
        if re.fullmatch(pattern, path):
            return name, reason
    return "(other files)", "written by scripts"


def report(image: Path, roots: Mapping[str, str]) -> dict[str, Any]:
    """Return ``used`` (bytes of all files), ``packages`` (rows, largest first) and ``image``.

    :param roots: package -> why it was asked for.
    """
    tree = read_image(image).tree
    owned = {name: size for name, size in read_package_sizes(tree).items() if name}
    why = reasons(tree.text("var/lib/dpkg/status"), roots)
    others, why_others = unowned(tree)
    rows = [
        {"package": name, "bytes": size, "why": {**why, **why_others}.get(name, "")}
        for name, size in Counter({**owned, **others}).most_common()
        if size
    ]
    return {
        "used": sum(entry.size for entry in tree.entries.values() if entry.is_file),
        "image": image.stat().st_size,
        "packages": rows,
    }


def roots_of(plan: Mapping[str, Any], own_elements: Path) -> dict[str, str]:
    """Return package -> why, by the plan in a manifest."""
    variables = plan["environment"]
    found = asked(plan["elements"], [own_elements], variables)
    kernel = variables["AMPHORA_KERNEL_PACKAGE"]
    return {"apt": "the bootstrap", kernel: "the kernel"} | {
        name: f"asked for by {', '.join(elements)}" for name, elements in found.items()
    }
