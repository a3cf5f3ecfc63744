"""The lines to Redis: one to a server of its own, one to each primary of a cluster; a shard has its line."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from redis.exceptions import RedisClusterException

from gateway.core.background import KeptTask
from gateway.stores import redis_keys
from gateway.stores.redis_client import CONNECT_DEADLINE_S, FAILURES, RedisUnavailable, connect, is_cluster, of_node
from gateway.stores.redis_connection import RedisConnection, Script, Tally

LOG = logging.getLogger("gateway.store")
LOOK_EVERY_S, LOOK_AGAIN_S = 30.0, 0.5

Address = tuple[str, int]


class ShardConnections:
    """`async with ShardConnections(…) as connections:` — `connections.for_shard(shard)` is that to the node with the shard."""

    def __init__(self, url: str, scripts: Mapping[str, Script], on_failure: Callable[[Exception], None]) -> None:
        self._url, self._scripts, self._on_failure = url, scripts, on_failure
        self.tally = Tally()
        self._open: dict[Address | None, RedisConnection] = {}
        self._of_shard: list[RedisConnection] = []
        self._moved = asyncio.Event()
        self._looking = KeptTask(self._keep_looking, "redis cluster")

    async def __aenter__(self) -> Self:
        if not is_cluster(self._url):
            self._of_shard = [await self._line_to(None)] * redis_keys.SHARDS
            return self
        with suppress(*FAILURES):
            await self._look()
        self._looking.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._looking.end()
        for line in self._open.values():
            await line.__aexit__()

    @property
    def background(self) -> list[KeptTask]:
        return [self._looking, *(line.background for line in self._open.values())]

    @property
    def is_usable(self) -> bool:
        return bool(self._of_shard) and all(line.is_usable for line in self._open.values())

    def for_shard(self, shard: int) -> RedisConnection:
        """Raises RedisUnavailable while it is not known which node has the shard."""
        if not self._of_shard:
            raise RedisUnavailable
        return self._of_shard[shard]

    async def _line_to(self, address: Address | None) -> RedisConnection:
        if address not in self._open:
            url = self._url if address is None else of_node(self._url, *address)
            connection = RedisConnection(url, self._scripts, self._on_failure, self._moved.set, self.tally)
            self._open[address] = await connection.__aenter__()
        return self._open[address]

    async def _look(self) -> None:
        """Who holds which shard, as the cluster says it now."""
        client: Any = connect(self._url, deadline_s=CONNECT_DEADLINE_S)
        async with asyncio.timeout(CONNECT_DEADLINE_S * 2), client as cluster:
            nodes = [cluster.get_node_from_key(shared.calls) for shared in redis_keys.BY_SHARD]
        if None in nodes:
            raise RedisClusterException("a part of the names is held by nobody")
        found: list[Address] = [(node.host, int(node.port)) for node in nodes]
        self._of_shard = [await self._line_to(address) for address in found]
        for address in self._open.keys() - set(found):
            await self._open.pop(address).__aexit__()

    async def _keep_looking(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S if self.is_usable else LOOK_AGAIN_S):
                    await self._moved.wait()
            self._moved.clear()
            try:
                await self._look()
            except FAILURES as wrong:
                self._on_failure(wrong)
            await asyncio.sleep(LOOK_AGAIN_S)
