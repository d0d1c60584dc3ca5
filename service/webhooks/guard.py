"""Where a webhook may go: hosts that the operator named, at public addresses, checked when it is sent.

The name is resolved once; the connection goes to an address that was checked, with the name in TLS and in `Host`. A
name that points elsewhere a moment later changes nothing. No redirects, no proxies, and nothing of the answer is kept
but its status.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

from service.errors import Unprocessable

NAT64 = IPv6Network("64:ff9b::/96")
MAX_URL = 2000


class Refused(Exception):
    """This delivery must not be sent; says why."""


@dataclass(frozen=True)
class Policy:
    """What the operator allows."""

    hosts: tuple[str, ...]
    """Names; `*.example.org` for all below one, `*` for any."""
    private: bool
    """Private addresses and plain http, for receivers of one's own network."""

    def check_url(self, url: str) -> SplitResult:
        """Raises Unprocessable for what will never be delivered."""
        if not self.hosts:
            raise _invalid("Webhooks are off: PERENNIAL_WEBHOOK_HOSTS names no host.", "webhooks_off")
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise _invalid("'url' is not a URL.") from error
        if parts.scheme != "https" and not (self.private and parts.scheme == "http"):
            raise _invalid("'url' must begin with https://.")
        if not host or parts.username is not None or parts.fragment or not url.isascii() or any(c <= " " for c in url):
            raise _invalid("'url' must name a host, without user, fragment or spaces.")
        if not any(_matches(host, pattern) for pattern in self.hosts):
            raise _invalid(f"Host '{host[:128]}' is not among those that the operator allows.", "host_not_allowed")
        return parts

    def check_address(self, address: str) -> None:
        """Raises Refused for an address that is not the public internet's, however it is written."""
        if not self.private and not _public(ip_address(address)):
            raise Refused(f"{address} is not a public address")

    async def address_of(self, parts: SplitResult) -> str:
        """One address of the host. Raises Refused when any of its addresses is not allowed, or it has none."""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise Refused(f"the host has no address: {error.strerror or error}") from error
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            self.check_address(address)
        return addresses[0]


def _public(address: IPv4Address | IPv6Address) -> bool:
    """Also by what an IPv6 address carries inside."""
    if isinstance(address, IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in NAT64:
            inside = IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return _public(inside)
        if address.scope_id is not None:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _matches(host: str, pattern: str) -> bool:
    if pattern == "*":
        return True
    if pattern.startswith("*."):
        return host.endswith(pattern[1:].lower())
    return host == pattern.lower()


def _invalid(message: str, code: str = "invalid_parameter") -> Unprocessable:
    return Unprocessable(message, code=code, param="url")
