"""Opens what one process needs, from the settings: stores, keys, backends, limits, audit. The order of opening is the reverse
of the order of closing."""

import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher

from gateway.audit import retention
from gateway.audit.call_costs import CallCosts
from gateway.audit.settlement import Settler
from gateway.audit.writer import AuditWriter
from gateway.auth.auth_failures import AuthFailures
from gateway.auth.authenticator import Authenticator
from gateway.auth.verifier import Verifier
from gateway.core.background import KeptTask
from gateway.core.cancel_scope import ScopeTimer
from gateway.core.in_flight import InFlight
from gateway.dialects import registry
from gateway.dialects.dialect import Dialect
from gateway.edge.client_address import TrustedProxies
from gateway.fleet import board, model_jobs, presence, probe
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.catalog import Catalog
from gateway.fleet.claim import Routing
from gateway.fleet.claims import Claims
from gateway.fleet.control import Control
from gateway.fleet.cost_store import CostStore
from gateway.fleet.costs import Costs
from gateway.fleet.discovery import Discovery
from gateway.fleet.drains import Drains
from gateway.fleet.held_answers import HeldAnswers
from gateway.fleet.load import Load
from gateway.fleet.model_jobs import ModelJobs
from gateway.fleet.placing import Placing
from gateway.fleet.presence import Presence, ProcessState
from gateway.fleet.queue import FleetQueue
from gateway.limits import limiter
from gateway.limits.budgets import Budgets
from gateway.limits.fallback import Share
from gateway.limits.limiter import Limiter
from gateway.limits.quota import Quota
from gateway.proxy.body import Bodies
from gateway.settings import Settings
from gateway.stores import redis_keys
from gateway.stores.postgres import Database, ReportDatabase
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_keys import SLOT_FREED
from gateway.stores.redis_scripts import read_scripts
from gateway.stores.redis_shards import ShardConnections
from gateway.telemetry.gauges import Gauges
from gateway.telemetry.metrics import Metrics

# How long an operator waits for sums over many rows.
REPORT_DEADLINE_S = 10.0


@dataclass
class Components:
    """What one process has opened; `background` returns its tasks that never end."""

    database: Database
    reports: ReportDatabase
    store: RedisClient
    authenticator: Authenticator
    backends: dict[str, Backend]
    discovery: Discovery
    load: Load
    costs: Costs
    proxies: TrustedProxies
    limits: Limiter
    dialects: dict[str, Dialect]
    writer: AuditWriter
    settler: Settler
    scope_timer: ScopeTimer
    metrics: Metrics
    in_flight: InFlight
    bodies: Bodies
    held_answers: HeldAnswers
    placing: Placing
    background: Callable[[], list[KeptTask]]

    def catalog(self) -> Catalog:
        return self.discovery.catalog

    def model_jobs(self) -> ModelJobs:
        return ModelJobs(self.backends, self.discovery, self.store, self.load.look_soon)


