"""Every request's end, told once: the limits learn its cost, the audit gets its row, whatever is away. Looks leave nothing."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self

from gateway.audit import token_usage
from gateway.audit.record import Record
from gateway.core import strict_json
from gateway.core.background import KeptTask
from gateway.core.errors import StoreUnavailable
from gateway.dialects.dialect import Dialect
from gateway.limits.admission import Settlement
from gateway.limits.limiter import Limiter
from gateway.stores.redis_client import RedisUnavailable

LOG = logging.getLogger("gateway.audit")
LOOK_EVERY_S = 0.2
AT_ONCE = 500
# So long Redis may be silent before rows take the direct way.
PATIENCE_S = 1.0
CLOSING_S = 8.0

WriteRows = Callable[[Sequence[bytes], Sequence[bytes]], Any]


class Settler:
    """`async with Settler(...) as settler:` — `finish` never waits, `finish_before_last_bytes` at most 50 ms; neither fails.

    What Redis does not take waits here, at most `size` requests; while Redis is away its rows go to PostgreSQL directly, and
    its tokens and slots are told to Redis when it is back. With both away the oldest are lost, counted and said.
    """

    def __init__(
        self,
        limits: Limiter,
        dialects: Mapping[str, Dialect],
        write: WriteRows,
        *,
        size: int,
        most_output: int,
        cached_weight: int,
    ) -> None:
        self._limits, self._dialects, self._write = limits, dialects, write
        self._size, self._most_output, self._cached_weight = size, most_output, cached_weight
        self._backlog: deque[Settlement] = deque()
        self._unsettled: deque[Settlement] = deque(maxlen=size)
        self._under_way: set[asyncio.Future[Any]] = set()
        self._away_since: float | None = None
        self.dropped = 0
        self._is_dropping = False
        self.background = KeptTask(self._keep_delivering, "books")

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_S):
                await self._deliver_all()
        await self.background.end()
        if self._backlog:
            LOG.error("%d audit rows could be written nowhere and are lost", len(self._backlog))

    @property
    def backlog(self) -> int:
        return len(self._backlog)

    async def finish_before_last_bytes(self, record: Record, coming: int = 0) -> None:
        """As `finish`, before the last `coming` bytes are sent: who has them may ask again at once, of another process.

        Everything is on its way to Redis by then, and there where a slot is scarce.
        """
        if record.is_closed:
            return
        told = self.finish(record, coming)
        if told is not None and record.admission is not None and self._limits.is_tight(record.admission):
            with suppress(RedisUnavailable):
                await asyncio.shield(told)
        elif told is not None and not self._limits.is_flushed(record.key_id):
            # In the next turn of the loop it is written, with what others tell; after the second it has gone.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def finish(self, record: Record, coming: int = 0) -> "asyncio.Future[Any] | None":
        """Once for each request; `coming` bytes of its answer are still to be sent."""
        if record.is_closed:
            return None
        record.is_closed = True
        if record.key is None or record.is_operator_read:
            return None
        record.outcome = record.outcome or "answered"
        record.bytes_out += coming
        settlement = self._settlement(record)
        record.bytes_out -= coming
        try:
            told = self._limits.settle(settlement)
        except RedisUnavailable:
            self._keep(settlement)
            return None
        self._watch(told, settlement)
        return told

    def _settlement(self, record: Record) -> Settlement:
        spent = token_usage.usage_of(record, self._most_output, self._cached_weight)
        record.spent_prompt, record.spent_completion, record.spent_cached = spent.prompt, spent.completion, spent.cached or 0
        row = record.end(*spent)
        is_whole = record.outcome == "answered" and spent.source == "reported" and record.need.output != 0
        completion = spent.completion if is_whole else -1
        return Settlement(record.admission, spent.total, completion, row, self._prompt(record), record.id, record.key_id)

    def _prompt(self, record: Record) -> bytes:
        if record.prompt_log is None or record.key is None:
            return b""
        try:
            told = record.prompt_log.entry(self._dialects[record.dialect].said)
            return strict_json.write_anyhow({"id": record.id, "at": record.at, "key_id": record.key.id, **told})
        except Exception:
            # What it held must come back, whatever it said.
            LOG.exception("the prompt of request %s could not be kept", record.request_id)
            return b""

    def _watch(self, answer: "asyncio.Future[Any]", settlement: Settlement) -> None:
        self._under_way.add(answer)
        answer.add_done_callback(partial(self._told, settlement))

    def _told(self, settlement: Settlement, answer: "asyncio.Future[Any]") -> None:
        self._under_way.discard(answer)
        if answer.cancelled() or answer.exception() is not None:
            self._keep(settlement)

    def _keep(self, settlement: Settlement) -> None:
        if len(self._backlog) >= self._size:
            self._backlog.popleft()
            self.dropped += 1
            if not self._is_dropping:
                self._is_dropping = True
                LOG.error("Redis and PostgreSQL are away and AUDIT_BUFFER_SIZE is reached: the oldest audit rows are dropped")
        self._backlog.append(settlement)

    async def _keep_delivering(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._deliver()
            except Exception:
                LOG.exception("the audit's rows could not be delivered, trying again")

    async def _deliver_all(self) -> None:
        while self._backlog or self._under_way:
            if self._under_way:
                await asyncio.wait(set(self._under_way), timeout=1.0)
            await self._deliver(patience_s=0.0)
            if self._backlog:
                await asyncio.sleep(LOOK_EVERY_S)

    async def _deliver(self, patience_s: float = PATIENCE_S) -> None:
        if self._limits.is_usable:
            self._away_since = None
            self._tell_redis()
            return
        now = time.monotonic()
        self._away_since = self._away_since or now
        if self._backlog and now - self._away_since >= patience_s:
            await self._write_directly()

    def _tell_redis(self) -> None:
        for waiting in (self._unsettled, self._backlog):
            for _ in range(min(AT_ONCE, len(waiting))):
                settlement = waiting.popleft()
                try:
                    self._watch(self._limits.resend(settlement), settlement)
                except RedisUnavailable:
                    waiting.appendleft(settlement)
                    return
        self._say_whether_dropping()

    async def _write_directly(self) -> None:
        some = [self._backlog.popleft() for _ in range(min(AT_ONCE, len(self._backlog)))]
        rows = [settlement.row for settlement in some if settlement.row]
        try:
            await self._write(rows, [settlement.prompt for settlement in some if settlement.prompt])
        except BaseException as wrong:
            self._backlog.extendleft(reversed(some))
            if not isinstance(wrong, StoreUnavailable):
                raise
            return
        for settlement in some:
            settlement.row = settlement.prompt = b""
            if settlement.admission is not None:
                self._unsettled.append(settlement)
        self._say_whether_dropping()

    def _say_whether_dropping(self) -> None:
        if self._is_dropping and len(self._backlog) < self._size:
            self._is_dropping = False
            LOG.warning("%d audit rows have been dropped since the start; none are now", self.dropped)
