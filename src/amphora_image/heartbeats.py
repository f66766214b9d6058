# SPDX-License-Identifier: Apache-2.0
"""The health manager's side of the boot proof: heartbeats, verified by Octavia's own code."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from amphora_image.controller import status_message


class Heartbeats:
    """What has been heard so far; :func:`listening` makes it.

    :param key: what signs heartbeats.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        #: Amphora id -> when each of its heartbeats that was signed with the key came, in seconds.
        self.times: defaultdict[str, list[float]] = defaultdict(list)
        #: How many others came.
        self.bad = 0
        #: Amphora id -> the newest heartbeat, as Octavia's ``build_stats_message`` describes it.
        self.newest: dict[str, dict[str, Any]] = {}

    def take(self, datagram: bytes) -> None:
        """Verify a datagram and count it."""
        try:
            message = status_message.unwrap_envelope(datagram, self._key)
            amphora_id = message["id"]
        except Exception:  # whatever a stranger's bytes do to a decoder
            self.bad += 1
            return
        self.newest[amphora_id] = message
        self.times[amphora_id].append(time.monotonic())

    def member_states(self, amphora_id: str, pool_id: str, listener_id: str) -> dict[str, str]:
        """Tell how an amphora sees the members of a pool: member id -> ``UP``, ``DOWN`` ..."""
        pools = self.newest.get(amphora_id, {}).get("pools", {})
        pool = pools.get(f"{pool_id}:{listener_id}", pools.get(pool_id, {}))
        return dict(pool.get("members", {}))


@contextlib.contextmanager
def listening(key: str, place: tuple[str, int]) -> Iterator[Heartbeats]:
    """Hear heartbeats on a UDP address for the time of a ``with`` block."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(place)
        server.settimeout(0.2)
        heartbeats, done = Heartbeats(key), threading.Event()

        def listen() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    heartbeats.take(server.recv(65536))

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield heartbeats
        finally:
            done.set()
            thread.join()
