"""What each backend has loaded: one of the processes asks each backend for it, Redis keeps it, every process knows it."""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Self

from gateway.core.background import KeptTask, TaskGroup
from gateway.dialects import model_entries
from gateway.dialects.model_names import canonical
from gateway.fleet import discovery, llama_server, residents
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.catalog import Catalog, Entries
from gateway.fleet.residents import MOST_RESIDENTS, BackendLoad, Listed, Resident
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_connection import RedisConnection
from gateway.stores.redis_shards import ShardConnections

LOG = logging.getLogger("gateway.load")
JITTER = random.Random()  # noqa: S311 # not a secret  # nosec B311
# In intervals: how long an answer may take, and how long a backend that did not answer is left alone.
DEADLINE, SILENT = 5, 5
LONGEST_DEADLINE_S, LONGEST_SILENCE_S = 5.0, 10.0
# For clients that ask what is running: how old an answer may be, how long they wait for a newer one, and how many backends
# are asked a second.
FRESH_S, WAIT_S, MOST_A_SECOND = 1.0, 0.3, 50
# A clock that differs by less is taken for ours, which is more precise than the date of an answer.
SAME_CLOCK_S = 3.0


class Load:
    """`async with Load(...)`: `view()` is the newest that is known; reading it never waits for a backend."""

    def __init__(
        self, backends: Iterable[Backend], connections: ShardConnections, catalog: Callable[[], Catalog], *, every_s: float
    ) -> None:
        self._backends = {backend.name: backend for backend in backends}
        self._connections, self._catalog, self._every_s = connections, catalog, every_s
        self._deadline_s = min(LONGEST_DEADLINE_S, DEADLINE * every_s)
        self._silent_s = min(LONGEST_SILENCE_S, SILENT * every_s)
        self._fresh_s = max(FRESH_S, len(self._backends) / MOST_A_SECOND)
        # The backends that load models on demand, as far as they are known.
        self.known: dict[str, BackendLoad] = {}
        # For clients: what a backend of kind `ollama` answered to this process.
        self._entries: dict[str, Entries] = {}
        # Until when its answer is new enough for clients, and until when a backend that did not answer is left alone.
        self._fresh_until: dict[str, float] = {}
        self._silent_until: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._again: set[str] = set()
        self._tasks = TaskGroup("loaded models")
        self.background = KeptTask(self._keep_asking, "loaded models")

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()
        self._again.clear()
        await self._tasks.end()

    def view(self) -> dict[str, BackendLoad]:
        """All backends; those that load no models on demand have theirs always."""
        found = {}
        for snapshot in self._catalog().snapshots:
            name = snapshot.backend
            if snapshot.kind == "ollama" or snapshot.swaps:
                found[name] = self.known.get(name) or BackendLoad(name, swaps=True)
            else:
                names = (entry["name"] for entry in snapshot.models[:MOST_RESIDENTS])
                always = tuple(Resident(canonical(each).canonical) for each in names)
                found[name] = BackendLoad(name, False, always, at=snapshot.answered_at, error=snapshot.error)
        return found

    def has(self, backend: str, model: str) -> bool:
        """Whether a backend that loads models on demand has this one loaded, as far as is known."""
        found = self.known.get(backend)
        return found is not None and any(resident.model == model for resident in found.residents)

    def look_soon(self, backend: str) -> None:
        """Asks a backend at once, or again as soon as it has answered the question that is in progress."""
        if backend in self._asking:
            self._again.add(backend)
        elif found := next((one for one in self._asked() if one.name == backend), None):
            self._start(found)

    async def running(self) -> Mapping[str, Entries]:
        """By backend, what those of kind `ollama` run now, as they describe it. Waits 0.3 s at most; for clients."""
        now = time.monotonic()
        for backend in self._backends.values():
            if backend.kind == "ollama" and self._may_ask(backend) and now >= self._fresh_until.get(backend.name, 0.0):
                self._start(backend)
        if self._asking:
            await asyncio.wait(set(self._asking.values()), timeout=WAIT_S)
        return self._entries

    def _asked(self) -> list[Backend]:
        """The backends that load and unload models."""
        routers = {snapshot.backend for snapshot in self._catalog().snapshots if snapshot.swaps}
        return [backend for backend in self._backends.values() if backend.kind == "ollama" or backend.name in routers]

    async def _keep_asking(self) -> None:
        while True:
            for backend in await self._turns(self._asked()):
                self._start(backend)
            await asyncio.sleep(self._every_s * JITTER.uniform(0.9, 1.0))

    async def _turns(self, asked: Sequence[Backend]) -> list[Backend]:
        """The backends that this process asks now; also reads what others have found out. While Redis is unavailable, each
        process asks all."""
        if not asked:
            return []
        names = [name for backend in asked for name in (self._turn(backend), redis_keys.fleet_box(backend.name))]
        values = [int(self._deadline_s * 1000), *(int(self._may_ask(backend)) for backend in asked)]
        try:
            found = await self._home().run("poll_turns", names, values)
        except RedisUnavailable:
            return [backend for backend in asked if self._may_ask(backend)]
        for backend, box in zip(asked, found[1::2], strict=True):
            self._take(backend.name, box)
        return [backend for backend, is_ours in zip(asked, found[::2], strict=True) if is_ours]

    def _may_ask(self, backend: Backend) -> bool:
        return backend.breaker.lets_pass and time.monotonic() >= self._silent_until.get(backend.name, 0.0)

    def _start(self, backend: Backend) -> None:
        if backend.name not in self._asking:
            self._asking[backend.name] = self._tasks.start(self._ask(backend))

    async def _ask(self, backend: Backend) -> None:
        name = backend.name
        sent_ms, sent = await self._redis_ms(), time.time()
        try:
            async with asyncio.timeout(self._deadline_s):
                listed = await self._list(backend)
            await self._store(backend, listed, sent_ms, sent)
            self._fresh_until[name] = time.monotonic() + self._fresh_s
        except BackendFault as fault:
            await self._note_fault(backend, str(fault), sent_ms, is_gone=fault.reason == "unreachable")
        except TimeoutError:
            # While it loads a model, an Ollama of a newer version does not answer.
            await self._note_fault(backend, "" if self._load_of(backend).loading else "poll_timeout", sent_ms)
        except Exception as wrong:
            # Unexpected: logged here, because nothing awaits this task's result; other backends are not affected.
            LOG.exception("backend %s could not be asked what it has loaded", name)
            await self._note_fault(backend, type(wrong).__name__, sent_ms)
        finally:
            del self._asking[name]
            if name in self._again:
                self._again.discard(name)
                self._start(backend)

    async def _list(self, backend: Backend) -> list[Listed]:
        if backend.kind != "ollama":
            return residents.of_router(await discovery.ask(backend, "/v1/models", llama_server.read_router))
        entries, date = await discovery.ask_with_date(backend, "/api/ps", model_entries.read_tags)
        self._entries[backend.name] = entries
        return residents.of_ollama(entries, _clock_of(date))

    async def _store(self, backend: Backend, listed: Sequence[Listed], sent_ms: int, sent: float) -> None:
        versions = {snapshot.backend: snapshot.version for snapshot in self._catalog().snapshots}
        is_early = backend.kind == "ollama" and residents.lists_loading(versions.get(backend.name, ""))
        names = [redis_keys.fleet_box(backend.name), self._turn(backend)]
        values = [sent_ms, int(self._every_s * 1000), int(is_early), *residents.arguments(listed)]
        try:
            if not sent_ms:
                raise RedisUnavailable
            box = await self._home().run("residents", names, values)
        except RedisUnavailable:
            self.known[backend.name] = residents.merged(self._load_of(backend), listed, sent, time.time())
        else:
            self._take(backend.name, box)

    async def _note_fault(self, backend: Backend, error: str, sent_ms: int, *, is_gone: bool = False) -> None:
        """Until it is asked again, later than others, it counts as having what it had; as having nothing if it `is_gone`."""
        if 0 < sent_ms < self._load_of(backend).at * 1000:
            # A question that was sent later has been answered.
            return
        self._silent_until[backend.name] = time.monotonic() + self._silent_s
        self._entries.pop(backend.name, None)
        known = self._load_of(backend)
        self.known[backend.name] = replace(known, error=error, residents=() if is_gone else known.residents)
        with suppress(RedisUnavailable):
            if is_gone:
                await self._home().run("forget_residents", [redis_keys.fleet_box(backend.name)], [sent_ms])
            await self._home().send("SET", self._turn(backend), b"", "PX", int(self._silent_s * 1000))
            await self._home().send("HSET", redis_keys.fleet_box(backend.name), "error", error)

    def _load_of(self, backend: Backend) -> BackendLoad:
        return self.known.get(backend.name) or BackendLoad(backend.name, swaps=True)

    async def _redis_ms(self) -> int:
        """The time by Redis's clock, which is the same for all processes; 0 while it is unavailable."""
        with suppress(RedisUnavailable):
            seconds, micros = await self._home().send("TIME")
            return int(seconds) * 1000 + int(micros) // 1000
        return 0

    def _take(self, name: str, box: Sequence[bytes]) -> None:
        if box:
            self.known[name] = residents.unpack(name, dict(zip(box[::2], box[1::2], strict=True)))

    def _home(self) -> RedisConnection:
        return self._connections.for_shard(redis_keys.HOME)

    def _turn(self, backend: Backend) -> bytes:
        return redis_keys.fleet_turn(discovery.address_hash(backend.config), self._every_s)


async def stored(store: RedisClient, backends: Sequence[str]) -> dict[str, BackendLoad]:
    """What running gateways know of these backends, where they ask them. Raises RedisUnavailable."""
    boxes = await store.pipeline(lambda pipe: [pipe.hgetall(redis_keys.fleet_box(name)) for name in backends])
    return {name: residents.unpack(name, box) for name, box in zip(backends, boxes, strict=True) if box}


def _clock_of(date: str) -> float:
    """The time by the clock of a backend, from the date of its answer."""
    now = time.time()
    with suppress(ValueError, TypeError, OverflowError):
        found = parsedate_to_datetime(date)
        theirs = (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        return now if abs(theirs - now) < SAME_CLOCK_S else theirs
    return now
