"""Loads, unloads and pulls models for operators, on one backend or on several at once."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from gateway.core.errors import CommandFailed, NotFound
from gateway.dialects.model_names import NAME_RULE, canonical, is_name
from gateway.fleet import cost_store, pulls
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.catalog import Catalog, Offer
from gateway.fleet.costs import LEARNED, Origin
from gateway.fleet.discovery import Discovery
from gateway.fleet.jobs import Job, Progress, TaskFailed
from gateway.fleet.load_turn import load_turn
from gateway.fleet.model_memory import ModelMemory, load_fields, memory_of
from gateway.stores.redis_client import RedisClient, RedisUnavailable

VERBS = ("warm", "unload", "pull")
# How long an unload is watched; where calls go on, the backend unloads later.
WATCH_S, LOOK_EVERY_S = 10.0, 0.25
SOON_S = 1.0
MOST_BACKENDS = 1000
# Where the expected time of a load may be from.
KNOWN: frozenset[Origin] = frozenset({LEARNED, "model", "size"})


class ModelJobs:
    """Plans jobs; what it refuses is raised as CommandFailed or NotFound before any begins.

    `changed` is called with each backend whose models or memory a job has changed; a command has nobody to notify.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        discovery: Discovery,
        store: RedisClient,
        changed: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._backends, self._discovery, self._store, self._changed = backends, discovery, store, changed
        self._plans: dict[str, Callable[..., Awaitable[Job]]] = {"warm": self.warm, "unload": self.unload, "pull": self.pull}

    async def plan(self, verb: str, arguments: Mapping[str, Any]) -> Job:
        """`verb` is one of VERBS; `arguments` come from anybody: `model`, and for a pull `backends`, else `backend`."""
        model = arguments.get("model")
        if not is_name(model):
            raise CommandFailed(f"the model {NAME_RULE}")
        names = _names(arguments.get("backends") or []) if verb == "pull" else _names([arguments.get("backend") or ""])
        return await self._plans[verb](model, [self._backend(name) for name in names])

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            raise NotFound(f"there is no backend {name[:64]!a}: write one of {', '.join(self._backends)}")
        return self._backends[name]

    async def warm(self, model: str, named: Sequence[Backend]) -> Job:
        """Loads a model on the named backend, or on the first that may get calls for it."""
        backend, offer = self._destination(model, named)
        memory = await _memory(backend)
        if memory is None:
            raise CommandFailed(f"{backend.name} has its models loaded always, or loads them by itself")
        if load_fields(backend.config, offer.spelling).get("keep_alive") == 0:
            raise CommandFailed(f"the keep_alive of {model!a} on {backend.name} is 0: it would be unloaded at once")
        job, expected_s = Job(self._refresh), await self._expected_s(offer)
        job.add(backend.name, offer.spelling, partial(self._load, backend, memory), load_s=None, expected_s=expected_s)
        return job

    async def _expected_s(self, offer: Offer) -> float | None:
        """The seconds that a load takes, if they are more than a guess."""
        try:
            rates = (await cost_store.read(self._store)).rates(offer.backend, offer.model, offer.size)
        except RedisUnavailable:
            return None
        return round(rates.load_s, 1) if rates.origins[0] in KNOWN else None

    def _destination(self, model: str, named: Sequence[Backend]) -> tuple[Backend, Offer]:
        reasons = []
        for offer in self._offers(model, named):
            backend = self._backends[offer.backend]
            reason = _why_not(backend, offer, self._discovery.catalog)
            if not reason:
                return backend, offer
            reasons.append(f"{backend.name} {reason}")
        raise CommandFailed("; ".join(dict.fromkeys(reasons)))

    def _offers(self, model: str, named: Sequence[Backend]) -> list[Offer]:
        found = self._discovery.catalog.lookup(canonical(model))
        offers = [offer for offer in found.offers if offer.backend in self._backends] if found else []
        if not offers:
            raise NotFound(f"no backend has the model {model!a}: `make pull MODEL=…` pulls one, `make models` lists all")
        chosen = [offer for offer in offers if not named or self._backends[offer.backend] in named]
        if not chosen:
            others = ", ".join(dict.fromkeys(offer.backend for offer in offers))
            raise CommandFailed(f"{named[0].name} does not have the model {model!a}, but {others}")
        return chosen

    async def _load(self, backend: Backend, memory: ModelMemory, progress: Progress) -> None:
        async with load_turn(self._store, backend, canonical(progress.model).canonical, progress):
            was_loaded = await _is_loaded(memory, progress.model)
            progress.note("loading")
            began = time.monotonic()
            await memory.load(progress.model)
        progress.note("was loaded" if was_loaded else "loaded", load_s=round(time.monotonic() - began, 2))

    async def unload(self, model: str, named: Sequence[Backend]) -> Job:
        """Unloads a model on the named backend, or on all that have it loaded."""
        offers = self._offers(model, named)
        job, always = Job(self._refresh), []
        memories = await asyncio.gather(*(_memory_or_fault(self._backends[offer.backend]) for offer in offers))
        for offer, memory in zip(offers, memories, strict=True):
            if memory is None:
                always.append(offer.backend)
            else:
                job.add(offer.backend, offer.spelling, partial(_unload, memory), freed_bytes=None)
        if len(always) == len(offers):
            raise CommandFailed(
                f"{', '.join(dict.fromkeys(always))}: models there are loaded always, or unloaded by the server"
            )
        return job

    async def pull(self, model: str, named: Sequence[Backend]) -> Job:
        """Pulls a model on the named backends, or on all Ollama backends, at once."""
        if others := [backend.name for backend in named if backend.kind != "ollama"]:
            raise CommandFailed(f"{', '.join(others)}: only Ollama pulls models")
        backends = named or [backend for backend in self._backends.values() if backend.kind == "ollama"]
        if not backends:
            raise CommandFailed("no Ollama backend is configured, and others do not pull models")
        job, unknown = Job(self._refresh), pulls.Transfer().facts
        for backend in backends:
            job.add(backend.name, model, partial(pulls.pull, backend, model), **unknown)
        return job

    async def _refresh(self, names: Sequence[str]) -> None:
        """So that the map of models is right when the job has ended."""
        for name in names:
            self._changed(name)
        if names:
            await self._discovery.refresh([self._backends[name] for name in names])


