"""Which models the backends run now: they are asked when somebody asks, each once for all who ask at about the same time."""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Self

from gateway.core.background import TaskGroup
from gateway.dialects import model_entries
from gateway.fleet import discovery
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault

LOG = logging.getLogger("gateway.running")
FRESH_S = 1.0
# So long a caller waits; who is slower is heard of by the next.
WAIT_S = 0.3
DEADLINE_S = 2.0
# Not asked again for so long after it did not answer.
SILENT_S = 10.0
MOST_A_SECOND = 50

Entries = tuple[dict[str, Any], ...]


class RunningModels:
    """`async with RunningModels(...)`: asks the backends of kind `ollama`, the only ones that tell what they run."""

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._backends = [backend for backend in backends if backend.kind == "ollama"]
        self._fresh_s = max(FRESH_S, len(self._backends) / MOST_A_SECOND)
        self._told: dict[str, tuple[float, Entries]] = {}
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
        return self._told

    async def _ask(self, backend: Backend) -> None:
        wait_s = SILENT_S
        try:
            async with asyncio.timeout(DEADLINE_S):
                entries = await discovery.ask(backend, "/api/ps", model_entries.read_tags)
            self._told[backend.name] = time.time(), entries
            wait_s = self._fresh_s
        except (BackendFault, TimeoutError):
            self._told.pop(backend.name, None)
        except Exception:
            # Said by nobody yet, and of no other backend.
            LOG.exception("backend %s could not be asked what it runs", backend.name)
            self._told.pop(backend.name, None)
        finally:
            self._ask_after[backend.name] = time.monotonic() + wait_s
            del self._asking[backend.name]
