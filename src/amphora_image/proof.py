# SPDX-License-Identifier: Apache-2.0
"""The boot proof: an image does, step by step, all that Octavia wants of an amphora."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from amphora_image import boot, heartbeats, members, network
from amphora_image.board import board_for
from amphora_image.boot import Machine
from amphora_image.controller import ERRORS, HEARTBEAT_PORT, VIP_INTERFACE, Controller
from amphora_image.errors import BootFailed
from amphora_image.heartbeats import Heartbeats
from amphora_image.members import Member, ask_http, ask_udp
from amphora_image.report import Milestone, Report, slowest_units

T = TypeVar("T")

#: How many requests each listener has to answer, without one failure.
REQUESTS = 50
#: Port of each listener on the VIP.
HTTP, HTTPS, TCP, UDP, SECOND_UDP, METRICS = 80, 443, 8080, 5353, 5354, 9000
#: Ports of the listeners that are deleted, and that go on.
DELETED, KEPT = (HTTPS, TCP, SECOND_UDP), (HTTP, UDP)
#: Seconds between an amphora's heartbeats at first, and after its settings were changed.
INTERVAL, SHORT_INTERVAL = 5, 1
#: Seconds in which a backup must serve: VRRP takes three intervals of two seconds and a skew of
#: two at most (RFC 9568, 6.1); the rest is patience with a machine that is emulated.
FAILOVER = 12
#: Errors that mean that something is not there yet.
NOT_YET = (OSError, ValueError, http.client.HTTPException, *ERRORS)


@dataclass
class Proof:
    """What the steps work with.

    :param machines: in the order of the load balancer's amphorae: the master first.
    :param server_pems: amphora id -> PEM of its certificate and key.
    :param members: address -> member.
    :param listeners: port -> the listener, as Octavia's database has it.
    :param timeout: seconds from power-on for the whole proof.
    """

    controller: Controller
    machines: Sequence[Machine]
    server_pems: dict[str, str]
    members: Mapping[str, Member]
    heartbeats: Heartbeats
    timeout: float
    agent: dict[str, object] = field(default_factory=dict)
    memory_in_use: int | None = None
    listeners: dict[int, Any] = field(default_factory=dict)

    @property
    def amphorae(self) -> list[tuple[Any, Machine]]:
        """Each amphora with its machine."""
        return list(zip(self.controller.amphorae, self.machines, strict=True))

    def wait(self, what: str, attempt: Callable[[], T | None]) -> T:
        """Wait as :meth:`Machine.wait` does, with the machine that has the VIPs."""
        running = (machine for machine in self.machines if machine.process.poll() is None)
        machine = next(running, self.machines[0])
        return machine.wait(what, attempt, self.timeout, NOT_YET)

    def balance(self, ask: Callable[[], str], servers: Sequence[str] = network.MEMBERS) -> str:
        """See all requests answered, as :func:`balance` does."""
        return balance(ask, self.wait, servers)

    def address(self, amphora: Any) -> tuple[str, int]:
        """Where the proof reaches an amphora's agent."""
        return amphora.lb_network_ip, boot.AGENT_PORT


def balance(
    ask: Callable[[], str],
    wait: Callable[[str, Callable[[], bool | None]], bool],
    servers: Sequence[str] = network.MEMBERS,
) -> str:
    """See that all requests are answered, and by each of the servers, and by no other.

    :param ask: sends one request and returns who has answered.
    :param wait: waits for what it is told, as :meth:`Proof.wait` does: for the first answers.
    :raises OSError: a request was lost, or another server has answered.
    """
    for server in servers:
        wait(f"an answer of {server}", lambda: ask() == server or None)  # noqa: B023
    answers = Counter(ask() for _ in range(REQUESTS))
    if set(answers) != set(servers):
        raise OSError(f"answers came from {dict(answers)}")
    shares = " and ".join(str(answers[server]) for server in servers)
    return f"{REQUESTS} of {REQUESTS} requests, {shares}"


