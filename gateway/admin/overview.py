"""The installation at a glance: backends, what is under way, what has happened lately, who is busy, how the stores are."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.core.errors import StoreUnavailable
from gateway.fleet import presence
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.catalog import Catalog, Snapshot
from gateway.fleet.discovery import Discovery
from gateway.fleet.presence import BackendState, ProcessState
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient, RedisUnavailable

LATELY = timedelta(minutes=15)
BUSIEST = 10
# Whoever looks, however many, the stores are asked no more often.
REMEMBERED_S = 2.0
SOON_S = 2.5
# Of each window that can be asked for: its length, and that of its steps.
WINDOWS = {
    "15m": (timedelta(minutes=15), timedelta(seconds=15)),
    "24h": (timedelta(hours=24), timedelta(minutes=15)),
    "30d": (timedelta(days=30), timedelta(hours=6)),
}
KEPT_SERIES_S = 10.0
NEVER_ASKED: dict[str, Any] = {
    "state": "unknown",
    "error": "",
    "answered_at": None,
    "latency_ms": None,
    "version": "",
    "models": 0,
    "running": [],
}


class Overview:
    def __init__(
        self,
        configs: Sequence[BackendConfig],
        discovery: Discovery,
        reports: Database,
        store: RedisClient,
        database: Database,
    ) -> None:
        self._configs, self._discovery, self._reports, self._store = configs, discovery, reports, store
        self._database = database
        self._asking = asyncio.Lock()
        self._last: tuple[float, dict[str, Any]] = (0.0, {})
        self._series: dict[str, tuple[float, dict[str, Any]]] = {}

    async def now(self) -> dict[str, Any]:
        """At most two seconds old. Parts that a store would have to tell are None while it is away."""
        async with self._asking:
            at, told = self._last
            if time.monotonic() - at > REMEMBERED_S:
                told = await self._look()
                self._last = time.monotonic(), told
            return told

    async def series(self, window: str) -> dict[str, Any]:
        """Steps of one of WINDOWS. Raises StoreUnavailable."""
        async with self._asking:
            at, told = self._series.get(window, (0.0, {}))
            if time.monotonic() - at > KEPT_SERIES_S:
                length, step = WINDOWS[window]
                since = datetime.now(UTC) - length
                rows = await self._reports.rows("series", since, step)
                told = {"window": window, "step_s": step.total_seconds(), "since": since, "steps": [dict(row) for row in rows]}
                self._series[window] = time.monotonic(), told
            return told

    async def _look(self) -> dict[str, Any]:
        states = await self._states()
        lately, drained = await self._lately()
        return {
            "at": datetime.now(UTC),
            "processes": None if states is None else len(states),
            "in_flight": sum(state.in_flight for state in states or ()),
            "waiting": sum(state.waiting for state in states or ()),
            "audit_backlog": max(
                (state.audit_waiting for state in states or () if state.audit_waiting is not None), default=None
            ),
            "backends": backends(self._configs, self._discovery.catalog, presence.merged_view(states or ()), drained or {}),
            "stores": {
                "redis": self._store.up,
                "postgresql": lately is not None or (self._reports.up and self._database.up),
            },
            "postgresql_takes_writes": self._database.takes_writes,
            "lately": lately,
        }

    async def _states(self) -> list[ProcessState] | None:
        try:
            return await presence.read(self._store)
        except RedisUnavailable:
            return None

    async def _lately(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """None where PostgreSQL has no answer soon enough for who watches."""
        try:
            async with asyncio.timeout(SOON_S):
                return await self._sums()
        except (StoreUnavailable, TimeoutError):
            return None, None

    async def _sums(self) -> tuple[dict[str, Any], dict[str, Any]]:
        since = datetime.now(UTC) - LATELY
        out = await self._reports.rows("drained_backends")
        sums = await self._reports.row("recent_sums", since)
        keys = await self._reports.rows("busiest_keys", since, BUSIEST)
        models = await self._reports.rows("busiest_models", since, BUSIEST)
        assert sums is not None
        told = {**sums, "since": since, "keys": [dict(row) for row in keys], "models": [dict(row) for row in models]}
        return told, {row["backend"]: {"at": row["at"], "by": row["by"]} for row in out}


def backends(
    configs: Sequence[BackendConfig], catalog: Catalog, states: Mapping[str, BackendState], drained: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """In the operator's order; addresses without tokens."""
    snapshots = {snapshot.backend: snapshot for snapshot in catalog.snapshots}
    return [
        {
            "name": config.name,
            "kind": config.kind,
            "base_url": config.base_url,
            "max_connections": config.max_connections,
            "drained": drained.get(config.name),
            **asdict(states.get(config.name, BackendState())),
            **_as_asked(snapshots.get(config.name)),
        }
        for config in configs
    ]


def _as_asked(snapshot: Snapshot | None) -> dict[str, Any]:
    if snapshot is None:
        return NEVER_ASKED
    return {
        "state": "away" if snapshot.error else "up",
        "error": snapshot.error,
        "answered_at": datetime.fromtimestamp(snapshot.answered_at, UTC) if snapshot.answered_at else None,
        "latency_ms": snapshot.latency_ms,
        "version": snapshot.version,
        "models": len(snapshot.models),
        "running": [entry["name"] for entry in snapshot.running],
    }
