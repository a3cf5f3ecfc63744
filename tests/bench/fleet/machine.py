"""A simulated machine with Ollama, as it matters for routing: loads, slots, prompt caches, shared computing."""

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from tests.bench.fleet.clock import Clock
from tests.bench.fleet.scenario import BoxConfig
from tests.bench.fleet.vram import Model, Prompt, Vram

PREFILL_STEP, DECODE_STEP = 256, 8
# Each further stream of a batch makes all of them slower by this part.
BATCH_COST = 0.15


class QueueFull(Exception):
    """The machine has as many calls waiting as it takes."""


@dataclass
class Call:
    """What is asked, and what it cost: moments and seconds of the machine's clock."""

    model: Model
    prompt: Prompt
    output: int
    began: float = 0.0
    load_s: float = 0.0
    slot_at: float = 0.0
    first_at: float = 0.0
    ended: float = 0.0
    done: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.prompt)


class Processor:
    """Prefills share its rate; the streams of a batch slow each other down."""

    def __init__(self, clock: Clock, prefill: float, decode: float) -> None:
        self._clock, self._prefill, self._decode = clock, prefill, decode
        self._prefills = self._streams = 0

    async def prefill(self, tokens: int) -> None:
        self._prefills += 1
        try:
            due = self._clock.now()
            for begun in range(0, tokens, PREFILL_STEP):
                due += min(tokens - begun, PREFILL_STEP) * self._prefills / self._prefill
                await self._clock.until(due)
        finally:
            self._prefills -= 1

    async def decode(self, tokens: int) -> AsyncGenerator[int, None]:
        """Yields how many tokens there are so far: the first by itself, then some at a time."""
        self._streams += 1
        try:
            due, done = self._clock.now(), 0
            while done < tokens:
                step = min(DECODE_STEP, tokens - done) if done else 1
                due += step * (1 + BATCH_COST * (self._streams - 1)) / self._decode
                await self._clock.until(due)
                done += step
                yield done
        finally:
            self._streams -= 1


class Machine:
    def __init__(self, config: BoxConfig, clock: Clock) -> None:
        self.config, self.clock = config, clock
        self.vram = Vram(clock, config.vram, config.disk, config.slots, config.parallel_loads)
        self.models = {name: Model(name, gigabytes) for name, gigabytes in config.models.items()}
        for model in self.models.values():
            self.vram.add(model)
        self._processor = Processor(clock, config.prefill, config.decode)
        self._waiting = 0
        self._tokens: Counter[str] = Counter()

    def find(self, name: str) -> Model | None:
        spellings = (name, name.removesuffix(":latest"), f"{name}:latest")
        return next((self.models[spelling] for spelling in spellings if spelling in self.models), None)

    async def run(self, call: Call) -> AsyncGenerator[int, None]:
        """Yields how many tokens have been answered so far."""
        call.began = self.clock.now()
        call.model.enter()
        try:
            await self._wait_for_slot(call)
            try:
                async with aclosing(self._compute(call)) as steps:
                    async for step in steps:
                        yield step
            finally:
                call.model.free.release()
        finally:
            call.ended = self.clock.now()
            self.vram.leave(call.model)

    async def load(self, model: Model) -> float:
        """Loads without computing; the seconds it took."""
        began = self.clock.now()
        model.enter()
        try:
            await self.vram.ensure(model)
        finally:
            self.vram.leave(model)
        return self.clock.now() - began

    async def _wait_for_slot(self, call: Call) -> None:
        if self._waiting >= self.config.queue:
            raise QueueFull
        self._waiting += 1
        try:
            await self.vram.ensure(call.model)
            call.load_s = self.clock.now() - call.began
            await call.model.free.acquire()
        finally:
            self._waiting -= 1

    async def _compute(self, call: Call) -> AsyncGenerator[int, None]:
        call.slot_at = self.clock.now()
        slot, equal = call.model.take_slot(call.prompt)
        kept = slot[:equal]
        try:
            cached = sum(tokens for _, tokens in kept)
            self._tokens.update(prompt=call.prompt_tokens, cached=cached)
            await self._processor.prefill(call.prompt_tokens - cached)
            kept, call.first_at = call.prompt, self.clock.now()
            async with aclosing(self._processor.decode(call.output)) as steps:
                async for done in steps:
                    self._tokens.update(output=done - call.done)
                    call.done = done
                    yield done
        finally:
            call.model.slots.append(kept)

    def statistics(self) -> dict[str, Any]:
        late = sorted(self.clock.lateness)
        return {
            "loads": self.vram.loads.total(),
            "loads by model": dict(self.vram.loads),
            "evictions": self.vram.evictions,
            "most loads at once": self.vram.most_loads,
            "most calls at once": {model.name: model.most_calls for model in self.models.values()},
            "prompt tokens": self._tokens["prompt"],
            "saved tokens": self._tokens["cached"],
            "output tokens": self._tokens["output"],
            "late p99": late[int(0.99 * len(late))] if late else 0.0,
        }
