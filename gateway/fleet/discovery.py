"""Polls the backends for their models: one process polls each, Redis keeps the answers, every process has the newest map."""

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self, TypeVar

from gateway.core import strict_json
from gateway.core.background import KeptTask, TaskGroup
from gateway.dialects import model_entries
from gateway.fleet import catalog, llama_server, routes
from gateway.fleet.aliases import NO_ALIASES, Aliases
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.catalog import Catalog, Snapshot
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

LOG = logging.getLogger("gateway.discovery")
POLL_DEADLINE_S = 10.0
JITTER = random.Random()  # noqa: S311 # not a secret  # nosec B311
FAST_ANSWERS_S = 1.0
# A model has some thirty values; parsing many more of them would block the event loop.
LONGEST_LIST, MOST_VALUES = 8 * 2**20, 300_000
# Hints for an entry whose backend answers, but has no list of models at the expected path.
LEAVE_OFF_V1 = "leave off /v1 at the end of its base_url"
IS_OPENAI = 'it is OpenAI-compatible: add "kind":"openai"'
IS_IT_OPENAI = 'is it OpenAI-compatible? add "kind":"openai" to its entry in OLLAMA_BACKENDS'
KEPT_IN_REDIS_S = 86_400

Answer = TypeVar("Answer")


class Discovery:
    """`async with Discovery(...)`: `discovery.catalog` is the newest map; reading it never waits for a backend."""

    def __init__(
        self,
        backends: Sequence[Backend],
        store: RedisClient,
        *,
        refresh_s: float,
        cache_s: float,
        aliases: Aliases = NO_ALIASES,
        is_digest_decisive: bool = False,
    ) -> None:
        self._backends, self._store = list(backends), store
        self._refresh_s, self._cache_s, self._aliases = refresh_s, cache_s, aliases
        self._is_digest_decisive = is_digest_decisive
        self._snapshots = {backend.name: _unknown(backend) for backend in backends}
        self._configs = {backend.name: backend.config for backend in backends}
        self.catalog = Catalog(aliases=aliases)
        # Each backend has been polled: its models are known, or why it did not list them.
        self.has_asked_all = asyncio.Event()
        self._polls, self._loads, self._load_turn = TaskGroup("discovery"), TaskGroup("catalog of models"), asyncio.Lock()
        self.background = KeptTask(self._keep_refreshing, "discovery")

    async def __aenter__(self) -> Self:
        await self._load()
        oldest = time.time() - self._refresh_s
        if stale := [backend for backend in self._backends if self._snapshots[backend.name].answered_at < oldest]:
            await self.refresh(stale, enough_s=FAST_ANSWERS_S)
        self._store.subscribe({redis_keys.MODELS_CHANGED: self._load_soon}, after_gap=lambda: self._load_soon(""))
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()
        await self._polls.end()
        await self._loads.end()

    async def _keep_refreshing(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s * JITTER.uniform(0.9, 1.0))
            if claimed := await self._claim_backends():
                await self.refresh(claimed)

    async def _claim_backends(self) -> list[Backend]:
        """The backends that this process polls: Redis assigns each to one of the processes that poll it equally often; while
        Redis is unavailable each process polls all."""

        def claim(pipe: Any) -> None:
            for backend in self._backends:
                name = redis_keys.poll_turn(address_hash(backend.config), self._refresh_s)
                pipe.set(name, b"", nx=True, px=int(self._refresh_s * 800))

        try:
            answers = await self._store.pipeline(claim)
        except RedisUnavailable:
            return self._backends
        return [backend for backend, is_claimed in zip(self._backends, answers, strict=True) if is_claimed]

    async def only_stored(self) -> Self:
        """Loads what other processes have stored in Redis; polls no backend."""
        await self._load()
        return self

    async def refreshed(self) -> list[dict[str, Any]]:
        """Polls all backends, also for their paths; returns a row for each: `backend`, `models` (how many) and `state`."""
        await self.refresh(asks_paths=True)
        return [
            {"backend": found.backend, "models": len(found.models), "state": found.state} for found in self.catalog.snapshots
        ]

    async def refresh(
        self, backends: Sequence[Backend] | None = None, enough_s: float | None = None, *, asks_paths: bool = False
    ) -> None:
        """Polls these backends, or all, and publishes; returns after `enough_s`, where given, and adds slower answers later.

        `asks_paths` asks for the paths that they have even if these are known.
        """
        polled = self._backends if backends is None else backends
        polls = {self._polls.start(self._poll_and_keep(one, asks_paths=asks_paths)): one for one in polled}
        if not polls:
            return
        done, slow = await asyncio.wait(polls, timeout=enough_s or FAST_ANSWERS_S)
        await self._publish([polls[poll] for poll in done])
        if slow and enough_s is not None:
            self._polls.start(self._publish_after({poll: polls[poll] for poll in slow}))
        elif slow:
            await self._publish_after({poll: polls[poll] for poll in slow})

    async def _publish_after(self, slow: Mapping[asyncio.Task[None], Backend]) -> None:
        await asyncio.wait(slow)
        await self._publish(list(slow.values()))

    async def _poll_and_keep(self, backend: Backend, *, asks_paths: bool) -> None:
        known = self._snapshots[backend.name]
        if asks_paths:
            known = replace(known, routes_at=0.0)
        try:
            snapshot = routes.with_known(catalog.keep_created(await poll(backend), known), known)
        except BackendFault as fault:
            snapshot = replace(known, error=str(fault), asked_at=time.time())
        except Exception as wrong:
            # An unexpected answer of one backend must not stop the polling of the others.
            LOG.exception("backend %s could not be polled", backend.name)
            snapshot = replace(known, error=type(wrong).__name__, asked_at=time.time())
        if bool(snapshot.error) != bool(known.error):
            change = f"is down: {snapshot.error}" if snapshot.error else f"answers with {len(snapshot.models)} models"
            LOG.log(logging.WARNING if snapshot.error else logging.INFO, "backend %s %s", backend.name, change)
        self._snapshots[backend.name] = snapshot
        self._rebuild()
        if not snapshot.error and not snapshot.routes_at:
            # Until then calls for such paths are translated.
            (found, at), slots = await asyncio.gather(routes.find(backend, known), slots_reported(backend, snapshot))
            self._snapshots[backend.name] = replace(self._snapshots[backend.name], routes=found, routes_at=at, slots=slots)
            self._rebuild()

    def _rebuild(self) -> None:
        in_order = [self._snapshots[backend.name] for backend in self._backends]
        known, decisive = self.catalog, self._is_digest_decisive
        self.catalog = catalog.build(in_order, self._cache_s, self._aliases, self._configs, is_digest_decisive=decisive)
        for name, digests in self.catalog.different.items():
            if digests != known.different.get(name):
                LOG.warning("model %s differs between backends: %s", name, catalog.digests_in_words(digests))
        if all(snapshot.asked_at for snapshot in in_order):
            self.has_asked_all.set()

    async def _publish(self, polled: Sequence[Backend]) -> None:
        """Only the backends polled here: another process may have newer answers of the others."""
        packed = {snapshot_name(one.config): strict_json.write(self._snapshots[one.name].packed()) for one in polled}
        offers = {name: [offer.backend for offer in model.offers] for name, model in self.catalog.models.items()}
        whole = strict_json.write({"at": time.time(), "models": offers})

        def fill(pipe: Any) -> None:
            for name, value in packed.items():
                pipe.set(name, value, ex=KEPT_IN_REDIS_S)
            pipe.set(redis_keys.MODELS, whole, ex=KEPT_IN_REDIS_S)

        with suppress(RedisUnavailable):
            await self._store.pipeline(fill)
            await self._store.call(lambda redis: redis.publish(redis_keys.MODELS_CHANGED, ""))

    def _load_soon(self, _: str) -> None:
        # One load is in progress and one waits, which will read this change, too.
        if len(self._loads) < 2:
            self._loads.start(self._load_in_turn())

    async def _load_in_turn(self) -> None:
        async with self._load_turn:
            await self._load()

    async def _load(self) -> None:
        names = [snapshot_name(backend.config) for backend in self._backends]
        try:
            packed = await self._store.call(lambda redis: redis.mget(names))
        except RedisUnavailable:
            return
        for backend, text in zip(self._backends, packed, strict=True):
            self._take(backend, text)
        self._rebuild()

    def _take(self, backend: Backend, text: bytes | None) -> None:
        if text is None:
            return
        with suppress(ValueError, TypeError, KeyError):
            snapshot = catalog.unpack(strict_json.read_loosely(text))
            is_same_backend = (snapshot.base_url, snapshot.kind) == (backend.config.base_url, backend.kind)
            if is_same_backend and snapshot.asked_at >= self._snapshots[backend.name].asked_at:
                self._snapshots[backend.name] = snapshot

    async def stored_catalog(self) -> tuple[float, int] | None:
        """When the map in Redis was written and its size in bytes."""
        try:
            text = await self._store.call(lambda redis: redis.get(redis_keys.MODELS))
        except RedisUnavailable:
            return None
        return (strict_json.read_loosely(text)["at"], len(text)) if text else None


