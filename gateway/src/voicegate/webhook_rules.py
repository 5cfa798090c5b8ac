"""Webhooks, the rules: which addresses may be called, how a message is signed. Pure functions.

Signatures are those of Standard Webhooks 1.0, so that receivers can use its ready-made libraries.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new attempt
URL_LENGTH = 2048

SECRET_PREFIX = "whsec_"  # noqa: S105  # the mark of such a secret, not one
SECRET_BYTES = (24, 64)

_HOST = re.compile(r"^[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?$")

# Beside what ipaddress knows as loopback, link-local (most clouds' metadata), multicast and unspecified.
_FORBIDDEN: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",  # "this" host: Linux takes it for loopback
        "240.0.0.0/4",  # reserved, broadcast
        # Metadata services with other addresses: Alibaba, Oracle, Azure; AWS and Google over IPv6.
        "100.100.100.200/32",
        "192.0.0.192/32",
        "168.63.129.16/32",
        "fd00:ec2::254/128",
        "fd20:ce::254/128",
    )
)
# IPv6 networks whose addresses hold an IPv4 one, and at which bit from the right it begins.
_EMBEDDED: tuple[tuple[ipaddress.IPv6Network, int], ...] = tuple(
    (ipaddress.IPv6Network(text), shift)
    for text, shift in (("::/96", 0), ("64:ff9b::/96", 0), ("64:ff9b:1::/48", 0), ("2002::/16", 80))
)


def addresses_in(address: Address) -> list[Address]:
    """The address, and the IPv4 ones that a mapped, translated or tunnelled IPv6 address leads to."""
    found: list[Address] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return [address.ipv4_mapped]
        if address.teredo is not None:
            found += address.teredo
        for network, shift in _EMBEDDED:
            if address in network and int(address) > 1:  # :: and ::1 are themselves
                found.append(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
    return found


def forbidden(address: Address) -> str | None:
    """What kind of address nobody may make this server call; None for one that is fine."""
    for item in addresses_in(address):
        if item.is_loopback:
            return "loopback"
        if item.is_link_local:
            return "link-local"
        if item.is_multicast:
            return "multicast"
        if item.is_unspecified:
            return "unspecified"
        if any(item in network for network in _FORBIDDEN if network.version == item.version):
            return "reserved"
    return None


@dataclass(frozen=True)
class Allowed:
    """Networks and host names that may be called whatever their addresses are."""

    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """From a list with commas or spaces. ValueError names the first entry that is neither."""
        networks: list[Network] = []
        hosts: set[str] = set()
        for entry in text.replace(",", " ").split():
            try:
                networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                host = entry.lower().rstrip(".")
                # Digits and dots alone are a mistyped address.
                if not _HOST.match(host) or host.replace(".", "").isdigit():
                    raise ValueError(f"{entry!r} is neither a network, an address nor a host name") from None
                hosts.add(host)
        return cls(tuple(networks), frozenset(hosts))

    def refusal(self, host: str, address: Address) -> str | None:
        """Why `address`, which `host` stands for, must not be called; None if it may be."""
        if host.lower().rstrip(".") in self.hosts:
            return None
        if any(item in net for item in addresses_in(address) for net in self.networks
               if net.version == item.version):  # fmt: skip
            return None
        kind = forbidden(address)
        return None if kind is None else f"{kind} addresses are not called"


def check_url(url: str) -> None:
    """ValueError says what is wrong with the URL of a webhook, apart from where it leads."""
    if len(url) > URL_LENGTH:
        raise ValueError(f"it is longer than {URL_LENGTH} characters")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("it must be printable ASCII without spaces (encode other characters)")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("it must begin with https:// or http://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("it must hold no user name or password")
    if not parts.hostname:
        raise ValueError("it names no host")
    if parts.port == 0:  # also raises ValueError for a port out of range
        raise ValueError("port 0 cannot be called")


def secrets_from(text: str) -> tuple[bytes, ...]:
    """The keys in a secret file, one a line. ValueError if there is none or a bad one."""
    secrets: list[bytes] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not (entry := line.strip()):
            continue
        try:
            key = base64.b64decode(entry.removeprefix(SECRET_PREFIX), validate=True)
        except binascii.Error:
            key = b""
        low, high = SECRET_BYTES
        if not entry.startswith(SECRET_PREFIX) or not low <= len(key) <= high:
            raise ValueError(
                f"line {number} is not {SECRET_PREFIX} and {low} to {high} bytes in base64;"
                f' make one with: echo "{SECRET_PREFIX}$(openssl rand -base64 32)"'
            )
        secrets.append(key)
    if not secrets:
        raise ValueError(f'it is empty; make a secret with: echo "{SECRET_PREFIX}$(openssl rand -base64 32)"')
    return tuple(secrets)


def signature(secrets: Sequence[bytes], message: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: one for each secret, so that they can be changed without a gap."""
    signed = f"{message}.{timestamp}.".encode() + body
    return " ".join(
        "v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode() for secret in secrets
    )
