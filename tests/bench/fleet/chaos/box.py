"""`python -m tests.bench.fleet.chaos.box CONFIG LOG PORT`: one machine that writes down its calls, and when it has too many.

A line of its log is a JSON object: `at` in seconds since 1970, `kind`, and `id` of a call or `model` and how `many` at once.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web

from tests.bench.fleet.boxes import BoxServer, listening
from tests.bench.fleet.clock import Clock
from tests.bench.fleet.machine import Machine
from tests.bench.fleet.scenario import BoxConfig
from tests.bench.fleet.vram import Model, Vram

# Who closes a connection and who opens the next are different processes: the machine may see that in the wrong order.
BRIEF_S = 0.1
Note = Callable[..., None]


@dataclass
class WatchedModel(Model):
    on_enter: Callable[["WatchedModel"], None] = lambda model: None

    def enter(self) -> None:
        super().enter()
        self.on_enter(self)


class WatchedVram(Vram):
    """As Ollama does, it breaks off a load if nobody waits for it any more."""

    def __init__(self, clock: Clock, config: BoxConfig, on_load: Callable[[Model], None]) -> None:
        super().__init__(clock, config.vram, config.disk, config.slots, config.parallel_loads)
        self._on_load = on_load

    @property
    def wanted(self) -> int:
        return self._wanted

    def leave(self, model: Model) -> None:
        super().leave(model)
        if model.loading is not None and not model.calls:
            model.loading.cancel()

    async def _load(self, model: Model) -> None:
        self._on_load(model)
        try:
            await super()._load(model)
        finally:
            model.occupies = model.is_loaded


class WatchedMachine(Machine):
    def __init__(self, config: BoxConfig, clock: Clock, note: Note) -> None:
        super().__init__(config, clock)
        self._note = note
        self.vram = self._watched = WatchedVram(clock, config, self._loads)
        self.models = {name: WatchedModel(name, size, on_enter=self._enters) for name, size in config.models.items()}
        for model in self.models.values():
            self.vram.add(model)
        self._checks: set[asyncio.Task[None]] = set()

    def _enters(self, model: Model) -> None:
        if model.calls > self.config.slots:
            self._check("calls", model, lambda: model.calls, self.config.slots)

    def _loads(self, model: Model) -> None:
        # This one is counted a moment later.
        if self._watched.wanted:
            self._check("loads", model, lambda: self._watched.wanted, 1)

    def _check(self, kind: str, model: Model, count: Callable[[], int], most: int) -> None:
        task = asyncio.create_task(self._check_soon(kind, model, count, most))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def _check_soon(self, kind: str, model: Model, count: Callable[[], int], most: int) -> None:
        at = time.time()
        await asyncio.sleep(BRIEF_S)
        many = count()
        self._note(kind if many > most else f"brief {kind}", at=at, model=model.name, many=many)


class WatchedServer(BoxServer):
    def __init__(self, machine: WatchedMachine, scale: float, note: Note) -> None:
        super().__init__(machine, scale)
        self._note = note

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        call = request.headers.get("X-Request-ID", "")
        self._note("begins", id=call)
        try:
            return await super()._answer(request)
        finally:
            self._note("ends", id=call)


async def serve(config: BoxConfig, log: Path, port: int, speed: float) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def note(kind: str, **more: Any) -> None:
        # At once: this process may be killed at any moment.
        os.write(file, json.dumps({"at": time.time(), "kind": kind, **more}).encode() + b"\n")

    machine = WatchedMachine(config, Clock(speed), note)
    async with listening(WatchedServer(machine, 1 / speed, note).application(), port) as url:
        print(json.dumps(url), flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=json.loads)
    parser.add_argument("log", type=Path)
    parser.add_argument("port", type=int)
    parser.add_argument("--speed", type=float, required=True)
    found = parser.parse_args()
    uvloop.run(serve(BoxConfig(**found.config), found.log, found.port, found.speed))


if __name__ == "__main__":
    main()
