"""Calls that wait for a slot of their key: Redis keeps the queue of each key, in the order of arrival at all processes."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from gateway.core import background
from gateway.core.errors import LimitReached
from gateway.limits.admission import Ticket, Verdict
from gateway.limits.quota import CounterSet
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisUnavailable
from gateway.stores.redis_shards import ShardConnections

# How many calls may wait for one key in all processes together, and for all keys in this process.
WAITING_PER_KEY, WAITING = 100, 1_000
ASK_AGAIN_S = 0.25


class Queue:
    """The calls of this process that wait; `length` of them."""

    def __init__(self, connections: ShardConnections) -> None:
        self._connections = connections
        self._waiting: dict[bytes, list[asyncio.Event]] = {}
        self.length = 0

    async def wait(
        self, ticket: Ticket, until: float, ask: Callable[[bool], Awaitable[Verdict]], *, was_local: bool = False
    ) -> Verdict:
        """Asks whenever a slot may be free, until the ticket passes, is refused or its time is over.

        `ask` is called with whether the ticket may continue to wait. `was_local`: this process has refused it before, because
        Redis did not answer.
        """
        freed = asyncio.Event()
        for counter_set in ticket.counter_sets:
            self._waiting.setdefault(redis_keys.queue(counter_set.name), []).append(freed)
        self.length += 1
        try:
            while True:
                left = until - time.monotonic()
                with suppress(TimeoutError):
                    await asyncio.wait_for(freed.wait(), max(0.0, min(left, ASK_AGAIN_S)))
                freed.clear()
                verdict = await ask(time.monotonic() < until)
                if isinstance(verdict, LimitReached):
                    # Redis may have admitted it, though its answer did not come.
                    verdict.is_local = was_local = was_local or verdict.is_local
                if not (isinstance(verdict, LimitReached) and verdict.may_wait):
                    return verdict
        except BaseException:
            self._leave(ticket)
            raise
        finally:
            self.length -= 1
            for counter_set in ticket.counter_sets:
                self._forget(redis_keys.queue(counter_set.name), freed)

    def _leave(self, ticket: Ticket) -> None:
        with suppress(RedisUnavailable):
            for counter_set in ticket.counter_sets:
                connection = self._connections.for_shard(redis_keys.shard_of(counter_set.name))
                connection.send("ZREM", redis_keys.queue(counter_set.name), ticket.id).add_done_callback(background.retrieve)

    async def slot_freed_soon(self, counter_sets: Sequence[CounterSet], longest_s: float) -> None:
        """Waits until a slot of one of these may be free, at most so long."""
        freed = asyncio.Event()
        queues = {redis_keys.queue(counter_set.name) for counter_set in counter_sets}
        for queue in queues:
            self._waiting.setdefault(queue, []).append(freed)
        try:
            async with asyncio.timeout(min(longest_s, ASK_AGAIN_S)):
                await freed.wait()
        except TimeoutError:
            return
        finally:
            for queue in queues:
                self._forget(queue, freed)

    def _forget(self, queue: bytes, freed: asyncio.Event) -> None:
        waiting = self._waiting[queue]
        waiting.remove(freed)
        if not waiting:
            del self._waiting[queue]

    def slot_freed(self, queue: bytes) -> None:
        """A call has ended in some process: the first that waits here asks again."""
        for freed in self._waiting.get(queue, ())[:1]:
            freed.set()
