# SPDX-License-Identifier: Apache-2.0
"""The way to what a build downloads: mirrors, package index, Git base, proxies and a private CA.

Each has a flag and a variable, a row of :data:`SETTINGS`. What may hold a password (a proxy, an
index) goes by the environment alone: a flag with one is refused, and whatever is shown of one, in a
plan, a manifest or a log, has stars in its place.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from amphora_image.errors import BadValue, HostError
from amphora_image.sandbox import Mount
from amphora_image.workspace import Workspace

SECRET = "***"  # noqa: S105  # what is shown in its place

#: The name, password or token before the host in a URL (RFC 3986, 3.2.1). Not in that of ssh, where
#: it is a name and no secret.
_USER = re.compile(r"(?<=://)(?<!ssh://)[^/@\s]+(?=@)")

#: The trust stores of the distributions: a file with certificates in PEM form.
STORES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, CentOS, Rocky, RHEL
    "/etc/ssl/ca-bundle.pem",  # SUSE
)

#: Variables by which OpenSSL, curl, git, Python and pip are told of another store.
STORE_VARIABLES = (
    *("SSL_CERT_FILE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "REQUESTS_CA_BUNDLE", "PIP_CERT"),
)


def redacted(text: str) -> str:
    """Return a text with stars for what stands before the host in its URLs."""
    return _USER.sub(SECRET, text)


def passwords(variables: Mapping[str, str]) -> set[str]:
    """Return the passwords in the URLs of variables, as they stand there and decoded."""
    users = (user for value in variables.values() for user in _USER.findall(value))
    found = {user.partition(":")[2] for user in users}
    return {form for password in found if password for form in (password, unquote(password))}


def is_direct(host: str, no_proxy: str) -> bool:
    """Tell whether a host is one of no_proxy: by its name, a domain above it, or ``*``."""
    names = [name.strip().lstrip(".").lower() for name in no_proxy.split(",")]
    return any(name and (name == "*" or f".{host}".endswith(f".{name}")) for name in names)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Where a build downloads from, and through what.

    :ivar mirror: URL of the base OS's archive.
    :ivar security_mirror: URL of Debian's security archive.
    :ivar index: URL of the index of Python packages (PEP 503); may hold a password.
    :ivar git_base: URL in front of ``openstack/octavia``.
    :ivar http_proxy: for http URLs; may hold a password, as ``https_proxy``.
    :ivar no_proxy: hosts that are reached directly, with commas.
    :ivar ca_file: certificates of CAs that are trusted during the build, in PEM form.
    :ivar keep_ca: the image trusts them as well.
    """

    mirror: str | None = None
    security_mirror: str | None = None
    index: str | None = field(default=None, repr=False)
    git_base: str | None = None
    http_proxy: str | None = field(default=None, repr=False)
    https_proxy: str | None = field(default=None, repr=False)
    no_proxy: str | None = None
    ca_file: Path | None = None
    keep_ca: bool = False

    def __post_init__(self) -> None:
        """Hold what concerns more than one value.

        :raises BadValue: they do not fit together.
        """
        if self.keep_ca and not self.ca_file:
            raise BadValue("--keep-ca needs the CA that is to be kept", hint="name it: --ca-file")

    def environment(self) -> dict[str, str]:
        """Return the variables that tell the tools of a build, passwords included."""
        told = {
            "DIB_DISTRIBUTION_MIRROR": self.mirror,
            "DIB_GITREPOBASE": self.git_base,
            # uv installs the agent; pip is what elements of others call.
            **dict.fromkeys(("UV_DEFAULT_INDEX", "PIP_INDEX_URL"), self.index),
            # apt and curl read the small letters, some programs the capitals first.
            **dict.fromkeys(("http_proxy", "HTTP_PROXY"), self.http_proxy),
            **dict.fromkeys(("https_proxy", "HTTPS_PROXY"), self.https_proxy),
            **dict.fromkeys(("no_proxy", "NO_PROXY"), self.no_proxy),
            "AMPHORA_KEEP_CA": str(int(self.keep_ca)) if self.ca_file else None,
        }
        return {name: value for name, value in told.items() if value}

    def urlopen(self, url: str, timeout: float) -> HTTPResponse:
        """Open a URL through the proxies, with trust in the CA.

        :raises OSError: as :func:`urllib.request.urlopen`.
        """
        given = {"http": self.http_proxy, "https": self.https_proxy}
        direct = is_direct(urlsplit(url).hostname or "", self.no_proxy or "")
        proxies = {name: value for name, value in given.items() if value and not direct}
        context = ssl.create_default_context()
        if self.ca_file:
            context.load_verify_locations(self.ca_file)
        opener = build_opener(ProxyHandler(proxies), HTTPSHandler(context=context))
        answer: HTTPResponse = opener.open(url, timeout=timeout)
        return answer