def agent_answers(proof: Proof) -> str:
    """Each agent answers its controller, with the certificate that was injected."""
    for amphora, machine in proof.amphorae:
        info = machine.wait(
            "the agent's answer",
            lambda: proof.controller.info(amphora),  # noqa: B023
            proof.timeout,
            NOT_YET,
        )
        proof.agent = proof.agent or info
        proof.memory_in_use = proof.memory_in_use or machine.memory_in_use()
        shows_certificate(proof, amphora)
    wanted = ("hostname", "api_version", "haproxy_version")
    return ", ".join(f"{key} {proof.agent[key]}" for key in wanted)


def shows_certificate(proof: Proof, amphora: Any) -> None:
    """See that the agent shows the certificate that we know of.

    :raises OSError: it does not.
    """
    shown = proof.controller.certificate_of(amphora)
    if shown.strip() not in proof.server_pems[amphora.id]:
        raise OSError("the agent shows another certificate than it was given")


def strangers_refused(proof: Proof) -> str:
    """No agent serves a client without a certificate, or with one of another authority."""
    with tempfile.NamedTemporaryFile("w", prefix="amphora-tls-") as stranger:
        stranger.write(proof.controller.stranger_pem)
        stranger.flush()
        for amphora, _ in proof.amphorae:
            for client in (None, stranger.name):
                context = ssl.create_default_context(cadata=proof.controller.server_ca.certificate)
                if client:
                    context.load_cert_chain(client)
                if not refuses(proof.address(amphora), context, amphora.id):
                    raise OSError("the agent serves a client that is not its controller")
    return "no certificate, and one of another authority"


def refuses(place: tuple[str, int], context: ssl.SSLContext, name: str) -> bool:
    """Tell whether a server ends the connection of a client instead of answering it.

    In TLS 1.3 the refusal comes after the client's handshake, with the first read. A silent server
    has refused nobody: no connection and no answer in time are errors.

    :raises OSError: no connection, or no answer in time.
    :raises ssl.SSLCertVerificationError: the server is not the one with that name.
    """
    plain = socket.create_connection(place, timeout=members.PATIENCE)
    try:
        with context.wrap_socket(plain, server_hostname=name) as tls:
            tls.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return not tls.recv(1)
    except ssl.SSLCertVerificationError:
        raise
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
        return True


def vip_plugged(proof: Proof) -> str:
    """Each amphora gets its network card while it runs, and the VIPs on it."""
    for amphora, machine in proof.amphorae:
        proof.controller.plug_vip(amphora, machine.plug_card())
        name = proof.controller.driver.get_interface_from_ip(amphora, amphora.vrrp_ip)
        if name != VIP_INTERFACE:
            raise OSError(f"the VIP's interface is {name}, not {VIP_INTERFACE}")
    proof.controller.start_vrrp()
    return f"{network.VIP} and {network.VIP_IPV6} on {VIP_INTERFACE}"


def http_balanced(proof: Proof) -> str:
    """An HTTP listener shares requests between the members."""
    proof.listeners[HTTP] = proof.controller.listen("HTTP", HTTP, "HTTP", check_every=2)
    proof.controller.update()
    return proof.balance(lambda: ask_http((network.VIP, HTTP)))


def ipv6_balanced(proof: Proof) -> str:
    """The same listener serves the IPv6 VIP."""
    return proof.balance(lambda: ask_http((network.VIP_IPV6, HTTP)))


def heartbeats_signed(proof: Proof) -> str:
    """Each amphora sends heartbeats, two of them at least, all signed with the key."""
    times = proof.heartbeats.times
    for amphora, machine in proof.amphorae:
        wanted = len(times[amphora.id]) + 2

        def heard() -> bool | None:
            if bad := proof.heartbeats.bad:
                raise machine.failure(f"{bad} heartbeats were not signed with the key")  # noqa: B023
            return len(times[amphora.id]) >= wanted or None  # noqa: B023

        proof.wait("two heartbeats", heard)
    return f"{sum(map(len, times.values()))} heartbeats"