@asynccontextmanager
async def opened(
    settings: Settings, metrics_folder: Path | None = None, beside: Sequence[KeptTask] = ()
) -> AsyncIterator[Components]:
    """`metrics_folder` is where the workers of one gateway share their counts; `beside` are tasks that others own."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        database = await enter(database_of(settings))
        reports = await enter(ReportDatabase(settings.database_url, timeout_s=REPORT_DEADLINE_S))
        store = await enter(RedisClient(settings.redis_url))
        authenticator = await enter(authenticator_of(settings, database, store))
        backends = await enter(backends_of(settings))
        discovery = await enter(discovery_of(settings, backends, store))
        drains = await enter(Drains(database, store, backends))
        proxies = await enter(TrustedProxies(settings.gateway_trusted_proxies))
        connections = await enter(connections_of(settings, store))
        load = await enter(load_of(settings, backends, connections, discovery))
        active = Presence(
            connections, uuid.uuid4().hex, lambda: state_of(settings, active, in_flight, limits, writer, backends)
        )
        limits = await enter(limits_of(settings, database, store, connections, lambda: Share(active.rank, active.count)))
        costs = await enter(CostStore(connections, Costs()))
        dialects, in_flight = registry.dialects(), InFlight()
        writer = await enter(AuditWriter(store, limits, database, active.process_id, keep_prompts=kept_prompts(settings)))
        purging, scope_timer = await enter(retention_task(settings)), await enter(ScopeTimer())
        settler = await enter(settler_of(settings, limits, dialects, writer, CallCosts(costs.costs, lambda: discovery.catalog)))
        placing = await enter(placing_of(settings, store, connections, active, costs.costs, load))
        metrics, catalog = Metrics(metrics_folder), lambda: discovery.catalog
        shown: list[Any] = [backends, catalog, store, database, costs.costs, load.known, placing.queue.board]
        gauges = await enter(Gauges(metrics, in_flight, limits, connections, settler, writer, *shown))
        await enter(active)
        await enter(control_of(store, discovery, backends, load))
        owners: list[Any] = [authenticator, discovery, drains, proxies, limits, writer, settler, scope_timer, gauges, active]

        def background() -> list[KeptTask]:
            of_stores = [*beside, purging, *store.background, *connections.background]
            return [*of_stores, *(one.background for one in (*owners, load, costs, placing.queue))]

        yield Components(
            database=database,
            reports=reports,
            store=store,
            authenticator=authenticator,
            backends=backends,
            discovery=discovery,
            load=load,
            costs=costs.costs,
            proxies=proxies,
            limits=limits,
            dialects=dialects,
            writer=writer,
            settler=settler,
            scope_timer=scope_timer,
            metrics=metrics,
            in_flight=in_flight,
            bodies=Bodies(settings.max_request_body_bytes, settings.max_upload_bytes),
            held_answers=HeldAnswers(),
            placing=placing,
            background=background,
        )


def database_of(settings: Settings) -> Database:
    return Database(settings.database_url, size=settings.database_pool_size, overflow=settings.database_pool_overflow)


def connections_of(settings: Settings, store: RedisClient) -> ShardConnections:
    return ShardConnections(settings.redis_url, read_scripts(limiter.LUA, presence.LUA, board.LUA), store.count_failure)


def hasher_of(settings: Settings) -> PasswordHasher:
    return PasswordHasher(
        time_cost=settings.argon2_time_cost,
        memory_cost=settings.argon2_memory_cost_kib,
        parallelism=settings.argon2_parallelism,
    )


def authenticator_of(settings: Settings, database: Database, store: RedisClient) -> Authenticator:
    failures = AuthFailures(store, settings.auth_failure_rate_limit_per_ip_per_min)
    verifier = Verifier(hasher_of(settings))
    return Authenticator(database, store, verifier, failures, cache_s=settings.redis_key_cache_ttl_s)


@asynccontextmanager
async def backends_of(settings: Settings) -> AsyncIterator[dict[str, Backend]]:
    async with AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(Backend(config)) for config in settings.backends]
        yield {backend.name: backend for backend in backends}


def discovery_of(settings: Settings, backends: dict[str, Backend], store: RedisClient) -> Discovery:
    return Discovery(
        list(backends.values()),
        store,
        refresh_s=settings.model_discovery_refresh_s,
        cache_s=settings.model_discovery_cache_ttl_s,
        aliases=settings.aliases,
        is_digest_decisive=settings.digest_parity == "distinct",
    )


def load_of(settings: Settings, backends: dict[str, Backend], connections: ShardConnections, discovery: Discovery) -> Load:
    catalog = lambda: discovery.catalog  # noqa: E731
    return Load(backends.values(), connections, catalog, every_s=settings.loaded_models_refresh_s)


@asynccontextmanager
async def limits_of(
    settings: Settings, database: Database, store: RedisClient, connections: ShardConnections, share: Callable[[], Share]
) -> AsyncIterator[Limiter]:
    limits = Limiter(
        connections,
        Budgets(database, store).seed,
        share=share,
        most_output=settings.max_num_predict,
        queue_wait_s=settings.max_queue_wait_s,
        closed_without_redis=settings.limits_without_redis == "closed",
    )
    async with limits:
        store.subscribe({SLOT_FREED: lambda queue: limits.queue.slot_freed(queue.encode())}, after_gap=lambda: None)
        yield limits


def routing_of(settings: Settings) -> Routing:
    return Routing(
        settings.routing,
        settings.routing_spill_s,
        settings.routing_sticky_s,
        settings.queue_wait_s,
        settings.queue_size,
        settings.queue_tokens,
    )


@asynccontextmanager
async def placing_of(
    settings: Settings, store: RedisClient, connections: ShardConnections, active: Presence, costs: Costs, load: Load
) -> AsyncIterator[Placing]:
    queue = FleetQueue(
        connections,
        active.process_id,
        routing_of(settings),
        share_of=lambda slots: Share(active.rank, active.count).out_of(slots),
        is_resident=load.has,
        look=load.look_soon,
    )
    store.subscribe({redis_keys.granted(active.process_id): queue.granted}, after_gap=lambda: None)
    async with queue:
        yield Placing(queue, Claims(queue.routing, costs, await salt_of(store), has_tiers=has_equals(settings.backends)))


def has_equals(backends: Iterable[BackendConfig]) -> bool:
    """Whether some backends are in one tier."""
    tiers = [backend.tier for backend in backends]
    return len(set(tiers)) < len(tiers)


def chooses_nothing(settings: Settings) -> bool:
    """`fast` chooses among the backends of a tier."""
    return settings.routing == "fast" and len(settings.backends) > 1 and not has_equals(settings.backends)


async def salt_of(store: RedisClient) -> bytes:
    """The secret that makes the names of conversations meaningless outside of this installation."""
    own = secrets.token_bytes(16)
    try:
        known = await store.call(lambda redis: redis.set(redis_keys.FLEET_SALT, own, nx=True, get=True))
    except RedisUnavailable:
        return own
    return known or own


def default_quota(settings: Settings) -> Quota:
    return Quota(settings.default_rpm, settings.default_tpm, settings.default_concurrent)


def kept_prompts(settings: Settings) -> timedelta:
    return timedelta(days=settings.prompt_log_default_retention_days)


@asynccontextmanager
async def retention_task(settings: Settings) -> AsyncIterator[KeptTask]:
    """On a separate connection: a slow query here must not make the database look unreachable."""
    keep = timedelta(days=settings.audit_log_default_retention_days)
    async with Database(settings.database_url, size=1) as database:
        purging = KeptTask(lambda: retention.run_regularly(database, keep), "retention")
        purging.start()
        try:
            yield purging
        finally:
            await purging.end()


def settler_of(
    settings: Settings, limits: Limiter, dialects: dict[str, Dialect], writer: AuditWriter, call_costs: CallCosts
) -> Settler:
    return Settler(
        limits,
        dialects,
        writer.write,
        call_costs,
        size=settings.audit_buffer_size,
        most_output=settings.max_num_predict,
        cached_weight=int(settings.cached_tokens_weight),
    )


def state_of(
    settings: Settings,
    active: Presence,
    in_flight: InFlight,
    limits: Limiter,
    writer: AuditWriter,
    backends: dict[str, Backend],
) -> ProcessState:
    """What this process publishes of itself."""
    return ProcessState(
        active.process_id,
        time.time(),
        in_flight.of_callers,
        limits.waiting,
        in_flight.draining,
        writer.waiting,
        presence.local_view(backends),
        presence.described(backend.config for backend in backends.values()),
        routing_of(settings)._asdict(),
    )


def control_of(store: RedisClient, discovery: Discovery, backends: dict[str, Backend], load: Load) -> Control:
    acts = {"refresh": discovery.refreshed, "probe": lambda: probe.probe_all(backends)}
    fleet = presence.described(backend.config for backend in backends.values())
    return Control(store, fleet, acts, model_jobs.VERBS, ModelJobs(backends, discovery, store, load.look_soon).plan)
