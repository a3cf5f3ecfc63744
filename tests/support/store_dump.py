"""The whole content of a store as one text, to search it for what must not be there."""

import asyncio
from typing import Any

import asyncpg

from tests.conftest import TestStores


def dump_redis(stores: TestStores) -> str:
    with stores.client() as client:
        read: dict[bytes, Any] = {
            b"string": client.get,
            b"hash": client.hgetall,
            b"zset": lambda name: client.zrange(name, 0, -1),
            b"stream": client.xrange,
            # It has expired meanwhile.
            b"none": lambda _: "",
        }
        return "\n".join(f"{name!r} {read[client.type(name)](name)}" for name in client.scan_iter("*"))


def dump_postgres(stores: TestStores) -> str:
    async def run() -> str:
        connection = await asyncpg.connect(stores.database_url)
        try:
            tables = await connection.fetch("SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'")
            rows = [row[0] for table in tables for row in await connection.fetch(f"SELECT t::text FROM {table['name']} t")]
            return "\n".join(rows)
        finally:
            await connection.close()

    return asyncio.run(run())
