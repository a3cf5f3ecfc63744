"""Ends a piece of work early, for one of several reasons that stay distinct: client gone, deadline passed, shutting down."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Guard:
    """`with Guard() as guard:` — whoever calls `guard.interrupt(reason)` makes the block raise `reason` at its next wait.

    The block's task is cancelled and the cancellation taken back at the block's end, as asyncio.timeout does it, so guards
    nest; `living` holds it meanwhile. A deadline is kept as a number and its timer is set anew only when it fires: moving it
    costs an assignment.
    """

    def __init__(self, living: "set[Guard] | None" = None) -> None:
        self._living = living
        self._task: asyncio.Task[object] | None = None
        self._reason: Exception | None = None
        self._due = 0.0
        self._overdue: Callable[[], Exception] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._loop = self._task.get_loop()
        self._cancelling = self._task.cancelling()
        if self._living is not None:
            self._living.add(self)
        return self

    def interrupt(self, reason: Exception) -> None:
        if self._task is not None and self._reason is None:
            self._reason = reason
            self._task.cancel()

    def within(self, seconds: float, overdue: Callable[[], Exception]) -> None:
        """From now on, interrupt with what `overdue` makes unless told otherwise within `seconds`."""
        self._due = self._loop.time() + seconds
        self._overdue = overdue
        if self._timer is not None and self._timer.when() > self._due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._due, self._look)

    def without_deadline(self) -> None:
        self._overdue = None

    def _look(self) -> None:
        self._timer = None
        if self._overdue is None:
            return
        if self._loop.time() >= self._due:
            self.interrupt(self._overdue())
        else:
            self._timer = self._loop.call_at(self._due, self._look)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        task, self._task = self._task, None
        if self._living is not None:
            self._living.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._reason is None or task is None:
            return
        cancelled_by_others = task.uncancel() > self._cancelling
        if kind is not None and issubclass(kind, asyncio.CancelledError) and not cancelled_by_others:
            raise self._reason from None
