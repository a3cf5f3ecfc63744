"""How many connections of clients a process keeps open, and which give way to others where all places are taken."""

import logging
import time
from collections.abc import Collection
from heapq import nsmallest
from typing import Protocol

try:
    import resource
except ImportError:  # not on Windows, which has no such limit
    resource = None  # type: ignore[assignment]

LOG = logging.getLogger("gateway.server")
MOST_DESCRIPTORS = 65_536
# For the stores, lists of models, logs and the like.
RESERVED = 64
# Beyond all places, for those who ask whether the process is alive.
EXTRA = 16
LOGGED_EVERY_S = 60.0
# Requests that wait behind an unread answer end with their connections beyond it; bodies that are read have their own bounds.
MOST_HELD_BY_ALL = 64 * 2**20


class LimitedConnection(Protocol):
    @property
    def is_leaving(self) -> bool:
        """Whether it has ended, and its descriptor is about to be free."""

    @property
    def idle_since(self) -> float | None:
        """Since when it has nothing to do, by the loop's clock; None where a request is under way."""

    @property
    def has_unsent(self) -> bool:
        """Whether its client has not yet taken all that was sent."""

    def give_way(self) -> None:
        """Ends it."""


class ConnectionLimit:
    def __init__(self, most: int = MOST_DESCRIPTORS) -> None:
        self.most, self.held = most, 0
        self._logged_at = float("-inf")

    def admits(self, comer: LimitedConnection, taken: Collection[LimitedConnection]) -> bool:
        """Whether there is a place for one who has just come, among the `taken`; some that were idle for longest give way."""
        if len(taken) <= self.most:
            return True
        staying = [place for place in taken if not place.is_leaving]
        idle = ((place, since) for place in staying if place is not comer and (since := place.idle_since) is not None)
        # Several at once, for each look at all of them takes its time.
        wanted = max(len(staying) - self.most, self.most // 16)
        longest = nsmallest(wanted, idle, key=lambda found: (found[0].has_unsent, found[1]))
        for place, _ in longest:
            place.give_way()
        if time.monotonic() - self._logged_at > LOGGED_EVERY_S:
            self._logged_at = time.monotonic()
            LOG.warning(
                "all %d places for connections are taken: %s", self.most, "idle ones end" if longest else "none is idle"
            )
        return len(staying) - len(longest) <= self.most

    def hold(self, more: int) -> bool:
        """Whether all connections together may hold so many bytes more of what has arrived and is not read yet."""
        self.held += more
        return self.held <= MOST_HELD_BY_ALL

    def admits_extra(self, taken: Collection[LimitedConnection]) -> bool:
        return sum(not place.is_leaving for place in taken) <= self.most + EXTRA


def most_connections() -> int:
    """Half of the descriptors, for each request may need another one to its backend; first takes as many as are allowed."""
    if resource is None:
        return MOST_DESCRIPTORS // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    descriptors = MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MOST_DESCRIPTORS)
    return max(EXTRA, (descriptors - RESERVED) // 2)
