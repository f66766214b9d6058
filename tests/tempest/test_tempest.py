# SPDX-License-Identifier: Apache-2.0
"""What tempest is told, held against tempest and its plugins themselves; no cloud is asked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SHIPPED = Path(__file__).parents[2] / "tempest"
CONFIG, TESTS = SHIPPED / "tempest.conf", SHIPPED / "tests.txt"


def check(*argv: object) -> tuple[int, str]:
    """Run the check; return its exit code and what it says."""
    command = [sys.executable, SHIPPED / "check.py", *argv]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def edited(shipped: Path, directory: Path, changes: dict[str, str]) -> Path:
    """A copy of a shipped file with some things changed."""
    text = shipped.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy = directory / shipped.name
    copy.write_text(text)
    return copy


def test_shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option and every test that is shipped is one of tempest's; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert check() == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_wrong_options(tmp_path: Path) -> None:
    """An option that nobody registers, or with a value of another type, is told."""
    changes = {
        "[identity]": "[identities]",
        "nova = true": "nova = perhaps",
        "test_with_ipv6 =": "test_with_ipv7 =",
        "= ACTIVE_STANDBY": "= DOUBLE",
        "check_timeout = 120": "check_timeout = soon",
    }
    code, said = check("--config", edited(CONFIG, tmp_path, changes))
    told = [" ".join(line.split()[:2]).rstrip(":") for line in said.splitlines()]
    assert code == 1
    assert told == [
        "[identities] uri_v3",
        "[identities] region",
        "[service_available] nova",
        "[load_balancer] loadbalancer_topology",
        "[load_balancer] test_with_ipv7",
        "[load_balancer] check_timeout",
    ]


def test_wrong_names(tmp_path: Path) -> None:
    """Each line that names no test is told, and no other."""
    changes = {
        "test_basic_http_traffic": "test_basic_htp_traffic",
        "test_load_balancer_ipv4_CRUD\\[": "test_load_balancer_ipv4_CRU\\[",
        "AmphoraAPITest.test_amphora_update": "AmphoraTest.test_amphora_update",
    }
    code, said = check("--tests", edited(TESTS, tmp_path, changes))
    lines = said.splitlines()
    assert code == 1
    assert all(line.endswith(" names no test of a plugin") for line in lines)
    assert {name for line in lines for name in changes.values() if name in line} == set(
        changes.values()
    )
    assert len(lines) == len(changes)


@pytest.mark.parametrize(
    ("setting", "tests"),
    [
        ("run_validation", {"test_basic_http_traffic", "test_active_standby_vrrp_failover"}),
        ("barbican", {"test_basic_tls_traffic", "test_http_2_tls_traffic"}),
        ("prometheus_listener_enabled", {"test_prometheus_listener_metrics_page"}),
    ],
)
def test_settings_that_skip(tmp_path: Path, setting: str, tests: set[str]) -> None:
    """Settings with which a listed test would not run are told: a skipped test proves nothing."""
    config = edited(CONFIG, tmp_path, {f"\n{setting} = true": f"\n{setting} = false"})
    code, said = check("--config", config)
    assert code == 1
    assert {name for name in tests if re.search(rf"\.{name}\[.*\] is skipped: .", said)} == tests


def test_tempest_takes_the_list(tmp_path: Path) -> None:
    """Tempest itself finds one test for each line of the list."""
    tempest = Path(sys.executable).with_name("tempest")
    work = tmp_path / "work"
    registry = ["--workspace-path", tmp_path / "workspaces.yaml"]
    subprocess.run([tempest, "init", *registry, work], check=True, capture_output=True)
    (work / "etc/tempest.conf").write_text(CONFIG.read_text())
    command = [tempest, "run", "--list-tests", "--include-list", TESTS]
    said = subprocess.run(command, cwd=work, check=True, capture_output=True, text=True).stdout
    names = [line for line in said.splitlines() if line.startswith("octavia_tempest_plugin.")]
    lines = [line for line in TESTS.read_text().splitlines() if line and line[0] != "#"]
    assert len(names) == len(lines) > 30
