# SPDX-License-Identifier: Apache-2.0
"""The controller's side of the boot proof: what Octavia injects into an amphora and how it asks.

The certificates, the files and the host name check are those of Octavia's local certificate
generator, its compute tasks and its REST client.
"""

from __future__ import annotations

import configparser
import datetime
import functools
import http.client
import io
import json
import secrets
import socket
import ssl
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

#: The TCP port of the agent's REST API.
AGENT_PORT = 9443
#: The UDP port of the controller's health manager.
HEARTBEAT_PORT = 5555

AGENT_CONF_PATH = "/etc/octavia/amphora-agent.conf"
SERVER_PEM_PATH = "/etc/octavia/certs/server.pem"
CLIENT_CA_PATH = "/etc/octavia/certs/client_ca.pem"
RSYSLOG_CONF_PATH = "/etc/rsyslog.d/10-rsyslog.conf"

#: The user data of every amphora.
USER_DATA = """\
#cloud-config
runcmd:
- systemctl restart rsyslog
timezone: UTC
"""

_LIFETIME = datetime.timedelta(days=1)
_CLOCK_SKEW = datetime.timedelta(hours=1)
_KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)
_CA_USAGES = {"digital_signature", "key_cert_sign", "crl_sign"}
_PEER_USAGES = {"digital_signature", "key_encipherment", "data_encipherment", "key_agreement"}


