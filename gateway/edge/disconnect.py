"""Finds out whether a client that has closed its sending side has left, or still waits for its answer."""

import asyncio
import select
from collections.abc import Callable

POLL_EVERY_S = 0.25
ENDED = getattr(select, "POLLRDHUP", 0)  # Linux; elsewhere the end is noticed only by reading
RESET = select.POLLHUP | select.POLLERR | select.POLLNVAL


class DisconnectPoll:
    """Polls a socket until `stop` or until `gone` was called.

    The two cases differ only after something is sent: the system of a client that has gone answers with a reset. `probe`
    sends it, once, and returns False if it cannot; then the client counts as gone.
    """

    def __init__(self, descriptor: int, probe: Callable[[], bool], gone: Callable[[], None]) -> None:
        self._probe, self._gone = probe, gone
        self._poll = select.poll()
        self._poll.register(descriptor, ENDED)
        self._has_probed = False
        self.has_ended = False
        self._begin_wait()

    def stop(self) -> None:
        self._timer.cancel()

    def _begin_wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(POLL_EVERY_S, self._check)

    def _check(self) -> None:
        events = self._events()
        self.has_ended = self.has_ended or bool(events & ENDED)
        if events & RESET or (self.has_ended and not self._has_probed and not self._probe()):
            self._gone()
        else:
            self._has_probed = self.has_ended
            self._begin_wait()

    def _events(self) -> int:
        return next((events for _, events in self._poll.poll(0)), 0)
