# SPDX-License-Identifier: Apache-2.0
"""What an amphora's commands put off, with packages made for the purpose."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amphora_image.agent_locks import amphora_lazy

TRACE = "import sys\nsys.ran.append(__name__)\n"
#: File -> text: a package that leaves a trace when it is run, and what Octavia's data models need.
FILES = {
    "bus/__init__.py": f"{TRACE}from bus.parts import wheel\nspare = 1\nturn = lambda n: n + 1\n",
    "bus/parts.py": "wheel = 'round'\n",
    "broken/__init__.py": "import no_such_module\n",
    "sqlalchemy/__init__.py": TRACE,
    "sqlalchemy/orm/__init__.py": "",
    "sqlalchemy/orm/collections.py": "class InstrumentedList(list):\n    pass\n",
    "octavia/__init__.py": "",
    "octavia/common/__init__.py": "",
    "octavia/common/data_models.py": "from sqlalchemy.orm import collections\n",
}
NAMES = {
    "bus": {
        "wheel": "bus.parts:wheel",
        "set_route": "",
        "moved": "bus.gone:moved",
        "turn": amphora_lazy.WHEN_CALLED,
    },
    "broken": {},
}


@pytest.fixture(autouse=True)
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The packages that were run so far; all is as before afterwards."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    ours = {name.partition("/")[0] for name in FILES}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if _root(name) in ours}
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(amphora_lazy, "NAMES", NAMES)
    monkeypatch.setattr(sys, "ran", [], raising=False)
    yield sys.ran  # type: ignore[attr-defined]
    gc.unfreeze()
    for name in list(sys.modules):
        if _root(name) in ours:
            del sys.modules[name]
    sys.modules.update(hidden)


def _root(name: str) -> str:
    return name.partition(".")[0]


def imported(name: str) -> object:
    """A module that a command imports while it starts."""
    with amphora_lazy.starting():
        return importlib.import_module(name)


def test_known_names_do_not_run_a_package(ran: list[str]) -> None:
    """Names of the table and modules of the package are there, and the package was not run."""
    bus = imported("bus")
    assert bus.wheel == "round"  # type: ignore[attr-defined]
    assert bus.set_route("a", to="b") is None  # type: ignore[attr-defined]
    assert bus.parts is importlib.import_module("bus.parts")  # type: ignore[attr-defined]
    assert ran == []


def test_function_runs_its_package_when_it_is_called(ran: list[str]) -> None:
    """A function that was imported from a package does what it does there, and the package runs."""
    turn = imported("bus").turn  # type: ignore[attr-defined]
    assert ran == []
    assert [turn(1), turn(2)] == [2, 3]
    assert ran == ["bus"]


@pytest.mark.parametrize("name", ["spare", "__doc__x", "moved"])
def test_other_names_run_the_package_once(ran: list[str], name: str) -> None:
    """A name that is not known, or no longer where it was, runs the package, as an import does."""
    bus = imported("bus")
    assert hasattr(bus, name) is (name == "spare")
    assert bus.spare == 1  # type: ignore[attr-defined]
    assert ran == ["bus"]
    assert type(bus).__name__ == "module"
    assert bus.__spec__.loader is bus.__loader__  # type: ignore[attr-defined]


def test_run_all_shows_what_cannot_be_run() -> None:
    """A package that is put off and cannot be run is found at build time."""
    imported("broken")
    with pytest.raises(ImportError, match="no_such_module"):
        amphora_lazy.run_all()


def test_data_models_come_without_the_database(ran: list[str]) -> None:
    """Data models are imported without the database library, which is there when asked for."""
    models = imported("octavia.common.data_models")
    assert "sqlalchemy" not in sys.modules
    assert ran == []
    items = models.collections.InstrumentedList()  # type: ignore[attr-defined]
    assert type(items) is importlib.import_module("sqlalchemy.orm.collections").InstrumentedList
    assert ran == ["sqlalchemy"]


def test_data_models_that_need_more_are_imported_as_usual(tmp_path: Path, ran: list[str]) -> None:
    """Data models that want another part of the database library get the library itself."""
    (tmp_path / "sqlalchemy/orm/more.py").touch()
    (tmp_path / "octavia/common/data_models.py").write_text("import sqlalchemy.orm.more\n")
    models = imported("octavia.common.data_models")
    assert models.sqlalchemy.orm.more  # type: ignore[attr-defined]
    assert ran == ["sqlalchemy"]


def test_garbage_is_collected_once_a_command_has_started() -> None:
    """The collector rests while a command imports its modules, and leaves them alone then."""
    before = gc.get_freeze_count()
    with amphora_lazy.starting():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
