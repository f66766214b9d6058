# SPDX-License-Identifier: Apache-2.0
"""The script that stands for the commands of amphora-netns.service."""

from __future__ import annotations

from pathlib import Path

import pytest

from amphora_image import netns_unit

UNIT = """\
[Unit]
Description=Configure {{ amphora_nsname }}
[Service]
Type=oneshot
# ExecStart=/not/this
ExecStart=-/sbin/ip netns exec {{ amphora_nsname }} sysctl -w net.ipv4.ip_forward=1
ExecStart=-/bin/sh -c '/sbin/ip -br link | awk \\'{print $3 " " $1}\\' > "/run/a b"'
"""


def test_script() -> None:
    """Each command stands on a line, quoted for a shell, and what the unit ignores is ignored."""
    assert netns_unit.script_of(UNIT) == (
        "#!/bin/sh\n"
        "/sbin/ip netns exec amphora-haproxy sysctl -w net.ipv4.ip_forward=1\n"
        "/bin/sh -c '/sbin/ip -br link | awk '\"'\"'{print $3 \" \" $1}'\"'\"' > \"/run/a b\"'\n"
        "exit 0\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        "ExecStart=/bin/must-succeed",
        "ExecStart=+/bin/as-root",
        "ExecStartPost=-/bin/later",
        "ExecStart=-/bin/echo ${VARIABLE}",
        "ExecStart=-/bin/echo $VARIABLE",
        "ExecStart=-/bin/echo %i",
        "ExecStart=-/bin/one ; /bin/two",
        r"ExecStart=-/bin/echo 'a\tb'",
        "ExecStart=-/bin/echo one \\\n  two",
        "ExecStart=-/bin/echo {{ other }}",
        "ExecStart=-/bin/echo {% if a %}",
    ],
)
def test_unit_that_a_shell_cannot_do(line: str) -> None:
    """A unit with a command that means more to systemd than to a shell is left alone."""
    assert netns_unit.script_of(f"{UNIT}{line}\n") is None


def test_unit_without_commands() -> None:
    """A template that holds no command at all is not what we think it is."""
    assert netns_unit.script_of("[Service]\nType=oneshot\n") is None


@pytest.mark.parametrize(
    "place", ["opt/amphora-agent/lib/python3.13/site-packages", "usr/lib/python3/dist-packages"]
)
def test_shorten(tmp_path: Path, place: str) -> None:
    """The template of an agent is found where pip or the distribution has put it."""
    template = tmp_path / place / netns_unit.TEMPLATE
    template.parent.mkdir(parents=True)
    template.write_text(UNIT)
    netns_unit.shorten(tmp_path)
    script = tmp_path / netns_unit.SCRIPT
    assert script.read_text() == netns_unit.script_of(UNIT)
    assert script.stat().st_mode & 0o777 == 0o755
    drop_in = (tmp_path / netns_unit.DROP_IN).read_text()
    assert drop_in.endswith("ExecStart=\nExecStart=/usr/local/lib/amphora/netns-commands\n")


def test_nothing_to_shorten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image whose agent has no such template gets nothing, and the log says so."""
    netns_unit.shorten(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "stays as the agent writes it" in capsys.readouterr().out
