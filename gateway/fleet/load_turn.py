"""One load at a time on a backend: a load that is in progress there, as the gateways keep it in Redis, comes first."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.fleet import residents
from gateway.fleet.backends.backend import Backend
from gateway.fleet.jobs import Progress, TaskFailed
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

LOOK_EVERY_S = 0.25


@asynccontextmanager
async def load_turn(store: RedisClient, backend: Backend, model: str, progress: Progress) -> AsyncIterator[None]:
    """Waits while the backend loads another model; a load of the same model is joined. `model` is canonical.

    Raises TaskFailed after the time that an answer of this backend may take. Without Redis nothing is known of other loads.
    """
    wait_s = backend.config.read_timeout_s
    until = time.monotonic() + wait_s
    while (other := await _loading(store, backend.name)) not in ("", model):
        if time.monotonic() > until:
            raise TaskFailed(f"still loads {other} after {wait_s:g} s")
        progress.note(f"waits until {other} is loaded")
        await asyncio.sleep(LOOK_EVERY_S)
    yield


async def _loading(store: RedisClient, backend: str) -> str:
    """The canonical name of the model that a gateway has this backend load, "" if there is none."""
    name = redis_keys.fleet_box(backend)
    try:
        known = residents.unpack(backend, await store.call(lambda redis: redis.hgetall(name)))
    except RedisUnavailable:
        return ""
    # The scripts remove a load that has ended when they next look.
    is_loaded = known.loading and any(resident.model == known.loading.model for resident in known.residents)
    return known.loading.model if known.loading and not is_loaded else ""
