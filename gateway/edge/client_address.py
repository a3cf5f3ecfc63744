"""The client's address: the peer's, or the one that trusted proxies report."""

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Self

from starlette.types import Scope

from gateway.core.background import KeptTask

RESOLVE_EVERY_S = 60.0
NOBODY = "local"
# Bounds of the header, which clients write: the proxies in a chain, and the length of an address.
MOST_HOPS, LONGEST_ADDRESS = 32, 64

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class TrustedProxies:
    """`async with TrustedProxies(entries)`: host names among the entries are resolved once a minute."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._networks: list[Network] = []
        self._names: list[str] = []
        for entry in entries:
            try:
                self._networks.append(ip_network(entry, strict=False))
            except ValueError:
                self._names.append(entry)
        self._resolved: frozenset[Address] = frozenset()
        self.background = KeptTask(self._keep_resolving, "proxy names")

    async def __aenter__(self) -> Self:
        if self._names:
            self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()

    async def _keep_resolving(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            found: set[Address] = set()
            for name in self._names:
                with suppress(OSError):
                    answers = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                    found.update(ip_address(str(answer[4][0]).partition("%")[0]) for answer in answers)
            self._resolved = frozenset(found)
            await asyncio.sleep(RESOLVE_EVERY_S)

    def client_of(self, scope: Scope) -> str:
        """The peer; if it is a trusted proxy, the rightmost entry of X-Forwarded-For that is not one."""
        client = scope.get("client")
        if client is None:
            return NOBODY
        entries = _forwarded_for(scope) if self._networks or self._resolved else []
        peer = _address(client[0])
        if not entries or peer is None or not self._trusts(peer):
            return _shown(client[0])
        found = peer
        for text in reversed(entries):
            entry = _address(text) if len(text) <= LONGEST_ADDRESS else None
            if entry is None:
                break
            found = entry
            if not self._trusts(entry):
                break
        return str(found)

    def _trusts(self, address: Address) -> bool:
        return address in self._resolved or any(address in network for network in self._networks)


def _forwarded_for(scope: Scope) -> list[str]:
    lines = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
    if not lines:
        return lines
    hops = ",".join(lines).rsplit(",", MOST_HOPS)[-MOST_HOPS:]
    return [entry for hop in hops if (entry := hop.strip())]


@lru_cache(maxsize=10_000)
def _shown(text: str) -> str:
    """An address in its canonical spelling."""
    return str(_address(text) or NOBODY)


@lru_cache(maxsize=10_000)
def _address(text: str) -> Address | None:
    """Parses an address as proxies write it: with a port or a zone, in brackets, or IPv4 mapped into IPv6."""
    plain = text.partition("]")[0].removeprefix("[") if text.startswith("[") else text
    if plain.count(":") == 1:
        plain = plain.partition(":")[0]
    try:
        parsed = ip_address(plain.partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return mapped or parsed
