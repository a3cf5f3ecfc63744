"""The calls of processes that share a board: whatever gets lost or comes late, no place has more calls than slots."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.components import connections_of
from gateway.core.errors import NoBackend, QueueFull, QueueTimeout
from gateway.fleet import board
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.board import Board
from gateway.fleet.caller import NO_KEY_SLOT
from gateway.fleet.catalog import Offer
from gateway.fleet.claim import Claim, Place, Routing
from gateway.fleet.queue import FS, LATE_S, FleetQueue
from gateway.fleet.scheduler import Candidate
from gateway.fleet.slot import Slot
from gateway.fleet.waiting import Queued
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_scripts import read_scripts
from tests.conftest import TestStores
from tests.support.gateway_settings import settings_for

MODEL = "m"


def place(backend: str, slots: int = 1) -> Place:
    offer = Offer(backend, "ollama", MODEL, 1e12, model=MODEL, slots=slots)
    return Place(Candidate(Backend(BackendConfig(backend, f"http://{backend}")), offer), 1, 1000, 100, 1000)


class Busy:
    """A key whose slot another call has: it is free at the `free_at`-th time."""

    def __init__(self, free_at: int = 1) -> None:
        self._free_at, self.asked, self.has_slot = free_at, 0, True
        self.asking = asyncio.Event()

    def give_up(self) -> None:
        self.has_slot = False

    async def take_again(self) -> bool:
        self.asked += 1
        self.asking.set()
        await asyncio.sleep(0.02)
        self.has_slot = self.asked >= self._free_at
        return self.has_slot

    async def wait_for_one(self, longest_s: float) -> None:
        await asyncio.sleep(min(longest_s, 0.01))


@dataclass
class Process:
    queue: FleetQueue
    store: RedisClient
    names: int = 0
    queued: list[Queued] = field(default_factory=list)

    def claim(self, *places: Place, **more: Any) -> Claim:
        self.names += 1
        values: dict[str, Any] = {"patience_ms": int(self.queue.routing.wait_s * 1000), **more}
        return Claim(f"{self.queue.board.process}-{self.names}", MODEL, "alice", places or (place("a"),), **values)

    async def get(self, claim: Claim, claim_now: Callable[[], Claim | None] | None = None, key_slot: Any = NO_KEY_SLOT) -> Slot:
        return await self.queue.get(claim, claim_now or (lambda: claim), key_slot, self.queued.append)

    def start(self, claim: Claim, **more: Any) -> "asyncio.Task[Slot]":
        return asyncio.create_task(self.get(claim, **more))

    async def is_waiting(self, calls: int = 1) -> None:
        await until(lambda: self.queue.length == calls)


async def until(done: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not done():  # noqa: ASYNC110 a test may ask
            await asyncio.sleep(0.005)


def stand_still(seconds: float) -> None:
    """As if all of this process were stopped."""
    time.sleep(seconds)


@dataclass
class Fleet:
    stores: TestStores
    stack: AsyncExitStack

    async def process(self, name: str, mode: str = "order", **routing: Any) -> Process:
        settings = settings_for(REDIS_URL=self.stores.redis_url)
        store = await self.stack.enter_async_context(RedisClient(settings.redis_url))
        connections = await self.stack.enter_async_context(connections_of(settings, store))
        queue = FleetQueue(
            connections,
            name,
            Routing(mode, **{"wait_s": 5.0, **routing}),
            share_of=lambda slots: slots // 2,
            is_resident=lambda backend, model: True,
            look=lambda backend: None,
        )
        is_listening = asyncio.Event()
        store.subscribe({redis_keys.granted(name): queue.granted}, after_gap=is_listening.set)
        await self.stack.enter_async_context(queue)
        async with asyncio.timeout(5):
            await is_listening.wait()
        return Process(queue, store)

    def calls(self) -> Counter[str]:
        """The calls on the board by their state: "w" or the backend at which they run."""
        found: Counter[str] = Counter()
        with self.stores.client() as client:
            for name in client.scan_iter(f"{redis_keys.FLEET}:calls:*"):
                for text in client.hvals(name):
                    state = text.decode().split(FS)
                    found[state[1] if state[0] == "r" else "w"] += 1
        return found


@asynccontextmanager
async def fleet(stores: TestStores) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        found = Fleet(stores, stack)
        yield found
        await asyncio.sleep(0.02)
        assert not found.calls()


def run(stores: TestStores, test: Callable[[Fleet], Awaitable[None]]) -> None:
    async def inside() -> None:
        async with asyncio.timeout(20), fleet(stores) as found:
            await test(found)

    asyncio.run(inside())


def test_a_call_waits_for_a_slot_that_another_process_frees(stores: TestStores) -> None:
    async def test(fleet: Fleet) -> None:
        one, other = await fleet.process("one"), await fleet.process("other")
        first = await one.get(one.claim())
        waits = other.start(other.claim())
        await other.is_waiting()
        first.free()
        second = await waits
        assert (second.backend, fleet.calls()) == ("a", {"a": 1})
        assert other.queued[0].position == 1
        second.free()

    run(stores, test)


def test_who_leaves_while_its_key_is_asked_for_a_slot_leaves_the_backend_free(stores: TestStores) -> None:
    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        first = await one.get(one.claim())
        key_slot = Busy()
        waits = one.start(one.claim(), key_slot=key_slot)
        await one.is_waiting()
        first.free()
        await key_slot.asking.wait()
        waits.cancel()
        await asyncio.wait([waits])
        await until(lambda: not fleet.calls())
        assert one.queue.running == one.queue.length == 0

    run(stores, test)


def test_a_call_whose_key_has_no_slot_leaves_the_backend_to_others_and_waits(stores: TestStores) -> None:
    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        first = await one.get(one.claim())
        key_slot = Busy(free_at=4)
        waits = one.start(one.claim(), key_slot=key_slot)
        await one.is_waiting()
        first.free()
        slot = await waits
        assert (key_slot.asked, key_slot.has_slot, fleet.calls()) == (4, True, {"a": 1})
        slot.free()

    run(stores, test)


def test_a_message_before_the_reply_is_a_grant_and_one_for_an_earlier_wait_is_none(
    stores: TestStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[str] = []

    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        first, take = await one.get(one.claim()), Board.take

        async def freed_meanwhile(board: Board, claim: Claim) -> list[Any]:
            reply = await take(board, claim)
            first.free()
            await until(lambda: fleet.calls() == {"a": 1})
            await asyncio.sleep(0.05)
            late.append(claim.id)
            return reply

        monkeypatch.setattr(Board, "take", freed_meanwhile)
        claim = one.claim()
        slot = await one.get(claim)
        monkeypatch.setattr(Board, "take", take)
        slot.free()
        again = await one.get(one.claim())
        waits = one.start(claim)
        await one.is_waiting()
        one.queue.granted(FS.join([late[0], "a", MODEL, "order", "1000", "0"]))
        await asyncio.sleep(0.05)
        assert one.queue.length == 1, "it is for a wait that has ended"
        again.free()
        (await waits).free()
        assert not one.queue._asked

    run(stores, test)


def test_a_call_that_is_granted_while_redis_gets_lost_has_one_slot(stores: TestStores, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        first = await one.get(one.claim())
        waits = one.start(one.claim())
        await one.is_waiting()
        asked = asyncio.Event()

        async def lost(board: Board, claim: Claim) -> list[Any]:
            asked.set()
            first.free()
            await until(lambda: not one.queue.length)
            raise RedisUnavailable

        monkeypatch.setattr(Board, "ask", lost)
        slot = await waits
        assert asked.is_set() and fleet.calls() == {"a": 1}
        slot.free()

    run(stores, test)


def test_who_gets_a_slot_or_leaves_while_others_are_described_anew_waits_no_more(
    stores: TestStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        first, ask = await one.get(one.claim()), Board.ask
        waits = [one.start(one.claim()) for _ in range(3)]
        await one.is_waiting(3)
        slots: list[Slot] = []

        async def meanwhile(board: Board, claim: Claim) -> list[Any]:
            if not slots:
                first.free()
                slots.append(await waits[0])
                slots[0].free()
                slots.append(await waits[1])
                waits[2].cancel()
                await asyncio.wait([waits[2]])
            return await ask(board, claim)

        monkeypatch.setattr(Board, "ask", meanwhile)
        await until(lambda: len(slots) == 2)
        await asyncio.sleep(0.1)
        assert (one.queue.length, one.queue.running, one.queue.local.running(("a", MODEL))) == (0, 1, 1)
        slots[1].free()
        assert one.queue.local.running(("a", MODEL)) == 0

    run(stores, test)


def test_what_redis_did_without_telling_is_put_in_order(stores: TestStores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply gets lost: the board gave one slot, and the process takes another by itself."""

    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        take, a, b = Board.take, place("a", 2), place("b", 2)

        async def reply_lost(board: Board, claim: Claim) -> list[Any]:
            await take(board, claim)
            claim.places = (b,)
            board._doubt()
            raise RedisUnavailable

        monkeypatch.setattr(Board, "take", reply_lost)
        slot = await one.get(one.claim(a, b))
        monkeypatch.setattr(Board, "take", take)
        assert slot.backend == "b"
        await until(lambda: fleet.calls() == {"b": 1}, 0.5)
        slot.free()

    run(stores, test)


