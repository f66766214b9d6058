# SPDX-License-Identifier: Apache-2.0
"""Run the command amphora-interface in forks of the agent, which has imported most of it already.

Octavia starts that command for each card that it plugs, and again for all cards when the first load
balancer starts; nine tenths of its time are imports. So the agent has a process beside it that has
made them and waits on a socket. The command asks it: it sends its arguments and variables, its
standard streams, and the namespaces that it runs in. A fork takes these over, does the work, and
answers with the exit status. Where nobody answers, the command does its work itself.

This file is that command, and for the agent a module. It needs the standard library alone.
"""

from __future__ import annotations

import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Made for root alone, whose directory it is in.
SOCKET = "/run/amphora-interface.socket"
#: The command that does its work itself.
ALONE = "/opt/amphora-agent/bin/amphora-interface"
NAMESPACES = ("/proc/self/ns/net", "/proc/self/ns/mnt")
#: Bytes that arguments and variables may have.
ROOM = 2**17


def ask(arguments: list[str], place: str = SOCKET) -> int | None:
    """Let the agent's process do the work; None where nobody has done it, else its exit status.

    :param arguments: of the command, with its name.
    """
    variables = [f"{name}={value}" for name, value in os.environ.items()]
    words = "\0".join([str(len(arguments)), *arguments, *variables])
    namespaces = [os.open(path, os.O_RDONLY) for path in NAMESPACES]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
            agent.connect(place)
            socket.send_fds(agent, [os.fsencode(words)], [0, 1, 2, *namespaces])
            status = agent.recv(1)
    except OSError:
        return None
    finally:
        for namespace in namespaces:
            os.close(namespace)
    return status[0] if status else None


def serve(place: str = SOCKET) -> None:
    """Start the process beside the agent; it ends with the agent's unit.

    Not before Python 3.12, which cannot change its namespaces: commands work alone then.
    """
    if hasattr(os, "setns") and os.fork() == 0:
        try:
            _serve(place)
        finally:
            os._exit(1)


def _serve(place: str) -> None:
    import contextlib
    import importlib
    import signal

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)  # noqa: PTH108  # pathlib is what small commands do without
        umask = os.umask(0o177)
        listener.bind(place)
        os.umask(umask)
        listener.listen()
        # The agent itself comes first; whoever asks meanwhile waits no longer than alone.
        os.nice(19)
        command = importlib.import_module("octavia.cmd.interface")
        importlib.import_module("pyroute2").IPRoute  # noqa: B018  # put off by amphora_lazy
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        while True:
            asking, _ = listener.accept()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a fork
            if os.fork() == 0:
                try:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _answer(asking, command.main)
                finally:
                    os._exit(1)
            asking.close()


def _answer(asking: socket.socket, main: Callable[[], object]) -> None:
    """Be the command that asks: take over what it sends, run it, and send its exit status."""
    import traceback

    status = 1
    try:
        _become(asking)
        sys.exit(main())  # type: ignore[arg-type]  # whatever a command returns
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as a command of its own would end
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    asking.send(bytes([status]))


def _become(asking: socket.socket) -> None:
    words, received, _, _ = socket.recv_fds(asking, ROOM, 3 + len(NAMESPACES))
    for number, stream in enumerate(received[:3]):
        os.dup2(stream, number)
    for namespace in received[3:]:
        os.setns(namespace)  # type: ignore[attr-defined,unused-ignore]
    for descriptor in received:
        os.close(descriptor)
    count, *texts = os.fsdecode(words).split("\0")
    sys.argv = texts[: int(count)]
    os.environ.clear()
    for text in texts[int(count) :]:
        name, _, value = text.partition("=")
        os.environ[name] = value


if __name__ == "__main__":
    status = ask(sys.argv)
    if status is None:
        os.execv(sys.executable, [sys.executable, ALONE, *sys.argv[1:]])  # noqa: S606
    sys.exit(status)
