# SPDX-License-Identifier: Apache-2.0
"""Heartbeats: those that are signed with the key count, all others are bad."""

from __future__ import annotations

import socket
import time

import pytest

from amphora_image import heartbeats
from amphora_image.controller import status_message
from amphora_image.heartbeats import Heartbeats

MESSAGE = {
    "id": "an-amphora",
    "seq": 1,
    "pools": {"a-pool:a-listener": {"status": "UP", "members": {"a-member": "DOWN"}}},
}


def test_signed_heartbeat_counts() -> None:
    """A heartbeat with our signature counts for its amphora and tells its members' states."""
    heard = Heartbeats("a key")
    heard.take(status_message.wrap_envelope(MESSAGE, "a key"))
    assert (list(heard.times), heard.bad) == (["an-amphora"], 0)
    states = heard.member_states("an-amphora", "a-pool", "a-listener")
    assert states == {"a-member": "DOWN"}
    assert heard.member_states("another", "a-pool", "a-listener") == {}


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        b"?" * 100,
        status_message.wrap_envelope(MESSAGE, "another key"),
        status_message.wrap_envelope({"no": "id"}, "a key"),
    ],
)
def test_other_datagrams_are_bad(datagram: bytes) -> None:
    """What is not signed with the key, or tells no amphora, does not count."""
    heard = Heartbeats("a key")
    heard.take(datagram)
    assert (list(heard.times), heard.bad) == ([], 1)


def test_heartbeats_are_heard_while_listening() -> None:
    """Datagrams to the address are taken, and the address is free afterwards."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        place = free.getsockname()
    for _ in range(2):
        with (
            heartbeats.listening("a key", place) as heard,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as amphora,
        ):
            amphora.sendto(status_message.wrap_envelope(MESSAGE, "a key"), place)
            deadline = time.monotonic() + 5
            while not heard.times and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(heard.times["an-amphora"]) == 1
