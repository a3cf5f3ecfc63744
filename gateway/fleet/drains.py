"""Backends that an operator has drained: they finish their calls and get no new ones, from any process, until undrained."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

from gateway.core.background import KeptTask
from gateway.core.errors import StoreUnavailable
from gateway.fleet.backends.backend import Backend
from gateway.stores import redis_keys
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient, RedisUnavailable

LOG = logging.getLogger("gateway.drains")
READ_EVERY_S = 15.0


async def mark(database: Database, store: RedisClient, backend: str, *, drained: bool, by: str) -> bool:
    """Returns whether all processes are notified; else they read it within fifteen seconds. Raises StoreUnavailable."""
    if drained:
        await database.run("drain_backend", backend, by)
    else:
        await database.run("undrain_backend", backend)
    try:
        await store.call(lambda redis: redis.publish(redis_keys.DRAINS_CHANGED, backend))
    except RedisUnavailable:
        return False
    return True


class Drains:
    """`async with Drains(...)`: keeps each backend's `is_drained` as it is in the database."""

    def __init__(self, database: Database, store: RedisClient, backends: Mapping[str, Backend]) -> None:
        self._database, self._store, self._backends = database, store, backends
        self._changed = asyncio.Event()
        self.background = KeptTask(self._keep_reading, "drains")

    async def __aenter__(self) -> Self:
        await self._read()
        self._store.subscribe({redis_keys.DRAINS_CHANGED: lambda _: self._changed.set()}, after_gap=self._changed.set)
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()

    async def _keep_reading(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_EVERY_S):
                    await self._changed.wait()
            self._changed.clear()
            await self._read()

    async def _read(self) -> None:
        try:
            drained = {row["backend"] for row in await self._database.rows("drained_backends")}
        except StoreUnavailable:
            return
        except Exception:
            # The schema may be older than this table; the start-up log already advises `make migrate`.
            LOG.debug("the drained backends could not be read", exc_info=True)
            return
        for name, backend in self._backends.items():
            if backend.is_drained != (name in drained):
                backend.is_drained = name in drained
                LOG.info("backend %s %s", name, "gets no new requests" if backend.is_drained else "gets requests again")
