# SPDX-License-Identifier: Apache-2.0
"""Start one of Octavia's commands without what only its controller needs.

Octavia's modules import a database library, a message bus and Keystone wherever they run; in an
amphora that is half of the time and of the memory of each start. Here such a package is an empty
module at first. The names that are asked of it while the command starts come from where `NAMES`
says; any other name runs the whole package, as an import would have done.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader  # it imports a tenth of what a small command does
else:
    Loader = object

#: A function for which its module is run when it is called.
WHEN_CALLED = None

#: Module that is put off -> name asked of it, if it is not that of a module in it ->
#: "module:attribute" where it is defined, or WHEN_CALLED, or "" for a function that need not do
#: anything: an amphora has no message bus, no API for browsers, and no defaults for listeners that
#: could conflict. Nor has it Keystone: of the many options that those functions declare, the named
#: ones are those that Octavia looks at in its own configuration.
NAMES: dict[str, dict[str, str | tuple[str, ...] | None]] = {
    "jsonschema": {"validate": WHEN_CALLED},
    "keystoneauth1.loading": {
        "register_adapter_conf_options": ("endpoint_override", "valid_interfaces"),
        "register_auth_conf_options": ("auth_type",),
        "register_session_conf_options": ("cafile",),
    },
    "octavia.common.validate": {
        "check_default_ciphers_prohibit_list_conflict": "",
        "check_default_tls_versions_min_conflict": "",
    },
    "oslo_messaging": {
        "Notifier": "",
        "TransportURL": "oslo_messaging.transport:TransportURL",
        "get_notification_transport": "",
        "get_rpc_transport": "",
        "set_transport_defaults": "",
    },
    "oslo_messaging.rpc": {},
    "oslo_messaging.rpc.dispatcher": {"DefaultRPCAccessPolicy": ""},
    "oslo_middleware": {},
    "oslo_middleware.cors": {"set_defaults": ""},
    "pyroute2": {
        "IPRoute": "pyroute2.iproute:IPRoute",
        "NetNS": "pyroute2.iproute:NetNS",
        "NetlinkError": "pyroute2.netlink.exceptions:NetlinkError",
    },
    "rfc3986": {},
    "xmlrpc.client": {},
}

#: What the import system itself asks of a module, and takes no for an answer.
_IMPORT_SYSTEM = frozenset(
    ("__cached__", "__file__", "__loader__", "__package__", "__path__", "__spec__")
)
_LOCK = threading.RLock()


class Lazy(ModuleType):
    """A module that is not run before it has to be."""

    def __getattr__(self, name: str) -> Any:
        if name in _IMPORT_SYSTEM:
            raise AttributeError(name)
        place = NAMES[self.__name__].get(name, f"{self.__name__}.{name}:")
        if place is WHEN_CALLED:
            return _when_called(self, name)
        try:
            value = _find(place)
        except (ImportError, AttributeError):
            run(self)
            return getattr(self, name)
        setattr(self, name, value)
        return value


def _find(place: str | tuple[str, ...]) -> Any:
    """The value at a place as `NAMES` has them."""
    if isinstance(place, tuple):
        return functools.partial(_declare, place)
    if not place:
        return lambda *args, **kwargs: None
    module, _, attribute = place.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def _when_called(module: ModuleType, name: str) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> Any:
        run(module)
        return getattr(module, name)(*args, **kwargs)

    return call


def _declare(names: tuple[str, ...], conf: Any, group: str, **_: object) -> None:
    option = importlib.import_module("oslo_config.cfg").Opt
    conf.register_opts([option(name) for name in names], group=group)


def run(module: ModuleType) -> None:
    """Run a module that was put off, after its package; nothing if it was run already."""
    with _LOCK:
        if package := sys.modules.get(module.__name__.rpartition(".")[0]):
            run(package)
        if type(module) is not Lazy:
            return
        object.__setattr__(module, "__class__", ModuleType)
        spec = module.__spec__
        if spec is not None and isinstance(spec.loader, _Later):
            spec.loader = module.__loader__ = spec.loader.real
            spec.loader.exec_module(module)


class _Later(Loader):
    def __init__(self, real: Loader) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Lazy(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Not now."""


class _Finder:
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in NAMES else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec


class _Collections(ModuleType):
    """``sqlalchemy.orm.collections``, imported when it is asked for something."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def _import_data_models() -> None:
    """Import Octavia's data models without the database library.

    They name one of its classes, in a function that no amphora calls. The parts of that library
    need each other at once, so it cannot be put off as those of `NAMES` are; but it can stay away
    while this one module is imported.
    """
    collections = _Collections("sqlalchemy.orm.collections")
    away = {name: ModuleType(name) for name in ("sqlalchemy", "sqlalchemy.orm")}
    away["sqlalchemy.orm"].__dict__["collections"] = collections
    sys.modules.update(away)
    try:
        importlib.import_module("octavia.common.data_models")
    except ImportError:
        pass  # it needs more of the library than we know: it will be imported as usual
    finally:
        for name in away:
            del sys.modules[name]


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Import in this block what a command needs.

    The collector of cycles rests meanwhile, for modules are no garbage; then it leaves them alone
    for good, so that processes forked from here go on sharing their memory.
    """
    sys.meta_path.insert(0, _Finder())
    gc.disable()
    try:
        _import_data_models()
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_all() -> None:
    """Ask all that was put off for the names that we know, and then run it: both must work.

    :raises ImportError: or whatever else a module raises: one of them cannot be run.
    """
    put_off = [module for module in list(sys.modules.values()) if isinstance(module, Lazy)]
    for module in put_off:
        for name in NAMES[module.__name__]:
            getattr(module, name)
    for module in put_off:
        run(module)
