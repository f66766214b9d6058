# SPDX-License-Identifier: Apache-2.0
"""Each milestone of the boot proof is missed, by its name, by an amphora that is broken there."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Callable, Sequence
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amphora_image import boot, network, proof
from amphora_image.controller import Authority, Complaints, status_message
from amphora_image.heartbeats import Heartbeats
from amphora_image.proof import HTTP, HTTPS, METRICS, SECOND_UDP, TCP, UDP, Proof, run_steps
from amphora_image.report import Report

KEY = "a key"


class World:
    """Amphorae that do all that they are told, and their members; each field can be broken."""

    def __init__(self, amphorae: Sequence[Any]) -> None:
        self.amphorae = amphorae
        #: Seconds; they pass while the proof waits, and then alone.
        self.clock = 0.0
        self.listeners: list[Any] = []
        #: What listens, what never does, and what does not end.
        self.ports: set[int] = set()
        self.deaf: set[int] = set()
        self.sticky: set[int] = set()
        self.deaf_after_reboot: set[int] = set()
        self.deaf_hosts: set[str] = set()
        #: Members that run; which each kind of check sees, or is too blind to; who is asked next.
        self.alive = set(network.MEMBERS)
        self.checked: dict[str, set[str]] = {"HTTP": set(self.alive), "UDP": set(self.alive)}
        self.unchecked: set[str] = set()
        self.unreturned: set[str] = set()
        self.believes_in_the_dead = False
        self.turn = count()
        self.served = 0
        self.loses: int | None = None
        #: Heartbeats.
        self.heard = Heartbeats(KEY)
        self.key, self.interval, self.silent_since, self.seq = KEY, float(proof.INTERVAL), 1e9, 0
        self.metrics = "octavia_loadbalancer_cpu 0\n"
        self.serves_strangers = False
        self.certificates: dict[str, str] = {}
        #: When the master died, and how long the backup takes.
        self.died = -1e9
        self.takes_over = 7.0

    def tick(self, _: float = 0.0) -> None:
        """Let a second pass: members are checked, heartbeats sent."""
        self.clock += 1
        for kind, seen in self.checked.items():
            if kind not in self.unchecked:
                seen &= self.alive
                seen |= self.alive - self.unreturned
        if self.clock % self.interval == 0 and self.clock < self.silent_since:
            for amphora in self.amphorae:
                self.heartbeat(amphora)

    def heartbeat(self, amphora: Any) -> None:
        """Send a heartbeat that tells how the members are seen."""
        self.seq += 1
        pools = {}
        for listener in self.listeners:
            pool = listener.default_pool
            udp = listener.protocol == "UDP"
            seen = self.checked["UDP" if udp else "HTTP"]
            states = {row.id: "UP" if row.ip_address in seen else "DOWN" for row in pool.members}
            pools[pool.id if udp else f"{pool.id}:{listener.id}"] = {"members": states}
        message = {"id": amphora.id, "seq": self.seq, "pools": pools}
        self.heard.take(status_message.wrap_envelope(message, self.key))
        if self.heard.times[amphora.id]:
            self.heard.times[amphora.id][-1] = self.clock

    def answer(self, place: tuple[str, int], kind: str) -> str:
        """Answer one request, as the next member does."""
        host, port = place
        if self.clock - self.died < self.takes_over:
            raise TimeoutError("timed out")
        if host in self.deaf_hosts or port not in self.ports - self.deaf:
            raise ConnectionRefusedError("refused")
        self.served += 1
        if self.served == self.loses:
            raise ConnectionResetError("reset")
        seen = set(network.MEMBERS) if self.believes_in_the_dead else self.checked[kind]
        member = sorted(seen)[next(self.turn) % len(seen)]
        if member not in self.alive:
            raise OSError("503 Service Unavailable")
        return member

    def ask_http(
        self,
        place: tuple[str, int],
        path: str = "/",
        *,
        tls: ssl.SSLContext | None = None,
        timeout: float = 30,
    ) -> str:
        """Stand in for ``members.ask_http``."""
        answer = self.answer(place, "HTTP")
        assert (tls is not None) == (place[1] == HTTPS)
        return self.metrics if (place[1], path) == (METRICS, "/metrics") else answer

    def ask_udp(self, place: tuple[str, int], *, timeout: float = 30) -> str:
        """Stand in for ``members.ask_udp``."""
        return self.answer(place, "UDP")

    def connect(self, place: tuple[str, int], timeout: float) -> Any:
        """Stand in for ``socket.create_connection``."""
        self.answer(place, "HTTP")
        return SimpleNamespace(close=lambda: None)

    def refuses(self, place: tuple[str, int], context: ssl.SSLContext, name: str) -> bool:
        """Stand in for ``proof.refuses``."""
        return not self.serves_strangers


class Issued:
    """An authority that has made its certificates beforehand, for it takes a while."""

    def __init__(self) -> None:
        authority = Authority.create("server CA")
        self.certificate = authority.certificate
        self.pems = cycle([authority.issue("lb") for _ in range(4)])

    def issue(self, _: str) -> str:
        """Return the next one."""
        return next(self.pems)


class Agent:
    """The controller, with Octavia's driver, for agents that do what they are told."""

    def __init__(self, world: World, server_ca: Issued) -> None:
        self.world, self.server_ca, self.driver = world, server_ca, self
        self.amphorae, self.complaints = world.amphorae, Complaints()
        self.stranger_pem = server_ca.issue("stranger")
        self.interface = proof.VIP_INTERFACE
        self.interval = 0
        for amphora in world.amphorae:
            world.certificates[amphora.id] = server_ca.issue(amphora.id)

    def info(self, amphora: Any) -> dict[str, object]:
        """Tell what the agent is."""
        return {"hostname": "lb", "api_version": "1.0", "haproxy_version": "3.0"}

    def certificate_of(self, amphora: Any) -> str:
        """Show the certificate."""
        pem = self.world.certificates[amphora.id]
        return pem[: pem.index("-----BEGIN RSA")]

    def plug_vip(self, amphora: Any, mac: str) -> None:
        """Plug the card."""

    def get_interface_from_ip(self, amphora: Any, address: str) -> str:
        """Tell the card's name."""
        return self.interface

    def start_vrrp(self) -> None:
        """Start keepalived."""

    def listen(self, protocol: str, port: int, pool: str | None, **_: Any) -> Any:
        """Add a listener."""
        rows = [SimpleNamespace(id=f"{port} {ip}", ip_address=ip) for ip in network.MEMBERS]
        its_pool = SimpleNamespace(id=f"pool {port}", members=rows)
        listener = SimpleNamespace(
            id=str(port), protocol=protocol, protocol_port=port, default_pool=its_pool
        )
        self.world.listeners.append(listener)
        return listener

    def forget(self, listener: Any) -> None:
        """Delete a listener; a UDP listener at once."""
        self.world.listeners.remove(listener)
        if listener.protocol == "UDP":
            self.world.ports -= {listener.protocol_port} - self.world.sticky

    def update(self) -> None:
        """Serve the listeners."""
        kept = self.world.ports & self.world.sticky
        self.world.ports = {each.protocol_port for each in self.world.listeners} | kept

    def store(self, pem: str) -> str:
        """Keep a certificate."""
        return "a reference"

    def configure(self, interval: int) -> None:
        """Change the settings."""
        self.interval = interval

    def agent_conf(self, amphora: Any) -> str:
        """The agent's settings."""
        return str(self.interval)

    def update_amphora_agent_config(self, amphora: Any, conf: bytes) -> None:
        """Take new settings."""
        self.world.interval = float(conf)

    def upload_cert_amp(self, amphora: Any, pem: bytes) -> None:
        """Take a new certificate."""
        self.world.certificates[amphora.id] = pem.decode()


