# SPDX-License-Identifier: Apache-2.0
"""The table of command lines and their golden plans, and what holds for every plan.

After a change that is meant, ``pytest tests/unit/test_plan.py --update-golden`` writes
``tests/data/plans/plans.json`` anew; read the difference before it is committed.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image import manifest, options
from amphora_image.access import SECRET
from amphora_image.host import Host, Mirrors
from amphora_image.plan import ELEMENTS, Plan, make_plan
from amphora_image.request import ARCHITECTURES, RELEASES, Architecture, BaseOS, Request

DATA = Path(__file__).parents[1] / "data/plans"
GOLDEN = DATA / "plans.json"

#: The lines of the table, each ``host: VARIABLE=value diskimage-create.sh OPTIONS``.
TABLE = [
    line
    for line in (DATA / "command-lines.txt").read_text().splitlines()
    if line and not line.startswith("#")
]

KEYRINGS = {BaseOS.DEBIAN: Path("/keys/debian.gpg"), BaseOS.UBUNTU: Path("/keys/ubuntu.gpg")}
ARCHIVE = "http://mirror.example.org/own"

#: What is known of a build host whose machine name is x86_64; other hosts are bare ones.
HOSTS = {
    "debian": Host(BaseOS.DEBIAN, Mirrors(f"{ARCHIVE}/", f"{ARCHIVE}-sec/"), KEYRINGS),
    "debian-plain": Host(BaseOS.DEBIAN, Mirrors(ARCHIVE), KEYRINGS),
    "ubuntu": Host(BaseOS.UBUNTU, Mirrors(ARCHIVE, f"{ARCHIVE}-sec"), KEYRINGS),
}
MACHINES = {"bare": "x86_64", **dict.fromkeys(HOSTS, "x86_64")}

PLAIN = "bare: diskimage-create.sh"


@cache
def parser() -> options.Parser:
    """The parser of ``diskimage-create.sh``'s options."""
    made = options.Parser(prog="diskimage-create.sh", allow_abbrev=False)
    options.add_build_options(made)
    return made


def taken_apart(line: str) -> tuple[str, dict[str, str], list[str]]:
    """Host, variables and arguments of a line of the table."""
    host, _, command = line.partition(": ")
    words = shlex.split(command)
    variables = list(takewhile(lambda word: word != "diskimage-create.sh", words))
    return host, dict(word.split("=", 1) for word in variables), words[len(variables) + 1 :]


def asked_and_planned(line: str) -> tuple[Request, Plan]:
    """What a line of the table asks for, and what becomes of it."""
    host, variables, argv = taken_apart(line)
    request = options.read_request(parser().parse_args(argv), variables, MACHINES.get(host, host))
    return request, make_plan(request, HOSTS.get(host, Host()))