def _unknown(backend: Backend) -> Snapshot:
    return Snapshot(backend.name, backend.config.base_url, backend.kind)


def snapshot_name(config: BackendConfig) -> str:
    """The key in Redis; two lists of backends may use one name for different backends."""
    return redis_keys.model_list(config.name, address_hash(config))


def address_hash(config: BackendConfig) -> str:
    """A hash, because an address may contain what must not be stored."""
    return hashlib.sha256(f"{config.kind} {config.base_url}".encode()).hexdigest()[:16]


async def poll(backend: Backend) -> Snapshot:
    """Polls one backend for its models and its version; never makes it generate. Raises BackendFault."""
    began = time.monotonic()
    now = time.time()
    fresh = replace(_unknown(backend), answered_at=now, asked_at=now)
    try:
        async with asyncio.timeout(POLL_DEADLINE_S):
            try:
                models, routed = await _ask_models(backend, backend.kind)
            except BackendFault as fault:
                raise await _with_hint(backend, fault) from fault
            if backend.kind == "openai":
                slots = {name: model.slots for name, model in routed.items()}
                return replace(fresh, models=models, slots=slots, swaps=bool(routed), latency_ms=_since(began))
            took = _since(began)
            return replace(fresh, models=models, version=await _ask_version(backend), latency_ms=took)
    except TimeoutError:
        raise BackendFault("poll_timeout") from None


