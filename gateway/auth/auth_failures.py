"""Wrong keys per client address and minute, counted by all processes together while Redis is available."""

import time
from collections import OrderedDict
from contextlib import AbstractContextManager
from ipaddress import IPv6Address, ip_address

from gateway.auth.active_counts import ActiveCounts
from gateway.core.errors import GatewayError, TooManyFailures, WrongKey
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

WINDOW_S = 60.0
REMEMBERED_ADDRESSES = 10_000
# A provider often assigns a /56 to one customer, who then chooses the other bits.
CUSTOMER_BITS = 128 - 56


class AuthFailures:
    """At most `limit` wrong keys per address in a window of one minute, which begins with the first of them."""

    def __init__(self, store: RedisClient, limit: int) -> None:
        self._store, self._limit = store, limit
        self._counts: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._unverified = ActiveCounts()

    def check(self, address: str) -> None:
        """Raises TooManyFailures if this address has to wait; keys from it that are still being verified count as wrong."""
        group, now = address_group(address), time.monotonic()
        count, ends = self._counts.get(group, (0, 0.0))
        count = count if ends > now else 0
        if count + self._unverified[group] >= self._limit:
            raise TooManyFailures(retry_after=ends - now if count else 1.0)

    def verifying(self, address: str) -> AbstractContextManager[None]:
        """Counts a key from this address as wrong until it is verified."""
        return self._unverified.counting(address_group(address))

    async def record_failure(self, address: str) -> GatewayError:
        """Records one failure and returns the error to raise."""
        group = address_group(address)
        count, ends = self._local_count(group)
        self._counts[group] = (count + 1, ends)
        self._counts.move_to_end(group)
        if len(self._counts) > REMEMBERED_ADDRESSES:
            self._counts.popitem(last=False)
        shared, left_s = await self._count_in_redis(group)
        # Meanwhile more wrong keys from this address may have been counted.
        count, ends = self._local_count(group)
        if shared > count:
            self._counts[group] = (shared, time.monotonic() + left_s)
        return WrongKey()

    def _local_count(self, group: str) -> tuple[int, float]:
        now = time.monotonic()
        count, ends = self._counts.get(group, (0, 0.0))
        return (count, ends) if ends > now else (0, now + WINDOW_S)

    async def _count_in_redis(self, group: str) -> tuple[int, float]:
        name = redis_keys.wrong_keys(group)
        try:
            count, _, left_ms = await self._store.pipeline(
                lambda pipe: pipe.incr(name).expire(name, int(WINDOW_S), nx=True).pttl(name)
            )
        except RedisUnavailable:
            return 0, 0.0
        return int(count), max(0.0, left_ms / 1000)


def address_group(address: str) -> str:
    """The addresses of one IPv6 /56, which one customer may have, count as one."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped) if mapped else str(IPv6Address(int(parsed) >> CUSTOMER_BITS << CUSTOMER_BITS))
    return str(parsed)