def flat(document: dict[str, Any]) -> dict[str, Any]:
    """A document whose inner documents' values stand beside the others, as ``outer.inner``."""
    inner = {
        f"{name}.{key}": value
        for name, values in document.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    return {name: value for name, value in document.items() if not isinstance(value, dict)} | inner


def shown(line: str, here: Path) -> dict[str, Any]:
    """A line's golden entry: what differs from the plain command's request, and the whole plan.

    Paths are told from <here>, <home> and <elements> on, so that they are the same everywhere.
    """
    request, plan = asked_and_planned(line)
    plain = flat(manifest.asked(asked_and_planned(PLAIN)[0]))
    entry = {
        "asked": {k: v for k, v in flat(manifest.asked(request)).items() if v != plain.get(k)},
        "argv": shlex.join(plan.argv),
        "environment": {
            name: value.splitlines() if "\n" in value else value
            for name, value in plan.variables().items()
        },
    }
    text = json.dumps(entry)
    for path, name in ((here, "here"), (here.parent / "home", "home"), (ELEMENTS, "elements")):
        text = text.replace(str(path), f"<{name}>")
    document: dict[str, Any] = json.loads(text)
    return document


@pytest.fixture
def place(here: Path, ca_certificate: bytes) -> Path:
    """A current directory with all that the table's lines name."""
    for name in ("elements", "more elements", "diskimage-builder", "tripleo-image-elements"):
        (here / name).mkdir()
    for name in ("guest.qcow2", "keys.gpg", "bundle.tar"):
        (here / name).touch()
    (here / "ca.pem").write_bytes(ca_certificate)
    return here


@pytest.fixture(scope="module")
def golden(pytestconfig: pytest.Config) -> Iterator[dict[str, Any]]:
    """The golden plans by line; with ``--update-golden`` they are written when the tests end."""
    plans = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    yield plans
    if pytestconfig.getoption("--update-golden"):
        kept = {line: plans[line] for line in sorted(TABLE) if line in plans}
        GOLDEN.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("line", TABLE)
def test_golden_plan(
    line: str, place: Path, golden: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    """A command line's plan is the one that was read and committed."""
    if pytestconfig.getoption("--update-golden"):
        golden[line] = shown(line, place)
    assert line in golden, "no golden plan; make it with --update-golden and read it"
    assert shown(line, place) == golden[line]


def test_no_golden_plan_is_stale() -> None:
    """There is no golden plan whose command line has left the table."""
    if GOLDEN.exists():
        assert set(json.loads(GOLDEN.read_text())) <= set(TABLE)


def test_lines_of_the_table_differ() -> None:
    """No line stands in the table twice, and there are enough of them."""
    assert len(TABLE) == len(set(TABLE)) >= 60


def test_table_has_every_allowed_image(place: Path) -> None:
    """Each base OS is planned for each of its architectures and releases."""
    requests = [asked_and_planned(line)[0] for line in TABLE]
    allowed = {
        (base_os, architecture, release)
        for base_os in BaseOS
        for architecture in ARCHITECTURES[base_os]
        for release in RELEASES[base_os]
    } - {(BaseOS.DEBIAN, Architecture.I386, "trixie")}
    assert {(r.base_os, r.architecture, r.release) for r in requests} == allowed


def test_table_has_every_option() -> None:
    """Each option is in the table by its short and by its long name."""
    used = {word for line in TABLE for word in taken_apart(line)[2]}
    known = {name for action in parser()._actions for name in action.option_strings}
    assert known - used == {"-h", "--help", "-v", "--version"}


def test_table_has_every_variable(place: Path, variables_read: set[str]) -> None:
    """Each variable that the command line reads is in the table."""
    assert variables_read <= {name for line in TABLE for name in taken_apart(line)[1]}


def test_json_holds_the_plan(place: Path) -> None:
    """The JSON holds the argv, its elements last, and the variables."""
    for plan in (asked_and_planned(line)[1] for line in TABLE):
        document = json.loads(json.dumps(plan.as_json()))
        assert document["argv"][0] == "disk-image-create"
        assert document["argv"][-len(document["elements"]) :] == document["elements"]
        assert document["environment"] == plan.variables()
        assert list(document["environment"]) == sorted(document["environment"])


def read_back(shell: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """The variables and the argv of a line of shell."""
    words = shlex.split(shell)
    assignments = list(takewhile(lambda word: word != "disk-image-create", words))
    return dict(word.split("=", 1) for word in assignments), tuple(words[len(assignments) :])


def test_shell_says_the_same_as_the_plan(place: Path) -> None:
    """A shell reads the plan's line as its variables and its argv."""
    for plan in (asked_and_planned(line)[1] for line in TABLE):
        assert read_back(plan.as_shell()) == (plan.variables(), plan.argv)


WORD = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
NAME = st.from_regex(r"[A-Z_][A-Z0-9_]*", fullmatch=True)
PATH = WORD.map(lambda text: Path("/", text))


@given(
    st.lists(WORD, max_size=3).map(tuple),
    st.lists(WORD, max_size=3).map(tuple),
    st.dictionaries(NAME, WORD, max_size=3),
    st.dictionaries(NAME, st.lists(PATH, min_size=1, max_size=2).map(tuple), max_size=2),
)
def test_shell_line_survives_any_text(
    elements: tuple[str, ...],
    options: tuple[str, ...],
    environment: dict[str, str],
    paths: dict[str, tuple[Path, ...]],
) -> None:
    """Spaces, quotes, dollars and newlines stay what they are in a shell."""
    plan = Plan(elements, options, environment, paths)
    assert read_back(plan.as_shell()) == (plan.variables(), plan.argv)


@given(st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1))
def test_root_password_is_in_no_document(a_request: Callable[..., Request], password: str) -> None:
    """Plan, shell line, manifest and repr are the same whatever the password is."""

    def told(text: str) -> tuple[object, ...]:
        request = a_request(root_password=text)
        plan = make_plan(request, Host())
        return plan.as_json(), plan.as_shell(), manifest.asked(request), repr(request), repr(plan)

    assert told(password) == told("another")
    assert told(password)[2]["root_password"] == SECRET  # type: ignore[call-overload, index]


def test_no_password_is_none(a_request: Callable[..., Request]) -> None:
    """Where no password was asked for, the manifest says so and no element sets one."""
    assert manifest.asked(a_request())["root_password"] is None
    assert "amphora-root-password" not in make_plan(a_request(), Host()).elements


def test_a_request_makes_one_plan(a_request: Callable[..., Request]) -> None:
    """The same request on the same host gives the same plan."""
    assert make_plan(a_request(), HOSTS["debian"]) == make_plan(a_request(), HOSTS["debian"])