def member_lost(proof: Proof) -> str:
    """A member that dies is reported, and its requests go to the other."""
    dead, alive = network.MEMBERS
    proof.members[dead].stop()
    wait_for_state(proof, dead, "DOWN")
    return balance_kept(proof, [alive])


def member_returns(proof: Proof) -> str:
    """A member that returns is reported, and gets requests again."""
    back = network.MEMBERS[0]
    proof.members[back].start()
    wait_for_state(proof, back, "UP")
    return balance_kept(proof)


def balance_kept(proof: Proof, servers: Sequence[str] = network.MEMBERS) -> str:
    """See all requests answered by the HTTP and by the UDP listener."""
    over_http = proof.balance(lambda: ask_http((network.VIP, HTTP)), servers)
    over_udp = proof.balance(lambda: ask_udp((network.VIP, UDP)), servers)
    return f"HTTP: {over_http}; UDP: {over_udp}"


def wait_for_state(proof: Proof, member: str, state: str) -> None:
    """Wait until heartbeats tell a state of a member: HAProxy's of it, and keepalived's."""
    [amphora] = proof.controller.amphorae
    for listener in (proof.listeners[port] for port in KEPT):
        pool = listener.default_pool
        [member_id] = [row.id for row in pool.members if row.ip_address == member]

        def told() -> bool | None:
            states = proof.heartbeats.member_states(amphora.id, pool.id, listener.id)  # noqa: B023
            return states.get(member_id) == state or None  # noqa: B023

        proof.wait(f"a heartbeat with the {listener.protocol} member {state}", told)


def listeners_added(proof: Proof) -> str:
    """The load balancer takes listeners of all kinds, one of them with a certificate."""
    listen = proof.controller.listen
    reference = proof.controller.store(proof.controller.server_ca.issue(members.SITE))
    proof.listeners |= {
        HTTPS: listen("TERMINATED_HTTPS", HTTPS, "HTTP", tls_certificate_id=reference),
        TCP: listen("TCP", TCP, "TCP"),
        UDP: listen("UDP", UDP, "UDP", check_every=2),
        SECOND_UDP: listen("UDP", SECOND_UDP, "UDP"),
        METRICS: listen("PROMETHEUS", METRICS, None),
    }
    proof.controller.update()
    return ", ".join(listener.protocol for listener in proof.listeners.values())


def https_balanced(proof: Proof) -> str:
    """An HTTPS listener with an uploaded certificate shares requests between the members."""
    tls = ssl.create_default_context(cadata=proof.controller.server_ca.certificate)
    return proof.balance(lambda: ask_http((network.VIP, HTTPS), tls=tls))


def tcp_balanced(proof: Proof) -> str:
    """A TCP listener shares connections between the members."""
    return proof.balance(lambda: ask_http((network.VIP, TCP)))


def udp_balanced(proof: Proof) -> str:
    """A UDP listener (keepalived and LVS) shares datagrams between the members."""
    return proof.balance(lambda: ask_udp((network.VIP, UDP)))


def metrics_served(proof: Proof) -> str:
    """A PROMETHEUS listener serves the metrics of the load balancer."""

    def metrics() -> list[str] | None:
        text = ask_http((network.VIP, METRICS), "/metrics")
        return [line for line in text.splitlines() if line.startswith("octavia_")] or None

    return f"{len(proof.wait('metrics of Octavia', metrics))} samples"


def listeners_deleted(proof: Proof) -> str:
    """Listeners that are deleted are served no more; the others are."""
    deleted = [proof.listeners.pop(port) for port in DELETED]
    for listener in deleted:
        proof.controller.forget(listener)
    proof.controller.update()
    for listener in deleted:
        proof.wait(f"the end of the {listener.protocol} listener", lambda: refused(listener))  # noqa: B023
    return balance_kept(proof)


