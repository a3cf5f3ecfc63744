"""The slot of a key while its call waits for a backend: given up for others of its calls, and taken again."""

from collections.abc import Callable
from typing import Any

from gateway.core.background import retrieve
from gateway.limits.admission import Admission
from gateway.limits.fallback import FallbackLimiter, Share
from gateway.limits.lease_renewal import LEASE_MS
from gateway.limits.queue import Queue
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisUnavailable
from gateway.stores.redis_shards import ShardConnections


class KeySlot:
    """Of one admitted call; without Redis it is given up and taken again in this process."""

    def __init__(
        self,
        connections: ShardConnections,
        local: FallbackLimiter,
        share: Callable[[], Share],
        queue: Queue,
        admission: Admission,
    ) -> None:
        self._connections, self._local, self._share, self._queue = connections, local, share, queue
        self._admission = admission

    def give_up(self) -> None:
        admission = self._admission
        if not admission.takes_slot or admission.is_paused:
            return
        admission.is_paused = True
        self._local.leave(admission.counter_sets)
        try:
            reply = self._run("pause", [admission.id, LEASE_MS, redis_keys.SLOT_FREED])
        except RedisUnavailable:
            for counter_set in admission.counter_sets:
                self._queue.slot_freed(redis_keys.queue(counter_set.name))
        else:
            reply.add_done_callback(retrieve)

    async def take_again(self) -> bool:
        """Whether there was one of each counter set."""
        admission = self._admission
        if not admission.is_paused:
            return True
        limits = [counter_set.concurrent for counter_set in admission.counter_sets]
        admission.is_resuming = True
        try:
            has_slot = bool(await self._run("resume", [admission.id, LEASE_MS, *limits]))
        except RedisUnavailable:
            has_slot = self._local.has_slot(admission.counter_sets, self._share())
        finally:
            admission.is_resuming = False
        if has_slot:
            admission.is_paused = False
            self._local.enter(admission.counter_sets)
        return has_slot

    async def wait_for_one(self, longest_s: float) -> None:
        await self._queue.slot_freed_soon(self._admission.counter_sets, longest_s)

    def _run(self, script: str, values: list[Any]) -> Any:
        names = [counter_set.name for counter_set in self._admission.counter_sets]
        keys = [key for name in names for key in (redis_keys.slots(name), redis_keys.queue(name))]
        return self._connections.for_shard(redis_keys.shard_of(names[0])).run(script, keys, values)
