# SPDX-License-Identifier: Apache-2.0
"""The boot proof's steps, with an amphora made of answers."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amphora_image import boot, controller, proof
from amphora_image.controller import Authority, Complaints
from amphora_image.heartbeats import Heartbeats
from amphora_image.proof import Proof, run_steps
from amphora_image.report import Milestone, Report


class FakeProcess:
    """A process that runs."""

    returncode = None

    def poll(self) -> None:
        """It runs."""


class FakeController:
    """A controller that has done nothing."""

    def __init__(self) -> None:
        self.complaints = Complaints()


@pytest.fixture
def scene(tmp_path: Path) -> Proof:
    """A proof with one machine that has started systemd."""
    process: Any = FakeProcess()
    controller: Any = FakeController()
    machine = boot.Machine(process, tmp_path / "qmp.sock", tmp_path / "serial.log")
    machine.lines += [(1.5, "Linux version 6.12.1"), (3.5, "Welcome to Debian!")]
    return Proof(controller, [machine], {}, {}, Heartbeats("a key"), timeout=0.5)


@pytest.fixture
def report() -> Report:
    """A report with nothing in it."""
    return Report("a.qcow2", "tcg", "single", "a.log")


def test_every_server_must_answer(scene: Proof) -> None:
    """The shares of the members are told."""
    answers = cycle(("one", "two"))
    assert scene.balance(lambda: next(answers), ("one", "two")) == "50 of 50 requests, 25 and 25"


def test_one_lost_request_is_a_failure(scene: Proof) -> None:
    """When all members have answered once, not one request may fail."""
    answers = iter(["one", "two", *["one", "two"] * 20])

    def ask() -> str:
        for answer in answers:
            return answer
        raise ConnectionResetError("reset by peer")

    with pytest.raises(ConnectionResetError):
        scene.balance(ask, ("one", "two"))


def test_answer_of_another_server_is_a_failure(scene: Proof) -> None:
    """A member that is down must not answer."""
    answers = cycle(("one", "two"))
    with pytest.raises(OSError, match=r"answers came from .*'two'"):
        scene.balance(lambda: next(answers), ("one",))


def test_steps_are_told_in_order(
    scene: Proof, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the console showed comes first, then each step with what it saw."""
    run_steps(scene, {"a": lambda _: "fine", "b": lambda _: "so"}, report)
    assert report.passed
    assert report.milestones[:2] == [
        Milestone("kernel starts", 1.5),
        Milestone("systemd starts", 3.5),
    ]
    assert [(each.name, each.detail) for each in report.milestones[2:]] == [
        ("a", "fine"),
        ("b", "so"),
    ]


def test_first_failure_ends_the_proof(
    scene: Proof, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure has the step, its error and what the agent said; later steps are missing."""
    scene.controller.complaints.texts.append("unexpected result code 500")

    def fails(_: Proof) -> str:
        raise OSError("no way")

    run_steps(scene, {"a": lambda _: "", "b": fails, "c": fails, "d": fails}, report)
    assert not report.passed
    assert report.failure.splitlines()[:2] == ["b: no way", "unexpected result code 500"]
    assert report.milestones[-1] == Milestone("b")
    assert report.missing == ["c", "d"]


def test_fatal_console_is_a_failure(
    scene: Proof, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stopped fails the step that waits for it, with its words."""
    scene.machines[0].lines.append((9.0, "Kernel panic - not syncing"))

    def waits(it: Proof) -> str:
        return it.wait("an answer", lambda: None)

    run_steps(scene, {"a": waits}, report)
    assert "the machine stopped; missing: an answer" in report.failure
    assert "Kernel panic" in report.failure


@pytest.fixture(scope="module")
def authorities() -> tuple[Authority, Authority]:
    """The authorities of servers and of clients; making the keys takes a third of a second."""
    return Authority.create("server CA"), Authority.create("client CA")


@contextlib.contextmanager
def agent(context: ssl.SSLContext, answer: bytes) -> Iterator[tuple[str, int]]:
    """Serve one connection on a loopback port with a canned answer."""

    def serve() -> None:
        plain, _ = listener.accept()
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as tls:
            if tls.recv(4096):
                tls.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        thread.join(5)


@pytest.fixture
def servers(
    authorities: tuple[Authority, Authority], tmp_path: Path
) -> Callable[[bool], ssl.SSLContext]:
    """A function that makes a server's TLS: of one that wants clients of the client CA, or not."""
    pem = tmp_path / "server.pem"
    pem.write_text(authorities[0].issue("an-id"))

    def make(strict: bool) -> ssl.SSLContext:
        context = ssl.create_default_context(
            ssl.Purpose.CLIENT_AUTH, cadata=authorities[1].certificate
        )
        context.verify_mode = ssl.CERT_REQUIRED if strict else ssl.CERT_NONE
        context.load_cert_chain(pem)
        return context

    return make


@pytest.mark.parametrize(("issuer", "refused"), [(None, True), (0, True), (1, False)])
def test_strangers_are_refused(
    authorities: tuple[Authority, Authority],
    servers: Callable[[bool], ssl.SSLContext],
    tmp_path: Path,
    issuer: int | None,
    refused: bool,
) -> None:
    """A client without a certificate and one of another authority are refused, ours is not."""
    client = ssl.create_default_context(cadata=authorities[0].certificate)
    if issuer is not None:
        pem = tmp_path / "client.pem"
        pem.write_text(authorities[issuer].issue("a client"))
        client.load_cert_chain(pem)
    with agent(servers(True), b"hello") as place:
        assert proof.refuses(place, client, "an-id") is refused


def test_certificate_is_shown_to_the_controller(
    authorities: tuple[Authority, Authority],
    servers: Callable[[bool], ssl.SSLContext],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With TLS 1.2 too, in which a server ends the handshake of a client without a certificate."""
    (tmp_path / "client.pem").write_text(authorities[1].issue("controller"))
    context = servers(True)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    its: Any = SimpleNamespace(server_ca=authorities[0], directory=tmp_path)
    with agent(context, b"") as place:
        monkeypatch.setattr(controller, "AGENT_PORT", place[1])
        amphora = SimpleNamespace(id="an-id", lb_network_ip=place[0])
        shown = controller.Controller.certificate_of(its, amphora)
    assert shown.strip() in (tmp_path / "server.pem").read_text()


def test_an_answer_of_any_kind_is_no_refusal(
    authorities: tuple[Authority, Authority], servers: Callable[[bool], ssl.SSLContext]
) -> None:
    """An agent that says anything at all to a client without a certificate has not refused it."""
    client = ssl.create_default_context(cadata=authorities[0].certificate)
    with agent(servers(False), b"x") as place:
        assert not proof.refuses(place, client, "an-id")


def test_another_server_is_no_refusal(
    authorities: tuple[Authority, Authority], servers: Callable[[bool], ssl.SSLContext]
) -> None:
    """That we do not trust the server does not mean that it refuses us."""
    client = ssl.create_default_context(cadata=authorities[0].certificate)
    with agent(servers(False), b"x") as place, pytest.raises(ssl.SSLCertVerificationError):
        proof.refuses(place, client, "another-id")


def test_every_step_is_documented() -> None:
    """Each milestone is in the document of the boot proof, and each step says what it shows."""
    told = (Path(__file__).parents[2] / "docs/boot.rst").read_text()
    steps = proof.SINGLE | proof.PAIR
    names = {*steps, *boot.SERIAL_MILESTONES}
    assert {name for name in names if f"``{name}``" not in told} == set()
    assert all(step.__doc__ for step in steps.values())
