# SPDX-License-Identifier: Apache-2.0
"""The budget: what an image may cost, as shares of something that was measured beside it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("budget.toml")


@dataclass(frozen=True)
class Budget:
    """The content of ``budget.toml``.

    :ivar recorded: bytes of the established composition's image: ``qcow2``, ``used``.
    :ivar most: name of a share -> what it may be at most.
    :ivar base: name of a share -> what it is a share of, ``established`` or ``cold``.
    """

    recorded: Mapping[str, int]
    most: Mapping[str, float]
    base: Mapping[str, str]

    def excesses(self, shares: Mapping[str, float]) -> list[str]:
        """Return a sentence for each share that is over the budget.

        :raises KeyError: there is no budget for one of them.
        """
        return [
            f"{name} is {share:.3f} of {self.base[name]}; the budget is {self.most[name]}"
            for name, share in shares.items()
            if share > self.most[name]
        ]


def load(path: Path = FILE) -> Budget:
    """Read the budget."""
    document = tomllib.loads(path.read_text())
    groups = {name: document[name] for name in ("established", "cold")}
    return Budget(
        recorded=document["recorded"],
        most={name: most for group in groups.values() for name, most in group.items()},
        base={name: base for base, group in groups.items() for name in group},
    )
