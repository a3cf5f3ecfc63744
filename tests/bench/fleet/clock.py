"""The clock of a scenario, which may run faster than the one on the wall."""

import asyncio
import time


class Clock:
    """`speed` of its seconds pass in one second of the wall."""

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self.lateness: list[float] = []
        self._began = time.monotonic()

    def now(self) -> float:
        return (time.monotonic() - self._began) * self.speed

    async def until(self, moment: float) -> None:
        """Sleeps. Callers add up moments, so that what one sleep is late the next one is shorter."""
        await asyncio.sleep(max(0.0, (moment - self.now()) / self.speed))
        self.lateness.append(self.now() - moment)
