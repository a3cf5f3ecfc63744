"""Moves audit rows from Redis to PostgreSQL in batches, in one process at a time; settles calls whose process has died."""

import asyncio
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Self

from gateway.audit import abandoned, table
from gateway.core import strict_json
from gateway.core.background import KeptTask
from gateway.core.errors import StoreUnavailable
from gateway.limits.limiter import Limiter
from gateway.stores import redis_keys
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_keys import HOME

LOG = logging.getLogger("gateway.audit")
LEASE_MS = 5000
MOST_ROWS, MOST_PROMPTS = 1000, 50
IDLE_S, AWAY_S = 0.25, 1.0
READ_DEADLINE_S = 2.0
SETTLE_EVERY_S, SETTLED_AT_ONCE = 2.0, 100
# When Redis is back, active processes renew their leases before any call counts as abandoned.
EXPIRED_MS, SETTLING_S = 4000, 6.0

ROWS = frozenset(shared.rows for shared in redis_keys.BY_SHARD)
STREAMS = [*(shared.rows for shared in redis_keys.BY_SHARD), *(shared.prompts for shared in redis_keys.BY_SHARD)]
LENGTHS = """
local found = {}
for number, stream in ipairs(KEYS) do
    found[number] = redis.call('XLEN', stream)
end
return found
"""

Entry = tuple[bytes, dict[bytes, bytes]]