@dataclass(frozen=True)
class Authority:
    """A throw-away certificate authority: RSA of 2048 bits, SHA-256, valid for a day."""

    certificate: x509.Certificate
    key: rsa.RSAPrivateKey = field(repr=False)

    @classmethod
    def create(cls, name: str) -> Authority:
        """Make an authority that signs itself.

        :param name: common name of its subject.
        """
        key = _new_key()
        builder = _builder(name, key, issuer=_name(name), usages=_CA_USAGES, ca=True)
        return cls(builder.sign(key, hashes.SHA256()), key)

    @property
    def pem(self) -> str:
        """The certificate in PEM."""
        return _certificate_pem(self.certificate)

    def issue(self, name: str) -> str:
        """Make a key and a certificate for one end of a mutual TLS connection.

        Octavia gives the amphora's certificate both usages, server and client; so do we.

        :param name: common name and only DNS name; for an amphora its id.
        :returns: certificate and then private key (PKCS #1, not encrypted), both in PEM.
        """
        key = _new_key()
        issuer_id = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        certificate = (
            _builder(name, key, issuer=self.certificate.subject, usages=_PEER_USAGES, ca=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=True,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id.value),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        key_pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
        return _certificate_pem(certificate) + key_pem.decode()


@dataclass(frozen=True)
class Credentials:
    """Everything one amphora and its controller need to trust each other; all texts are PEM.

    :param amphora_id: UUID; also the subject of the amphora's certificate.
    :param server_ca: signs the amphora's certificate.
    :param server_pem: the amphora's certificate and key.
    :param client_ca: signs the controller's certificate.
    :param client_pem: the controller's certificate and key.
    :param stranger_pem: a certificate and key that the amphora must refuse as a client's: they are
        of the server CA, which must not count as a client CA.
    :param heartbeat_key: the key that signs heartbeats.
    """

    amphora_id: str
    server_ca: str
    server_pem: str = field(repr=False)
    client_ca: str
    client_pem: str = field(repr=False)
    stranger_pem: str = field(repr=False)
    heartbeat_key: str = field(repr=False)

    @classmethod
    def create(cls) -> Credentials:
        """Make new credentials for a new amphora."""
        amphora_id = str(uuid.uuid4())
        server_ca, client_ca = Authority.create("server CA"), Authority.create("client CA")
        return cls(
            amphora_id=amphora_id,
            server_ca=server_ca.pem,
            server_pem=server_ca.issue(amphora_id),
            client_ca=client_ca.pem,
            client_pem=client_ca.issue("controller"),
            stranger_pem=server_ca.issue("stranger"),
            heartbeat_key=secrets.token_hex(32),
        )

    @functools.cached_property
    def server_der(self) -> bytes:
        """The amphora's certificate in DER, to compare with what its agent shows."""
        certificate = x509.load_pem_x509_certificate(self.server_pem.encode())
        return certificate.public_bytes(serialization.Encoding.DER)


@dataclass(frozen=True)
class Answer:
    """What the agent said.

    :param body: the JSON document of the response.
    :param server_der: the certificate it showed, DER.
    """

    body: dict[str, object]
    server_der: bytes


def agent_conf(credentials: Credentials, controller: str) -> str:
    """Write the agent's settings, with the keys and defaults of Octavia 19.

    :param controller: the address to which the amphora sends its heartbeats.
    :returns: an oslo.config file (INI).
    """
    parser = configparser.RawConfigParser()
    parser.read_dict(
        {
            "DEFAULT": {
                "debug": "False",
                "use_syslog": "True",
                "syslog_log_facility": "LOG_LOCAL1",
            },
            "haproxy_amphora": {
                "base_cert_dir": "/var/lib/octavia/certs",
                "base_path": "/var/lib/octavia",
                "bind_host": "::",
                "bind_port": AGENT_PORT,
                "haproxy_cmd": "/usr/sbin/haproxy",
                "user_log_facility": 0,
                "administrative_log_facility": 1,
            },
            "health_manager": {
                "controller_ip_port_list": f"{controller}:{HEARTBEAT_PORT}",
                "heartbeat_interval": 10,
                "heartbeat_key": credentials.heartbeat_key,
            },
            "amphora_agent": {
                "agent_server_ca": CLIENT_CA_PATH,
                "agent_server_cert": SERVER_PEM_PATH,
                "agent_request_read_timeout": 180,
                "amphora_id": credentials.amphora_id,
                "amphora_udp_driver": "keepalived_lvs",
                "agent_tls_protocol": "TLSv1.2",
            },
            "controller_worker": {"loadbalancer_topology": "SINGLE"},
        }
    )
    text = io.StringIO()
    parser.write(text)
    return text.getvalue()


def injected_files(credentials: Credentials, controller: str) -> dict[str, str]:
    """List what Octavia injects into an amphora.

    :param controller: as for :func:`agent_conf`.
    :returns: absolute path in the amphora -> text.
    """
    return {
        SERVER_PEM_PATH: credentials.server_pem,
        CLIENT_CA_PATH: credentials.client_ca,
        AGENT_CONF_PATH: agent_conf(credentials, controller),
        # Octavia sends the file even if it forwards no log, as here.
        RSYSLOG_CONF_PATH: "\n",
    }


def ask(
    port: int,
    path: str,
    credentials: Credentials,
    *,
    client_pem: str | None,
    timeout: float,
) -> Answer:
    """Send one GET to an agent that listens on a port of the loopback interface.

    As in Octavia's REST client the server's certificate must be of the server CA and name the
    amphora's id, whatever its address is.

    :param path: ``/`` or what starts with ``/1.0/``.
    :param client_pem: the client's certificate and key; None sends none.
    :param timeout: seconds for each step on the connection.
    :raises OSError: no connection, no TLS (:class:`ssl.SSLError`) or no answer in time.
    :raises http.client.HTTPException: the answer is not HTTP, or its status is not 200.
    :raises ValueError: the answer is not JSON.
    """
    context = ssl.create_default_context(cadata=credentials.server_ca)
    if client_pem is not None:
        # The ssl module takes a client's key from a file only.
        with tempfile.TemporaryDirectory(prefix="amphora-tls-") as directory:
            pem = Path(directory, "client.pem")
            pem.write_text(client_pem)
            context.load_cert_chain(pem)
    plain = socket.create_connection(("127.0.0.1", port), timeout)
    with context.wrap_socket(plain, server_hostname=credentials.amphora_id) as tls:
        server_der = tls.getpeercert(binary_form=True) or b""
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.sock = tls
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != http.HTTPStatus.OK:
            raise http.client.HTTPException(f"GET {path}: {response.status} {response.reason}")
        return Answer(json.loads(body), server_der)


def refuses(port: int, credentials: Credentials, client_pem: str | None, timeout: float) -> bool:
    """Tell whether the agent ends the connection of a client instead of answering it.

    In TLS 1.3 the refusal comes after the client's handshake, with the first read. A silent agent
    has refused nobody: no connection and no answer in time are errors.

    :param client_pem: as for :func:`ask`.
    :raises OSError: no connection, or no answer in time.
    :raises ssl.SSLCertVerificationError: it is not the amphora that answers.
    """
    try:
        ask(port, "/", credentials, client_pem=client_pem, timeout=timeout)
    except ssl.SSLCertVerificationError:
        raise
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
        return True
    except (http.client.HTTPException, ValueError):
        return False
    return False


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _certificate_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _builder(
    name: str, key: rsa.RSAPrivateKey, *, issuer: x509.Name, usages: set[str], ca: bool
) -> x509.CertificateBuilder:
    """Start a certificate with what an authority's and a peer's have in common (RFC 5280)."""
    now = datetime.datetime.now(datetime.UTC)
    key_usage = x509.KeyUsage(**{usage: usage in usages for usage in _KEY_USAGES})
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(key_usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