def trust(access: Access, environ: Mapping[str, str], space: Workspace) -> dict[str, str]:
    """Let the programs of a sandbox trust the CA beside all that the build host trusts.

    Each trust store of the host is seen in the sandbox with the CA at its end, so that no program
    has to be told. The host's own files stay as they are.

    :returns: a variable for programs that look for a store elsewhere.
    :raises HostError: the host has no trust store.
    """
    if not access.ca_file:
        return {}
    named = (environ.get(name, "") for name in STORE_VARIABLES)
    stores = list(dict.fromkeys(path for path in (*named, *STORES) if Path(path).is_file()))
    if not stores:
        raise HostError(
            f"this host has no trust store to add --ca-file to: {' or '.join(STORES)}",
            hint="apt-get install ca-certificates",
        )
    for number, store in enumerate(dict.fromkeys(Path(path).resolve() for path in stores)):
        extended = space.root / f"trust-{number}.crt"
        extended.write_bytes(store.read_bytes() + b"\n" + access.ca_file.read_bytes())
        extended.chmod(0o644)  # apt reads it as a user of its own
        space.mounts.append(Mount(str(extended), str(store)))
    return {"SSL_CERT_FILE": stores[0]}


Reader = Callable[[str, str], Any]


@dataclass(frozen=True)
class Setting:
    """A flag and its variables, one value of :class:`Access`.

    :ivar field: of Access.
    :ivar variables: the first that is set counts.
    :ivar read: returns the value that a flag or variable (its name, its text) gives.
    """

    field: str
    flag: str
    metavar: str
    variables: tuple[str, ...]
    read: Reader
    help: str

    def value(self, flags: Mapping[str, str | None], env: Mapping[str, str]) -> Any:
        """Return what was asked for, the flag before its variables; None if nothing was.

        :raises BadValue: it is not allowed.
        """
        if given := flags[self.flag]:
            if _USER.search(given):
                raise BadValue(
                    f"{self.flag} holds a user or password, which every user of this host can see",
                    hint=f"set {self.variables[0]} instead",
                )
            return self.read(self.flag, given)
        name = next((name for name in self.variables if env.get(name)), None)
        return self.read(name, env[name]) if name else None


def url_of(*schemes: str) -> Reader:
    """Return what reads a URL that others will see: without user or password."""

    def read(name: str, value: str) -> str:
        if not re.fullmatch(rf"({'|'.join(schemes)})://[!-~]+", value):
            *most, last = schemes
            allowed = f"{', '.join(most)} and {last}"
            raise BadValue(f"{name} is {redacted(value)!r}; allowed are {allowed} URLs")
        if _USER.search(value):
            raise BadValue(
                f"{name} holds a user or password, which would stay in the image or its manifest",
                hint="let a proxy on this host add it, or allow this host's address",
            )
        return value

    return read


def _git_base(name: str, value: str) -> str:
    read: str = url_of("http", "https", "ssh", "git", "file")(name, value)
    return read.rstrip("/") + "/"  # diskimage-builder puts the rest directly behind it


def _index(name: str, value: str) -> str:
    if not re.fullmatch(r"(https?|file)://[!-~]+", value):
        raise BadValue(f"{name} is {redacted(value)!r}; allowed are http, https and file URLs")
    return value


def _proxy(name: str, value: str) -> str:
    value = value if "://" in value else f"http://{value}"  # as curl(1) reads it
    if not re.fullmatch(r"(https?|socks5h?)://[!-~]*[^/@:]+(:\d+)?/?", value):
        raise BadValue(
            f"{name} is {redacted(value)!r}; allowed is a proxy's URL",
            hint="such as http://proxy.example.org:3128",
        )
    return value


def _hosts(_: str, value: str) -> str:
    return ",".join(value.replace(",", " ").split())


def _certificates(name: str, value: str) -> Path:
    path = Path(value).expanduser().absolute()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # ssl.SSLError is one
        what = error.strerror if error.errno and not isinstance(error, ssl.SSLError) else "no PEM"
        raise BadValue(
            f"{name} is {value!r}: {what}; allowed is a file with certificates in PEM form"
        ) from None
    return path


#: All that can be set. Two fields may have one flag.
SETTINGS: tuple[Setting, ...] = (
    Setting(
        *("mirror", "--mirror", "URL"),
        ("BASE_OS_MIRROR", "DIB_DISTRIBUTION_MIRROR"),
        url_of("http", "https", "file"),
        "mirror of the base OS (default: this host's if it runs the same)",
    ),
    Setting(
        *("security_mirror", "--security-mirror", "URL"),
        ("DIB_DEBIAN_SECURITY_MIRROR",),
        url_of("http", "https", "file"),
        "mirror of the security archive (default: the mirror's URL with -security)",
    ),
    Setting(
        *("index", "--index-url", "URL"),
        ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"),
        _index,
        "index of Python packages (default: uv's)",
    ),
    Setting(
        *("git_base", "--git-base", "URL"),
        ("DIB_GITREPOBASE",),
        _git_base,
        "what stands before openstack/octavia in Git URLs, for -g",
    ),
    Setting(
        *("http_proxy", "--proxy", "URL"),
        ("http_proxy", "HTTP_PROXY"),
        _proxy,
        "proxy of all downloads; one with a password: in the variables https_proxy, http_proxy",
    ),
    Setting(
        *("https_proxy", "--proxy", "URL"),
        ("https_proxy", "HTTPS_PROXY"),
        _proxy,
        "",
    ),
    Setting(
        *("no_proxy", "--no-proxy", "HOSTS"),
        ("no_proxy", "NO_PROXY"),
        _hosts,
        "hosts that are reached without the proxy, with commas",
    ),
    Setting(
        *("ca_file", "--ca-file", "FILE"),
        ("AMPHORA_CA_FILE",),
        _certificates,
        "certificates of CAs (PEM) to trust during the build",
    ),
)
