# SPDX-License-Identifier: Apache-2.0
"""The proof of a tar file: what is refused before podman is asked, and how long it waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from amphora_image import container, network
from amphora_image.errors import BadValue, HostError


def test_missing_tar_is_a_bad_value(tmp_path: Path) -> None:
    """A tar file that is not there is named."""
    with pytest.raises(BadValue, match=r"none\.tar"):
        container.prove(tmp_path / "none.tar")


def test_missing_program_is_a_host_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without podman is told which package to install."""
    monkeypatch.setattr("shutil.which", lambda program: None)
    (tmp_path / "a.tar").touch()
    with pytest.raises(HostError, match="podman is not installed") as failure:
        container.prove(tmp_path / "a.tar")
    assert failure.value.hint == "install the package podman"


def test_wait_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never comes is waited for in bounded time, and named."""

    def attempt() -> bool:
        raise ConnectionRefusedError

    monkeypatch.setattr(container, "PATIENCE", 0.05)
    with pytest.raises(OSError, match="still missing: an answer"):
        container.wait("an answer", attempt)


def test_configuration_is_for_a_host_with_small_limits(tmp_path: Path) -> None:
    """HAProxy needs no more files than its limit allows, four and a few for each connection."""
    config = container.haproxy_config(tmp_path, "3.0.11-1")
    limits = [int(line.split()[1]) for line in config.splitlines() if "maxconn" in line]
    assert max(limits) * 4 < 1024
    assert f"bind {network.VIP}:{container.HTTP}" in config
