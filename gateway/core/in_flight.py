"""The requests in progress in this process, and whether it still accepts new ones."""

import asyncio


class InFlight:
    """Counts requests from `begin` to `end`; while `draining` is true, new ones are refused.

    Requests to the admin API are counted, and also counted separately: `of_callers` leaves them out.
    """

    def __init__(self) -> None:
        self.total = self._of_operators = 0
        self.draining = False
        self._idle: asyncio.Event | None = None

    @property
    def of_callers(self) -> int:
        return self.total - self._of_operators

    def begin(self, by_operator: bool) -> None:
        self.total += 1
        self._of_operators += by_operator

    def end(self, by_operator: bool) -> None:
        self.total -= 1
        self._of_operators -= by_operator
        if self._idle is not None and not self.total:
            self._idle.set()

    async def wait_idle(self, limit_s: float) -> bool:
        """Waits until no request is in progress; returns whether that was within the limit."""
        self._idle = asyncio.Event()
        if not self.total:
            return True
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
