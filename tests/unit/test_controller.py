# SPDX-License-Identifier: Apache-2.0
"""The controller's side: Octavia's code, with an amphora that only notes what it is told."""

from __future__ import annotations

import configparser
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from amphora_image import controller, network
from amphora_image.controller import Authority, Controller

ANSWERS = {
    "get_api_version": {"api_version": "1.0"},
    "get_info": {"api_version": "1.0", "haproxy_version": "3.0.11-1"},
    "get_details": {},
}


class Agent:
    """The driver's client for an agent that does all that it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(amphora: Any, *arguments: Any, **_: Any) -> Any:
            self.calls.append((name, arguments))
            return ANSWERS.get(name)

        return call

    def told(self, name: str) -> list[Any]:
        """The arguments of each call of that name."""
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def agent() -> Agent:
    """An agent that was told nothing yet."""
    return Agent()


@pytest.fixture
def make(tmp_path: Path, agent: Agent) -> Callable[[int], Controller]:
    """A function that makes a controller of one amphora or two."""

    def made(count: int) -> Controller:
        it = Controller(tmp_path, "10.0.2.2", count)
        it.driver.clients = {"base": agent, "1.0": agent}
        return it

    return made


@pytest.fixture
def one(make: Callable[[int], Controller]) -> Controller:
    """The controller of one amphora."""
    return make(1)


def test_issued_certificate_is_for_its_name_alone() -> None:
    """What an authority issues names the amphora, is signed by it and has its key beside it."""
    authority, other = Authority.create("server CA"), Authority.create("client CA")
    pem = authority.issue("an-id")
    certificate = x509.load_pem_x509_certificate(pem.encode())
    issuer, stranger = (
        x509.load_pem_x509_certificate(each.certificate.encode()) for each in (authority, other)
    )
    (common_name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    certificate.verify_directly_issued_by(issuer)
    with pytest.raises(ValueError, match=r"[Ii]ssuer"):
        certificate.verify_directly_issued_by(stranger)
    assert common_name.value == "an-id"
    assert pem.index("CERTIFICATE") < pem.index("RSA PRIVATE")
    assert "PRIVATE" not in repr(authority)


def test_agent_conf_points_at_the_injected_files(one: Controller) -> None:
    """The agent's settings are INI and name the certificates where they are injected."""
    [amphora] = one.amphorae
    files = one.injected_files(amphora, "a server's PEM")
    conf = configparser.RawConfigParser()
    conf.read_string(files["/etc/octavia/amphora-agent.conf"])
    agent_section = conf["amphora_agent"]
    assert agent_section["amphora_id"] == amphora.id
    assert files[agent_section["agent_server_cert"]] == "a server's PEM"
    assert files[agent_section["agent_server_ca"]] == one.client_ca.certificate
    assert conf["haproxy_amphora"]["bind_port"] == str(controller.AGENT_PORT)
    assert conf["health_manager"]["controller_ip_port_list"] == "10.0.2.2:5555"
    assert conf["health_manager"]["heartbeat_key"] == one.heartbeat_key


def test_settings_can_change(one: Controller) -> None:
    """The next settings of the agent have the new interval, and the same key."""
    [amphora] = one.amphorae
    before = one.agent_conf(amphora)
    one.configure(heartbeat_interval=2)
    assert one.agent_conf(amphora) == before.replace(
        "heartbeat_interval = 5", "heartbeat_interval = 2"
    )


@pytest.mark.parametrize(("count", "topology"), [(1, "SINGLE"), (2, "ACTIVE_STANDBY")])
def test_topology(make: Callable[[int], Controller], count: int, topology: str) -> None:
    """A pair is active-standby, and its amphorae share nothing but the VIP."""
    it = make(count)
    assert it.load_balancer.topology == topology
    assert f"loadbalancer_topology = {topology}" in it.agent_conf(it.amphorae[0])
    for column in ("id", "lb_network_ip", "vrrp_ip", "role", "vrrp_priority"):
        assert len({getattr(amphora, column) for amphora in it.amphorae}) == count


def test_vips_are_plugged_by_the_cards_address(one: Controller, agent: Agent) -> None:
    """The agent is told the card by its MAC address, and both VIPs with their networks."""
    one.plug_vip(one.amphorae[0], "fa:16:3e:00:01:01")
    [(vip, card)] = agent.told("plug_vip")
    [more] = card["additional_vips"]
    assert (vip, card["subnet_cidr"]) == (network.VIP, network.SUBNET)
    assert card["mac_address"] == "fa:16:3e:00:01:01"
    assert (more["ip_address"], more["subnet_cidr"]) == (network.VIP_IPV6, network.SUBNET_IPV6)


def test_only_a_pair_speaks_vrrp(make: Callable[[int], Controller], agent: Agent) -> None:
    """Keepalived is configured and started on both amphorae of a pair, and on no other."""
    make(1).start_vrrp()
    assert agent.calls == []
    make(2).start_vrrp()
    configs = [config for (config,) in agent.told("upload_vrrp_config")]
    assert len(configs) == len(agent.told("start_vrrp")) == 2
    assert all(network.VIP in config and network.VIP_IPV6 in config for config in configs)


def test_listener_balances_between_all_members(one: Controller, agent: Agent) -> None:
    """HAProxy's configuration binds both VIPs and has each member as a server, with a check."""
    one.listen("HTTP", 80, "HTTP", check_every=2)
    one.update()
    [(_, config)] = agent.told("upload_config")
    assert f"bind {network.VIP}:80" in config
    assert f"bind {network.VIP_IPV6}:80" in config
    assert all(f" {member}:80 weight 1 check " in config for member in network.MEMBERS)
    assert agent.told("reload_listener")


def test_certificate_is_uploaded_with_its_listener(one: Controller, agent: Agent) -> None:
    """The PEM that was stored reaches the agent, key and all, before the configuration does."""
    pem = one.server_ca.issue("www.example.org")
    one.listen("TERMINATED_HTTPS", 443, "HTTP", tls_certificate_id=one.store(pem))
    one.update()
    names = [name for name, _ in agent.calls]
    uploaded = agent.told("upload_cert_pem")[0][-1].decode()
    assert "".join(pem.split()) == "".join(uploaded.split())
    assert names.index("upload_cert_pem") < names.index("upload_config")


def test_udp_listener_is_lvs(one: Controller, agent: Agent) -> None:
    """A UDP listener is keepalived's, and deleting it is told to the agent at once."""
    one.listen("HTTP", 80, "HTTP")
    listener = one.listen("UDP", 5353, "UDP")
    one.update()
    [(_, config)] = agent.told("upload_udp_config")
    assert f"{network.VIP} 5353" in config
    one.forget(listener)
    assert agent.told("delete_listener") == [(listener.id,)]


def test_forgotten_listener_is_in_no_configuration(one: Controller, agent: Agent) -> None:
    """After a listener is forgotten the next configuration has the others only."""
    one.listen("HTTP", 80, "HTTP")
    listener = one.listen("TCP", 8080, "TCP")
    one.forget(listener)
    one.update()
    [(_, config)] = agent.told("upload_config")
    assert (":80" in config, ":8080" in config) == (True, False)


def test_what_agents_complain_of_is_kept(
    one: Controller, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors that Octavia's code logs are kept for the report and shown nowhere else."""
    logging.getLogger("octavia.amphorae").error("code %s", 500)
    logging.getLogger("octavia.amphorae").warning("retrying")
    assert one.complaints.texts == ["code 500"]
    assert capsys.readouterr().err == ""
