# SPDX-License-Identifier: Apache-2.0
"""The commands of the unit ``amphora-netns.service``, as one script.

The agent writes that unit from a template of its own. systemd starts each of its fifteen commands
by itself, which costs a small machine more than the commands do. Here the template of the agent
that is in an image becomes a script, which a drop-in makes the unit's only command. A template that
holds what we do not know is left alone: then the unit works as the agent wrote it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

#: Where the template may be: the agent's own environment, or the distribution's packages.
TEMPLATES = (
    "opt/amphora-agent/lib/python3*/site-packages",
    "usr/lib/python3*/*-packages",
)
TEMPLATE = "octavia/amphorae/backends/agent/api_server/templates/amphora-netns.systemd.j2"
#: The namespace, which the template has as a variable (octavia.common.constants).
NAMESPACE, VARIABLE = "amphora-haproxy", "{{ amphora_nsname }}"

SCRIPT = Path("usr/local/lib/amphora/netns-commands")
DROP_IN = Path("usr/lib/systemd/system/amphora-netns.service.d/commands.conf")
DROP_IN_TEXT = f"""\
# All commands of the unit as the agent writes it; each of them may fail, as there.
[Service]
ExecStart=
ExecStart=/{SCRIPT}
"""


#: What a shell has not: variables, specifiers, escapes other than of quotes, further lines; and
#: what is still to be filled in.
_ONLY_SYSTEMD = re.compile(r"""\$\{|%|\\[^'"]|\\$|\{[{%]""")
#: Words of the same kind: a variable that may be several words, and what separates commands.
_ONLY_SYSTEMD_WORD = re.compile(r"\$\w+|;")


def script_of(template: str) -> str | None:
    """Return a POSIX shell script that does what the unit of a template does.

    :param template: a unit with ``Type=oneshot``, see :manpage:`systemd.service(5)`.
    :returns: None if one of its commands has to succeed, or uses what a shell has not.
    """
    unit = template.replace(VARIABLE, NAMESPACE)
    settings = re.findall(r"^(Exec\w+)=(.*)$", unit, re.MULTILINE)
    commands = []
    for key, value in settings:
        if key != "ExecStart" or not value.startswith("-/") or _ONLY_SYSTEMD.search(value):
            return None
        words = _words(value.removeprefix("-"))
        if any(_ONLY_SYSTEMD_WORD.fullmatch(word) for word in words):
            return None
        commands.append(shlex.join(words))
    return "\n".join(["#!/bin/sh", *commands, "exit 0", ""]) if commands else None


def _words(value: str) -> list[str]:
    """Split a command as systemd does, for which a backslash counts in both kinds of quotes."""
    lexer = shlex.shlex(value, posix=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    lexer.escapedquotes = "\"'"
    return list(lexer)


def shorten(root: Path) -> None:
    """Give the unit of an image's agent one command, if its template can be read that way."""
    found = (path for place in TEMPLATES for path in root.glob(f"{place}/{TEMPLATE}"))
    template = next(found, None)
    script = script_of(template.read_text()) if template else None
    if script is None:
        print("amphora-netns.service stays as the agent writes it")
        return
    for path, text, mode in ((SCRIPT, script, 0o755), (DROP_IN, DROP_IN_TEXT, 0o644)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
        (root / path).chmod(mode)
