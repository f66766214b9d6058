# SPDX-License-Identifier: Apache-2.0
"""The command that a fork of the agent does, and that does its work itself where none answers."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from amphora_image.agent_locks import amphora_fork


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket as the agent's process has it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "agent"))
        listener.listen()
        listener.settimeout(10)
        yield listener


def asked(listener: socket.socket, answer: bytes) -> tuple[threading.Thread, list[object]]:
    """Answer one command in a thread; what it sent, as soon as that has ended."""
    sent: list[object] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            words, received, _, _ = socket.recv_fds(connection, amphora_fork.ROOM, 8)
            sent.extend(
                [words.split(b"\0"), [str(Path(f"/proc/self/fd/{n}").readlink()) for n in received]]
            )
            for descriptor in received:
                os.close(descriptor)
            connection.send(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, sent


def test_ask(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, variables, streams and namespaces are sent, and the exit status comes back."""
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", "EMPTY": ""})
    thread, sent = asked(listener, b"\3")
    assert amphora_fork.ask(["amphora-interface", "up", "eth1"], listener.getsockname()) == 3
    thread.join()
    words, descriptors = sent
    assert words == [b"3", b"amphora-interface", b"up", b"eth1", b"PATH=/bin", b"EMPTY="]
    assert isinstance(descriptors, list)
    assert [text.partition(":")[0] for text in descriptors[3:]] == ["net", "mnt"]
    assert len(descriptors) == 5


def test_nobody_is_there(tmp_path: Path) -> None:
    """Without a process that waits, the command has to do its work itself."""
    assert amphora_fork.ask(["amphora-interface"], str(tmp_path / "nobody")) is None


def test_fork_ends_without_a_word(listener: socket.socket) -> None:
    """A fork that ends before it has answered has not done the work."""
    thread, _ = asked(listener, b"")
    assert amphora_fork.ask(["amphora-interface"], listener.getsockname()) is None
    thread.join()


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    """What was opened to be sent is closed, whether it was sent or not."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    amphora_fork.ask(["amphora-interface"], str(tmp_path / "nobody"))
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
