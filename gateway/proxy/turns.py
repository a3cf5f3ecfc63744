"""Work that blocks the event loop: one piece at a time, with a pause for other tasks after each."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from gateway.core.cancel_scope import CancelScope
from gateway.core.errors import Overloaded

# The pause after a piece of work, and that until the next piece of the same caller, as multiples of the time that the piece
# took. So all callers together get half of the loop's time, and one of them a fifth.
PAUSE, PAUSE_OF_A_CALLER = 1.0, 4.0
LONGEST_WAIT_S = 20.0

Result = TypeVar("Result")


@dataclass(slots=True)
class Caller:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    pieces: int = 0


class Turns:
    """Callers take turns, one piece of work each, however many pieces they have waiting."""

    def __init__(self) -> None:
        self._loop_lock = asyncio.Lock()
        self._callers: dict[str, Caller] = {}

    async def run(self, name: str, work: Callable[[], Result], cancel_scope: CancelScope) -> Result:
        """Returns or raises what `work` does; raises Overloaded where its turn does not come within 20 seconds."""
        cancel_scope.within(LONGEST_WAIT_S, lambda: Overloaded(retry_after=1))
        caller = self._callers.setdefault(name, Caller())
        caller.pieces += 1
        try:
            await self._begin(caller)
        except BaseException:
            self._leave(name)
            raise
        cancel_scope.without_deadline()
        began = time.perf_counter()
        try:
            return work()
        finally:
            took, loop = time.perf_counter() - began, asyncio.get_running_loop()
            loop.call_later(took * PAUSE, self._loop_lock.release)
            loop.call_later(took * PAUSE_OF_A_CALLER, self._end, name)

    async def _begin(self, caller: Caller) -> None:
        await caller.lock.acquire()
        try:
            await self._loop_lock.acquire()
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
