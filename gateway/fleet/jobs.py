"""Work for operators that takes long, on several backends at once, with its progress; the end of a job ends its work."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Self

from gateway.core.background import TaskGroup
from gateway.fleet.backends.http_client import BackendFault

LOG = logging.getLogger("gateway.jobs")
# How often progress is reported: at least, and at most.
BEAT_S, SHORTEST_BEAT_S = 1.0, 0.25
RUNNING, DONE, FAILED = "running", "done", "failed"

Row = dict[str, Any]
Rows = list[Row]


class TaskFailed(Exception):
    """A task of a job cannot be done; the message says why."""


class Progress:
    """How far a task on one backend is. Its row has `state`, `detail` in words, the seconds so far, and what `note` adds."""

    def __init__(self, backend: str, model: str, changed: asyncio.Event, facts: Row) -> None:
        self.backend, self.model, self._changed, self._facts = backend, model, changed, facts
        self.state, self.detail = RUNNING, ""
        self._began, self._seconds = time.monotonic(), 0.0

    @property
    def row(self) -> Row:
        seconds = time.monotonic() - self._began if self.state == RUNNING else self._seconds
        named = {"backend": self.backend, "model": self.model, "state": self.state, "detail": self.detail}
        return {**named, "seconds": round(seconds, 1), **self._facts}

    def note(self, detail: str = "", **facts: Any) -> None:
        self.detail = detail or self.detail
        self._facts |= facts
        self._changed.set()

    def end(self, state: str, detail: str = "") -> None:
        self.state, self._seconds = state, time.monotonic() - self._began
        self.note(detail)


Task = Callable[[Progress], Awaitable[None]]


class Job:
    """`async with job:` does its tasks at the same time; one that fails ends no other.

    `finish` is called with the backends on which all went well, before the last progress is reported.
    """

    def __init__(self, finish: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        self._finish = finish
        self._changed = asyncio.Event()
        self._planned: list[tuple[Progress, Task]] = []
        self._running: list[asyncio.Task[None]] = []
        self._tasks = TaskGroup("job")

    def add(self, backend: str, model: str, task: Task, **facts: Any) -> None:
        """`facts` are further fields of its row, with their first values."""
        self._planned.append((Progress(backend, model, self._changed, facts), task))

    async def __aenter__(self) -> Self:
        self._running = [self._tasks.start(self._run(progress, task)) for progress, task in self._planned]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.end()

    @property
    def rows(self) -> Rows:
        return [progress.row for progress, _ in self._planned]

    async def progress(self) -> AsyncIterator[Rows]:
        """All rows: at each change, at least once a second, and when all tasks have ended."""
        while pending := [task for task in self._running if not task.done()]:
            yield self.rows
            await asyncio.wait(pending, timeout=SHORTEST_BEAT_S)
            await self._next_change()
        done = {row["backend"] for row in self.rows if row["state"] == DONE}
        await self._finish(sorted(done))
        yield self.rows

    async def _next_change(self) -> None:
        try:
            async with asyncio.timeout(BEAT_S):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    async def _run(self, progress: Progress, task: Task) -> None:
        try:
            await task(progress)
        except (TaskFailed, BackendFault) as failed:
            progress.end(FAILED, str(failed))
        except asyncio.CancelledError:
            progress.end(FAILED, "was ended early")
            raise
        except Exception:
            LOG.exception("a task for the backend %s failed", progress.backend)
            progress.end(FAILED, "failed inside the gateway: the log says why")
        else:
            progress.end(DONE)


def failed(rows: Rows) -> list[str]:
    """The backends on which a task has failed."""
    return list(dict.fromkeys(row["backend"] for row in rows if row["state"] == FAILED))


class Changes:
    """Which rows differ from those before; the seconds of a task that runs are no difference."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Row] = {}

    def among(self, rows: Rows) -> Rows:
        found = []
        for row in rows:
            name, fields = (row["backend"], row["model"]), {**row, "seconds": None}
            if self._known.get(name) != fields:
                found.append(row)
            self._known[name] = fields
        return found
