"""Everything that the stores hold, as one text to search for what must not be there."""

import asyncio
from typing import Any

import asyncpg

from tests.conftest import TestStores


def all_of_redis(stores: TestStores) -> str:
    with stores.client() as client:
        look: dict[bytes, Any] = {
            b"string": client.get,
            b"hash": client.hgetall,
            b"zset": lambda name: client.zrange(name, 0, -1),
            b"stream": client.xrange,
        }
        return "\n".join(f"{name!r} {look[client.type(name)](name)}" for name in client.scan_iter("*"))


def all_of_postgresql(stores: TestStores) -> str:
    async def run() -> str:
        connection = await asyncpg.connect(stores.database_url)
        try:
            tables = await connection.fetch("SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'")
            rows = [row[0] for table in tables for row in await connection.fetch(f"SELECT t::text FROM {table['name']} t")]
            return "\n".join(rows)
        finally:
            await connection.close()

    return asyncio.run(run())
