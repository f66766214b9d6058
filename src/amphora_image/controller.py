# SPDX-License-Identifier: Apache-2.0
"""The controller's side of the boot proof: Octavia's own code, and what it needs around it.

The ``octavia`` package makes the certificates, the injected files and the configurations, and talks
to the agent; here are the settings, the load balancer and the objects of a network that it is told.
"""

from __future__ import annotations

import configparser
import datetime
import logging
import secrets
import socket
import ssl
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from amphora_image import network
from amphora_image.boot import AGENT_PORT
from amphora_image.members import PATIENCE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries about each other
    from octavia.amphorae.backends.agent.agent_jinja_cfg import AgentJinjaTemplater
    from octavia.amphorae.backends.health_daemon import status_message as status_message
    from octavia.amphorae.driver_exceptions import exceptions as driver_exceptions
    from octavia.amphorae.drivers.haproxy import exceptions as api_exceptions
    from octavia.amphorae.drivers.haproxy import rest_api_driver
    from octavia.certificates.generator.local import LocalCertGenerator
    from octavia.certificates.manager.local import LocalCertManager
    from octavia.common import config, constants
    from octavia.common.jinja.logging.logging_jinja_cfg import LoggingJinjaTemplater
    from octavia.common.jinja.user_data_jinja_cfg import UserDataJinjaCfg
    from octavia.db import models
    from octavia.network import data_models

#: The UDP port of the controller's health manager.
HEARTBEAT_PORT = 5555
#: Seconds between VRRP advertisements: an emulated master may be late by one.
VRRP_INTERVAL = 2
#: The VIP card's name in the amphora's namespace.
VIP_INTERFACE = constants.NETNS_PRIMARY_INTERFACE

#: What the driver raises when an amphora does not do what it is told.
ERRORS = (driver_exceptions.AmphoraDriverError, api_exceptions.APIException)

_DAY = datetime.timedelta(days=1)
_CA_USAGES = ("digital_signature", "key_cert_sign", "crl_sign")
_OTHER_USAGES = (
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True)
class Authority:
    """A throw-away certificate authority; both texts are PEM.

    :param certificate: RSA of 2048 bits, SHA-256, valid for a day.
    :param key: PKCS #8, not encrypted.
    """

    certificate: str
    key: str = field(repr=False)

    @classmethod
    def create(cls, name: str) -> Authority:
        """Make an authority that signs itself (RFC 5280).

        :param name: common name of its subject.
        """
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        usages = dict.fromkeys(_CA_USAGES, True) | dict.fromkeys(_OTHER_USAGES, False)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usages), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        unencrypted = serialization.NoEncryption()
        return cls(
            certificate.public_bytes(pem).decode(),
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, unencrypted).decode(),
        )

    def issue(self, name: str) -> str:
        """Make a key and a certificate, valid for a day, with Octavia's generator.

        :param name: common name and only DNS name; for an amphora its id.
        :returns: certificate and then private key (PKCS #1, not encrypted), both in PEM.
        """
        issued = LocalCertGenerator.generate_cert_key_pair(
            cn=name,
            validity=_DAY.total_seconds(),
            ca_cert=self.certificate.encode(),
            ca_key=self.key.encode(),
            ca_digest="sha256",
        )
        pem: bytes = issued.certificate + issued.private_key
        return pem.decode()


