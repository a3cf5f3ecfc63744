"""Ends work early for one stated reason: the client has left, a deadline has passed, or the process is shutting down."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from gateway.core.background import KeptTask

CHECK_EVERY_S = 0.1
NEVER = float("inf")

Reason = Callable[[], Exception]


class CancelScope:
    """`with CancelScope() as scope:` — after `scope.interrupt(reason)` the block raises `reason` at its next wait.

    As in asyncio.timeout, the block's task is cancelled and uncancelled at the end of the block, so that scopes nest. A
    deadline is a number, and its timer is set again only when it fires: to move a deadline costs one assignment.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._reason: Exception | None = None
        self._due = NEVER
        self._expired: Reason | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._loop = self._task.get_loop()
        self._cancelling = self._task.cancelling()
        return self

    def interrupt(self, reason: Exception) -> None:
        if self._task is not None and self._reason is None:
            self._reason = reason
            self._task.cancel()

    def within(self, seconds: float, expired: Reason) -> None:
        """After `seconds`, interrupts with the error that `expired` returns, unless the deadline is moved or removed before."""
        self._due = self._loop.time() + seconds
        self._expired = expired
        if self._timer is not None and self._timer.when() > self._due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._due, self._check)

    def without_deadline(self) -> None:
        self._due = NEVER

    def _check(self) -> None:
        self._timer = None
        if self._loop.time() >= self._due and self._expired is not None:
            self.interrupt(self._expired())
        elif self._due != NEVER:
            self._timer = self._loop.call_at(self._due, self._check)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self._reason is None or task is None:
            return
        cancelled_by_others = task.uncancel() > self._cancelling
        if kind is not None and issubclass(kind, asyncio.CancelledError) and not cancelled_by_others:
            try:
                raise self._reason from None
            finally:
                # Its traceback refers to the block, and the block to this scope: a cycle for the garbage collector.
                self._reason = None


class CallScope(CancelScope):
    """A scope without a timer of its own: a ScopeTimer checks it ten times a second.

    It has a deadline for the whole block and another for the current wait.
    """

    def __init__(self, active: "set[CallScope]") -> None:
        super().__init__()
        self._active = active
        self._end = NEVER
        self._too_long: Reason | None = None
        self._on_expiry: Callable[[Exception], None] | None = None

    def __enter__(self) -> Self:
        self._active.add(self)
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._active.discard(self)
        super().__exit__(kind, error, traceback)

    def within(self, seconds: float, expired: Reason, *, on_expiry: Callable[[Exception], None] | None = None) -> None:
        """As in CancelScope; if given, `on_expiry` gets the error of `expired`, and the block is not interrupted."""
        self._due, self._expired, self._on_expiry = self._loop.time() + seconds, expired, on_expiry

    def end_within(self, seconds: float, too_long: Reason) -> None:
        self._end, self._too_long = self._loop.time() + seconds, too_long

    def check(self, now: float) -> None:
        if now >= self._due and self._expired is not None:
            self._due = NEVER
            (self._on_expiry or self.interrupt)(self._expired())
        elif now >= self._end and self._too_long is not None:
            self.interrupt(self._too_long())


class ScopeTimer:
    """`async with ScopeTimer() as scope_timer:` — checks the deadlines of its scopes, and can end them all."""

    def __init__(self) -> None:
        self._active: set[CallScope] = set()
        self.background = KeptTask(self._keep_checking, "deadlines")

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()

    def call_scope(self) -> CallScope:
        return CallScope(self._active)

    def end_all(self, reason: Reason) -> None:
        for scope in list(self._active):
            scope.interrupt(reason())

    async def _keep_checking(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            now = loop.time()
            for scope in list(self._active):
                scope.check(now)
