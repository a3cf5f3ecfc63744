"""Settles each request once: its tokens go to the limits, its row to the audit, even while a store is unavailable."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self

from gateway.audit import backend_seconds, token_usage
from gateway.audit.call_costs import CallCosts
from gateway.audit.record import Record
from gateway.core import strict_json
from gateway.core.background import KeptTask
from gateway.core.errors import StoreUnavailable
from gateway.dialects.dialect import Dialect
from gateway.limits.admission import Settlement
from gateway.limits.limiter import Limiter
from gateway.stores.redis_client import RedisUnavailable

LOG = logging.getLogger("gateway.audit")
DELIVER_EVERY_S = 0.2
BATCH_SIZE = 500
# How long Redis may be unavailable before rows are written to PostgreSQL directly.
DIRECT_AFTER_S = 1.0
CLOSING_S = 8.0

WriteRows = Callable[[Sequence[bytes], Sequence[bytes]], Any]


class Settler:
    """`async with Settler(...) as settler:` — `finish` never waits, `finish_before_last_bytes` at most 50 ms; neither fails.

    What Redis does not accept waits here, at most `size` requests. While Redis is unavailable, rows are written to PostgreSQL
    directly; tokens and slots go to Redis when it is back. While both are unavailable the oldest are dropped, counted and
    logged.
    """

    def __init__(
        self,
        limits: Limiter,
        dialects: Mapping[str, Dialect],
        write: WriteRows,
        call_costs: CallCosts,
        *,
        size: int,
        most_output: int,
        cached_weight: int,
    ) -> None:
        self._limits, self._dialects, self._write, self._call_costs = limits, dialects, write, call_costs
        self._size, self._most_output, self._cached_weight = size, most_output, cached_weight
        self._backlog: deque[Settlement] = deque()
        self._unsettled: deque[Settlement] = deque(maxlen=size)
        self._deliveries: set[asyncio.Future[Any]] = set()
        self._away_since: float | None = None
        self.dropped = 0
        self._is_dropping = False
        self.background = KeptTask(self._keep_delivering, "settlements")

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSING_S):
                await self._deliver_all()
        await self.background.end()
        if self._backlog:
            LOG.error("%d audit rows could not be written and are lost", len(self._backlog))

    @property
    def backlog(self) -> int:
        return len(self._backlog)

    async def finish_before_last_bytes(self, record: Record, coming: int = 0) -> None:
        """As `finish`, before the last `coming` bytes are sent: then the caller may send its next request to another process.

        By then the settlement is written to the connection to Redis; if slots are scarce, Redis has confirmed it.
        """
        if record.is_closed:
            return
        delivery = self.finish(record, coming)
        if delivery is not None and record.admission is not None and self._limits.is_tight(record.admission):
            with suppress(RedisUnavailable):
                await asyncio.shield(delivery)
        elif delivery is not None and not self._limits.is_flushed(record.key_id):
            # In the next turn of the loop it is written, together with other commands; after the second it has been sent.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    def finish(self, record: Record, coming: int = 0) -> "asyncio.Future[Any] | None":
        """Settles a request, once; `coming` bytes of its answer are still to be sent. Returns the delivery to Redis."""
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
            delivery = self._limits.settle(settlement)
        except RedisUnavailable:
            self._keep(settlement)
            return None
        self._watch(delivery, settlement)
        return delivery

    def _settlement(self, record: Record) -> Settlement:
        spent = token_usage.usage_of(record, self._most_output, self._cached_weight)
        record.spent_prompt, record.spent_completion, record.spent_cached = spent.prompt, spent.completion, spent.cached or 0
        record.end_slot()
        self._call_costs.note(record, spent)
        record.backend_s, record.seconds_from = backend_seconds.seconds_of(record)
        record.loaded = backend_seconds.has_loaded(record)
        row = record.end(*spent)
        is_whole = record.outcome == "answered" and spent.source == "reported" and record.need.output != 0
        completion = spent.completion if is_whole else -1
        kept = (row, self._prompt(record), record.id, record.key_id)
        used_ms = round(record.row()["backend_ms"] or 0)
        return Settlement(record.admission, spent.total, completion, *kept, used_ms)

    def _prompt(self, record: Record) -> bytes:
        if record.prompt_log is None or record.key is None:
            return b""
        try:
            entry = record.prompt_log.entry(self._dialects[record.dialect].answer_text)
            return strict_json.write_with_replacements({"id": record.id, "at": record.at, "key_id": record.key.id, **entry})
        except Exception:
            # The settlement must continue: it frees what the request held.
            LOG.exception("the prompt of request %s could not be kept", record.request_id)
            return b""

    def _watch(self, delivery: "asyncio.Future[Any]", settlement: Settlement) -> None:
        self._deliveries.add(delivery)
        delivery.add_done_callback(partial(self._on_delivery_end, settlement))

    def _on_delivery_end(self, settlement: Settlement, delivery: "asyncio.Future[Any]") -> None:
        self._deliveries.discard(delivery)
        if delivery.cancelled() or delivery.exception() is not None:
            self._keep(settlement)

    def _keep(self, settlement: Settlement) -> None:
        if len(self._backlog) >= self._size:
            self._backlog.popleft()
            self.dropped += 1
            if not self._is_dropping:
                self._is_dropping = True
                LOG.error(
                    "Redis and PostgreSQL are unreachable and AUDIT_BUFFER_SIZE is reached: dropping the oldest audit rows"
                )
        self._backlog.append(settlement)

    async def _keep_delivering(self) -> None:
        while True:
            await asyncio.sleep(DELIVER_EVERY_S)
            try:
                await self._deliver()
            except Exception:
                LOG.exception("audit rows could not be delivered, trying again")

    async def _deliver_all(self) -> None:
        while self._backlog or self._deliveries:
            if self._deliveries:
                await asyncio.wait(set(self._deliveries), timeout=1.0)
            await self._deliver(direct_after_s=0.0)
            if self._backlog:
                await asyncio.sleep(DELIVER_EVERY_S)

    async def _deliver(self, direct_after_s: float = DIRECT_AFTER_S) -> None:
        if self._limits.is_usable:
            self._away_since = None
            self._deliver_to_redis()
            return
        now = time.monotonic()
        self._away_since = self._away_since or now
        if self._backlog and now - self._away_since >= direct_after_s:
            await self._write_directly()

    def _deliver_to_redis(self) -> None:
        for waiting in (self._unsettled, self._backlog):
            for _ in range(min(BATCH_SIZE, len(waiting))):
                settlement = waiting.popleft()
                try:
                    self._watch(self._limits.resend(settlement), settlement)
                except RedisUnavailable:
                    waiting.appendleft(settlement)
                    return
        self._log_end_of_dropping()

    async def _write_directly(self) -> None:
        some = [self._backlog.popleft() for _ in range(min(BATCH_SIZE, len(self._backlog)))]
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
        self._log_end_of_dropping()

    def _log_end_of_dropping(self) -> None:
        if self._is_dropping and len(self._backlog) < self._size:
            self._is_dropping = False
            LOG.warning("%d audit rows have been dropped since the start; no more are dropped now", self.dropped)