class Process:
    """A process that runs until it is killed."""

    returncode: int | None = None

    def __init__(self, world: World) -> None:
        self.world = world

    def poll(self) -> int | None:
        """Its status."""
        return self.returncode

    def kill(self) -> None:
        """End it."""
        self.returncode, self.world.died = -9, self.world.clock

    def wait(self) -> None:
        """It has ended."""


class Machine(boot.Machine):
    """A machine of that world."""

    world: World

    @property
    def elapsed(self) -> float:
        """Seconds since power-on."""
        return self.world.clock

    def memory_in_use(self) -> int | None:
        """MiB."""
        return 154

    def plug_card(self) -> str:
        """Plug the VIP's card."""
        return "fa:16:3e:00:01:01"

    def reboot(self) -> None:
        """Start again: with the first heartbeat."""
        self.world.seq = 0
        self.world.ports -= self.world.deaf_after_reboot


class Member:
    """A member that runs or not."""

    def __init__(self, world: World, address: str) -> None:
        self.start = lambda: world.alive.add(address)
        self.stop = lambda: world.alive.discard(address)


@pytest.fixture(scope="module")
def server_ca() -> Issued:
    """The authority of all tests here."""
    return Issued()


Make = Callable[[str], Proof]


@pytest.fixture
def make(server_ca: Issued, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A function that makes the proof of a topology, with a world of its own."""

    def made(topology: str) -> Proof:
        number, _ = proof.TOPOLOGIES[topology]
        amphorae = [
            SimpleNamespace(
                id=str(uuid.uuid4()), lb_network_ip=f"127.0.0.{each + 1}", vrrp_ip=f"vrrp {each}"
            )
            for each in range(number)
        ]
        world = World(amphorae)
        monkeypatch.setattr(proof, "ask_http", world.ask_http)
        monkeypatch.setattr(proof, "ask_udp", world.ask_udp)
        monkeypatch.setattr(proof, "refuses", world.refuses)
        monkeypatch.setattr("socket.create_connection", world.connect)
        monkeypatch.setattr("time.sleep", world.tick)
        agent: Any = Agent(world, server_ca)
        machines = []
        for _ in amphorae:
            process: Any = Process(world)
            machine = Machine(process, tmp_path / "qmp.sock", tmp_path / "serial.log")
            machine.world = world
            machines.append(machine)
        members: Any = {ip: Member(world, ip) for ip in network.MEMBERS}
        pems = dict(world.certificates)
        return Proof(agent, machines, pems, members, world.heard, timeout=900)

    return made


def run(it: Proof, topology: str) -> Report:
    """Take all steps of a topology."""
    report = Report("a.qcow2", "tcg", topology, "a.log")
    run_steps(it, proof.TOPOLOGIES[topology][1], report)
    return report


@pytest.mark.parametrize("topology", proof.TOPOLOGIES)
def test_whole_amphora(make: Make, topology: str) -> None:
    """An amphora that does all that it is told reaches every milestone, in order."""
    report = run(make(topology), topology)
    assert report.failure == ""
    assert [each.name for each in report.milestones] == list(proof.TOPOLOGIES[topology][1])
    seconds = [each.seconds for each in report.milestones if each.seconds is not None]
    assert seconds == sorted(seconds)


Break = Callable[[World, Any], object]


def _raise(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


def _only_one_listener(world: World, agent: Any) -> None:
    """The agent fails when it is told of a second listener: keepalived cannot be started."""
    update = agent.update

    def fail() -> None:
        if len(world.listeners) > 1:
            raise OSError("500 Error starting keepalivedlvs")
        update()

    agent.update = fail


def _silent_after_reboot(world: World, agent: Any) -> None:
    for machine in agent.machines:
        machine.reboot = lambda: setattr(world, "silent_since", world.clock)


def _no_agent_after_reboot(world: World, agent: Any) -> None:
    for machine in agent.machines:
        reboot = machine.reboot

        def rebooted(reboot: Callable[[], None] = reboot) -> None:
            reboot()
            agent.info = _raise(ConnectionRefusedError("refused"))

        machine.reboot = rebooted


def _set(**fields: Any) -> Break:
    return lambda world, agent: vars(world).update(fields)


def _agent(**fields: Any) -> Break:
    return lambda world, agent: vars(agent).update(fields)


REFUSED = ConnectionRefusedError("refused")
#: Milestone, what the failure says, what is broken in the amphora.
BREAKS: list[tuple[str, str, Break]] = [
    ("agent answers", "the agent's answer (refused)", _agent(info=_raise(REFUSED))),
    (
        "agent answers",
        "another certificate",
        lambda world, agent: world.certificates.update(dict.fromkeys(world.certificates, OTHER)),
    ),
    ("strangers refused", "serves a client", _set(serves_strangers=True)),
    (
        "VIP plugged",
        "no card",
        _agent(plug_vip=_raise(OSError("no card"))),
    ),
    ("VIP plugged", "interface is eth7", _agent(interface="eth7")),
    ("HTTP balanced", "an answer of 203.0.113.101 (refused)", _set(deaf={HTTP})),
    (
        "HTTP balanced",
        "an answer of 203.0.113.102",
        lambda world, _: world.alive.discard("203.0.113.102"),
    ),
    ("HTTP balanced", "reset", _set(loses=20)),
    ("IPv6 balanced", "refused", _set(deaf_hosts={network.VIP_IPV6})),
    ("heartbeats signed", "two heartbeats", _set(silent_since=0)),
    ("heartbeats signed", "were not signed with the key", _set(key="another key")),
    ("listeners added", "500 Error starting keepalivedlvs", _only_one_listener),
    ("HTTPS balanced", "refused", _set(deaf={HTTPS})),
    ("TCP balanced", "refused", _set(deaf={TCP})),
    ("UDP balanced", "refused", _set(deaf={UDP})),
    ("metrics served", "refused", _set(deaf={METRICS})),
    ("metrics served", "metrics of Octavia", _set(metrics="haproxy_up 1\n")),
    ("member lost", "a heartbeat with the HTTP member DOWN", _set(unchecked={"HTTP"})),
    ("member lost", "a heartbeat with the UDP member DOWN", _set(unchecked={"UDP"})),
    ("member lost", "503", _set(believes_in_the_dead=True)),
    (
        "member returns",
        "a heartbeat with the HTTP member UP",
        _set(unreturned=set(network.MEMBERS)),
    ),
    ("listeners deleted", "the end of the TERMINATED_HTTPS listener", _set(sticky={HTTPS})),
    ("listeners deleted", "the end of the TCP listener", _set(sticky={TCP})),
    ("listeners deleted", "the end of the UDP listener", _set(sticky={SECOND_UDP})),
    ("certificate rotated", "another certificate", _agent(upload_cert_amp=lambda *_: None)),
    (
        "agent configured",
        "heartbeats in the new interval",
        _agent(update_amphora_agent_config=lambda *_: None),
    ),
    ("rebooted", "a heartbeat after the reboot", _silent_after_reboot),
    ("rebooted", "the agent's answer", _no_agent_after_reboot),
    ("rebooted", "refused", _set(deaf_after_reboot={HTTP})),
    ("rebooted", "refused", _set(deaf_after_reboot={UDP})),
    ("failover", "an answer of the backup", _set(takes_over=1e9)),
    ("failover", "12 s are allowed", _set(takes_over=20.0)),
]
OTHER = "another\n-----BEGIN RSA"


@pytest.mark.parametrize(
    ("milestone", "says", "break_it"), BREAKS, ids=[f"{name}-{says}" for name, says, _ in BREAKS]
)
def test_broken_amphora(make: Make, milestone: str, says: str, break_it: Break) -> None:
    """What an amphora does not do is caught by the milestone that names it, and by no other."""
    topology = "single" if milestone in proof.SINGLE else "active-standby"
    it = make(topology)
    agent: Any = it.controller
    agent.machines = it.machines
    break_it(agent.world, agent)
    report = run(it, topology)
    assert report.failure.startswith(f"{milestone}: ")
    assert says in report.failure.splitlines()[0]
    assert report.milestones[-1].name == milestone
    assert report.milestones[-1].seconds is None


def test_every_milestone_can_be_missed() -> None:
    """No milestone is without an amphora that misses it."""
    assert {milestone for milestone, *_ in BREAKS} == {*proof.SINGLE, *proof.PAIR}
