"""`/healthz`: whether the process is alive; `/readyz`: whether it can accept requests."""

import time
from collections.abc import Callable, Iterable

from starlette.types import Receive, Scope, Send

from gateway.core.asgi import SAME_ORIGIN, send_json
from gateway.core.background import KeptTask
from gateway.core.errors import StoreUnavailable
from gateway.core.in_flight import InFlight
from gateway.fleet.catalog import Catalog
from gateway.stores.migrations import is_current
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient

CACHED_S = 1.0
DEGRADED, READ_ONLY = "degraded", "degraded: takes no writes"


class Health:
    """A store that becomes unavailable is a degraded mode: known keys and routing still work, so the gateway stays ready.

    A database that was never reached, or has an older schema, makes it not ready: such a gateway knows no keys.
    """

    def __init__(
        self,
        database: Database,
        store: RedisClient,
        catalog: Callable[[], Catalog],
        background: Callable[[], Iterable[KeptTask]],
        in_flight: InFlight,
    ) -> None:
        self._database, self._store, self._catalog, self._in_flight = database, store, catalog, in_flight
        self._background = background
        self._schema, self._schema_checked_at = "unknown", 0.0

    async def alive(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, {"status": "ok"}, more=SAME_ORIGIN)

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        checks = {
            "draining": "yes" if self._in_flight.draining else "no",
            "database": await self._schema_state(),
            "redis": "ok" if self._store.up else "degraded",
            "backends": "ok" if self._catalog().fresh_snapshots() else "none",
            "tasks": "; ".join(f"{kept.name}: {kept.state}" for kept in self._background() if kept.state != "ok") or "ok",
        }
        knows_keys = checks["database"] in ("ok", DEGRADED, READ_ONLY)
        is_ready = checks["draining"] == "no" and knows_keys and checks["backends"] == "ok"
        await send_json(send, {"ready": is_ready, **checks}, 200 if is_ready else 503, SAME_ORIGIN)

    async def _schema_state(self) -> str:
        """Checked at most once a second, because anybody may request it."""
        if time.monotonic() - self._schema_checked_at > CACHED_S:
            self._schema_checked_at = time.monotonic()
            try:
                self._schema = await self._state_of_schema()
            except StoreUnavailable:
                self._schema = DEGRADED if self._database.was_reached else "away"
        return self._schema

    async def _state_of_schema(self) -> str:
        if not await is_current(self._database):
            return "schema not current"
        return "ok" if self._database.takes_writes else READ_ONLY
