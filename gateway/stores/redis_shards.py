"""The connections to Redis by shard: one connection to a single server, one to each primary of a cluster."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Self

from redis.exceptions import RedisClusterException

from gateway.core.background import KeptTask
from gateway.stores import redis_keys
from gateway.stores.redis_client import CONNECT_DEADLINE_S, FAILURES, RedisUnavailable, connect, is_cluster, node_url
from gateway.stores.redis_connection import CallCounts, RedisConnection
from gateway.stores.redis_scripts import Script

LOG = logging.getLogger("gateway.store")
MAP_EVERY_S, RETRY_S = 30.0, 0.5

Address = tuple[str, int]


class ShardConnections:
    """`async with ShardConnections(…) as connections:` — `connections.for_shard(shard)` leads to the node with that shard."""

    def __init__(self, url: str, scripts: Mapping[str, Script], on_failure: Callable[[Exception], None]) -> None:
        self._url, self._scripts, self._on_failure = url, scripts, on_failure
        self.counts = CallCounts()
        self._by_address: dict[Address | None, RedisConnection] = {}
        self._by_shard: list[RedisConnection] = []
        self._moved = asyncio.Event()
        self._mapping = KeptTask(self._keep_mapped, "redis cluster")

    async def __aenter__(self) -> Self:
        if not is_cluster(self._url):
            self._by_shard = [await self._connection_to(None)] * redis_keys.SHARDS
            return self
        with suppress(*FAILURES):
            await self._map_shards()
        self._mapping.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._mapping.end()
        for connection in self._by_address.values():
            await connection.__aexit__()

    @property
    def background(self) -> list[KeptTask]:
        return [self._mapping, *(connection.background for connection in self._by_address.values())]

    @property
    def is_usable(self) -> bool:
        return bool(self._by_shard) and all(connection.is_usable for connection in self._by_address.values())

    def for_shard(self, shard: int) -> RedisConnection:
        """Raises RedisUnavailable while it is not known which node has the shard."""
        if not self._by_shard:
            raise RedisUnavailable
        return self._by_shard[shard]

    async def _connection_to(self, address: Address | None) -> RedisConnection:
        if address not in self._by_address:
            url = self._url if address is None else node_url(self._url, *address)
            connection = RedisConnection(url, self._scripts, self.counts, self._on_failure, self._moved.set)
            self._by_address[address] = await connection.__aenter__()
        return self._by_address[address]

    async def _map_shards(self) -> None:
        """Asks the cluster which node has which shard."""
        client: Any = connect(self._url, deadline_s=CONNECT_DEADLINE_S)
        async with asyncio.timeout(CONNECT_DEADLINE_S * 2), client as cluster:
            nodes = [cluster.get_node_from_key(shard_keys.calls) for shard_keys in redis_keys.BY_SHARD]
        if None in nodes:
            raise RedisClusterException("some shards are on no node")
        addresses: list[Address] = [(node.host, int(node.port)) for node in nodes]
        self._by_shard = [await self._connection_to(address) for address in addresses]
        for address in self._by_address.keys() - set(addresses):
            await self._by_address.pop(address).__aexit__()

    async def _keep_mapped(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(MAP_EVERY_S if self.is_usable else RETRY_S):
                    await self._moved.wait()
            self._moved.clear()
            try:
                await self._map_shards()
            except FAILURES as error:
                self._on_failure(error)
            await asyncio.sleep(RETRY_S)
