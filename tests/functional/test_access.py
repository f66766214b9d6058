# SPDX-License-Identifier: Apache-2.0
"""A build behind a proxy with a password, from a mirror with a private CA, and nothing else."""

from __future__ import annotations

import os
import ssl
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import mirror
import pytest
from conftest import COMMAND
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from lonely import USER, Proxy, lonely, proxy_of
from tiny import PATIENCE, Scene, make_program
from ubuntu_archive import Archive

from amphora_image import plan

SECRET = USER.partition(":")[2]
NAME = "CA of these tests"
NO_USE = dict.fromkeys(
    (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    ),
    False,
)

#: Asks the mirror from inside the image's tree, by what the environment says.
ASKS = "import urllib.request;print('tree:', urllib.request.urlopen('{url}').status)"


@dataclass(frozen=True)
class Authority:
    """A private CA in a directory: its certificate's file, and a server's TLS settings."""

    file: Path
    context: ssl.SSLContext


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that nobody knows, and a server certificate for 127.0.0.1 of it."""
    directory = tmp_path_factory.mktemp("ca")
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    ca, server = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        for name in (NAME, "127.0.0.1")
    )
    now = datetime.now(UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
    made = [
        x509.CertificateBuilder(ca, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=subject == ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer, critical=False)
        .add_extension(extension, critical=subject == ca)
        .sign(keys[0], hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        for subject, key, extension in (
            (ca, keys[0], x509.KeyUsage(**{**NO_USE, "key_cert_sign": True})),
            (server, keys[1], address),
        )
    ]
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    key = keys[1].private_bytes(*pem, serialization.NoEncryption())
    (directory / "ca.pem").write_bytes(made[0])
    (directory / "server.pem").write_bytes(made[1] + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem")
    return Authority(directory / "ca.pem", context)


@dataclass(frozen=True)
class Built:
    """What a build left: its files, what it said, and what the proxy saw of it."""

    directory: Path
    said: str
    proxy: Proxy
    mirrors: Mapping[str, mirror.Mirror]

    @property
    def tree(self) -> Mapping[str, bytes]:
        """The image's regular files, path -> content."""
        with tarfile.open(self.directory / "lb.tar") as tar:
            files = ((member, tar.extractfile(member)) for member in tar if member.isreg())
            return {member.name.lstrip("./"): file.read() for member, file in files if file}


Build = Callable[..., Built]


