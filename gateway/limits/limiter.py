"""May a request pass, now, and what did it really cost: decided in Redis for all processes, without it by shares."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

from gateway.core import background
from gateway.core.errors import LimitReached, LimitsUnavailable, StoreUnavailable
from gateway.limits import leases, queue
from gateway.limits.admission import Admission, CounterUsage, Settlement, Ticket, Verdict, WindowUsage, headers, refusal
from gateway.limits.estimates import MEAN_OF_UNKNOWN_MODEL, Estimates
from gateway.limits.fallback import WHOLE, FallbackLimiter, Share
from gateway.limits.leases import Leases
from gateway.limits.queue import Queue
from gateway.limits.quota import CounterSet
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisUnavailable
from gateway.stores.redis_shards import ShardConnections

LUA = Path(__file__).parent / "lua"
# Of one shard.
MOST_ROWS, MOST_PROMPTS = 25_000, 500
SEED_WAIT_S = 3.0


class Limiter:
    """`async with Limits(...) as limits:` — `admit` lets a request in or raises LimitReached; `settle` ends it."""

    def __init__(
        self,
        lines: ShardConnections,
        seed: Callable[[CounterSet], Awaitable[None]],
        *,
        share: Callable[[], Share] = lambda: WHOLE,
        most_output: int,
        queue_wait_s: float = 0.0,
        closed_without_redis: bool = False,
    ) -> None:
        self._lines, self._seed, self.share = lines, seed, share
        self._most_output, self._queue_wait_s, self._closed = most_output, queue_wait_s, closed_without_redis
        self.local = FallbackLimiter()
        self.estimates, self.leases, self.queue = Estimates(), Leases(lines), Queue(lines)
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
        """Whether Redis decides; else this process does."""
        return self._lines.is_usable

    @property
    def running(self) -> int:
        return len(self.leases.running)

    @property
    def waiting(self) -> int:
        return self.queue.length

    async def admit(self, ticket: Ticket) -> Admission:
        """Raises LimitReached, LimitsUnavailable or StoreUnavailable; then nothing was taken."""
        began = time.monotonic()
        admission = await self._admit_or_wait(ticket, began)
        admission.began = time.monotonic()
        admission.queue_s = admission.began - began if self._queue_wait_s else 0.0
        if admission.takes_slot:
            self.leases.running[admission.id] = admission
            self.local.enter(admission.scopes)
        return admission

    async def _admit_or_wait(self, ticket: Ticket, began: float) -> Admission:
        verdict = await self._ask(ticket, bool(self._queue_wait_s) and self.queue.length < queue.WAITING)
        if isinstance(verdict, LimitReached) and verdict.may_wait:
            verdict = await self.queue.wait(ticket, began + self._queue_wait_s, partial(self._ask, ticket))
        if isinstance(verdict, LimitReached):
            verdict.waited_s = time.monotonic() - began if self._queue_wait_s else 0.0
            raise verdict
        return verdict

    async def _ask(self, ticket: Ticket, may_wait: bool) -> Verdict:
        try:
            reply = await self._reply(ticket, may_wait, leases.LEASE_MS)
        except RedisUnavailable:
            return self._ask_ourselves(ticket, may_wait)
        return self._read(ticket, reply)

    async def preview(self, ticket: Ticket) -> tuple[Verdict, list[CounterUsage]]:
        """As `admit` would decide now, and what is used of each scope; takes nothing. Raises StoreAway."""
        reply = await self._reply(ticket, may_wait=False, lease_ms=0)
        used = []
        for start in range(5, 5 + 7 * len(ticket.scopes), 7):
            requests, tokens, _, _, day, month, slots = reply[start : start + 7]
            used.append(CounterUsage(requests, tokens, slots, day, month))
        return self._read(ticket, reply), used

    async def _reply(self, ticket: Ticket, may_wait: bool, lease_ms: int) -> list[Any]:
        line = self._lines.for_shard(redis_keys.shard_of(ticket.scopes[0].name))
        # The key and each of its rules has a budget of its own, that may have to be read first.
        for _ in range(len(ticket.scopes) + 1):
            reply: list[Any] = await line.run("admit", *self._question(ticket, may_wait, lease_ms))
            if reply[0] != b"seed":
                return reply
            await self._seeded(ticket.scopes[reply[4] - 1])
        raise StoreUnavailable("The gateway cannot check this key's budget at the moment; try again shortly.")

    def _question(self, ticket: Ticket, may_wait: bool, lease_ms: int) -> tuple[list[Any], list[Any]]:
        keys: list[Any] = [*redis_keys.BY_SHARD[redis_keys.shard_of(ticket.scopes[0].name)][:3]]
        wait_ms = int(self._queue_wait_s * 1000) if may_wait else 0
        prompt, output = ticket.need.prompt, -1 if ticket.need.output is None else ticket.need.output
        values: list[Any] = [ticket.id, ticket.info, lease_ms, prompt, output, ticket.model, MEAN_OF_UNKNOWN_MODEL]
        first = ticket.scopes[0]
        values += [self._most_output, wait_ms, queue.WAITING_PER_KEY, round(self.estimates.slot_s(first) * 1000)]
        values.append(round(self.estimates.call_s(first) * 1000))
        for scope in ticket.scopes:
            keys += redis_keys.counters(scope.name)
            values += scope[1:]
        return keys, values

    def _read(self, ticket: Ticket, reply: list[Any]) -> Verdict:
        usages = []
        for start, scope in enumerate(ticket.scopes):
            first = 5 + start * 7
            usage = WindowUsage(*reply[first : first + 4])
            usages.append(usage)
            self.local.note(scope, usage, reply[first + 4], reply[first + 5], reply[first + 6])
        told = headers(ticket.scopes, usages)
        if reply[0] == b"ok":
            return Admission(ticket.id, ticket.scopes, ticket.model, bool(ticket.info), "admitted", reply[1], headers=told)
        scope = ticket.scopes[reply[4] - 1]
        wait_s = None if reply[2] < 0 else max(0.001, reply[2] / 1000)
        return refusal(reply[3].decode(), scope, wait_s, told, self._asked(ticket), may_wait=reply[0] == b"queued")

    def _asked(self, ticket: Ticket, share: Share = WHOLE) -> int:
        prompt, output, _ = ticket.need
        if output is None:
            rooms = (share.out_of(limit) - prompt for scope in ticket.scopes for limit in scope.of_tokens if limit >= 0)
            output = max(0, min((self._most_output, self.estimates.tokens_of(ticket.model), *rooms)))
        return prompt + output if prompt >= 0 else 0

    def _ask_ourselves(self, ticket: Ticket, may_wait: bool) -> Verdict:
        if self._closed:
            raise LimitsUnavailable(retry_after=2.0)
        share = self.share()
        tokens = self._asked(ticket, share) if ticket.need.prompt >= 0 else -1
        takes_slot = bool(ticket.info)
        refused = self.local.admit(ticket.scopes, tokens, share, takes_slot=takes_slot)
        told = headers(ticket.scopes, self.local.usages(ticket.scopes))
        if refused is None:
            return Admission(ticket.id, ticket.scopes, ticket.model, takes_slot, "alone", max(0, tokens), headers=told)
        likely_s = (
            self.estimates.slot_s(refused.scope) if refused.limit == "concurrent" else self.estimates.call_s(refused.scope)
        )
        wait_s = refused.wait_s if refused.wait_s != 0.0 else likely_s
        waits = may_wait and refused.limit == "concurrent" and wait_s is not None
        error = refusal(refused.limit, refused.scope, wait_s, told, max(0, tokens), may_wait=waits)
        error.is_alone = True
        return error

    async def _seeded(self, scope: CounterSet) -> None:
        """A budget's counters after Redis has lost them: the audit knows what was spent. Asked once for all who wait."""
        task = self._seeding.get(scope.name)
        if task is None:
            task = self._seeding[scope.name] = asyncio.create_task(self._run_seed(scope), name="budget")
            task.add_done_callback(lambda _: self._seeding.pop(scope.name, None))
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(task), SEED_WAIT_S)

    async def _run_seed(self, scope: CounterSet) -> None:
        with suppress(RedisUnavailable, StoreUnavailable):
            await self._seed(scope)

    def settle(self, settlement: Settlement) -> "asyncio.Future[Any]":
        """Ends a request; what it held is free and its row is on its way when this returns. Raises StoreAway.

        Without an answer in the end it may be said again: it counts once.
        """
        admission = settlement.admission
        if admission is not None and self.leases.running.pop(admission.id, None) is not None:
            self._note_end(admission, settlement)
        return self.resend(settlement)

    def is_tight(self, admission: Admission) -> bool:
        """Whether the next request may need the very slot that this one gives back."""
        return any(self.local.slots(scope) * 2 >= scope.concurrent >= 0 for scope in admission.scopes)

    def is_flushed(self, key_id: str) -> bool:
        """Whether all that was said of this key is on its way to Redis."""
        return self._lines.for_shard(redis_keys.shard_of(key_id)).has_written

    def resend(self, settlement: Settlement, how: str = "") -> "asyncio.Future[Any]":
        admission = settlement.admission
        scopes: Sequence[CounterSet] = admission.scopes if admission else ()
        shard = redis_keys.shard_of(settlement.key_id)
        keys: list[Any] = [*redis_keys.BY_SHARD[shard], redis_keys.once(shard, settlement.id)]
        model = admission.model if admission else ""
        how = how or (admission.how if admission else "admitted")
        # Redis may have let in, unheard, what this process then let in alone.
        reserved = admission.reserved if admission and how != "alone" else -1
        values: list[Any] = [settlement.id, reserved, settlement.used, settlement.row, settlement.prompt, how]
        values += [model, settlement.completion, MOST_ROWS, MOST_PROMPTS]
        for scope in scopes:
            keys += redis_keys.counters(scope.name)[1:]
            values += [int(scope.tpm >= 0), int(scope.has_budget)]
        return self._lines.for_shard(shard).run("settle", keys, values)

    def _note_end(self, admission: Admission, settlement: Settlement) -> None:
        self.local.leave(admission.scopes)
        if admission.how == "alone":
            self.local.settle(admission.scopes, admission.reserved, settlement.used)
            for scope in admission.scopes:
                self.queue.slot_freed(redis_keys.queue(scope.name))
        seconds = time.monotonic() - admission.began
        self.estimates.add(admission.scopes[0], seconds, admission.model, settlement.completion)
