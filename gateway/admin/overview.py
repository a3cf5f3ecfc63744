"""The overview of the installation: backends, requests in progress, the last 15 minutes, busy keys and models, the stores."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.admin.fleet_view import FleetView
from gateway.core.errors import StoreUnavailable
from gateway.fleet import presence
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.catalog import Catalog, Snapshot
from gateway.fleet.discovery import Discovery
from gateway.fleet.presence import BackendState, ProcessState
from gateway.fleet.ways import speaks
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient, RedisUnavailable

RECENT = timedelta(minutes=15)
BUSIEST = 10
# The stores are not queried more often than this, however many operators watch.
CACHED_S = 2.0
DEADLINE_S = 2.5
# The windows of a series: the length of each, and that of its steps.
WINDOWS = {
    "15m": (timedelta(minutes=15), timedelta(seconds=15)),
    "24h": (timedelta(hours=24), timedelta(minutes=15)),
    "30d": (timedelta(days=30), timedelta(hours=6)),
}
SERIES_CACHED_S = 10.0
NEVER_POLLED: dict[str, Any] = {
    "state": "unknown",
    "error": "",
    "answered_at": None,
    "latency_ms": None,
    "version": "",
    "models": 0,
    "speaks": [],
}


class Overview:
    def __init__(
        self,
        configs: Sequence[BackendConfig],
        discovery: Discovery,
        reports: Database,
        store: RedisClient,
        database: Database,
        fleet: FleetView,
    ) -> None:
        self._configs, self._discovery, self._reports, self._store = configs, discovery, reports, store
        self._database, self._fleet = database, fleet
        self._lock = asyncio.Lock()
        self._last: tuple[float, dict[str, Any]] = (0.0, {})
        self._series: dict[str, tuple[float, dict[str, Any]]] = {}

    async def now(self) -> dict[str, Any]:
        """At most two seconds old. Parts that come from a store are None while the store is unreachable."""
        async with self._lock:
            at, last = self._last
            if time.monotonic() - at > CACHED_S:
                last = await self._collect()
                self._last = time.monotonic(), last
            return last

    async def series(self, window: str) -> dict[str, Any]:
        """Steps of one of WINDOWS. Raises StoreUnavailable."""
        async with self._lock:
            at, series = self._series.get(window, (0.0, {}))
            if time.monotonic() - at > SERIES_CACHED_S:
                length, step = WINDOWS[window]
                since = datetime.now(UTC) - length
                rows = await self._reports.rows("series", since, step)
                series = {
                    "window": window,
                    "step_s": step.total_seconds(),
                    "since": since,
                    "steps": [dict(row) for row in rows],
                }
                self._series[window] = time.monotonic(), series
            return series

    async def _collect(self) -> dict[str, Any]:
        states, fleet = await self._states(), await self._fleet.now()
        recent, drained = await self._recent()
        in_order = backends(self._configs, self._discovery.catalog, presence.merged_view(states or ()), drained or {})
        of_each = {row["backend"]: row for row in (recent or {}).pop("backends", ())}
        return {
            "at": datetime.now(UTC),
            "processes": None if states is None else len(states),
            "in_flight": sum(state.in_flight for state in states or ()),
            "waiting": sum(state.waiting for state in states or ()),
            "audit_backlog": max(
                (state.audit_waiting for state in states or () if state.audit_waiting is not None), default=None
            ),
            "waiting_for_backends": fleet.waiting,
            "queues": fleet.queues(),
            "backends": [{**row, **fleet.of(row["name"]), "lately": of_each.get(row["name"])} for row in in_order],
            "stores": {
                "redis": self._store.up,
                "postgresql": recent is not None or (self._reports.up and self._database.up),
            },
            "postgresql_takes_writes": self._database.takes_writes,
            "lately": recent,
        }

    async def _states(self) -> list[ProcessState] | None:
        try:
            return await presence.read(self._store)
        except RedisUnavailable:
            return None

    async def _recent(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """None if PostgreSQL does not answer soon enough for a page that polls."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await self._sums()
        except (StoreUnavailable, TimeoutError):
            return None, None

    async def _sums(self) -> tuple[dict[str, Any], dict[str, Any]]:
        since = datetime.now(UTC) - RECENT
        out = await self._reports.rows("drained_backends")
        sums = await self._reports.row("recent_sums", since)
        keys = await self._reports.rows("busiest_keys", since, BUSIEST)
        models = await self._reports.rows("busiest_models", since, BUSIEST)
        loading_keys = await self._reports.rows("loading_keys", since, BUSIEST)
        of_backends = await self._reports.rows("recent_backends", since)
        assert sums is not None
        lists = {"keys": keys, "models": models, "loading_keys": loading_keys, "backends": of_backends}
        recent = {**sums, "since": since, **{name: [dict(row) for row in rows] for name, rows in lists.items()}}
        return recent, {row["backend"]: {"at": row["at"], "by": row["by"]} for row in out}


def backends(
    configs: Sequence[BackendConfig], catalog: Catalog, states: Mapping[str, BackendState], drained: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """In the order of the configuration; URLs without tokens."""
    snapshots = {snapshot.backend: snapshot for snapshot in catalog.snapshots}
    return [
        {
            "name": config.name,
            "kind": config.kind,
            "base_url": config.base_url,
            "max_connections": config.max_connections,
            "drained": drained.get(config.name),
            **asdict(states.get(config.name, BackendState())),
            **_as_polled(snapshots.get(config.name)),
        }
        for config in configs
    ]


def _as_polled(snapshot: Snapshot | None) -> dict[str, Any]:
    if snapshot is None:
        return NEVER_POLLED
    return {
        "state": "away" if snapshot.error else "up",
        "error": snapshot.error,
        "answered_at": datetime.fromtimestamp(snapshot.answered_at, UTC) if snapshot.answered_at else None,
        "latency_ms": snapshot.latency_ms,
        "version": snapshot.version,
        "models": len(snapshot.models),
        "speaks": speaks(snapshot.kind, snapshot.routes),
    }