class Complaints(logging.Handler):
    """The errors that Octavia's code has logged: what an agent said of them is nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.texts.append(record.getMessage())


class Controller:
    """Octavia's controller for one load balancer; its settings are those of the process.

    :param directory: where its files go: ``octavia.conf``, certificates and keys.
    :param address: the controller's address, as the amphorae see it.
    :param count: how many amphorae: 1, or 2 for an active-standby pair.
    """

    def __init__(self, directory: Path, address: str, count: int = 1) -> None:
        self.directory, self.address = directory, address
        self.server_ca, self.client_ca = (
            Authority.create("server CA"),
            Authority.create("client CA"),
        )
        #: PEM of a client that the amphora must refuse: of the server CA, which is no client CA.
        self.stranger_pem = self.server_ca.issue("stranger")
        self.heartbeat_key = secrets.token_hex(32)
        for name, text in (
            ("server_ca.pem", self.server_ca.certificate),
            ("client.pem", self.client_ca.issue("controller")),
        ):
            (directory / name).write_text(text)
        self.configure()
        self.driver = rest_api_driver.HaproxyAmphoraLoadBalancerDriver()
        self.load_balancer = _load_balancer(count)
        self.complaints = Complaints()
        octavia_log = logging.getLogger("octavia")
        octavia_log.handlers, octavia_log.propagate = [self.complaints], False

    def configure(self, heartbeat_interval: int = 5) -> None:
        """Write ``octavia.conf`` and let Octavia's code read it.

        :param heartbeat_interval: seconds.
        """
        parser = configparser.RawConfigParser()
        parser.read_dict(
            {
                "haproxy_amphora": {
                    "client_cert": self.directory / "client.pem",
                    "server_ca": self.directory / "server_ca.pem",
                    "bind_port": AGENT_PORT,
                    # An emulated amphora takes its time to find a card or to start a service; to
                    # ask again what it is still doing would fail.
                    "connection_max_retries": 120,
                    "connection_retry_interval": 1,
                    "rest_request_conn_timeout": 30,
                    "rest_request_read_timeout": 600,
                },
                "health_manager": {
                    "controller_ip_port_list": f"{self.address}:{HEARTBEAT_PORT}",
                    "heartbeat_interval": heartbeat_interval,
                    "heartbeat_key": self.heartbeat_key,
                },
                # A machine that is emulated takes long for keepalived's check of HAProxy.
                "keepalived_vrrp": {"vrrp_check_interval": 30},
                "certificates": {
                    "cert_manager": "local_cert_manager",
                    "storage_path": self.directory,
                },
            }
        )
        path = self.directory / "octavia.conf"
        with path.open("w") as file:
            parser.write(file)
        config.cfg.CONF.clear()
        config.init([], default_config_files=[str(path)], default_config_dirs=[])

    @property
    def amphorae(self) -> Sequence[Any]:
        """The amphorae of the load balancer, as Octavia's database has them."""
        return list(self.load_balancer.amphorae)

    def injected_files(self, amphora: Any, server_pem: str) -> dict[str, str]:
        """List what Octavia injects into an amphora: absolute path there -> text."""
        return {
            "/etc/octavia/certs/server.pem": server_pem,
            "/etc/octavia/certs/client_ca.pem": self.client_ca.certificate,
            "/etc/octavia/amphora-agent.conf": self.agent_conf(amphora),
            "/etc/rsyslog.d/10-rsyslog.conf": LoggingJinjaTemplater().build_logging_config(),
        }

    def agent_conf(self, amphora: Any) -> str:
        """Return the text of the agent's settings, an oslo.config file (INI)."""
        topology = self.load_balancer.topology
        return str(AgentJinjaTemplater().build_agent_config(amphora.id, topology))

    def user_data(self) -> str:
        """Return the user data of every amphora, a cloud-config document."""
        return str(UserDataJinjaCfg().build_user_data_config({}))

    def info(self, amphora: Any) -> dict[str, object]:
        """Ask the agent once what it is.

        :returns: ``hostname``, ``haproxy_version``, ``api_version`` and more.
        :raises AmpConnectionRetry: of Octavia: it does not answer, or not as that amphora.
        """
        once = {
            constants.CONN_MAX_RETRIES: 1,
            constants.CONN_RETRY_INTERVAL: 0,
            constants.REQ_CONN_TIMEOUT: 10,
            constants.REQ_READ_TIMEOUT: 60,
        }
        info = self.driver.get_info(amphora, raise_retry_exception=True, timeout_dict=once)
        return dict(info)

    def certificate_of(self, amphora: Any) -> str:
        """Return the certificate, PEM, that an agent shows to its controller.

        An agent whose TLS is 1.2 shows none to a client that has none itself.

        :raises OSError: it cannot be reached, or is not that amphora for our authority.
        """
        context = ssl.create_default_context(cadata=self.server_ca.certificate)
        context.load_cert_chain(self.directory / "client.pem")
        place = (amphora.lb_network_ip, AGENT_PORT)
        with (
            socket.create_connection(place, timeout=PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=amphora.id) as tls,
        ):
            shown = tls.getpeercert(binary_form=True)
        assert shown  # verified
        return ssl.DER_cert_to_PEM_cert(shown)

    def plug_vip(self, amphora: Any, mac: str) -> None:
        """Tell the agent that a card with the VIPs was plugged in."""
        vips = data_models.Network(mtu=1500)
        port = data_models.Port(id=amphora.vrrp_port_id, mac_address=mac, network=vips)
        subnet = data_models.Subnet(cidr=network.SUBNET, gateway_ip=network.GATEWAY, host_routes=[])
        more = data_models.AdditionalVipData(
            ip_address=network.VIP_IPV6,
            subnet=data_models.Subnet(
                cidr=network.SUBNET_IPV6, gateway_ip=network.GATEWAY_IPV6, host_routes=[]
            ),
        )
        self.driver.post_vip_plug(amphora, self.load_balancer, None, port, subnet, [more])

    def start_vrrp(self) -> None:
        """Let the amphorae of a pair agree on who has the VIPs; a single one has them already."""
        if len(self.amphorae) < 2:
            return
        subnet = {"cidr": network.SUBNET, "gateway_ip": network.GATEWAY}
        subnet_ipv6 = {"cidr": network.SUBNET_IPV6, "gateway_ip": network.GATEWAY_IPV6}
        networks = {
            constants.VIP_SUBNET: subnet,
            "additional_vip_data": [{"ip_address": network.VIP_IPV6, "subnet": subnet_ipv6}],
        }
        for amphora in self.amphorae:
            self.driver.update_vrrp_conf(self.load_balancer, {amphora.id: networks}, amphora)
            self.driver.start_vrrp_service(amphora)

    def listen(
        self,
        protocol: str,
        port: int,
        pool_protocol: str | None,
        *,
        check_every: int | None = None,
        connection_limit: int = constants.DEFAULT_CONNECTION_LIMIT,
        **more: Any,
    ) -> Any:
        """Add a listener, with a pool of all members if it is to have one.

        :param protocol: as in Octavia's API: ``HTTP``, ``TERMINATED_HTTPS`` ...
        :param check_every: seconds between health checks of the members; None: no checks.
        :param connection_limit: connections at a time; -1: as many as Octavia ever allows.
        :param more: columns of Octavia's table of listeners.
        :returns: the listener, as Octavia's database has it.
        """
        pool = self._pool(pool_protocol, check_every) if pool_protocol else None
        return models.Listener(
            **_row(protocol=protocol, protocol_port=port, peer_port=1025, **more),
            load_balancer=self.load_balancer,
            default_pool=pool,
            insert_headers={},
            connection_limit=connection_limit,
        )

    def update(self) -> None:
        """Tell the amphorae of all listeners."""
        self.driver.update(self.load_balancer)

    def haproxy_config(self, version: str) -> str:
        """Render HAProxy's configuration of all listeners, none of them with a certificate.

        :param version: of HAProxy, for instance ``3.0.11-1``.
        """
        text = self.driver.jinja_combo.build_config(
            host_amphora=self.amphorae[0],
            listeners=list(self.load_balancer.listeners),
            tls_certs={},
            haproxy_versions=version.split(".")[:2],
            amp_details={},
        )
        return str(text)

    def forget(self, listener: Any) -> None:
        """Delete a listener; amphorae that still have others are told of it by an update."""
        if listener.protocol in constants.LVS_PROTOCOLS:
            self.driver.delete(listener)
        self.load_balancer.listeners.remove(listener)

    def _pool(self, protocol: str, check_every: int | None) -> Any:
        lvs = protocol in constants.LVS_PROTOCOLS
        members = [
            models.Member(
                **_row(ip_address=ip, protocol_port=80, weight=1, backup=False),
                operating_status=constants.NO_MONITOR,
            )
            for ip in network.MEMBERS
        ]
        monitor = models.HealthMonitor(
            # A dead member refuses at once; a check that takes long shows a busy host.
            **_row(delay=check_every, timeout=60, fall_threshold=3, rise_threshold=2),
            type=constants.HEALTH_MONITOR_UDP_CONNECT if lvs else constants.HEALTH_MONITOR_HTTP,
            http_method="GET",
            url_path="/",
            expected_codes="200",
        )
        return models.Pool(
            **_row(protocol=protocol, tls_enabled=False),
            lb_algorithm=constants.LB_ALGORITHM_ROUND_ROBIN,
            load_balancer=self.load_balancer,
            operating_status=constants.ONLINE,
            members=members,
            health_monitor=monitor if check_every else None,
        )

    def store(self, pem: str) -> str:
        """Keep a certificate and key where Octavia finds it; return its reference."""
        end = pem.index("-----BEGIN RSA")
        return str(LocalCertManager.store_cert(None, pem[:end], pem[end:]))


