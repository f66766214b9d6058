# SPDX-License-Identifier: Apache-2.0
"""The keyrings that come with the package hold the keys that they should, and no other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest

from amphora_image.host import PACKAGED_KEYRINGS

PUBLIC_KEY, SECRET_KEY, SECRET_SUBKEY, USER_ID = 6, 5, 7, 13


def packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and body of each OpenPGP packet (RFC 4880, section 4.2)."""
    while data:
        first = data[0]
        assert first & 0x80, "no packet begins here"
        if first & 0x40:  # the new format
            tag, length, header = first & 0x3F, data[1], 2
            if length >= 192:
                assert length < 224, "a length of more than two bytes"
                length, header = ((length - 192) << 8) + data[2] + 192, 3
        else:
            tag, size = first >> 2 & 0xF, 1 << (first & 3)
            length, header = int.from_bytes(data[1 : 1 + size]), 1 + size
        body = data[header : header + length]
        assert len(body) == length, "a packet is cut off"
        yield tag, body
        data = data[header + length :]


def keys(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield fingerprint (RFC 4880, section 12.2) and user ID of each primary key."""
    fingerprint = ""
    for tag, body in packets(data):
        assert tag not in (SECRET_KEY, SECRET_SUBKEY)
        if tag == PUBLIC_KEY:
            assert body[0] == 4, "no version 4 key"
            hashed = b"\x99" + len(body).to_bytes(2) + body
            fingerprint = hashlib.sha1(hashed, usedforsecurity=False).hexdigest().upper()
        elif tag == USER_ID:
            yield fingerprint, body.decode()


def known() -> dict[str, set[tuple[str, str]]]:
    """Return the keys that fingerprints.txt names, by file."""
    table: dict[str, set[tuple[str, str]]] = {}
    for line in (PACKAGED_KEYRINGS / "fingerprints.txt").read_text().splitlines():
        file, fingerprint, user = line.split(" ", 2)
        table.setdefault(file, set()).add((fingerprint, user))
    return table


@pytest.mark.parametrize("name", [path.name for path in PACKAGED_KEYRINGS.glob("*.gpg")])
def test_keys(name: str) -> None:
    """Each keyring holds exactly the keys that are written down for it."""
    assert set(keys((PACKAGED_KEYRINGS / name).read_bytes())) == known()[name]


def test_all_files_are_there() -> None:
    """No key is written down for a file that has gone."""
    assert set(known()) == {path.name for path in PACKAGED_KEYRINGS.glob("*.gpg")}


def test_a_changed_key_has_another_fingerprint() -> None:
    """One bit of a key is enough to be found out."""
    data = bytearray((PACKAGED_KEYRINGS / "ubuntu-archive-keyring.gpg").read_bytes())
    data[40] ^= 1
    assert set(keys(bytes(data))) != known()["ubuntu-archive-keyring.gpg"]
