"""The simulated machine: loads, evictions, slots, prompt caches; on a clock that waits for nothing."""

import asyncio
import heapq
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

from tests.bench.fleet.clock import Clock
from tests.bench.fleet.machine import Call, Machine
from tests.bench.fleet.scenario import BoxConfig

SIZES = {"small": 4.0, "middle": 8.0, "large": 16.0}
# So often everything that can run has run.
ROUNDS = 50


class StepClock(Clock):
    """Goes to the next moment that somebody waits for, as soon as nothing else can run."""

    def __init__(self) -> None:
        super().__init__(1)
        self._now = 0.0
        self._numbers = count()
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []

    def now(self) -> float:
        return self._now

    async def until(self, moment: float) -> None:
        woken = asyncio.Event()
        heapq.heappush(self._sleepers, (moment, next(self._numbers), woken))
        await woken.wait()

    async def drive(self) -> None:
        while True:
            for _ in range(ROUNDS):
                await asyncio.sleep(0)
            if self._sleepers:
                moment, _, woken = heapq.heappop(self._sleepers)
                self._now = max(self._now, moment)
                woken.set()


def on(test: Callable[[Machine], Coroutine[Any, Any, None]]) -> None:
    """Runs the test with a machine of 20 GB and two slots a model."""

    async def run() -> None:
        clock = StepClock()
        config = BoxConfig("box", SIZES, vram=20, slots=2, prefill=1000, decode=100, disk=4)
        driver = asyncio.create_task(clock.drive())
        try:
            await asyncio.wait_for(test(Machine(config, clock)), 10)
        finally:
            driver.cancel()

    asyncio.run(run())


async def ask(box: Machine, model: str, *messages: int, output: int = 9) -> Call:
    """A call whose messages have as many tokens as their numbers."""
    call = Call(box.models[model], tuple((tokens, tokens) for tokens in messages), output)
    async for _ in box.run(call):
        pass
    return call


def loaded(box: Machine) -> list[str]:
    return [model.name for model in box.vram.loaded()]


def test_a_cold_model_is_loaded_first_and_stays() -> None:
    async def test(box: Machine) -> None:
        first, second = await ask(box, "middle", 10), await ask(box, "middle", 10)
        assert (first.load_s, second.load_s, first.done, first.prompt_tokens) == (2, 0, 9, 10)
        assert loaded(box) == ["middle"]

    on(test)


def test_the_model_that_was_idle_longest_makes_space() -> None:
    async def test(box: Machine) -> None:
        for name in ("middle", "small", "middle"):
            await ask(box, name, 10)
        assert loaded(box) == ["small", "middle"]
        await ask(box, "large", 10)
        assert loaded(box) == ["large"] and box.vram.evictions == 2
        await ask(box, "small", 10)
        assert loaded(box) == ["small", "large"]

    on(test)


def test_a_model_in_use_is_not_evicted() -> None:
    async def test(box: Machine) -> None:
        slow, large = await asyncio.gather(ask(box, "middle", 10, output=400), ask(box, "large", 10))
        assert slow.done == 400 and large.load_s >= slow.ended - large.began + 4

    on(test)


def test_loads_come_one_after_the_other_and_are_counted_when_they_are_wanted_at_once() -> None:
    async def test(box: Machine) -> None:
        small, middle, again = await asyncio.gather(ask(box, "small", 10), ask(box, "middle", 10), ask(box, "small", 11))
        assert (small.load_s, middle.load_s, again.load_s) == (1, 3, 1)
        assert box.statistics()["most loads at once"] == 2 and box.statistics()["loads"] == 2

    on(test)


def test_a_load_is_left_out_when_nobody_waits_for_it_any_more() -> None:
    async def test(box: Machine) -> None:
        await box.load(box.models["middle"])
        slow = asyncio.create_task(ask(box, "middle", 10, output=200))
        await asyncio.sleep(0)
        impatient = asyncio.create_task(ask(box, "large", 10))
        await asyncio.sleep(0)
        impatient.cancel()
        await slow
        assert loaded(box) == ["middle"] and box.statistics()["loads"] == 1

    on(test)


def test_calls_beyond_the_slots_wait_in_their_order() -> None:
    async def test(box: Machine) -> None:
        calls = await asyncio.gather(*(ask(box, "small", 10, 20 + number, output=100) for number in range(4)))
        assert [call.slot_at for call in calls[:2]] == [1, 1]
        assert calls[0].ended <= calls[2].slot_at <= calls[3].slot_at
        assert box.statistics()["most calls at once"] == {"small": 4, "middle": 0, "large": 0}

    on(test)


def test_a_slot_computes_only_what_differs_from_its_last_prompt() -> None:
    async def test(box: Machine) -> None:
        for messages in ((500, 30), (9,)):
            await ask(box, "small", *messages)
        turn = await ask(box, "small", 500, 30, 7, 8)
        counts = box.statistics()
        assert (counts["saved tokens"], counts["prompt tokens"], counts["output tokens"]) == (530, 1084, 27)
        assert round(turn.first_at - turn.slot_at, 3) == 0.015

    on(test)


def test_prefills_share_the_processor_and_streams_slow_each_other_down() -> None:
    async def test(box: Machine) -> None:
        await box.load(box.models["small"])
        alone = await ask(box, "small", 1000, output=100)
        both = await asyncio.gather(ask(box, "small", 1001, output=100), ask(box, "small", 1002, output=100))
        assert round(alone.first_at - alone.slot_at, 3) == 1 and round(alone.ended - alone.first_at, 3) == 1
        assert all(1.7 < call.first_at - call.slot_at < 2.1 for call in both)
        assert all(1.1 < call.ended - call.first_at <= 1.2 for call in both)

    on(test)


def test_what_is_kept_alive_for_no_time_is_dropped() -> None:
    async def test(box: Machine) -> None:
        box.models["small"].keep_alive_s = 0
        await ask(box, "small", 10)
        assert loaded(box) == []

    on(test)
