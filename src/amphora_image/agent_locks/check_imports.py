# SPDX-License-Identifier: Apache-2.0
"""The last word on the agent: run inside the image, it imports all that an image starts.

It needs the standard library alone, and amphora_lazy where that is installed. Importing as root
also leaves the byte code of exactly these modules behind, made by the image's own Python: what the
agent loads while it boots, so nothing of what amphora_lazy puts off.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import warnings
from collections.abc import Iterator

#: The commands of Octavia's ``console_scripts`` that an image starts: the rest is the controller's.
COMMANDS = (
    "amphora-agent",
    "amphora-health-checker",
    "amphora-interface",
    "haproxy-vrrp-check",
    "prometheus-proxy",
)

#: Entry point groups out of which the running agent picks drivers by name.
DRIVERS = ("octavia.amphora.udp_api_server",)

#: Modules that are imported by functions or by name, so not before the agent serves.
LAZY = (
    "gunicorn.glogging",
    "gunicorn.workers.sync",
    "octavia.common.context",
    "octavia.network.base",
)

#: Packages of which every module may be imported while a load balancer is configured.
PACKAGES = ("octavia.amphorae.backends",)


def wanted() -> Iterator[tuple[str, str]]:
    """What must be importable: (module, what needs it).

    :raises ImportError: octavia itself is missing (PackageNotFoundError is one), lacks a command,
        or one of PACKAGES is missing.
    """
    points = importlib.metadata.distribution("octavia").entry_points
    if missing := set(COMMANDS) - {p.name for p in points if p.group == "console_scripts"}:
        raise ImportError(f"octavia has no command {', '.join(sorted(missing))}")
    for point in points:
        if point.name in COMMANDS or point.group in DRIVERS:
            yield point.module, point.name
    for name in LAZY:
        yield name, "the running agent"
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield module.name, "the agent's REST interface"


def main() -> int:
    """Import everything; 0, or 1 with one line on standard error that names what is missing."""
    sys.dont_write_bytecode = False
    warnings.simplefilter("ignore")
    needer = "the image"
    try:
        lazy = (
            importlib.import_module("amphora_lazy")
            if importlib.util.find_spec("amphora_lazy")
            else None
        )
        with lazy.starting() if lazy else contextlib.nullcontext():
            for name, needer in wanted():  # noqa: B007
                importlib.import_module(name)
        needer = "the agent's configuration"
        importlib.import_module("octavia.common.service").prepare_service(["amphora-agent"])
        if lazy:
            needer, sys.dont_write_bytecode = "a module that is put off", True
            lazy.run_all()
    except Exception as error:  # an import may fail in any way
        print(
            f"amphora agent: {needer} cannot start: {type(error).__name__}: {error}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
