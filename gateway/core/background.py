"""Background tasks: endless work is restarted whatever it raises, and each task is ended by its owner."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

LOG = logging.getLogger("gateway.tasks")
ATTEMPTS, ATTEMPT_S = 5, 1.0
AGAIN_S = 1.0
# After this time without a failure a task counts as healthy, and its next failure is logged again.
FAILING_S = 120.0


class KeptTask:
    """Work that runs until its owner ends it; a failure is logged once with its traceback, and the work restarts."""

    def __init__(self, work: Callable[[], Awaitable[object]], name: str) -> None:
        self._work, self.name = work, name
        self._task: asyncio.Task[None] | None = None
        self._failure = ""
        self._failed_at = -FAILING_S

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep_going(), name=self.name)
        self._task.add_done_callback(self._check_end)

    async def end(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            await end([task])

    @property
    def state(self) -> str:
        """`ok`, `dead`, or the class of the error that it failed with in the last two minutes."""
        if self._task is not None and self._task.done():
            return "dead"
        return self._failure if time.monotonic() - self._failed_at < FAILING_S else "ok"

    async def _keep_going(self) -> None:
        while True:
            try:
                await self._work()
            except Exception as wrong:  # noqa: BLE001 # logged below
                self._note(wrong)
            await asyncio.sleep(AGAIN_S)

    def _note(self, wrong: Exception) -> None:
        is_known, self._failure = self.state == type(wrong).__name__, type(wrong).__name__
        self._failed_at = time.monotonic()
        if not is_known:
            LOG.error("the task %r failed; restarting", self.name, exc_info=wrong)

    def _check_end(self, task: asyncio.Task[None]) -> None:
        # Not ended by its owner: a library has cancelled it, or the process is ending.
        if task is self._task:
            LOG.error("the task %r ended unexpectedly", self.name)


class TaskGroup:
    """Tasks that end by themselves: their failures are logged, and the owner ends those that still run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=self._name)
        self._tasks.add(task)
        task.add_done_callback(self._check_end)
        return task

    async def end(self) -> None:
        await end(self._tasks)

    def _check_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (wrong := task.exception()) is not None:
            LOG.error("the task %r failed", self._name, exc_info=wrong)


def retrieve(ended: "asyncio.Future[Any]") -> None:
    """A callback for futures whose failure does not matter; asyncio would log it as never retrieved."""
    if not ended.cancelled():
        ended.exception()


async def end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancels and waits, several times, because some libraries swallow a cancellation that arrives with a time-out."""
    pending = {task for task in tasks if not task.done()}
    for _ in range(ATTEMPTS):
        if not pending:
            return
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=ATTEMPT_S)
    for task in pending:
        LOG.error("the task %r could not be ended", task.get_name())
