"""Leases of running calls: renewed while their process runs, and expired once it has died."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from gateway.core.background import KeptTask
from gateway.limits.admission import Admission
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisUnavailable
from gateway.stores.redis_shards import ShardConnections

LEASE_MS = 25_000
TICK_S, RENEW_EVERY_S, RENEWED_AT_ONCE = 1.0, 8.0, 500


class ExpiredCall(NamedTuple):
    """A call whose lease has ended; `info` is what its process left of it in Redis."""

    shard: int
    id: str
    info: bytes


class LeaseRenewal:
    """`admitted` are the calls of this process that hold a slot; the limiter adds and removes them."""

    def __init__(self, connections: ShardConnections) -> None:
        self._connections = connections
        self.admitted: dict[str, Admission] = {}
        self._usable_since: float | None = None
        self.background = KeptTask(self._keep_renewing, "limits")

    def has_been_usable(self, seconds: float) -> bool:
        """Whether Redis has been in use for so long that every process has had the time to renew its leases."""
        return self._usable_since is not None and time.monotonic() - self._usable_since > seconds

    async def _keep_renewing(self) -> None:
        renewed_at = 0.0
        while True:
            now = time.monotonic()
            if not self._connections.is_usable:
                self._usable_since = None
            elif self._usable_since is None:
                self._usable_since, renewed_at = now, 0.0
            if now - renewed_at > RENEW_EVERY_S:
                renewed_at = now
                await self.renew()
            await asyncio.sleep(TICK_S)

    async def renew(self) -> None:
        of_shards: dict[int, list[tuple[Admission, bytes]]] = {}
        for admission in list(self.admitted.values()):
            shard = redis_keys.shard_of(admission.counter_sets[0].name)
            slots = [(admission, redis_keys.slots(counter_set.name)) for counter_set in admission.counter_sets]
            of_shards.setdefault(shard, []).extend(slots)
        for shard, slots in of_shards.items():
            with suppress(RedisUnavailable):
                await self._renew_in(shard, slots)

    async def _renew_in(self, shard: int, slots: Sequence[tuple[Admission, bytes]]) -> None:
        for start in range(0, len(slots), RENEWED_AT_ONCE):
            keys: list[Any] = [redis_keys.BY_SHARD[shard].leases]
            values: list[Any] = [LEASE_MS]
            for call, slot in slots[start : start + RENEWED_AT_ONCE]:
                # One that has ended since must not get its lease back, nor one that asks for its slot be without it.
                if call.id in self.admitted and not call.is_resuming:
                    keys.append(slot)
                    values += [call.id, int(call.is_paused)]
            await self._connections.for_shard(shard).run("renew", keys, values)

    async def expired(self, since_ms: int, most: int) -> list[ExpiredCall]:
        """Calls whose lease ended `since_ms` ago, at most `most` of each shard. Raises RedisUnavailable."""
        calls = []
        for shard, shared in enumerate(redis_keys.BY_SHARD):
            found = await self._connections.for_shard(shard).run("expired", [shared.leases, shared.calls], [since_ms, most])
            calls += [ExpiredCall(shard, call.decode(), info) for call, info in zip(found[::2], found[1::2], strict=True)]
        return calls

    async def forget(self, call: ExpiredCall) -> None:
        """Removes a call that cannot be settled. Raises RedisUnavailable."""
        await self._connections.for_shard(call.shard).send("HDEL", redis_keys.BY_SHARD[call.shard].calls, call.id)
