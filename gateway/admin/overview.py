"""The overview of the installation: backends, requests in progress, the last 15 minutes, busy keys and models, the stores."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.core.errors import StoreUnavailable
from gateway.fleet import presence
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.catalog import Catalog, Snapshot
from gateway.fleet.discovery import Discovery
from gateway.fleet.presence import BackendState, ProcessState
from gateway.fleet.residents import BackendLoad
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
        loads: Callable[[], Mapping[str, BackendLoad]],
    ) -> None:
        self._loads = loads
        self._configs, self._discovery, self._reports, self._store = configs, discovery, reports, store
        self._database = database
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
        states = await self._states()
        recent, drained = await self._recent()
        return {
            "at": datetime.now(UTC),
            "processes": None if states is None else len(states),
            "in_flight": sum(state.in_flight for state in states or ()),
            "waiting": sum(state.waiting for state in states or ()),
            "audit_backlog": max(
                (state.audit_waiting for state in states or () if state.audit_waiting is not None), default=None
            ),
            "backends": [
                {**row, "running": running(self._loads().get(row["name"]))}
                for row in backends(self._configs, self._discovery.catalog, presence.merged_view(states or ()), drained or {})
            ],
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
        assert sums is not None
        recent = {**sums, "since": since, "keys": [dict(row) for row in keys], "models": [dict(row) for row in models]}
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


def running(load: BackendLoad | None) -> list[str]:
    """The models that a backend has loaded on demand."""
    return [resident.model for resident in load.residents] if load is not None and load.swaps else []
