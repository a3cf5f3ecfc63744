"""A backend's circuit breaker: after a few failures in a row the backend is skipped for a while; then one request tries it."""

import time
from collections.abc import Callable

FAILURES_UNTIL_OPEN = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0


class CircuitBreaker:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._probing = False
        self._succeeded_at = 0.0
        self._doubted_by: set[str] = set()

    @property
    def state(self) -> str:
        if self._failures < FAILURES_UNTIL_OPEN:
            return "closed"
        return "half-open" if self._clock() >= self._open_until else "open"

    @property
    def lets_pass(self) -> bool:
        return self.state == "closed" or (self.state == "half-open" and not self._probing)

    @property
    def open_for_s(self) -> float:
        """Seconds until a request tries it again."""
        return max(0.0, self._open_until - self._clock()) if self.state == "open" else 0.0

    def attempt(self) -> None:
        """A request is sent; in the half-open state it is the only probe."""
        self._probing = self.state == "half-open"

    def succeeded(self) -> None:
        self._failures, self._pause_s, self._probing = 0, FIRST_PAUSE_S, False
        self._succeeded_at = self._clock()
        if self._doubted_by:
            self._doubted_by = set()

    def has_succeeded_since(self, moment: float) -> bool:
        return self._succeeded_at > moment

    def abandoned(self) -> None:
        """The request ended for reasons that have nothing to do with the backend."""
        self._probing = False

    def doubted(self, caller: str) -> None:
        """It failed, but so did all others: the request may be wrong. Counts once for each caller until a success."""
        if caller not in self._doubted_by and len(self._doubted_by) < FAILURES_UNTIL_OPEN:
            self._doubted_by.add(caller)
            self.failed()

    def failed(self) -> None:
        was_open = self.state != "closed"
        self._failures += 1
        self._probing = False
        if self._failures >= FAILURES_UNTIL_OPEN:
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S) if was_open else FIRST_PAUSE_S
            self._open_until = self._clock() + self._pause_s
