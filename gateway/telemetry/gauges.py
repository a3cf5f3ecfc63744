"""Metrics that are sampled once a second: requests in progress, what waits, what is up."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Self

from gateway.audit.settlement import Settler
from gateway.audit.writer import AuditWriter
from gateway.core.background import KeptTask
from gateway.core.in_flight import InFlight
from gateway.fleet.backends.backend import Backend
from gateway.fleet.board import Board
from gateway.fleet.board_state import BoardState, QueueState
from gateway.fleet.catalog import Catalog
from gateway.fleet.costs import Costs, Learned
from gateway.fleet.residents import BackendLoad
from gateway.limits.limiter import Limiter
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_shards import ShardConnections
from gateway.telemetry.metrics import Metrics

EVERY_S = 1.0
BREAKER = {"closed": 0, "half-open": 1, "open": 2}
# Pairs of a backend and a model whose slots are shown.
MOST_SLOTS_SHOWN = 1000
MOST_QUEUES_SHOWN = 100


class Gauges:
    """`async with Gauges(...)`: until the block ends."""

    def __init__(
        self,
        metrics: Metrics,
        in_flight: InFlight,
        limits: Limiter,
        connections: ShardConnections,
        settler: Settler,
        writer: AuditWriter,
        backends: Mapping[str, Backend],
        catalog: Callable[[], Catalog],
        store: RedisClient,
        database: Database,
        costs: Costs,
        loads: Mapping[str, BackendLoad],
        board: Board,
    ) -> None:
        self._metrics, self._in_flight, self._limits, self._connections = metrics, in_flight, limits, connections
        self._settler, self._writer, self._backends, self._catalog = settler, writer, backends, catalog
        self._store, self._database = store, database
        self._costs, self._loads, self._board = costs, loads, board
        # What waits and what runs, of all processes; each with the values that are shown, by their labels.
        self._shown_queues: dict[str, QueueState] = {}
        self._shown_places: dict[tuple[str, str], int] = {}
        self._sampled_loads: dict[str, BackendLoad] = {}
        self._sampled_slots: tuple[Catalog | None, dict[tuple[str, str, str], int]] = (None, {})
        self._sampled_costs: tuple[int, set[Learned]] = (-1, set())
        self._counted: dict[str, int] = {}
        self.background = KeptTask(self._keep_sampling, "metrics")

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()
        self.sample()

    async def _keep_sampling(self) -> None:
        while True:
            due = time.monotonic() + EVERY_S
            await asyncio.sleep(EVERY_S)
            self._metrics.lag.observe(max(0.0, time.monotonic() - due))
            self.sample()
            with suppress(RedisUnavailable):
                self._show_board(await self._board.state(with_estimates=False))

    def sample(self) -> None:
        metrics = self._metrics
        metrics.count_sums()
        metrics.in_flight.set(self._in_flight.of_callers)
        metrics.draining.set(int(self._in_flight.draining))
        metrics.waiting.set(self._limits.waiting)
        metrics.degraded.set(int(not self._limits.is_usable))
        metrics.held.set(self._settler.backlog)
        if self._writer.waiting is not None:
            metrics.backlog.set(self._writer.waiting)
        self._sample_backends()
        self._sample_stores()
        self._sample_costs()
        self._sample_loads()
        self._sample_slots()

    def _sample_backends(self) -> None:
        for name, backend in self._backends.items():
            self._metrics.backend_in_flight.labels(name).set(backend.in_flight)
            self._metrics.breaker.labels(name).set(BREAKER[backend.breaker.state])
        for snapshot in self._catalog().snapshots:
            self._metrics.backend_up.labels(snapshot.backend).set(int(not snapshot.error))

    def _sample_costs(self) -> None:
        """Only what has changed. What was learned of a backend that is no longer configured is not shown."""
        version, known = self._sampled_costs
        if version == self._costs.version:
            return
        rows = {row for row in self._costs.learned() if row.backend in self._backends}
        self._sampled_costs = self._costs.version, rows
        metrics = self._metrics
        for row in rows - known:
            for gauge, value in (
                (metrics.load_s, row.load_s),
                (metrics.prefill_tps, row.prefill_tps),
                (metrics.decode_tps, row.decode_tps),
                (metrics.call_s, row.service_s),
            ):
                if value is not None:
                    gauge.labels(row.backend, row.model).set(value)

    def _sample_loads(self) -> None:
        """Only what has changed."""
        metrics = self._metrics
        for name, load in self._loads.items():
            if load is not self._sampled_loads.get(name):
                self._sampled_loads[name] = load
                metrics.loaded_models.labels(name).set(len(load.residents))
                metrics.vram_used.labels(name).set(load.used)
                metrics.vram_seen.labels(name).set(load.seen)
                metrics.loads_seen.labels(name).set(load.loads)
                metrics.evictions_seen.labels(name).set(load.evictions)

    def _sample_slots(self) -> None:
        """Only what has changed; 0 for what is gone, because with several workers no label can be removed."""
        catalog, (sampled, known) = self._catalog(), self._sampled_slots
        if catalog is sampled:
            return
        models = (model for model in catalog.models.values() if not model.targets)
        offers = islice((offer for model in models for offer in model.offers), MOST_SLOTS_SHOWN)
        rows = {(offer.backend, offer.model, offer.slots_source): offer.slots for offer in offers}
        self._sampled_slots = catalog, rows
        for labels in known.keys() - rows.keys():
            self._metrics.slots.labels(*labels).set(0)
        for labels, number in rows.items():
            if known.get(labels) != number:
                self._metrics.slots.labels(*labels).set(number)

    def _show_board(self, state: BoardState) -> None:
        """Only what has changed; 0 for what is gone."""
        metrics = self._metrics
        queues = {queue.model: queue for queue in state.queues[:MOST_QUEUES_SHOWN]}
        gone = (QueueState(model, 0, 0, 0.0, None, None) for model in self._shown_queues.keys() - queues.keys())
        for queue in (*queues.values(), *gone):
            if self._shown_queues.get(queue.model) != queue:
                metrics.queue_calls.labels(queue.model).set(queue.calls)
                metrics.queue_tokens.labels(queue.model).set(queue.tokens)
                metrics.queue_oldest.labels(queue.model).set(queue.oldest_s)
        self._shown_queues = queues
        places = {(place.backend, place.model): place.running for place in state.places[:MOST_SLOTS_SHOWN]}
        for labels in self._shown_places.keys() - places.keys():
            metrics.slots_in_use.labels(*labels).set(0)
        for labels, number in places.items():
            if self._shown_places.get(labels) != number:
                metrics.slots_in_use.labels(*labels).set(number)
        self._shown_places = places

    def _sample_stores(self) -> None:
        metrics = self._metrics
        metrics.store_up.labels("redis").set(int(self._store.up))
        metrics.store_up.labels("postgresql").set(int(self._database.up))
        self._add(metrics.store_calls.labels("redis").inc, "redis calls", self._store.calls + self._connections.counts.calls)
        self._add(
            metrics.store_errors.labels("redis").inc, "redis errors", self._store.errors + self._connections.counts.errors
        )
        self._add(metrics.store_calls.labels("postgresql").inc, "postgresql calls", self._database.calls)
        self._add(metrics.store_errors.labels("postgresql").inc, "postgresql errors", self._database.errors)
        self._add(metrics.written.inc, "written", self._writer.written)
        self._add(metrics.dropped.inc, "dropped", self._settler.dropped)

    def _add(self, count: Callable[[float], None], name: str, total: int) -> None:
        """Adds what a component has counted since the last sample."""
        before = self._counted.get(name, 0)
        if total > before:
            count(total - before)
            self._counted[name] = total
