"""The limit of client connections in a process, and which idle connections are closed for new ones."""

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
# Descriptors for the stores, model lists, logs and the like.
RESERVED = 64
# Connections above the limit, for health checks.
EXTRA = 16
LOGGED_EVERY_S = 60.0
# Above it, connections are closed whose next requests wait for an unread answer; bodies in progress have their own bounds.
MOST_HELD_BY_ALL = 64 * 2**20


class LimitedConnection(Protocol):
    @property
    def is_leaving(self) -> bool:
        """Whether it has ended, so that its descriptor will soon be free."""

    @property
    def idle_since(self) -> float | None:
        """Since when it has been idle, by the loop's clock; None while a request is in progress."""

    @property
    def has_unsent(self) -> bool:
        """Whether its client has not read all that was sent."""

    def give_way(self) -> None:
        """Closes it at once."""


class ConnectionLimit:
    def __init__(self, most: int = MOST_DESCRIPTORS) -> None:
        self.most, self.held = most, 0
        self._logged_at = float("-inf")

    def admits(self, new: LimitedConnection, taken: Collection[LimitedConnection]) -> bool:
        """Whether the `new` connection, one of `taken`, may stay; those that have been idle longest are closed for it."""
        if len(taken) <= self.most:
            return True
        staying = [connection for connection in taken if not connection.is_leaving]
        idle = (
            (connection, since)
            for connection in staying
            if connection is not new and (since := connection.idle_since) is not None
        )
        # Several at once, because each search through all of them takes time.
        wanted = max(len(staying) - self.most, self.most // 16)
        longest = nsmallest(wanted, idle, key=lambda found: (found[0].has_unsent, found[1]))
        for connection, _ in longest:
            connection.give_way()
        if time.monotonic() - self._logged_at > LOGGED_EVERY_S:
            self._logged_at = time.monotonic()
            LOG.warning("all %d connections are in use: %s", self.most, "idle ones are closed" if longest else "none is idle")
        return len(staying) - len(longest) <= self.most

    def hold(self, more: int) -> bool:
        """Adds bytes that have arrived and are not read yet. Returns whether all connections together may hold so many."""
        self.held += more
        return self.held <= MOST_HELD_BY_ALL

    def admits_extra(self, taken: Collection[LimitedConnection]) -> bool:
        return sum(not connection.is_leaving for connection in taken) <= self.most + EXTRA


def most_connections() -> int:
    """Half of the descriptors, because each request may need another one to its backend; raises the limit as far as allowed."""
    if resource is None:
        return MOST_DESCRIPTORS // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    descriptors = MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else min(soft, MOST_DESCRIPTORS)
    return max(EXTRA, (descriptors - RESERVED) // 2)
