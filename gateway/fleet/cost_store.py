"""What calls cost, shared by all processes in Redis and kept there over restarts; without Redis each process uses its own."""

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Self

from gateway.core.background import KeptTask
from gateway.fleet.cost_means import DECAY
from gateway.fleet.costs import MOST_ENTRIES, Costs
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_shards import ShardConnections

EVERY_S = 2.0
# What has not been observed again for so long is deleted.
KEPT_S = 30 * 86_400.0
READ_DEADLINE_S = 2.0
EPOCH = b"epoch"
NOTHING_OBSERVED = b"0 0"

Key = tuple[str, str]


class CostStore:
    """`async with CostStore(connections, costs):` — keeps `costs` as all processes know them until the block ends.

    Observations are added up in one script, so that none of another process is lost. If Redis has lost its data, each process
    writes what it knows again; the first one counts.
    """

    def __init__(self, connections: ShardConnections, costs: Costs) -> None:
        self._connections, self.costs = connections, costs
        self._epoch = b""
        self.background = KeptTask(self._keep_sharing, "costs")

    async def __aenter__(self) -> Self:
        with suppress(RedisUnavailable):
            await self.share()
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()
        with suppress(RedisUnavailable):
            await self.share()

    async def _keep_sharing(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            with suppress(RedisUnavailable):
                await self.share()

    async def share(self) -> None:
        """Adds what was observed here, takes what all have observed. Raises RedisUnavailable; then nothing is lost."""
        taken = [(key, entry, *entry.take_own()) for key, entry in self.costs.entries() if any(entry.own.counts)]
        known = [(key, entry.shared) for key, entry in self.costs.entries() if entry.shared]
        changes = [part for key, entry, _, text in taken for part in (_field(key), entry.shared, text)]
        try:
            before, epoch, found = await self._merge(changes)
        except BaseException:
            for _, entry, own, _ in taken:
                entry.put_back(own)
            raise
        if self._epoch and before != self._epoch:
            lost = [part for key, text in known if key not in found for part in (_field(key), text, NOTHING_OBSERVED)]
            _, epoch, found = await self._merge(lost)
        self._epoch = epoch
        self.costs.replace(found.items())
        await self._delete_old(found)

    async def _merge(self, changes: list[Any]) -> tuple[bytes, bytes, dict[Key, bytes]]:
        """The epoch before and after, and the means of all processes."""
        connection, new_epoch = self._connections.for_shard(redis_keys.HOME), secrets.token_hex(8)
        values = [repr(DECAY), new_epoch, *changes]
        before, epoch, flat = await connection.run("merge_costs", [redis_keys.COSTS], values)
        return before, epoch, dict(_entries_of(dict(zip(flat[::2], flat[1::2], strict=True))))

    async def _delete_old(self, found: dict[Key, bytes]) -> None:
        now = time.time()
        by_age = sorted((_time_of(text), key) for key, text in found.items())
        old = [key for number, (at, key) in enumerate(by_age) if len(by_age) - number > MOST_ENTRIES or now - at > KEPT_S]
        if old:
            await self._connections.for_shard(redis_keys.HOME).send("HDEL", redis_keys.COSTS, *map(_field, old))


async def read(store: RedisClient) -> Costs:
    """What all processes know, for a command. Raises RedisUnavailable."""
    fields = await store.slow_call(lambda redis: redis.hgetall(redis_keys.COSTS), READ_DEADLINE_S)
    costs = Costs()
    costs.replace(_entries_of(fields))
    return costs


def _field(key: Key) -> str:
    """The name of a backend has no blanks."""
    return " ".join(key)


def _entries_of(fields: dict[bytes, bytes]) -> Iterator[tuple[Key, bytes]]:
    for field, text in fields.items():
        backend, blank, model = field.decode(errors="replace").partition(" ")
        if blank and field != EPOCH:
            yield (backend, model), text


def _time_of(text: bytes) -> float:
    """When something was observed last; 0 for what is no text of means."""
    with suppress(ValueError, IndexError):
        return float(text.split(maxsplit=2)[1])
    return 0.0
