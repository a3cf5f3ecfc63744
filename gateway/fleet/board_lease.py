"""The lease of this process on the board: while it is valid, the board has the calls of this process as they are."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from gateway.fleet.board import LEASE_MS, Board
from gateway.fleet.slot import Slot
from gateway.stores.redis_client import RedisUnavailable

LOG = logging.getLogger("gateway.queue")
# After a failure; a Redis that is out of memory answers, but does nothing.
PAUSE_S = 0.1


class BoardLease:
    """`waiting` and `running` are the calls that the board should have."""

    def __init__(self, waiting: Callable[[], Iterable[str]], running: Callable[[], Iterable[Slot]]) -> None:
        self._waiting, self._running = waiting, running
        # False also while it is not known whether the board has done what it was sent.
        self.is_valid = False
        # By time.monotonic. A process that was stopped for longer has lost what it had, though it does not know that yet.
        self.until = 0.0
        self._failed_at = -PAUSE_S
        self._lock = asyncio.Lock()

    def doubt(self) -> None:
        self.is_valid = False

    async def ensure(self, board: Board) -> None:
        """Renews it if it is not valid; raises RedisUnavailable."""
        if not board.is_usable:
            raise RedisUnavailable
        async with self._lock:
            if self.is_valid:
                return
            if time.monotonic() < self._failed_at + PAUSE_S:
                raise RedisUnavailable
            await self._renew(board)

    async def renew(self, board: Board) -> None:
        """Raises RedisUnavailable."""
        async with self._lock:
            await self._renew(board)

    async def _renew(self, board: Board) -> None:
        try:
            await self._tick(board)
        except RedisUnavailable:
            self._failed_at = time.monotonic()
            raise

    async def _tick(self, board: Board) -> None:
        # Redis executes the commands of a connection in their order: it knows then all that was sent before.
        began, expected = time.monotonic(), len(list(self._waiting())) + len(list(self._running()))
        known, calls = await board.tick()
        self.until = began + LEASE_MS / 1000
        if known and self.is_valid and calls == expected:
            return
        # What is sent from now on is executed after this. If it fails, the board doubts.
        self.is_valid = True
        removed, added = await board.restore(self._waiting(), self._running())
        if removed or added:
            LOG.info("the board of the fleet is in order again: %d calls removed, %d added", removed, added)
