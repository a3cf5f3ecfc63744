"""Moves finished rows from Redis to PostgreSQL, one batch at a time, whichever replica does it; ends calls that nobody ends."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self

from gateway import audit_table, strict_json, tasks
from gateway.database import Database
from gateway.errors import StoreUnavailable
from gateway.limits import DROPPED, PROMPTS, ROWS, Limits
from gateway.store import Store, StoreAway

LOG = logging.getLogger("gateway.audit")
LEASE, LEASE_MS = "nz:audit:writer", 5000
MOST_ROWS, MOST_PROMPTS = 1000, 50
IDLE_S, AWAY_S = 0.25, 1.0
READ_DEADLINE_S = 2.0
REAP_EVERY_S, REAPED_AT_ONCE = 2.0, 100
# After Redis was away, those who live renew their leases before anybody is given up.
OVERDUE_MS, SETTLING_S = 4000, 6.0

Entry = tuple[bytes, dict[bytes, bytes]]


class AuditWriter:
    """`async with AuditWriter(...)`: runs until the block ends; `write` is the direct way, past Redis."""

    def __init__(self, store: Store, limits: Limits, database: Database, *, keep_prompts: timedelta) -> None:
        self._store, self._limits, self._database, self._keep_prompts = store, limits, database, keep_prompts
        self._task: asyncio.Task[None] | None = None
        self._reaped_at = 0.0
        self.written = 0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="audit writer")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        await tasks.end([self._task])

    async def write(self, rows: Sequence[bytes], prompts: Sequence[bytes]) -> None:
        """Raises StoreUnavailable, with nothing written."""
        await self._write(rows, [_read(prompt) for prompt in prompts])

    async def _run(self) -> None:
        while True:
            try:
                moved = await self._work()
            except (StoreAway, StoreUnavailable):
                await asyncio.sleep(AWAY_S)
            except Exception:
                LOG.exception("the audit could not be written, trying again")
                await asyncio.sleep(AWAY_S * 5)
            else:
                await asyncio.sleep(0 if moved >= MOST_ROWS else IDLE_S)

    async def _work(self) -> int:
        if not await self._is_my_turn():
            return 0
        if time.monotonic() - self._reaped_at > REAP_EVERY_S:
            self._reaped_at = time.monotonic()
            await self._reap()
        return await self._move()

    async def _is_my_turn(self) -> bool:
        mine = self._limits.process.encode()
        _, holder = await self._store.pipeline(lambda pipe: pipe.set(LEASE, mine, nx=True, px=LEASE_MS).get(LEASE))
        if holder == mine:
            await self._store.call(lambda redis: redis.pexpire(LEASE, LEASE_MS))
        return bool(holder == mine)

    async def _move(self) -> int:
        rows = await self._oldest(ROWS, MOST_ROWS)
        prompts = await self._oldest(PROMPTS, MOST_PROMPTS)
        if rows or prompts:
            await self._write([fields.get(b"row", b"") for _, fields in rows], _contents(prompts))
            await self._forget(rows, prompts)
        return len(rows)

    async def _oldest(self, stream: str, most: int) -> list[Entry]:
        found: list[Entry] = await self._store.slow_call(lambda redis: redis.xrange(stream, count=most), READ_DEADLINE_S)
        return found

    async def _forget(self, rows: Sequence[Entry], prompts: Sequence[Entry]) -> None:
        for stream, entries in ((ROWS, rows), (PROMPTS, prompts)):
            if entries:
                await self._store.slow_call(_trim(stream, entries[-1][0]), READ_DEADLINE_S)

    async def _write(self, rows: Sequence[bytes], prompts: Sequence[dict[str, Any]]) -> None:
        try:
            self.written += await audit_table.write(self._database, rows, prompts, self._keep_prompts)
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
                taken += await audit_table.write(self._database, some, other, self._keep_prompts) or len(other)
            except StoreUnavailable:
                raise
            except Exception as wrong:  # noqa: BLE001 # told below, where others were taken
                refused.append(type(wrong).__name__)
        if taken and refused:
            LOG.error("%d audit rows are refused by the database and lost: %s", len(refused), ", ".join(sorted(set(refused))))
            await self._store.call(lambda redis: redis.incrby(DROPPED, len(refused)))
        return taken

    async def _reap(self) -> None:
        if not self._limits.is_settled(SETTLING_S):
            return
        for settlement in await self._limits.overdue(OVERDUE_MS, REAPED_AT_ONCE):
            await self._limits.tell(settlement, "reaped")


def _trim(stream: str, last: bytes) -> Callable[[Any], Any]:
    """Away with all entries up to this one: they were the oldest."""
    time, _, number = last.partition(b"-")
    return lambda redis: redis.xtrim(stream, minid=b"%b-%d" % (time, int(number) + 1), approximate=False)


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
