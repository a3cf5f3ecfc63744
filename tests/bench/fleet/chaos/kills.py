"""What happens to the fleet meanwhile, at random: processes, machines and Redis are killed, stopped and started again."""

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gateway.fleet.board import LEASE_MS
from tests.bench.fleet.chaos.fleet import Fleet

LEASE_S = LEASE_MS / 1000
Act = Literal["worker", "box", "redis"]


@dataclass
class Event:
    """`began` and `ended` in seconds since 1970."""

    kind: str
    what: str
    began: float
    ended: float = 0.0


@dataclass
class Kills:
    """`outage_every_s` is from the end of one outage of Redis to the next; with `acts` these happen instead, in this order."""

    fleet: Fleet
    chance: random.Random
    until: float
    pause_s: tuple[float, float] = (1.0, 8.0)
    outage_every_s: float = 120.0
    longest_stop_s: float = LEASE_S + 4
    acts: Sequence[Act] = ()
    events: list[Event] = field(default_factory=list)

    async def run(self) -> None:
        for act in self.acts:
            await asyncio.sleep(self.chance.uniform(*self.pause_s))
            if act == "redis":
                await self._during("redis", "frozen", self._redis)
            else:
                await (self._kill_worker if act == "worker" else self._kill_box)()
        if not self.acts:
            await self._at_random()

    async def _at_random(self) -> None:
        next_outage = time.time() + self.outage_every_s
        while (now := time.time()) < self.until:
            if now >= next_outage:
                await self._during("redis", self.chance.choice(("killed", "frozen")), self._redis)
                next_outage = time.time() + self.outage_every_s
            else:
                acts = (self._kill_worker, self._stop_worker, self._kill_box, self._end_gateway, self._kill_gateway)
                await self.chance.choices(acts, weights=(5, 2, 4, 1, 1))[0]()
            await asyncio.sleep(self.chance.uniform(*self.pause_s))

    async def _during(self, kind: str, what: str, work: Callable[[str], Awaitable[None]]) -> None:
        event = Event(kind, what, time.time())
        self.events.append(event)
        await work(what)
        event.ended = time.time()

    async def _redis(self, what: str) -> None:
        stores, seconds = self.fleet.stores, self.chance.uniform(0.3, self.longest_stop_s)
        assert stores.redis.process
        if what == "killed":
            stores.redis.process.kill()
            stores.redis.process.wait()
            await asyncio.sleep(seconds / 2)
            # Not in a thread: it is killed with the thread that started it.
            stores.start(stores.redis)
        else:
            with stores.frozen(stores.redis):
                await asyncio.sleep(seconds)

    async def _kill_worker(self) -> None:
        gateway = self.chance.choice(self.fleet.gateways)
        if pids := gateway.workers():
            pid = self.chance.choice(pids)
            self.events.append(Event("worker", "killed", time.time(), time.time()))
            os.kill(pid, signal.SIGKILL)
            gateway.stopped.discard(pid)

    async def _stop_worker(self) -> None:
        """For a moment, or for longer than its lease."""
        gateway = self.chance.choice(self.fleet.gateways)
        if not (pids := gateway.workers()):
            return

        async def stop(what: str) -> None:
            pid = self.chance.choice(pids)
            gateway.stopped.add(pid)
            os.kill(pid, signal.SIGSTOP)
            longest = self.longest_stop_s
            await asyncio.sleep(self.chance.uniform(LEASE_S, longest) if what == "long" else self.chance.uniform(0.2, 3))
            gateway.wake()

        await self._during("worker stopped", self.chance.choice(("short", "long")), stop)

    async def _kill_box(self) -> None:
        box = self.chance.choice(self.fleet.boxes)

        async def restart(what: str) -> None:
            await asyncio.to_thread(box.kill)
            await asyncio.sleep(self.chance.uniform(0.2, min(5, self.longest_stop_s)))
            await asyncio.to_thread(box.start)

        await self._during("box", box.config.name, restart)

    async def _end_gateway(self) -> None:
        await self._restart_gateway(signal.SIGTERM)

    async def _kill_gateway(self) -> None:
        await self._restart_gateway(signal.SIGKILL)

    async def _restart_gateway(self, number: signal.Signals) -> None:
        gateway = self.chance.choice(self.fleet.gateways)

        async def restart(what: str) -> None:
            await asyncio.to_thread(gateway.end, number)
            await asyncio.to_thread(gateway.start)

        await self._during("gateway", number.name, restart)
