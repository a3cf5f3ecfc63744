"""Rate limits, decided in Redis for all processes; while Redis is unavailable each process enforces its share."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

from gateway.core import background
from gateway.core.errors import LimitReached, LimitsUnavailable, StoreUnavailable
from gateway.limits import lease_renewal, queue
from gateway.limits.admission import (
    Admission,
    CounterUsage,
    Settlement,
    Ticket,
    Verdict,
    WindowUsage,
    limit_error,
    rate_limit_headers,
)
from gateway.limits.estimates import MEAN_OF_UNKNOWN_MODEL, Estimates
from gateway.limits.fallback import WHOLE, FallbackLimiter, Share
from gateway.limits.key_slot import KeySlot
from gateway.limits.lease_renewal import LeaseRenewal
from gateway.limits.queue import Queue
from gateway.limits.quota import CounterSet
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisUnavailable
from gateway.stores.redis_shards import ShardConnections

LUA = Path(__file__).parent / "lua"
# For each shard.
MOST_ROWS, MOST_PROMPTS = 25_000, 500
SEED_WAIT_S = 3.0
# The numbers of the script `admit` for each counter set.
OF_EACH_SET = 9


class Limiter:
    """`async with Limiter(...) as limits:` — `admit` lets a request in or raises LimitReached; `settle` ends it."""

    def __init__(
        self,
        connections: ShardConnections,
        seed: Callable[[CounterSet], Awaitable[None]],
        *,
        share: Callable[[], Share] = lambda: WHOLE,
        most_output: int,
        queue_wait_s: float = 0.0,
        closed_without_redis: bool = False,
    ) -> None:
        self._connections, self._seed, self.share = connections, seed, share
        self._most_output, self._queue_wait_s, self._is_closed = most_output, queue_wait_s, closed_without_redis
        self.local = FallbackLimiter()
        self.estimates, self.leases, self.queue = Estimates(), LeaseRenewal(connections), Queue(connections)
        self._seeding: dict[str, asyncio.Task[None]] = {}
        self.background = self.leases.background

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()
        await background.end(self._seeding.values())

    @property
    def is_usable(self) -> bool:
        """Whether Redis decides, and not this process."""
        return self._connections.is_usable

    @property
    def admitted(self) -> int:
        return len(self.leases.admitted)

    @property
    def waiting(self) -> int:
        return self.queue.length

    async def admit(self, ticket: Ticket) -> Admission:
        """Takes nothing if it raises: LimitReached, LimitsUnavailable or StoreUnavailable."""
        began = time.monotonic()
        admission = await self._admit_or_wait(ticket, began)
        admission.began = time.monotonic()
        admission.queue_s = admission.began - began if self._queue_wait_s else 0.0
        if admission.takes_slot:
            self.leases.admitted[admission.id] = admission
            self.local.enter(admission.counter_sets)
        return admission

    async def _admit_or_wait(self, ticket: Ticket, began: float) -> Admission:
        verdict = await self._decide(ticket, bool(self._queue_wait_s) and self.queue.length < queue.WAITING)
        if isinstance(verdict, LimitReached) and verdict.may_wait:
            until, is_local = began + self._queue_wait_s, verdict.is_local
            verdict = await self.queue.wait(ticket, until, partial(self._decide, ticket), was_local=is_local)
        if isinstance(verdict, LimitReached):
            verdict.waited_s = time.monotonic() - began if self._queue_wait_s else 0.0
            raise verdict
        return verdict

    async def _decide(self, ticket: Ticket, may_wait: bool) -> Verdict:
        try:
            reply = await self._reply(ticket, may_wait, lease_renewal.LEASE_MS)
        except RedisUnavailable:
            return self._decide_locally(ticket, may_wait)
        return self._read(ticket, reply)

    async def preview(self, ticket: Ticket) -> tuple[Verdict, list[CounterUsage]]:
        """What `admit` would decide now, and the usage of each counter set; takes nothing. Raises RedisUnavailable."""
        reply = await self._reply(ticket, may_wait=False, lease_ms=0)
        usages = []
        for start in range(5, 5 + OF_EACH_SET * len(ticket.counter_sets), OF_EACH_SET):
            requests, tokens, _, _, day, month, slots, day_ms, month_ms = reply[start : start + OF_EACH_SET]
            usages.append(CounterUsage(requests, tokens, slots, day, month, day_ms / 1000, month_ms / 1000))
        return self._read(ticket, reply), usages

    async def _reply(self, ticket: Ticket, may_wait: bool, lease_ms: int) -> list[Any]:
        connection = self._connections.for_shard(redis_keys.shard_of(ticket.counter_sets[0].name))
        # The key and each of its rules has its own budget, which may first have to be read from the audit.
        for _ in range(len(ticket.counter_sets) + 1):
            reply: list[Any] = await connection.run("admit", *self._arguments(ticket, may_wait, lease_ms))
            if reply[0] != b"seed":
                return reply
            await self._seed_once(ticket.counter_sets[reply[4] - 1])
        raise StoreUnavailable("The gateway cannot check this key's budget at the moment; try again shortly.")

    def _arguments(self, ticket: Ticket, may_wait: bool, lease_ms: int) -> tuple[list[Any], list[Any]]:
        keys: list[Any] = [*redis_keys.BY_SHARD[redis_keys.shard_of(ticket.counter_sets[0].name)][:3]]
        wait_ms = int(self._queue_wait_s * 1000) if may_wait else 0
        prompt, output = ticket.need.prompt, -1 if ticket.need.output is None else ticket.need.output
        values: list[Any] = [ticket.id, ticket.info, lease_ms, prompt, output, ticket.model, MEAN_OF_UNKNOWN_MODEL]
        first = ticket.counter_sets[0]
        values += [self._most_output, wait_ms, queue.WAITING_PER_KEY, round(self.estimates.slot_s(first) * 1000)]
        values += [round(self.estimates.call_s(first) * 1000), ticket.seconds_ms]
        for counter_set in ticket.counter_sets:
            keys += redis_keys.counters(counter_set.name)
            values += counter_set[1:]
        return keys, values

    def _read(self, ticket: Ticket, reply: list[Any]) -> Verdict:
        usages, counter_sets = [], ticket.counter_sets
        for start, counter_set in enumerate(counter_sets):
            first = 5 + start * OF_EACH_SET
            usage = WindowUsage(*reply[first : first + 4])
            usages.append(usage)
            self.local.note(counter_set, usage, *reply[first + 4 : first + OF_EACH_SET])
        headers = rate_limit_headers(counter_sets, usages)
        if reply[0] == b"ok":
            names = (ticket.id, counter_sets, ticket.model, bool(ticket.info), "admitted", reply[1])
            return Admission(*names, headers=headers, seconds_ms=ticket.seconds_ms)
        limit, exceeded = reply[3].decode(), counter_sets[reply[4] - 1]
        wait_s = None if reply[2] < 0 else max(0.001, reply[2] / 1000)
        return limit_error(limit, exceeded, wait_s, headers, self._tokens_of(ticket), may_wait=reply[0] == b"queued")

    def _tokens_of(self, ticket: Ticket, share: Share = WHOLE) -> int:
        """The tokens to reserve for a request."""
        prompt, output, _ = ticket.need
        if output is None:
            bounds = (
                share.out_of(limit) - prompt
                for counter_set in ticket.counter_sets
                for limit in counter_set.of_tokens
                if limit >= 0
            )
            output = max(0, min((self._most_output, self.estimates.tokens_of(ticket.model), *bounds)))
        return prompt + output if prompt >= 0 else 0

    def _decide_locally(self, ticket: Ticket, may_wait: bool) -> Verdict:
        if self._is_closed:
            raise LimitsUnavailable(retry_after=2.0)
        share = self.share()
        tokens = self._tokens_of(ticket, share) if ticket.need.prompt >= 0 else -1
        refused = self.local.admit(ticket, tokens, share)
        headers = rate_limit_headers(ticket.counter_sets, self.local.usages(ticket.counter_sets))
        if refused is None:
            names = (ticket.id, ticket.counter_sets, ticket.model, bool(ticket.info), "local", max(0, tokens))
            return Admission(*names, headers=headers, seconds_ms=ticket.seconds_ms)
        estimate = self.estimates.slot_s if refused.limit == "concurrent" else self.estimates.call_s
        wait_s = refused.wait_s if refused.wait_s != 0.0 else estimate(refused.counter_set)
        waits = may_wait and refused.limit == "concurrent" and wait_s is not None
        error = limit_error(refused.limit, refused.counter_set, wait_s, headers, max(0, tokens), may_wait=waits)
        error.is_local = True
        return error

    async def _seed_once(self, counter_set: CounterSet) -> None:
        """Counts in Redis again what a budget has spent, from the audit; one query serves all calls that wait for it."""
        task = self._seeding.get(counter_set.name)
        if task is None:
            task = self._seeding[counter_set.name] = asyncio.create_task(self._run_seed(counter_set), name="budget")
            task.add_done_callback(lambda _: self._seeding.pop(counter_set.name, None))
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(task), SEED_WAIT_S)

    async def _run_seed(self, counter_set: CounterSet) -> None:
        with suppress(RedisUnavailable, StoreUnavailable):
            await self._seed(counter_set)

    def settle(self, settlement: Settlement) -> "asyncio.Future[Any]":
        """Ends a request: frees what it held, and sends its tokens and its row to Redis. Raises RedisUnavailable.

        If the future fails, call `resend`: Redis counts a settlement once.
        """
        admission = settlement.admission
        if admission is not None and self.leases.admitted.pop(admission.id, None) is not None:
            self._note_end(admission, settlement)
        return self.resend(settlement)

    def key_slot(self, admission: Admission) -> KeySlot:
        return KeySlot(self._connections, self.local, self.share, self.queue, admission)

    def is_tight(self, admission: Admission) -> bool:
        """Whether the next request may need the slot that this one frees."""
        return any(self.local.slots(counter_set) * 2 >= counter_set.concurrent >= 0 for counter_set in admission.counter_sets)

    def is_flushed(self, key_id: str) -> bool:
        """Whether everything about this key has been written to the connection to Redis."""
        return self._connections.for_shard(redis_keys.shard_of(key_id)).has_written

    def resend(self, settlement: Settlement, how: str = "") -> "asyncio.Future[Any]":
        admission = settlement.admission
        counter_sets: Sequence[CounterSet] = admission.counter_sets if admission else ()
        shard = redis_keys.shard_of(settlement.key_id)
        keys: list[Any] = [*redis_keys.BY_SHARD[shard], redis_keys.once(shard, settlement.id)]
        model = admission.model if admission else ""
        how = how or (admission.how if admission else "admitted")
        # Redis may have admitted this call too, without its answer arriving in time: then it knows what it reserved.
        reserved = admission.reserved if admission and how != "local" else -1
        values: list[Any] = [settlement.id, reserved, settlement.used, settlement.row, settlement.prompt, how]
        values += [model, settlement.completion, MOST_ROWS, MOST_PROMPTS, redis_keys.SLOT_FREED]
        values += [admission.seconds_ms if admission else 0, settlement.used_ms]
        for counter_set in counter_sets:
            keys += redis_keys.counters(counter_set.name)[1:]
            values += [
                int(counter_set.tpm >= 0),
                int(counter_set.has_budget),
                int(counter_set.day_seconds >= 0 or counter_set.month_seconds >= 0),
            ]
        return self._connections.for_shard(shard).run("settle", keys, values)

    def _note_end(self, admission: Admission, settlement: Settlement) -> None:
        if not admission.is_paused:
            self.local.leave(admission.counter_sets)
        if admission.how == "local":
            self.local.settle(settlement)
            for counter_set in admission.counter_sets:
                self.queue.slot_freed(redis_keys.queue(counter_set.name))
        seconds = time.monotonic() - admission.began
        self.estimates.add(admission.counter_sets[0], seconds, admission.model, settlement.completion)
        if admission.seconds_ms and settlement.used_ms:
            self.estimates.add_backend_seconds(admission.counter_sets[0], admission.model, settlement.used_ms / 1000)
