"""The memory of a machine: which models are loaded, and what a load pushes out."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.bench.fleet.clock import Clock

KEEP_ALIVE_S = 300.0
# The messages of a prompt: a hash and the number of tokens of each.
Prompt = tuple[tuple[int, int], ...]


@dataclass
class Model:
    """A model on disk, and its runner while it is loaded: a slot remembers the prompt that it computed last."""

    name: str
    gigabytes: float
    is_loaded: bool = False
    occupies: bool = False
    loading: asyncio.Task[None] | None = None
    calls: int = 0
    most_calls: int = 0
    used_at: float = 0.0
    until: float = 0.0
    keep_alive_s: float = KEEP_ALIVE_S
    slots: deque[Prompt] = field(default_factory=deque)
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    def enter(self) -> None:
        self.calls += 1
        self.most_calls = max(self.most_calls, self.calls)

    def begin(self, slots: int, now: float) -> None:
        self.is_loaded, self.slots, self.free = True, deque([()] * slots), asyncio.Semaphore(slots)
        self.used(now)

    def used(self, now: float) -> None:
        self.used_at, self.until = now, now + self.keep_alive_s

    def drop(self) -> None:
        self.is_loaded = self.occupies = False

    def take_slot(self, prompt: Prompt) -> tuple[Prompt, int]:
        """The free slot whose prompt begins most like this one, among equals the longest unused; and the messages in common."""
        best = max(self.slots, key=lambda slot: common(slot, prompt))
        self.slots.remove(best)
        return best, common(best, prompt)


def common(one: Prompt, other: Prompt) -> int:
    """With how many equal messages both begin."""
    equal = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        equal += 1
    return equal


class Vram:
    """Loads on demand, one model after the other. The model that was idle longest has to go; one in use never has to."""

    def __init__(self, clock: Clock, gigabytes: float, disk: float, slots: int, parallel_loads: int) -> None:
        self._clock, self._gigabytes, self._disk, self._slots = clock, gigabytes, disk, slots
        self._loader = asyncio.Semaphore(parallel_loads)
        self._changed = asyncio.Event()
        self._models: list[Model] = []
        self._wanted = self.most_loads = 0
        self.loads: Counter[str] = Counter()
        self.evictions = 0

    def add(self, model: Model) -> None:
        self._models.append(model)

    async def ensure(self, model: Model) -> None:
        """Waits until the model is loaded; a caller who leaves does not stop the load."""
        self.expire()
        while not model.is_loaded:
            if model.loading is None:
                model.loading = asyncio.create_task(self._load(model))
            await asyncio.shield(model.loading)

    def leave(self, model: Model) -> None:
        """A call has ended."""
        model.calls -= 1
        model.used(self._clock.now())
        self.changed()

    def changed(self) -> None:
        self._changed.set()
        self._changed.clear()

    def loaded(self) -> list[Model]:
        self.expire()
        return [model for model in self._models if model.is_loaded]

    def expire(self) -> None:
        for model in self._idle():
            if model.until <= self._clock.now():
                model.drop()

    def _idle(self) -> Iterable[Model]:
        return [model for model in self._models if model.is_loaded and not model.calls]

    async def _load(self, model: Model) -> None:
        self._wanted += 1
        self.most_loads = max(self.most_loads, self._wanted)
        try:
            async with self._loader:
                if await self._make_space(model):
                    await self._clock.until(self._clock.now() + model.gigabytes / self._disk)
                    model.begin(self._slots, self._clock.now())
        finally:
            self._wanted -= 1
            model.loading = None

    async def _make_space(self, model: Model) -> bool:
        """False if meanwhile everybody has left who wanted the model."""
        while model.calls and self._occupied() + model.gigabytes > self._gigabytes:
            if idle := sorted(self._idle(), key=lambda one: (one.keep_alive_s, one.used_at)):
                idle[0].drop()
                self.evictions += 1
            else:
                await self._changed.wait()
        if model.calls:
            model.occupies = True
            self.loads[model.name] += 1
        return model.occupies

    def _occupied(self) -> float:
        return sum(model.gigabytes for model in self._models if model.occupies)