class AuditWriter:
    """`async with AuditWriter(...)`: runs until the block ends; `write` writes directly, without Redis."""

    def __init__(
        self, store: RedisClient, limits: Limiter, database: Database, process_id: str, *, keep_prompts: timedelta
    ) -> None:
        self._store, self._limits, self._database, self._keep_prompts = store, limits, database, keep_prompts
        self._process_id = process_id.encode()
        self.background = KeptTask(self._run, "audit writer")
        self._settled_at = 0.0
        self.written = 0
        # Rows in Redis; None while another process moves them.
        self.waiting: int | None = None

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()

    async def write(self, rows: Sequence[bytes], prompts: Sequence[bytes]) -> None:
        """Writes nothing if it raises StoreUnavailable."""
        await self._write(rows, [_read(prompt) for prompt in prompts])

    async def _run(self) -> None:
        while True:
            try:
                moved = await self._work()
            except (RedisUnavailable, StoreUnavailable):
                await asyncio.sleep(AWAY_S)
            except Exception:
                LOG.exception("the audit could not be written, trying again")
                await asyncio.sleep(AWAY_S * 5)
            else:
                await asyncio.sleep(0 if moved >= MOST_ROWS else IDLE_S)

    async def _work(self) -> int:
        if not await self._has_lease():
            self.waiting = None
            return 0
        if time.monotonic() - self._settled_at > SETTLE_EVERY_S:
            self._settled_at = time.monotonic()
            await self._settle_abandoned()
        return await self._move()

    async def _has_lease(self) -> bool:
        name = redis_keys.AUDIT_WRITER
        try:
            _, holder = await self._store.pipeline(
                lambda pipe: pipe.set(name, self._process_id, nx=True, px=LEASE_MS).get(name)
            )
        except RedisUnavailable as unavailable:
            if unavailable.is_full:
                # Moving rows frees memory, and two processes that move the same rows write none twice.
                return True
            raise
        if holder == self._process_id:
            await self._store.call(lambda redis: redis.pexpire(name, LEASE_MS))
        return bool(holder == self._process_id)

    async def _move(self) -> int:
        """Moves the oldest rows of each shard; returns how many the fullest had."""
        lengths = await self._lengths()
        self.waiting = sum(lengths[: len(ROWS)])
        streams = [stream for stream, length in zip(STREAMS, lengths, strict=True) if length]
        if not streams:
            return 0
        read = await self._oldest(streams)
        entries = [entry for some in read for entry in some]
        rows = [fields[b"row"] for _, fields in entries if b"row" in fields]
        contents = _contents([entry for entry in entries if b"row" not in entry[1]])
        for start in range(0, max(len(rows), 1), MOST_ROWS):
            await self._write(rows[start : start + MOST_ROWS], contents if start == 0 else [])
        await self._forget(streams, read)
        return max(map(len, read))

    async def _lengths(self) -> list[int]:
        """The lengths of all streams; read four times a second, so in one command unless Redis is a cluster."""

        def fill(pipe: Any) -> None:
            for stream in STREAMS:
                pipe.xlen(stream)

        if self._store.is_cluster:
            return await self._store.slow_pipeline(fill, READ_DEADLINE_S)
        found: list[int] = await self._store.slow_call(
            lambda redis: redis.eval(LENGTHS, len(STREAMS), *STREAMS), READ_DEADLINE_S
        )
        return found

    async def _oldest(self, streams: Sequence[bytes]) -> list[list[Entry]]:
        def fill(pipe: Any) -> None:
            for stream in streams:
                pipe.xrange(stream, count=MOST_ROWS if stream in ROWS else MOST_PROMPTS)

        return await self._store.slow_pipeline(fill, READ_DEADLINE_S)

    async def _forget(self, streams: Sequence[bytes], read: Sequence[Sequence[Entry]]) -> None:
        """Deletes the entries that were read, the oldest ones."""

        def fill(pipe: Any) -> None:
            for stream, entries in zip(streams, read, strict=True):
                if entries:
                    pipe.xtrim(stream, minid=_id_after(entries[-1][0]), approximate=False)

        if any(read):
            await self._store.slow_pipeline(fill, READ_DEADLINE_S)

    async def _write(self, rows: Sequence[bytes], prompts: Sequence[dict[str, Any]]) -> None:
        try:
            self.written += await table.write(self._database, rows, prompts, self._keep_prompts)
        except StoreUnavailable:
            raise
        except Exception:
            if len(rows) + len(prompts) < 2 or not await self._write_singly(rows, prompts):
                raise

    async def _write_singly(self, rows: Sequence[bytes], prompts: Sequence[dict[str, Any]]) -> int:
        """A row that the database refuses must not hold up the others; if it refuses all, the cause is not the rows."""
        taken, refused = 0, []
        for some, other in [*(([row], []) for row in rows), *(([], [prompt]) for prompt in prompts)]:
            try:
                taken += await table.write(self._database, some, other, self._keep_prompts) or len(other)
            except StoreUnavailable:
                raise
            except Exception as wrong:  # noqa: BLE001 # logged below, if other rows were accepted
                refused.append(type(wrong).__name__)
        if taken and refused:
            LOG.error("%d audit rows are refused by the database and lost: %s", len(refused), ", ".join(sorted(set(refused))))
            await self._store.call(lambda redis: redis.incrby(redis_keys.BY_SHARD[HOME].dropped, len(refused)))
        return taken

    async def _settle_abandoned(self) -> None:
        if self._limits.leases.has_been_usable(SETTLING_S):
            await abandoned.settle_expired(self._limits, EXPIRED_MS, SETTLED_AT_ONCE)


def _id_after(entry: bytes) -> bytes:
    time, _, number = entry.partition(b"-")
    return b"%b-%d" % (time, int(number) + 1)


def _contents(prompts: Sequence[Entry]) -> list[dict[str, Any]]:
    """Skips what is not an entry of the prompt log: Redis may hold anything."""
    found = []
    for _, fields in prompts:
        try:
            found.append(_read(fields[b"prompt"]))
        except (KeyError, ValueError):
            LOG.error("an entry of the prompt log in Redis is malformed and is removed")
    return found


def _read(text: bytes) -> dict[str, Any]:
    value = strict_json.read_loosely(text)
    if not isinstance(value, dict):
        raise ValueError("not an entry of the prompt log")
    return value
