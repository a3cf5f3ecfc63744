"""Retention: deletes what has expired, in steps so short that nothing waits for them; the hash chain stays intact."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.core.errors import StoreUnavailable
from gateway.stores.postgres import Connection, Database, Row, advice_for

LOG = logging.getLogger("gateway.retention")
JITTER = random.Random()  # noqa: S311 # not a secret  # nosec B311
MONTHS_AHEAD = 2
FEWEST_ROWS, MOST_ROWS = 20, 1000
# A step locks out the writers of the audit, and takes disk and processor time from everything else.
STEP_S, PAUSE_IN_STEPS, SHORTEST_PAUSE_S = 0.01, 2, 0.002
KEYS_AT_ONCE = 100
BATCHES_AT_ONCE = 2000
DROP_ATTEMPTS, DROP_AGAIN_S = 10, 0.2
STATEMENT_S = 60.0
REPORT_EVERY_S = 2.0
FIRST_AFTER_S, EVERY_S = 60.0, 3600.0
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)
NO_MONTH = (BEGINNING, BEGINNING)
NO_BATCH = 2**63 - 1

Report = Callable[[str], None]
Month = tuple[datetime, datetime]


@dataclass
class Removed:
    """What retention has deleted; nothing if another process is applying it."""

    rows: int = 0
    partitions: list[str] = field(default_factory=list)
    prompts: int = 0
    is_busy_elsewhere: bool = False

    def __bool__(self) -> bool:
        return bool(self.rows or self.partitions or self.prompts)


def quiet(_: str) -> None:
    pass


async def apply(database: Database, keep_audit: timedelta, report: Report = quiet) -> Removed:
    """Deletes all that has expired; `keep_audit` applies to keys without their own retention. Raises StoreUnavailable."""
    async with database.connection() as connection:
        steps = Steps(database, connection, report)
        if not await steps.value("try_retention"):
            return Removed(is_busy_elsewhere=True)
        purge = AuditPurge(steps, keep_audit)
        await purge.make_months_ahead()
        await purge.run()
        removed = Removed(purge.rows, purge.dropped)
        removed.prompts = await steps.repeat("purge_prompts", "expired prompts")
        return removed


async def forget(database: Database, key_id: str, report: Report = quiet) -> int:
    """Deletes the prompts of a key, also those not yet written; returns how many were there. Raises StoreUnavailable."""
    async with database.connection() as connection:
        steps = Steps(database, connection, report)
        # With the lock, every earlier writer has committed, and every later one sees the mark.
        async with steps.audit_lock():
            until = await steps.value("forget_prompts", key_id)
        return await steps.repeat("purge_prompts_of_key", "prompts", key_id, until)


async def run_regularly(
    database: Database, keep_audit: timedelta, *, first_after_s: float = FIRST_AFTER_S, every_s: float = EVERY_S
) -> None:
    """Applies retention regularly until cancelled; of several processes one does the work."""
    was_unavailable = False
    await asyncio.sleep(_about(first_after_s))
    while True:
        try:
            _log(await apply(database, keep_audit))
            was_unavailable = False
        except StoreUnavailable as unavailable:
            if not was_unavailable:
                LOG.warning("retention waits: %s", advice_for(unavailable))
            was_unavailable = True
        except Exception:
            LOG.exception("retention failed, trying again later")
        await asyncio.sleep(_about(every_s))


def _about(seconds: float) -> float:
    return seconds * JITTER.uniform(0.9, 1.1)


def _log(removed: Removed) -> None:
    if removed:
        months = " ".join(removed.partitions) or "none"
        LOG.info("retention: %d audit rows, whole months: %s, %d prompts", removed.rows, months, removed.prompts)


class Steps:
    """Short transactions on one connection, each with as many rows as fit into STEP_S and followed by a pause twice as long."""

    def __init__(self, database: Database, connection: Connection, report: Report) -> None:
        self._sql, self._connection, self._report = database.sql, connection, report
        self._reported_at = time.monotonic()
        self.size = FEWEST_ROWS * 5

    async def rows(self, query: str, *values: object) -> Sequence[Row]:
        return await self._connection.fetch(self._sql(query), *values, timeout=STATEMENT_S)

    async def row(self, query: str, *values: object) -> Row | None:
        return next(iter(await self.rows(query, *values)), None)

    async def value(self, query: str, *values: object) -> Any:
        return await self._connection.fetchval(self._sql(query), *values, timeout=STATEMENT_S)

    @asynccontextmanager
    async def audit_lock(self) -> AsyncIterator[None]:
        """One transaction that locks out the other writers of the audit."""
        async with self._connection.transaction():
            await self.value("lock_audit")
            yield

    @asynccontextmanager
    async def sized(self) -> AsyncIterator[None]:
        """Sets the size of the next step by how long this one takes."""
        began = time.monotonic()
        yield
        factor = STEP_S / (time.monotonic() - began)
        self.size = max(FEWEST_ROWS, min(MOST_ROWS, int(self.size * max(0.5, min(2.0, factor)))))

    @asynccontextmanager
    async def paced(self) -> AsyncIterator[None]:
        began = time.monotonic()
        yield
        await asyncio.sleep(max(PAUSE_IN_STEPS * (time.monotonic() - began), SHORTEST_PAUSE_S))

    async def repeat(self, query: str, what: str, *values: object) -> int:
        """Repeats a query that deletes some rows, until none is left."""
        done, since = 0, BEGINNING
        while True:
            async with self.paced(), self.sized():
                step = await self.row(query, since, self.size, *values)
            assert step is not None
            if not step["rows"]:
                return done
            done, since = done + step["rows"], step["until"]
            self.report(f"{what}: {done} deleted")

    def report(self, words: str, *, always: bool = False) -> None:
        if always or time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self._reported_at = time.monotonic()
            self._report(words)


class AuditPurge:
    """Deletes expired rows of the audit and shortens the hash chain at its beginning.

    A month in which all rows have expired is dropped as a whole, with the beginning of the chain. In other months rows are
    deleted a few at a time, and their hashes stay in the chain.
    """

    def __init__(self, steps: Steps, keep: timedelta) -> None:
        self._steps, self._keep = steps, keep
        self.rows = 0
        self.dropped: list[str] = []

    async def make_months_ahead(self) -> None:
        at = datetime.now(UTC).replace(day=15)
        async with self._steps.audit_lock():
            for _ in range(1 + MONTHS_AHEAD):
                await self._steps.value("make_audit_partition", at)
                at = (at + timedelta(days=30)).replace(day=15)

    async def run(self) -> None:
        for found in await self._steps.rows("audit_months"):
            month = (found["begins"], found["ends"])
            keys = await self._steps.rows("keys_in_month", *month, self._keep)
            if found["is_over"] and all(key["newest"] <= key["until"] for key in keys):
                await self._drop(found["name"], month)
            else:
                await self._sweep(month, [key for key in keys if key["oldest"] <= key["until"]])
        end, _ = await self._end_of_chain_without(NO_MONTH)
        await self._begin_chain_after(end)
        await self._trim()

    async def _sweep(self, month: Month, keys: Sequence[Row]) -> None:
        for first in range(0, len(keys), KEYS_AT_ONCE):
            await self._sweep_some(month, keys[first : first + KEYS_AT_ONCE])

    async def _sweep_some(self, month: Month, keys: Sequence[Row]) -> None:
        purged_to = {key["key_id"]: key["oldest"] for key in keys}
        until = [key["until"] for key in keys]
        while True:
            size = self._steps.size
            of_each = max(FEWEST_ROWS, 2 * size // len(keys))
            places = list(purged_to), list(purged_to.values()), until
            async with self._steps.paced():
                rows = await self._steps.rows("expired_audit_rows", *places, *month, of_each, size)
                await self._purge(month, rows)
            if not rows:
                return
            purged_to |= {row["key_id"]: row["at"] for row in rows}

    async def _purge(self, month: Month, rows: Sequence[Row]) -> None:
        if not rows:
            return
        async with self._steps.sized(), self._steps.audit_lock():
            places = [row["at"] for row in rows], [row["id"] for row in rows]
            self.rows += await self._steps.value("purge_audit_rows", *month, *places)
        self._steps.report(f"audit: {self.rows} rows deleted, now at {rows[-1]['at']:%Y-%m-%d}")

    async def _drop(self, name: str, month: Month) -> None:
        """Deletes the rows after the part of the chain that can be cut off, then drops the month with that part."""
        end, rows = await self._end_of_chain_without(month)
        await self._purge_from(end + 1, month)
        for _ in range(DROP_ATTEMPTS):
            if await self._has_dropped(name, month, end):
                self.dropped.append(name)
                self.rows += rows
                self._steps.report(f"{name}: dropped as a whole", always=True)
                break
            await asyncio.sleep(DROP_AGAIN_S)
        await self._trim()

    async def _purge_from(self, batch: int, month: Month) -> None:
        while True:
            async with self._steps.paced():
                rows = await self._steps.rows("audit_rows_from", *month, batch, self._steps.size)
                await self._purge(month, rows)
            if not rows:
                return
            batch = rows[-1]["batch"]

    async def _has_dropped(self, name: str, month: Month, end: int) -> bool:
        async with self._steps.audit_lock():
            newest = await self._steps.value("newest_batch_of_month", *month)
            if (newest is not None and newest > end) or not await self._steps.value("drop_audit_partition", name):
                return False
            await self._steps.value("move_audit_anchor", end)
            return True

    async def _end_of_chain_without(self, month: Month) -> tuple[int, int]:
        """The batch up to which the chain would be empty without a month, and how many rows of the month are in that part."""
        anchor = await self._steps.row("audit_anchor")
        end, rows = (anchor["batch"] if anchor else 0), 0
        below = await self._steps.value("first_batch_elsewhere", *month, end) or NO_BATCH
        while True:
            async with self._steps.paced():
                found = await self._steps.row("chain_without_loss", end, below, BATCHES_AT_ONCE)
            if found is None or found["batch"] is None:
                return end, rows
            end, rows = found["batch"], rows + found["rows"]

    async def _begin_chain_after(self, batch: int) -> None:
        async with self._steps.audit_lock():
            await self._steps.value("move_audit_anchor", batch)

    async def _trim(self) -> None:
        """Deletes the batches before the beginning of the chain, which nothing reads."""
        while True:
            async with self._steps.paced():
                if not await self._steps.value("trim_audit_chain", self._steps.size):
                    return
