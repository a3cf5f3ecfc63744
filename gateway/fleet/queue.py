"""The calls of this process on the board: it gets slots for them, waits where there are none, and gives them back."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any, Self

from gateway.core.background import KeptTask
from gateway.core.errors import GatewayError, NoBackend, QueueFull, QueueTimeout
from gateway.fleet.board import Board
from gateway.fleet.board_lease import BoardLease
from gateway.fleet.claim import Claim, Place, Routing
from gateway.fleet.eta import EtaCorrection
from gateway.fleet.local_slots import IsResident, LocalSlots, ShareOf
from gateway.fleet.slot import Slot
from gateway.fleet.waiting import KeySlot, Queued, Waiting
from gateway.stores.redis_client import RedisUnavailable
from gateway.stores.redis_shards import ShardConnections

TICK_S = 1.0
# The calls that wait are described anew in turn, so many with each tick: costs and backends change, and a message may have been
# lost. More at once would delay what others ask of Redis.
ASKED_PER_TICK = 50
# After so many ticks without Redis, the calls that wait there are served by this process.
AWAY_TICKS = 2
# For so long a call that has just come waits for a Redis that does not answer.
LATE_S = 0.3
LOOK_EVERY_S = 0.25
# Until the board is put in order, where nobody asks for a slot meanwhile.
SOON_MS = 100
SHORTEST_RETRY_S, RETRY_AFTER_S, LONGEST_RETRY_S = 1.0, 5.0, 3600.0
FS = "\x1f"


class FleetQueue:
    """`async with FleetQueue(…) as queue:` — `await queue.get(claim, …)` returns a slot, which the caller must `free`."""

    def __init__(
        self,
        connections: ShardConnections,
        process: str,
        routing: Routing,
        *,
        share_of: ShareOf,
        is_resident: IsResident,
        look: Callable[[str], None],
    ) -> None:
        self.routing = routing
        self.board = Board(connections, process, routing, self._wake_in, self._doubt)
        self._lease = BoardLease(lambda: (*self._waiting, *self._asked), lambda: list(self._running.values()))
        self.local = LocalSlots(routing, share_of, is_resident)
        # Asks a backend what it has loaded; done repeatedly for those on which calls of this process wait for a load.
        self.look = look
        self._loading: dict[str, str] = {}
        # By their names on the board.
        self._running: dict[str, Slot] = {}
        self._waiting: dict[str, Waiting] = {}
        # Calls of which the board has been asked, and messages that came before its reply.
        self._asked: dict[str, str] = {}
        self._names = self._ticks_away = 0
        self.eta = EtaCorrection()
        # Since when Redis has not answered, 0 if it has.
        self._late_since = 0.0
        self._wake_at = 0.0
        self._wake = asyncio.Event()
        self.background = KeptTask(self._keep_ticking, "fleet queue")

    async def __aenter__(self) -> Self:
        with suppress(RedisUnavailable):
            await self._lease.renew(self.board)
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()
        with suppress(RedisUnavailable):
            await self.board.leave()

    @property
    def length(self) -> int:
        return len(self._waiting) + len(self.local.waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    async def get(
        self, claim: Claim, claim_now: Callable[[], Claim | None], key_slot: KeySlot, queued: Callable[[Queued], None]
    ) -> Slot:
        """A slot at one of the claim's places. Raises QueueFull and QueueTimeout.

        `queued` gets how the call waits when it begins to, and how long it has waited at the end.
        """
        try:
            reply = await self._take_patiently(claim)
        except RedisUnavailable:
            return await self._get_locally(claim, claim_now, key_slot, queued)
        if reply[0] == b"go":
            estimated_s = reply[6] / 1000
            queued(Queued(estimated_s=self.eta.corrected((claim.group, False), estimated_s)))
            slot = self._granted(claim, reply)
            slot.arrived, slot.estimated_s = slot.began, estimated_s
            return slot
        if reply[0] == b"full":
            raise QueueFull(retry_after=_retry_after(reply[1]))
        waiting = self._begin_to_wait(claim, claim_now, position=reply[1], estimated_ms=reply[2])
        self._waiting[claim.id] = waiting
        return await self._wait(waiting, key_slot, queued)

    async def _take_patiently(self, claim: Claim) -> list[Any]:
        """As `_take`, but a Redis that is late on a busy machine is not away yet: slots would be given twice."""
        while True:
            try:
                reply = await self._take(claim)
            except RedisUnavailable:
                if not await self._is_back_soon():
                    raise
            else:
                self._late_since = 0.0
                return reply

    async def _is_back_soon(self) -> bool:
        self._late_since = self._late_since or time.monotonic()
        while time.monotonic() < self._late_since + LATE_S:
            await asyncio.sleep(LATE_S / 10)
            if self.board.is_usable:
                return True
        return False

    async def _take(self, claim: Claim) -> list[Any]:
        """Asks the board for a slot, under a new name: what is on its way to an earlier one is not for this one.

        Raises RedisUnavailable.
        """
        while True:
            self._names += 1
            name = claim.id = f"{claim.call}.{self._names}"
            if not self._lease.is_valid:
                await self._lease.ensure(self.board)
            self._asked[name] = message = ""
            try:
                reply = await self.board.take(claim)
            except BaseException:
                # The board may still grant it, though nobody waits any more.
                self.board.release(name)
                raise
            finally:
                message = self._asked.pop(name)
            if time.monotonic() < self._lease.until:
                break
            # This process was stopped meanwhile, and what it had was given to others.
            self._lease.doubt()
        if reply[0] == b"wait":
            claim.arrived_ms = reply[4]
            return _early(reply, message) if message else reply
        return reply

    def _begin_to_wait(
        self, claim: Claim, claim_now: Callable[[], Claim | None], position: int, estimated_ms: int | None
    ) -> Waiting:
        now = asyncio.get_running_loop().time()
        estimated_s = None if estimated_ms is None else estimated_ms / 1000
        waiting = Waiting(claim, claim_now, now + claim.patience_ms / 1000, now, position, estimated_s)
        waiting.expected_ms = estimated_ms or waiting.expected_ms
        return waiting

    def _granted(self, claim: Claim, reply: list[Any]) -> Slot:
        backend, model, why = (value.decode() for value in reply[1:4])
        return self._slot(claim, backend, model, why, reply[4], reply[5])

    def _slot(self, claim: Claim, backend: str, model: str, why: str, cost_ms: int, cached: int) -> Slot:
        slot = Slot(
            claim.id, backend, model, why, self._free, cost_ms, cached, claim.group, claim.client, claim.sub_user, claim.weight
        )
        self._running[claim.id] = slot
        if slot.loads:
            self._loading[claim.id] = backend
            self._wake.set()
        self.local.enter((backend, model), claim.conversation.full)
        return slot

    async def _wait(self, waiting: Waiting, key_slot: KeySlot, queued: Callable[[Queued], None]) -> Slot:
        """Waits for a slot of the fleet, and then has the slot of the key again, too."""
        key_slot.give_up()
        kind, estimated_s = (waiting.claim.group, True), waiting.estimated_s
        corrected_s = None if estimated_s is None else self.eta.corrected(kind, estimated_s)
        queued(Queued(waiting.position, estimated_s=corrected_s))
        loop = asyncio.get_running_loop()
        try:
            while True:
                slot = await self._next_slot(waiting)
                if await self._is_taken_again(key_slot, slot):
                    slot.arrived, slot.estimated_s, slot.has_waited = waiting.queued_at, estimated_s, True
                    return slot
                # Others may have what this call cannot use before one of its key has ended.
                slot.free()
                await key_slot.wait_for_one(max(0.0, waiting.until - loop.time()))
                if loop.time() >= waiting.until:
                    raise QueueTimeout(retry_after=SHORTEST_RETRY_S)
                await self._join_again(waiting)
        except BaseException:
            self._leave(waiting)
            raise
        finally:
            # If the backend fails, it may wait for the rest of its time.
            waiting.claim.patience_ms = max(1, int((waiting.until - loop.time()) * 1000))
            queued(Queued(waiting.position, loop.time() - waiting.queued_at, corrected_s))

    @staticmethod
    async def _is_taken_again(key_slot: KeySlot, slot: Slot) -> bool:
        try:
            return await key_slot.take_again()
        except BaseException:
            slot.free()
            raise

    def _leave(self, waiting: Waiting) -> None:
        waiting.has_left = True
        if waiting.slot is not None:
            waiting.slot.free()
        if self._waiting.pop(waiting.claim.id, None) is not None:
            self.board.release(waiting.claim.id)
        with suppress(ValueError):
            self.local.waiting.remove(waiting)

    async def _next_slot(self, waiting: Waiting) -> Slot:
        left = waiting.until - asyncio.get_running_loop().time()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, left)):
                await waiting.changed.wait()
        waiting.changed.clear()
        if waiting.error is not None:
            raise waiting.error
        if waiting.slot is None:
            raise QueueTimeout(retry_after=_retry_after(waiting.expected_ms))
        slot, waiting.slot = waiting.slot, None
        return slot

    async def _ask_some(self) -> None:
        """Describes some of the calls that wait anew; those that waited here go to the board again."""
        for waiting in [*islice(self._waiting.values(), ASKED_PER_TICK), *islice(self.local.waiting, ASKED_PER_TICK)]:
            # It may have got a slot, or left, since the one before was asked about.
            if waiting.claim.id in self._waiting or waiting in self.local.waiting:
                try:
                    await self._ask(waiting)
                except GatewayError as error:
                    waiting.fail(error)

    async def _ask(self, waiting: Waiting) -> None:
        """Raises RedisUnavailable, NoBackend and QueueFull."""
        fresh = waiting.claim_now()
        if fresh is None:
            raise NoBackend(retry_after=RETRY_AFTER_S)
        waiting.claim = fresh
        if waiting in self.local.waiting:
            self.local.waiting.remove(waiting)
            await self._join_again(waiting)
            return
        # The others come first next time.
        self._waiting[fresh.id] = self._waiting.pop(fresh.id, waiting)
        reply = await self.board.ask(fresh)
        if fresh.id not in self._waiting or time.monotonic() >= self._lease.until:
            return
        if reply[0] == b"go":
            del self._waiting[fresh.id]
            waiting.grant(self._granted(fresh, reply))
        elif reply[0] == b"gone":
            del self._waiting[fresh.id]
            await self._join_again(waiting)

    async def _join_again(self, waiting: Waiting) -> None:
        claim = waiting.claim
        try:
            reply = await self._take(claim)
        except RedisUnavailable:
            if not waiting.has_left:
                self._wait_here(waiting)
            return
        if reply[0] == b"full":
            raise QueueFull(retry_after=_retry_after(reply[1]))
        if waiting.has_left:
            self.board.release(claim.id)
        elif reply[0] == b"go":
            waiting.grant(self._granted(claim, reply))
        else:
            self._waiting[claim.id] = waiting

    def granted(self, message: str) -> None:
        """A message of the board: a call of this process has got a slot."""
        call = message.partition(FS)[0]
        if call in self._waiting:
            # If this process has lost its lease since, the call will ask again.
            if time.monotonic() < self._lease.until:
                waiting = self._waiting.pop(call)
                waiting.grant(self._granted(waiting.claim, _early([], message)))
        elif call in self._asked:
            self._asked[call] = message
        elif call not in self._running:
            self.board.release(call)

    async def _get_locally(
        self, claim: Claim, claim_now: Callable[[], Claim | None], key_slot: KeySlot, queued: Callable[[Queued], None]
    ) -> Slot:
        place = None if self.local.waiting else self.local.free_place(claim)
        if place is not None:
            queued(Queued())
            return self._local_slot(claim, place)
        if len(self.local.waiting) >= self.routing.queue_size or claim.patience_ms <= 0:
            raise QueueFull(retry_after=SHORTEST_RETRY_S)
        waiting = self._begin_to_wait(claim, claim_now, len(self.local.waiting) + 1, None)
        self.local.waiting.append(waiting)
        return await self._wait(waiting, key_slot, queued)

    def _local_slot(self, claim: Claim, place: Place) -> Slot:
        # The board does not have it.
        self._lease.doubt()
        return self._slot(claim, *place.name, self.routing.mode, int(claim.cost_ms(place)), 0)

    def _wait_here(self, waiting: Waiting) -> None:
        self.local.waiting.append(waiting)
        self._serve_locally()

    def _serve_locally(self) -> None:
        for waiting, place in self.local.ready():
            waiting.grant(self._local_slot(waiting.claim, place))

    def _free(self, slot: Slot) -> None:
        self._running.pop(slot.call, None)
        if self._loading.pop(slot.call, None) is not None:
            # Nobody knows what has gone for the load that is given up.
            self.look(slot.backend)
        self.local.leave((slot.backend, slot.model))
        self.board.release(slot.call, slot.held_ms)
        if self.local.waiting and not self._lease.is_valid:
            self._serve_locally()

    def opened(self, slot: Slot, size: int) -> None:
        """A good answer has begun; `size` is that of the model in bytes."""
        if slot.estimated_s is not None:
            self.eta.note((slot.group, slot.has_waited), slot.estimated_s, time.monotonic() - slot.arrived)
        if slot.loads:
            self._loaded(slot, size)

    def _loaded(self, slot: Slot, size: int) -> None:
        self.board.loaded(slot.backend, slot.model, size)
        self._loading.pop(slot.call, None)
        self.look(slot.backend)

    def _doubt(self) -> None:
        self._lease.doubt()
        if self.board.is_usable:
            self._wake_in(SOON_MS)

    def _wake_in(self, milliseconds: int) -> None:
        due = asyncio.get_running_loop().time() + milliseconds / 1000
        if not self._wake_at or due < self._wake_at:
            self._wake_at = due
            self._wake.set()

    async def _keep_ticking(self) -> None:
        loop = asyncio.get_running_loop()
        next_tick = loop.time()
        while True:
            due = min(next_tick, self._wake_at or next_tick)
            if self._loading:
                due = min(due, loop.time() + LOOK_EVERY_S)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            self._wake.clear()
            for backend in set(self._loading.values()):
                self.look(backend)
            if loop.time() >= min(next_tick, self._wake_at or next_tick):
                self._wake_at, next_tick = 0.0, loop.time() + TICK_S
                await self._tick()

    async def _tick(self) -> None:
        try:
            await self._lease.renew(self.board)
            self._ticks_away = 0
            await self._ask_some()
        except RedisUnavailable:
            self._ticks_away += 1
        if self._ticks_away >= AWAY_TICKS:
            self.local.waiting.extend(self._waiting.values())
            self._waiting.clear()
            self._serve_locally()


def _early(reply: list[Any], message: str) -> list[Any]:
    """A message as the reply "go"; `reply` is the "wait" that it was sooner than."""
    _, backend, model, why, cost_ms, cached = message.split(FS)
    first_ms = reply[2] if reply else 0
    return [b"go", backend.encode(), model.encode(), why.encode(), int(cost_ms), int(float(cached)), first_ms]


def _retry_after(milliseconds: float) -> float:
    return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, milliseconds / 1000))