@pytest.fixture(scope="module")
def build(
    authority: Authority, ubuntu_archive: Archive, tmp_path_factory: pytest.TempPathFactory
) -> Build:
    """Build a whole Ubuntu amphora where nothing but a proxy answers."""
    cache = tmp_path_factory.mktemp("cache")

    def run(*options: str) -> Built:
        directory = tmp_path_factory.mktemp("built")
        with behind(ubuntu_archive, authority) as (enter, proxy, mirrors):
            hook = directory / "elements/asks/install.d/50-asks"
            url = f"{mirrors['https'].url}/dists/noble/InRelease"
            make_program(hook, f'python3 -c "{ASKS.format(url=url)}"')
            environment = {
                **without_access(),
                "DIB_APT_KEYRING": str(ubuntu_archive.keyring),
                "DIB_LOCAL_ELEMENTS": "asks",
                "DIB_LOCAL_ELEMENTS_PATH": str(hook.parents[2]),
                "http_proxy": proxy.url,
                "https_proxy": proxy.url,
            }
            words = [COMMAND, "-t", "tar", "-o", "lb", "-l", "log", "-c", cache]
            words += ["--mirror", mirrors["https"].url, "--security-mirror", mirrors["http"].url]
            done = subprocess.run(
                [*enter, *words, "--ca-file", authority.file, "-x", *options],
                cwd=directory,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, done.stdout
            return Built(directory, done.stdout, proxy, mirrors)

    return run


@contextmanager
def behind(
    archive: Archive, authority: Authority
) -> Iterator[tuple[tuple[str, ...], Proxy, dict[str, mirror.Mirror]]]:
    """Serve an archive with and without TLS behind a proxy that alone answers."""
    with (
        lonely() as place,
        proxy_of(place) as proxy,
        mirror.serve(archive.root, context=authority.context) as tls,
        mirror.serve(archive.root) as plain,
    ):
        yield place.enter, proxy, {"https": tls, "http": plain}


def without_access() -> dict[str, str]:
    """Return this process's variables without proxies."""
    return {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}


@pytest.fixture(scope="module")
def built(build: Build) -> Built:
    """An amphora that does not keep the CA."""
    return build()


def test_everything_comes_through_the_proxy(built: Built) -> None:
    """Where the proxy alone answers a whole amphora is built: both mirrors, the index, the tree."""
    asked = " ".join(built.proxy.asked)
    tls, plain = (built.mirrors[name] for name in ("https", "http"))
    assert f"CONNECT 127.0.0.1:{tls.port}" in asked
    assert f"GET {plain.url}/dists/noble-security/InRelease" in asked
    hosts = {line.split()[1] for line in built.proxy.asked if line.startswith("CONNECT")}
    assert hosts > {f"127.0.0.1:{tls.port}"}  # and an index of Python packages
    assert any(path.endswith(".deb") for path in tls.asked)
    assert "tree: 200" in (built.directory / "log").read_text()


def test_the_password_is_told_to_nobody(built: Built) -> None:
    """No command line, log, manifest or message holds it, not even where scripts are traced."""
    assert not built.proxy.seen
    texts = {
        path.name: path.read_text()
        for path in built.directory.iterdir()
        if path.suffix != ".tar" and path.is_file()
    }
    texts["said"] = built.said
    assert {"log", "lb.tar.json", "said"} <= texts.keys()
    assert {name for name, text in texts.items() if SECRET in text} == set()
    assert "***@127.0.0.1" in texts["lb.tar.json"]


def test_nothing_of_the_way_stays(built: Built, authority: Authority) -> None:
    """No file of the image holds the proxy, its password, the CA or the path of its file."""
    words = {
        "password": SECRET.encode(),
        "proxy": f"127.0.0.1:{built.proxy.port}".encode(),
        "CA": authority.file.read_bytes().splitlines()[2],
        "CA's file": str(authority.file).encode(),
    }
    tree = built.tree
    assert "etc/ssl/certs/ca-certificates.crt" in tree
    assert not {(w, p) for w, word in words.items() for p, data in tree.items() if word in data}
    assert not [path for path in tree if "amphora-image" in Path(path).name]


def test_the_ca_is_kept_if_that_is_asked_for(
    build: Build, built: Built, authority: Authority
) -> None:
    """With --keep-ca the image's own trust store has the CA, and that is the only difference."""
    kept, plain = build("--keep-ca").tree, built.tree
    store = "etc/ssl/certs/ca-certificates.crt"
    assert authority.file.read_bytes().strip() in kept[store]
    assert kept["usr/local/share/ca-certificates/amphora-image-1.crt"].strip() == (
        authority.file.read_bytes().strip()
    )
    assert kept[store].replace(authority.file.read_bytes(), b"") == plain[store]
    assert set(kept) - set(plain) == {"usr/local/share/ca-certificates/amphora-image-1.crt"}


def test_a_ca_that_is_not_named(
    scene: Scene, ubuntu_archive: Archive, authority: Authority
) -> None:
    """Without --ca-file the mirror's certificate is refused, and the hint names the option."""
    with mirror.serve(ubuntu_archive.root, context=authority.context) as tls:
        build = scene.start(
            "lb",
            *("-i", "ubuntu", "--mirror", tls.url),
            DIB_ELEMENTS="amphora-base amphora-disk amphora-initramfs amphora-manifest",
            DIB_LOCAL_ELEMENTS_PATH=str(plan.ELEMENTS),
            DIB_APT_KEYRING=str(ubuntu_archive.keyring),
            no_proxy="127.0.0.1",
        )
        _, said = build.process.communicate(timeout=2 * PATIENCE)
    assert build.process.returncode == 1
    assert "hint: a TLS certificate is not trusted" in said.replace("\n", " ")
    assert "--ca-file" in said
    assert "Traceback" not in said
