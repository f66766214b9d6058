# SPDX-License-Identifier: Apache-2.0
"""The networks of the boot proof: a network namespace of its own, with a bridge for the VIPs.

Nothing in it is reached from outside, and the amphora reaches nothing but the proof. The kernel
removes all of it with its last process (:manpage:`network_namespaces(7)`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from amphora_image.errors import HostError
from amphora_image.run import run

#: Values of :manpage:`unshare(2)`.
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000

#: The network of the VIPs and members: addresses for documentation (RFC 5737, RFC 3849).
SUBNET, SUBNET_IPV6 = "203.0.113.0/24", "2001:db8::/64"
#: The controller's host on it; also its gateway.
GATEWAY, GATEWAY_IPV6 = "203.0.113.1", "2001:db8::1"
VIP, VIP_IPV6 = "203.0.113.10", "2001:db8::10"
MEMBERS = ("203.0.113.101", "203.0.113.102")
#: The hosts' own addresses beside the VIP, one per amphora.
VRRP_IPS = ("203.0.113.11", "203.0.113.12")
BRIDGE = "vip"


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Give the calling thread, and what it starts, networks of its own for a ``with`` block.

    Whoever is not root gets a user namespace as well; the thread, which must be the process's only
    one, then stays in both.

    :raises HostError: the kernel refuses.
    """
    user = os.geteuid()
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if user == 0:
            _call("unshare", _CLONE_NEWNET)
        else:
            _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        commands = (
            "link set lo up",
            f"link add {BRIDGE} type bridge",
            f"link set {BRIDGE} up",
            *(f"address add {ip}/24 dev {BRIDGE}" for ip in (GATEWAY, *MEMBERS)),
            f"address add {GATEWAY_IPV6}/64 dev {BRIDGE} nodad",
            # Who does not answer for seconds may be a machine that is emulated on a busy host.
            f"ntable change name arp_cache dev {BRIDGE} mcast_probes 60",
            f"ntable change name ndisc_cache dev {BRIDGE} mcast_probes 60",
        )
        _ip(*commands)
        yield
    finally:
        if user == 0:
            _call("setns", before, _CLONE_NEWNET)
        os.close(before)


def add_tap(name: str) -> None:
    """Make a network device for a virtual machine's card and plug it into the bridge.

    :raises AmphoraImageError: the host has no ``/dev/net/tun``.
    """
    _ip(f"tuntap add dev {name} mode tap", f"link set {name} master {BRIDGE} up")


def add_vips() -> None:
    """Give the VIPs to this host itself."""
    _ip(f"address add {VIP}/24 dev {BRIDGE}", f"address add {VIP_IPV6}/64 dev {BRIDGE} nodad")


def _ip(*commands: str) -> None:
    run(["ip", "-batch", "-"], stdin="\n".join(commands))


def _call(function: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        raise HostError(
            f"{function} of a network namespace: {os.strerror(ctypes.get_errno())}",
            "run it as root, or where namespaces are allowed",
        )
