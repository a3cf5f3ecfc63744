"""Wrong keys per client address and minute, counted together by all processes while Redis answers."""

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address

from gateway.core.errors import GatewayError, TooManyFailures, WrongKey
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

WINDOW_S = 60.0
REMEMBERED_ADDRESSES = 10_000
# The bits of an IPv6 address that one customer may choose.
OF_ONE_LINE = 128 - 56


class AuthFailures:
    """At most `limit` wrong keys per address in a minute that begins with the first of them."""

    def __init__(self, store: RedisClient, limit: int) -> None:
        self._store, self._limit = store, limit
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._suspected: Counter[str] = Counter()

    def check(self, address: str) -> None:
        """Raises TooManyFailures where this address has to wait; keys of it still being checked count as wrong."""
        counted, now = counted_as(address), time.monotonic()
        count, ends = self._counts.get(counted, (0, 0.0))
        count = count if ends > now else 0
        if count + self._suspected[counted] >= self._limit:
            raise TooManyFailures(retry_after=ends - now if count else 1.0)

    @contextmanager
    def suspecting(self, address: str) -> Iterator[None]:
        counted = counted_as(address)
        self._suspected[counted] += 1
        try:
            yield
        finally:
            self._suspected[counted] -= 1
            if not self._suspected[counted]:
                del self._suspected[counted]

    async def count(self, address: str) -> GatewayError:
        """Count one failure and return the error to raise."""
        counted = counted_as(address)
        count, ends = self._counted_here(counted)
        self._counts[counted] = (count + 1, ends)
        self._counts.move_to_end(counted)
        if len(self._counts) > REMEMBERED_ADDRESSES:
            self._counts.popitem(last=False)
        shared, left_s = await self._count_shared(counted)
        # Others of this address may have been counted meanwhile.
        count, ends = self._counted_here(counted)
        if shared > count:
            self._counts[counted] = (shared, time.monotonic() + left_s)
        return WrongKey()

    def _counted_here(self, counted: str) -> tuple[int, float]:
        now = time.monotonic()
        count, ends = self._counts.get(counted, (0, 0.0))
        return (count, ends) if ends > now else (0, now + WINDOW_S)

    async def _count_shared(self, counted: str) -> tuple[int, float]:
        name = redis_keys.wrong_keys(counted)
        try:
            count, _, left_ms = await self._store.pipeline(
                lambda pipe: pipe.incr(name).expire(name, int(WINDOW_S), nx=True).pttl(name)
            )
        except RedisUnavailable:
            return 0, 0.0
        return int(count), max(0.0, left_ms / 1000)


def counted_as(address: str) -> str:
    """One line to a home may have an IPv6 /56, that is 256 networks: its addresses count as one."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped) if mapped else str(IPv6Address(int(parsed) >> OF_ONE_LINE << OF_ONE_LINE))
    return str(parsed)
