"""May a request pass, now, and what did it really cost: decided in Redis for all processes, without it by shares."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from gateway.core import background
from gateway.core.background import KeptTask
from gateway.core.errors import LimitReached, LimitsUnavailable, StoreUnavailable
from gateway.limits.admission import Admission, CounterUsage, Settlement, Ticket, WindowUsage, headers, refusal
from gateway.limits.fallback import WHOLE, FallbackLimiter, Share
from gateway.limits.quota import CounterSet
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisUnavailable
from gateway.stores.redis_shards import ShardConnections

LUA = Path(__file__).parent / "lua"
LEASE_MS = 25_000
TICK_S, RENEW_EVERY_S, RENEWED_AT_ONCE = 1.0, 8.0, 500
MEAN_OF_UNKNOWN_MODEL = 256
# Of one shard.
MOST_ROWS, MOST_PROMPTS = 25_000, 500
WAITING_PER_KEY, WAITING = 100, 1_000
LOOK_AGAIN_S, SEED_WAIT_S = 0.25, 3.0
# Client libraries ask two times more: told less than a second, they would have given up before anything could change.
LONGEST_LIKELY_S, SHORTEST_LIKELY_S = 60.0, 1.0
REMEMBERED = 10_000


class ExpiredCall(NamedTuple):
    """A call whose lease has ended; `info` is what its process left of it in Redis."""

    shard: int
    id: str
    info: bytes


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
        self._running: dict[str, Admission] = {}
        self._means: dict[str, float] = {}
        self._lengths: dict[str, float] = {}
        self._seeding: dict[str, asyncio.Task[None]] = {}
        self._waiting: OrderedDict[bytes, list[asyncio.Event]] = OrderedDict()
        self._waiters = 0
        self._usable_since: float | None = None
        self.background = KeptTask(self._tick, "limits")

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

    def is_settled(self, seconds: float) -> bool:
        """Whether Redis has decided for so long that everybody has had the time to renew."""
        return self._usable_since is not None and time.monotonic() - self._usable_since > seconds

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return self._waiters

    async def admit(self, ticket: Ticket) -> Admission:
        """Raises LimitReached, LimitsUnavailable or StoreUnavailable; then nothing was taken."""
        began = time.monotonic()
        admission = await self._admit_or_wait(ticket, began)
        admission.began = time.monotonic()
        admission.queue_s = admission.began - began if self._queue_wait_s else 0.0
        if admission.takes_slot:
            self._running[admission.id] = admission
            self.local.enter(admission.scopes)
        return admission

    async def _admit_or_wait(self, ticket: Ticket, began: float) -> Admission:
        verdict = await self._ask(ticket, may_wait=bool(self._queue_wait_s) and self._waiters < WAITING)
        if isinstance(verdict, LimitReached) and verdict.may_wait:
            verdict = await self._wait(ticket, began + self._queue_wait_s)
        if isinstance(verdict, LimitReached):
            verdict.waited_s = time.monotonic() - began if self._queue_wait_s else 0.0
            raise verdict
        return verdict

    async def _wait(self, ticket: Ticket, until: float) -> "Admission | LimitReached":
        """In the key's queue, which Redis keeps for all processes in the order of arrival."""
        freed = asyncio.Event()
        lines = [self._waiting.setdefault(redis_keys.queue(scope.name), []) for scope in ticket.scopes]
        for line in lines:
            line.append(freed)
        self._waiters += 1
        try:
            while True:
                left = until - time.monotonic()
                with suppress(TimeoutError):
                    await asyncio.wait_for(freed.wait(), max(0.0, min(left, LOOK_AGAIN_S)))
                freed.clear()
                verdict = await self._ask(ticket, may_wait=time.monotonic() < until)
                if not (isinstance(verdict, LimitReached) and verdict.may_wait):
                    return verdict
        except BaseException:
            self._leave_queue(ticket)
            raise
        finally:
            self._waiters -= 1
            for line, scope in zip(lines, ticket.scopes, strict=True):
                line.remove(freed)
                if not line:
                    self._waiting.pop(redis_keys.queue(scope.name), None)

    def _leave_queue(self, ticket: Ticket) -> None:
        with suppress(RedisUnavailable):
            for scope in ticket.scopes:
                line = self._lines.for_shard(redis_keys.shard_of(scope.name))
                line.send("ZREM", redis_keys.queue(scope.name), ticket.id).add_done_callback(background.retrieve)

    def slot_freed(self, queue: bytes) -> None:
        """A call has ended somewhere: the first who waits here asks again."""
        for freed in self._waiting.get(queue, ())[:1]:
            freed.set()

    async def _ask(self, ticket: Ticket, *, may_wait: bool) -> "Admission | LimitReached":
        try:
            reply = await self._reply(ticket, may_wait, LEASE_MS)
        except RedisUnavailable:
            return self._ask_ourselves(ticket, may_wait)
        return self._read(ticket, reply)

    async def preview(self, ticket: Ticket) -> "tuple[Admission | LimitReached, list[CounterUsage]]":
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
        values += [self._most_output, wait_ms, WAITING_PER_KEY, round(self._likely_s(first) * 1000)]
        values.append(round(self._call_s(first) * 1000))
        for scope in ticket.scopes:
            keys += redis_keys.counters(scope.name)
            values += scope[1:]
        return keys, values

    def _read(self, ticket: Ticket, reply: list[Any]) -> "Admission | LimitReached":
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
            output = max(0, min((self._mean(ticket.model), *rooms)))
        return prompt + output if prompt >= 0 else 0

    def _mean(self, model: str) -> int:
        return min(self._most_output, round(self._means.get(model, MEAN_OF_UNKNOWN_MODEL)))

    def _ask_ourselves(self, ticket: Ticket, may_wait: bool) -> "Admission | LimitReached":
        if self._closed:
            raise LimitsUnavailable(retry_after=2.0)
        share = self.share()
        tokens = self._asked(ticket, share) if ticket.need.prompt >= 0 else -1
        takes_slot = bool(ticket.info)
        refused = self.local.admit(ticket.scopes, tokens, share, takes_slot=takes_slot)
        told = headers(ticket.scopes, self.local.usages(ticket.scopes))
        if refused is None:
            return Admission(ticket.id, ticket.scopes, ticket.model, takes_slot, "alone", max(0, tokens), headers=told)
        likely_s = self._likely_s(refused.scope) if refused.limit == "concurrent" else self._call_s(refused.scope)
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
        if admission is not None and self._running.pop(admission.id, None) is not None:
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
                self.slot_freed(redis_keys.queue(scope.name))
        _move(self._lengths, admission.scopes[0].name, time.monotonic() - admission.began, 0.2)
        if settlement.completion >= 0:
            _move(self._means, admission.model, settlement.completion, 0.05)

    def _likely_s(self, scope: CounterSet) -> float:
        """How long until one of the calls that hold a slot is likely to end."""
        return max(SHORTEST_LIKELY_S, self._call_s(scope) / max(1, scope.concurrent))

    def _call_s(self, scope: CounterSet) -> float:
        """How long a call of this key is likely to take."""
        return min(LONGEST_LIKELY_S, max(SHORTEST_LIKELY_S, self._lengths.get(scope.name, 1.0)))

    async def _tick(self) -> None:
        renewed_at = 0.0
        while True:
            now = time.monotonic()
            if not self._lines.is_usable:
                self._usable_since = None
            elif self._usable_since is None:
                self._usable_since, renewed_at = now, 0.0
            if now - renewed_at > RENEW_EVERY_S:
                renewed_at = now
                await self._renew()
            await asyncio.sleep(TICK_S)

    async def _renew(self) -> None:
        """The leases of long calls, shard by shard."""
        of_shards: dict[int, list[tuple[str, bytes]]] = {}
        for admission in list(self._running.values()):
            shard = redis_keys.shard_of(admission.scopes[0].name)
            slots = [(admission.id, redis_keys.slots(scope.name)) for scope in admission.scopes]
            of_shards.setdefault(shard, []).extend(slots)
        for shard, slots in of_shards.items():
            with suppress(RedisUnavailable):
                await self._renew_in(shard, slots)

    async def _renew_in(self, shard: int, slots: Sequence[tuple[str, bytes]]) -> None:
        for start in range(0, len(slots), RENEWED_AT_ONCE):
            # Those that have ended since are not to be found there again.
            some = [(call, slot) for call, slot in slots[start : start + RENEWED_AT_ONCE] if call in self._running]
            keys = [redis_keys.BY_SHARD[shard].leases, *(slot for _, slot in some)]
            await self._lines.for_shard(shard).run("renew", keys, [LEASE_MS, *(call for call, _ in some)])

    async def expired(self, since_ms: int, most: int) -> list[ExpiredCall]:
        """Calls whose lease ended `since_ms` ago, at most `most` of each shard. Raises RedisUnavailable."""
        calls = []
        for shard, shared in enumerate(redis_keys.BY_SHARD):
            found = await self._lines.for_shard(shard).run("overdue", [shared.leases, shared.calls], [since_ms, most])
            calls += [ExpiredCall(shard, call.decode(), info) for call, info in zip(found[::2], found[1::2], strict=True)]
        return calls

    async def forget(self, call: ExpiredCall) -> None:
        """Removes what nobody can settle. Raises RedisUnavailable."""
        await self._lines.for_shard(call.shard).send("HDEL", redis_keys.BY_SHARD[call.shard].calls, call.id)


def _move(means: dict[str, float], name: str, value: float, weight: float) -> None:
    known = means.get(name)
    if known is None and len(means) >= REMEMBERED:
        del means[next(iter(means))]
    means[name] = value if known is None else known * (1 - weight) + value * weight