def refused(listener: Any) -> bool | None:
    """Tell whether nobody serves a listener's port on the VIP; None if somebody does."""
    place = (network.VIP, listener.protocol_port)
    try:
        if listener.protocol == "UDP":
            ask_udp(place)
        else:
            socket.create_connection(place, members.PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return None


def certificate_rotated(proof: Proof) -> str:
    """Each agent takes a new certificate and shows it from then on."""
    for amphora, _ in proof.amphorae:
        pem = proof.controller.server_ca.issue(amphora.id)
        proof.controller.driver.upload_cert_amp(amphora, pem.encode())
        proof.server_pems[amphora.id] = pem

        def shown() -> bool:
            shows_certificate(proof, amphora)  # noqa: B023
            return bool(proof.controller.info(amphora))  # noqa: B023

        proof.wait("the new certificate", shown)
    return "shown to the controller"


def agent_configured(proof: Proof) -> str:
    """Each agent takes new settings: heartbeats come in the new interval."""
    proof.controller.configure(SHORT_INTERVAL)
    for amphora, _ in proof.amphorae:
        proof.controller.driver.update_amphora_agent_config(
            amphora, proof.controller.agent_conf(amphora).encode()
        )
        times = proof.heartbeats.times[amphora.id]
        before = len(times)

        def in_time() -> bool | None:
            # Three intervals that are nearer to the new one; sending takes some time as well.
            newest = times[before:][-4:]  # noqa: B023
            allowed = 3 * (INTERVAL + SHORT_INTERVAL) / 2
            return (len(newest) == 4 and newest[-1] - newest[0] < allowed) or None

        proof.wait("heartbeats in the new interval", in_time)
    return f"a heartbeat every {SHORT_INTERVAL} s instead of {INTERVAL} s"


def rebooted(proof: Proof) -> str:
    """After a reboot each amphora serves by itself what it served before."""
    for amphora, machine in proof.amphorae:
        before = proof.heartbeats.newest[amphora.id]["seq"]
        machine.reboot()
        # It counts its heartbeats from 0 again.
        proof.wait(
            "a heartbeat after the reboot",
            lambda: proof.heartbeats.newest[amphora.id]["seq"] < before or None,  # noqa: B023
        )
        proof.wait("the agent's answer", lambda: proof.controller.info(amphora))  # noqa: B023
    return balance_kept(proof)


def failover(proof: Proof) -> str:
    """When the master is gone the other serves the VIPs, as soon as VRRP allows."""
    master, backup = proof.machines
    master.process.kill()
    master.process.wait()
    gone = backup.elapsed
    backup.wait(
        "an answer of the backup",
        lambda: ask_http((network.VIP, HTTP), timeout=1),
        proof.timeout,
        NOT_YET,
    )
    took = backup.elapsed - gone
    if took > FAILOVER:
        raise OSError(f"the first answer came after {took:.1f} s, {FAILOVER} s are allowed")
    detail = proof.balance(lambda: ask_http((network.VIP, HTTP)))
    return f"after {took:.1f} s; {detail}"


#: Milestones of one amphora, in order.
SINGLE: dict[str, Callable[[Proof], str]] = {
    "agent answers": agent_answers,
    "strangers refused": strangers_refused,
    "VIP plugged": vip_plugged,
    "HTTP balanced": http_balanced,
    "IPv6 balanced": ipv6_balanced,
    "heartbeats signed": heartbeats_signed,
    "listeners added": listeners_added,
    "HTTPS balanced": https_balanced,
    "TCP balanced": tcp_balanced,
    "UDP balanced": udp_balanced,
    "metrics served": metrics_served,
    "member lost": member_lost,
    "member returns": member_returns,
    "listeners deleted": listeners_deleted,
    "certificate rotated": certificate_rotated,
    "agent configured": agent_configured,
    "rebooted": rebooted,
}
#: Milestones of a pair: what two amphorae do otherwise than one.
PAIR: dict[str, Callable[[Proof], str]] = {
    "agent answers": agent_answers,
    "VIP plugged": vip_plugged,
    "HTTP balanced": http_balanced,
    "IPv6 balanced": ipv6_balanced,
    "heartbeats signed": heartbeats_signed,
    "failover": failover,
}
#: Octavia's topology -> how many amphorae it has, and their milestones.
TOPOLOGIES = {"single": (1, SINGLE), "active-standby": (2, PAIR)}


def prove(
    image: Path,
    *,
    log: Path,
    accel: str = "auto",
    firmware: str | None = None,
    topology: str = "single",
    timeout: float = 3600.0,
    tell: Callable[[Milestone], None] = lambda milestone: None,
) -> Report:
    """Boot an image as Octavia does and see it do all that is wanted of an amphora.

    The image is not written to. The serial log stays, whatever the outcome.

    :param image: a disk image; its suffix tells its format, see :data:`boot.DISK_FORMATS`.
    :param log: where to write the serial console's lines, each after its seconds since power-on;
        the second amphora's go to a file of the same name with ``.2`` at its end.
    :param accel: one of :data:`boot.ACCELERATORS`.
    :param firmware: one of :data:`.board.FIRMWARES`; None: the first for the architecture.
    :param topology: one of :data:`TOPOLOGIES`.
    :param timeout: seconds from power-on for the whole proof.
    :param tell: is called with each milestone that is reached.
    :returns: the report, also of an image that has failed.
    :raises BadValue: the image or the accelerator is none that can be used.
    :raises HostError: a program is missing, or this host gives us no network of our own.
    """
    with contextlib.ExitStack() as undo:
        undo.enter_context(network.isolated())
        computer = board_for(image, firmware)
        accelerator = boot.choose_accelerator(image, accel, computer)
        report = Report(str(image), accelerator, topology, str(log))
        count, steps = TOPOLOGIES[topology]
        directory = undo.enter_context(tempfile.TemporaryDirectory(prefix="amphora-controller-"))
        controller = Controller(Path(directory), boot.GATEWAY, count)
        controller.configure(INTERVAL)
        pems = {
            amphora.id: controller.server_ca.issue(amphora.id) for amphora in controller.amphorae
        }
        servers = undo.enter_context(members.serving(network.MEMBERS))
        heard = undo.enter_context(
            heartbeats.listening(controller.heartbeat_key, ("127.0.0.1", HEARTBEAT_PORT))
        )
        machines = []
        for number, amphora in enumerate(controller.amphorae, start=1):
            files = controller.injected_files(amphora, pems[amphora.id])
            drive = boot.config_drive(amphora.id, files, controller.user_data(), number)
            its_log = log if number == 1 else log.with_name(f"{log.name}.{number}")
            machines.append(
                undo.enter_context(
                    boot.power_on(
                        image,
                        drive,
                        accelerator=accelerator,
                        log=its_log,
                        number=number,
                        computer=computer,
                    )
                )
            )
        run_steps(Proof(controller, machines, pems, servers, heard, timeout), steps, report, tell)
    return report


def run_steps(
    proof: Proof,
    steps: Mapping[str, Callable[[Proof], str]],
    report: Report,
    tell: Callable[[Milestone], None] = lambda milestone: None,
) -> None:
    """Do the steps until one fails, and tell each in the report."""
    first = proof.machines[0]
    for number, (name, step) in enumerate(steps.items()):
        try:
            detail = step(proof)
            report.milestones.append(Milestone(name, first.elapsed, detail))
            tell(report.milestones[-1])
        except (BootFailed, *NOT_YET) as error:
            said = [str(error), *proof.controller.complaints.texts[-3:]]
            failure = error if isinstance(error, BootFailed) else first.failure("\n".join(said))
            report.failure = f"{name}: {failure}"
            report.milestones.append(Milestone(name))
            report.missing = list(steps)[number + 1 :]
            break
    report.agent = proof.agent
    report.memory_in_use = proof.memory_in_use
    report.units = slowest_units(first.journal())
    report.milestones[:0] = [
        Milestone(name, seconds)
        for name, line in boot.SERIAL_MILESTONES.items()
        if (seconds := first.seen(line)) is not None
    ]
