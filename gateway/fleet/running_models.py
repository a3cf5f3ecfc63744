"""Which models the backends run now: polled on demand, once for all requests that come at about the same time."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Self

from gateway.core.background import TaskGroup
from gateway.dialects import model_entries
from gateway.fleet import discovery
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.catalog import Entries

LOG = logging.getLogger("gateway.running")
FRESH_S = 1.0
# How long a request waits; slower answers are for the next request.
WAIT_S = 0.3
DEADLINE_S = 2.0
# How long a backend that did not answer is not polled again.
SILENT_S = 10.0
MOST_A_SECOND = 50


class RunningModels:
    """`async with RunningModels(...)`: asks the backends of kind `ollama`; only these report what they run."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._backends = [backend for backend in backends if backend.kind == "ollama"]
        self._fresh_s = max(FRESH_S, len(self._backends) / MOST_A_SECOND)
        self._running: dict[str, tuple[float, Entries]] = {}
        self._ask_after: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._tasks = TaskGroup("running models")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.end()

    async def now(self) -> Mapping[str, tuple[float, Entries]]:
        """By backend: when it answered last, in seconds since the epoch, and what it runs. Waits 0.3 s at most."""
        now = time.monotonic()
        for backend in self._backends:
            name = backend.name
            if name not in self._asking and backend.breaker.lets_pass and now >= self._ask_after.get(name, 0.0):
                self._asking[name] = self._tasks.start(self._ask(backend))
        if self._asking:
            await asyncio.wait(set(self._asking.values()), timeout=WAIT_S)
        return self._running

    async def _ask(self, backend: Backend) -> None:
        wait_s = SILENT_S
        try:
            async with asyncio.timeout(DEADLINE_S):
                entries = await discovery.ask(backend, "/api/ps", model_entries.read_tags)
            self._running[backend.name] = time.time(), entries
            wait_s = self._fresh_s
        except (BackendFault, TimeoutError):
            self._running.pop(backend.name, None)
        except Exception:
            # Unexpected: logged here, because nothing awaits this task's result; other backends are not affected.
            LOG.exception("backend %s could not be polled for its running models", backend.name)
            self._running.pop(backend.name, None)
        finally:
            self._ask_after[backend.name] = time.monotonic() + wait_s
            del self._asking[backend.name]