def test_who_was_stopped_for_longer_than_its_lease_begins_nothing_with_what_it_had(
    stores: TestStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("board", "board_lease"):
        monkeypatch.setattr(f"gateway.fleet.{module}.LEASE_MS", 400)

    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        with stores.client() as client:
            scripts = {name: client.register_script(script.text) for name, script in read_scripts(board.LUA).items()}

            def other(script: str, *values: Any) -> Any:
                return scripts[script](keys=[redis_keys.FLEET], args=[0, *values])

            def take(call: str) -> Any:
                claim = replace(one.claim(), id=call)
                return other("take", *claim.arguments(one.queue.routing, "other"))[0]

            assert take("c1") == b"go"
            waits = one.start(one.claim())
            await one.is_waiting()
            other("release", "other", "c1", -1)
            assert fleet.calls() == {"a": 1}, "a message is on its way"
            stand_still(0.2)
            other("tick", "other", 10_000)
            stand_still(0.3)
            other("tick", "other", 10_000)
            assert (take("c2"), fleet.calls()) == (b"go", {"a": 1})
            await asyncio.sleep(0.05)
            assert one.queue.running == 0, "its slot is another's now"
            await until(lambda: fleet.calls() == {"a": 1, "w": 1})
            other("release", "other", "c2", -1)
            (await waits).free()

    run(stores, test)


def test_a_process_that_redis_has_forgotten_is_put_in_order_before_it_takes_more(stores: TestStores) -> None:
    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        first = await one.get(one.claim())
        waits = one.start(one.claim())
        await one.is_waiting()
        with stores.client() as client:
            client.flushall()
        one.queue._doubt()
        later = one.start(one.claim())
        await one.is_waiting(2)
        await until(lambda: fleet.calls() == {"a": 1, "w": 2})
        first.free()
        for each in asyncio.as_completed([waits, later]):
            (await each).free()

    run(stores, test)


def test_backends_come_and_go_while_calls_wait(stores: TestStores) -> None:
    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one")
        first = await one.get(one.claim())
        claim, lost = one.claim(), one.claim()

        def claim_now() -> Claim:
            claim.places = (place("b"),)
            return claim

        waits = one.start(claim, claim_now=claim_now)
        withdrawn = one.start(lost, claim_now=lambda: None)
        assert (await waits).backend == "b"
        with pytest.raises(NoBackend):
            await withdrawn
        (await waits).free()
        first.free()

    run(stores, test)


def test_a_queue_that_is_full_and_a_wait_that_is_too_long_end_with_the_time_until_there_is_space(stores: TestStores) -> None:
    async def test(fleet: Fleet) -> None:
        one = await fleet.process("one", wait_s=0.4, queue_size=1)
        first = await one.get(one.claim())
        claim = one.claim()
        waits = one.start(claim)
        await one.is_waiting()
        with pytest.raises(QueueFull) as full:
            await one.get(one.claim())
        with pytest.raises(QueueTimeout) as late:
            await waits
        assert full.value.retry_after and late.value.retry_after
        assert 1 <= claim.patience_ms < 50, "if its backend had failed, it would have had no time left"
        assert one.queued[-1].waited_s == pytest.approx(0.4, abs=0.2)
        first.free()

    run(stores, test)


def test_without_redis_a_process_has_its_share_and_when_it_is_back_all_is_counted(stores: TestStores) -> None:
    async def test(fleet: Fleet) -> None:
        one, other = await fleet.process("one"), await fleet.process("other")
        held = [await process.get(process.claim(place("a", 2))) for process in (one, other)]
        for process in (one, other):
            process.queue.board._connections.for_shard(redis_keys.HOME)._takes_writes = False
        waits = [process.start(process.claim(place("a", 2))) for process in (one, other)]
        await asyncio.sleep(LATE_S * 2)
        assert [process.queue.length for process in (one, other)] == [1, 1], "each has its share"
        held[0].free()
        held[0] = await waits[0]
        for process in (one, other):
            process.queue.board._connections.for_shard(redis_keys.HOME)._takes_writes = True
        await until(lambda: fleet.calls() == {"a": 2, "w": 1})
        for slot in held:
            slot.free()
        (await waits[1]).free()

    run(stores, test)