def _names(given: object) -> list[str]:
    """The names of backends, each once; an empty one is none."""
    if not isinstance(given, list | tuple) or len(given) > MOST_BACKENDS or not all(isinstance(name, str) for name in given):
        raise CommandFailed("backends are given by their names")
    return [name for name in dict.fromkeys(given) if name]


def _why_not(backend: Backend, offer: Offer, catalog: Catalog) -> str:
    if backend.kind == "ollama" and not offer.swaps:
        return "passes calls for this model on to a cloud, and loads nothing"
    if backend.is_drained:
        return f"is drained: `make undrain BACKEND={backend.name}` lets it have calls again"
    error = next((snapshot.error for snapshot in catalog.snapshots if snapshot.backend == backend.name), "")
    if error or offer.good_until <= time.time():
        return f"does not answer: {error or 'its list of models is too old'}"
    return ""


async def _memory(backend: Backend) -> ModelMemory | None:
    try:
        return await memory_of(backend)
    except BackendFault as fault:
        raise CommandFailed(f"{backend.name} does not answer: {fault}") from None


async def _memory_or_fault(backend: Backend) -> ModelMemory | BackendFault | None:
    try:
        return await memory_of(backend)
    except BackendFault as fault:
        return fault


async def _is_loaded(memory: ModelMemory, model: str) -> bool:
    """False also if the backend does not answer soon, as while it loads a model, perhaps this one."""
    try:
        async with asyncio.timeout(SOON_S):
            return await memory.size_of(model) is not None
    except TimeoutError:
        return False


async def _unload(memory: ModelMemory | BackendFault, progress: Progress) -> None:
    if isinstance(memory, BackendFault):
        raise memory
    model = progress.model
    size = await memory.size_of(model)
    if size is None:
        progress.note("was not loaded", freed_bytes=0)
        return
    if memory.ends_calls and (calls := await memory.calls_of(model)):
        raise TaskFailed(
            f"has {calls} calls in progress, which it would break off: drain it, and try again when they have ended"
        )
    await memory.unload(model)
    until = time.monotonic() + WATCH_S
    while await memory.size_of(model) is not None:
        if time.monotonic() > until:
            return
        progress.note("calls are in progress: it is unloaded when they have ended")
        await asyncio.sleep(LOOK_EVERY_S)
    progress.note("unloaded", freed_bytes=size)