async def _ask_models(backend: Backend, kind: str) -> tuple[catalog.Entries, Mapping[str, llama_server.RoutedModel]]:
    """Its models, and how a router has them."""
    if kind == "openai":
        return await ask(backend, "/v1/models", _read_openai)
    return await ask(backend, "/api/tags", model_entries.read_tags), {}


def _read_openai(answer: object) -> tuple[catalog.Entries, Mapping[str, llama_server.RoutedModel]]:
    return model_entries.read_openai_models(answer), llama_server.read_router(answer)


async def slots_reported(backend: Backend, snapshot: Snapshot) -> Mapping[str, int]:
    """How many calls it answers at once, as far as it reports that."""
    if backend.kind == "openai" and not snapshot.swaps:
        return await llama_server.slots(backend, snapshot.slots)
    return snapshot.slots


async def _with_hint(backend: Backend, fault: BackendFault) -> BackendFault:
    """The fault, with what to change in the entry of a backend that answers, but is of another kind or has other paths."""
    is_missing = str(fault) == "bad_status: status 404"
    hint = ""
    if is_missing and backend.config.base_url.rstrip("/").endswith("/v1"):
        hint = LEAVE_OFF_V1
    elif backend.kind == "ollama" and (is_missing or fault.reason == "bad_list"):
        # LM Studio answers 200 to any path.
        hint = IS_IT_OPENAI if is_missing else ""
        with suppress(BackendFault):
            await _ask_models(backend, "openai")
            hint = IS_OPENAI
    return BackendFault(fault.reason, f"{fault.detail}; {hint}") if hint else fault


async def takes_token(backend: Backend) -> bool:
    """Whether the routes for calls accept the token: llama.cpp lists its models without. Nothing is generated."""
    path = "/v1/chat/completions" if backend.kind == "openai" else "/api/chat"
    async with backend.send("POST", path, routes.HEADERS, routes.PROBE, wait_s=POLL_DEADLINE_S) as upstream:
        return upstream.status not in (401, 403)


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 1)


async def ask(backend: Backend, path: str, read: Callable[[object], Answer]) -> Answer:
    """Gets a JSON document of a backend, parsed by `read`. Raises BackendFault."""
    return (await ask_with_date(backend, path, read))[0]


async def ask_with_date(backend: Backend, path: str, read: Callable[[object], Answer]) -> tuple[Answer, str]:
    """As `ask`, with the date of the answer by the backend's clock, where it names one."""
    async with backend.send("GET", path, {"Accept": "application/json"}, wait_s=POLL_DEADLINE_S) as upstream:
        if upstream.status in (401, 403):
            raise BackendFault("token_refused", f"status {upstream.status}")
        if upstream.status != 200:
            raise BackendFault("bad_status", f"status {upstream.status}")
        document = await upstream.read_whole(LONGEST_LIST)
        if document.count(b",") + document.count(b"[") + document.count(b"{") > MOST_VALUES:
            raise BackendFault("bad_list", f"{path} has too many values")
        try:
            return read(strict_json.read_loosely(document)), upstream.headers.get("Date", "")
        except (ValueError, TypeError, AttributeError) as wrong:
            raise BackendFault("bad_list", f"{path} is not a list of models") from wrong


async def _ask_version(backend: Backend) -> str:
    with suppress(BackendFault):
        return await ask(backend, "/api/version", _version_of)
    return ""


def _version_of(answer: object) -> str:
    version = answer.get("version") if isinstance(answer, dict) else None
    return version[:40] if isinstance(version, str) else ""