def _row(**columns: Any) -> dict[str, Any]:
    """Columns that all tables of Octavia have in common, and some more."""
    return {"id": str(uuid.uuid4()), "project_id": "proof", "enabled": True, **columns}


def _load_balancer(count: int) -> Any:
    """A load balancer with an IPv4 and an IPv6 VIP and a number of amphorae."""
    pair = count > 1
    topology = constants.TOPOLOGY_ACTIVE_STANDBY if pair else constants.TOPOLOGY_SINGLE
    load_balancer = models.LoadBalancer(
        **_row(topology=topology),
        vip=models.Vip(ip_address=network.VIP, vnic_type=constants.VNIC_TYPE_NORMAL),
        additional_vips=[models.AdditionalVip(ip_address=network.VIP_IPV6)],
        amphorae=[_amphora(number) for number in range(count)],
    )
    models.VRRPGroup(
        load_balancer=load_balancer,
        vrrp_group_name=load_balancer.id.replace("-", ""),
        vrrp_auth_type=constants.VRRP_AUTH_DEFAULT,
        vrrp_auth_pass=secrets.token_hex(4)[:7],
        advert_int=VRRP_INTERVAL,
    )
    return load_balancer


def _amphora(number: int) -> Any:
    return models.Amphora(
        id=str(uuid.uuid4()),
        status=constants.AMPHORA_ALLOCATED,
        lb_network_ip=f"127.0.0.{number + 1}",
        vrrp_ip=network.VRRP_IPS[number],
        ha_ip=network.VIP,
        vrrp_port_id=str(uuid.uuid4()),
        ha_port_id=str(uuid.uuid4()),
        role=(constants.ROLE_MASTER, constants.ROLE_BACKUP)[number],
        vrrp_interface=VIP_INTERFACE,
        vrrp_id=1,
        vrrp_priority=(constants.ROLE_MASTER_PRIORITY, constants.ROLE_BACKUP_PRIORITY)[number],
    )
