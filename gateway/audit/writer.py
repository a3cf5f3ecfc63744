"""Moves finished rows from Redis to PostgreSQL, one batch at a time, whichever replica does it; ends calls that nobody ends."""

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
REAP_EVERY_S, REAPED_AT_ONCE = 2.0, 100
# After Redis was away, those who live renew their leases before anybody is given up.
OVERDUE_MS, SETTLING_S = 4000, 6.0

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
    """`async with AuditWriter(...)`: runs until the block ends; `write` is the direct way, past Redis."""

    def __init__(
        self, store: RedisClient, limits: Limiter, database: Database, process_id: str, *, keep_prompts: timedelta
    ) -> None:
        self._store, self._limits, self._database, self._keep_prompts = store, limits, database, keep_prompts
        self._process_id = process_id.encode()
        self.background = KeptTask(self._run, "audit writer")
        self._reaped_at = 0.0
        self.written = 0
        # Rows in Redis; None where another process looks after them.
        self.waiting: int | None = None

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()

    async def write(self, rows: Sequence[bytes], prompts: Sequence[bytes]) -> None:
        """Raises StoreUnavailable, with nothing written."""
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
        if not await self._is_my_turn():
            self.waiting = None
            return 0
        if time.monotonic() - self._reaped_at > REAP_EVERY_S:
            self._reaped_at = time.monotonic()
            await self._reap()
        return await self._move()

    async def _is_my_turn(self) -> bool:
        mine = self._process_id
        try:
            _, holder = await self._store.pipeline(
                lambda pipe: pipe.set(redis_keys.AUDIT_WRITER, mine, nx=True, px=LEASE_MS).get(redis_keys.AUDIT_WRITER)
            )
        except RedisUnavailable as away:
            if away.is_full:
                # Moving rows makes room again, and two who move them write none twice.
                return True
            raise
        if holder == mine:
            await self._store.call(lambda redis: redis.pexpire(redis_keys.AUDIT_WRITER, LEASE_MS))
        return bool(holder == mine)

    async def _move(self) -> int:
        """The oldest of every shard; how many rows came from where most did."""
        lengths = await self._lengths()
        self.waiting = sum(lengths[: len(ROWS)])
        streams = [stream for stream, length in zip(STREAMS, lengths, strict=True) if length]
        if not streams:
            return 0
        read = await self._oldest(streams)
        entries = [entry for some in read for entry in some]
        told = [fields[b"row"] for _, fields in entries if b"row" in fields]
        contents = _contents([entry for entry in entries if b"row" not in entry[1]])
        for start in range(0, max(len(told), 1), MOST_ROWS):
            await self._write(told[start : start + MOST_ROWS], contents if start == 0 else [])
        await self._forget(streams, read)
        return max(map(len, read))

    async def _lengths(self) -> list[int]:
        """Of all streams; asked for four times a second, so in one command where one server has them all."""

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
        """Away with all that was read: it was the oldest."""

        def fill(pipe: Any) -> None:
            for stream, entries in zip(streams, read, strict=True):
                if entries:
                    pipe.xtrim(stream, minid=_behind(entries[-1][0]), approximate=False)

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
        """One row that the database does not take must not hold up all others; where it takes none, it is not the rows."""
        taken, refused = 0, []
        for some, other in [*(([row], []) for row in rows), *(([], [prompt]) for prompt in prompts)]:
            try:
                taken += await table.write(self._database, some, other, self._keep_prompts) or len(other)
            except StoreUnavailable:
                raise
            except Exception as wrong:  # noqa: BLE001 # told below, where others were taken
                refused.append(type(wrong).__name__)
        if taken and refused:
            LOG.error("%d audit rows are refused by the database and lost: %s", len(refused), ", ".join(sorted(set(refused))))
            await self._store.call(lambda redis: redis.incrby(redis_keys.BY_SHARD[HOME].dropped, len(refused)))
        return taken

    async def _reap(self) -> None:
        if self._limits.leases.is_settled(SETTLING_S):
            await abandoned.settle_expired(self._limits, OVERDUE_MS, REAPED_AT_ONCE)


def _behind(entry: bytes) -> bytes:
    time, _, number = entry.partition(b"-")
    return b"%b-%d" % (time, int(number) + 1)


def _contents(prompts: Sequence[Entry]) -> list[dict[str, Any]]:
    """Whatever is not ours is passed over: the store may hold anything."""
    found = []
    for _, fields in prompts:
        try:
            found.append(_read(fields[b"prompt"]))
        except (KeyError, ValueError):
            LOG.error("an entry of the prompt log in Redis is none and is left out")
    return found


def _read(text: bytes) -> dict[str, Any]:
    value = strict_json.read_loosely(text)
    if not isinstance(value, dict):
        raise ValueError("not a prompt")
    return value
