"""Work that holds up the event loop: one piece at a time, with a rest for everybody else after each."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from gateway.core.cancel_scope import CancelScope
from gateway.core.errors import Overloaded

# How long others have the loop after a piece of work, and how long until the next piece of the same caller: in times of what
# the piece took. So all callers together take half of a loop's time, and one of them a fifth.
REST, REST_OF_A_CALLER = 1.0, 4.0
LONGEST_WAIT_S = 20.0

Result = TypeVar("Result")


@dataclass(slots=True)
class Holder:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    pieces: int = 0


class Turns:
    """Callers take turns, each with one piece of work, whatever else they have waiting."""

    def __init__(self) -> None:
        self._everybody = asyncio.Lock()
        self._callers: dict[str, Holder] = {}

    async def run(self, name: str, work: Callable[[], Result], guard: CancelScope) -> Result:
        """What `work` returns or raises for the caller of that name; Overloaded where its turn does not come in 20 seconds."""
        guard.within(LONGEST_WAIT_S, lambda: Overloaded(retry_after=1))
        caller = self._callers.setdefault(name, Holder())
        caller.pieces += 1
        try:
            await self._begin(caller)
        except BaseException:
            self._leave(name)
            raise
        guard.without_deadline()
        began = time.perf_counter()
        try:
            return work()
        finally:
            took, loop = time.perf_counter() - began, asyncio.get_running_loop()
            loop.call_later(took * REST, self._everybody.release)
            loop.call_later(took * REST_OF_A_CALLER, self._end, name)

    async def _begin(self, caller: Holder) -> None:
        await caller.lock.acquire()
        try:
            await self._everybody.acquire()
        except BaseException:
            caller.lock.release()
            raise

    def _end(self, name: str) -> None:
        self._callers[name].lock.release()
        self._leave(name)

    def _leave(self, name: str) -> None:
        caller = self._callers[name]
        caller.pieces -= 1
        if not caller.pieces:
            del self._callers[name]
