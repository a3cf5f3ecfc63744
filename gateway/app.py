"""The composition root: builds the rooms from the settings and connects them; nesting is shutdown order."""

import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher
from starlette.types import ASGIApp, Scope

from gateway.admin.api import AdminApi
from gateway.admin.backends import BackendHandlers
from gateway.admin.explain import Fleet, explain
from gateway.admin.keys import KeyHandlers
from gateway.admin.overview import Overview
from gateway.admin.reports import ReportHandlers
from gateway.audit import retention
from gateway.audit.settlement import Settler
from gateway.audit.writer import AuditWriter
from gateway.auth.auth_failures import AuthFailures
from gateway.auth.authenticator import Authenticator
from gateway.auth.key_store import KeyStore
from gateway.auth.verifier import Verifier
from gateway.core import strict_json
from gateway.core.background import KeptTask
from gateway.core.cancel_scope import ScopeTimer
from gateway.core.errors import StoreUnavailable
from gateway.core.in_flight import InFlight
from gateway.dialects.dialect import Dialect
from gateway.dialects.ollama import Ollama
from gateway.dialects.openai import OpenAI
from gateway.edge import router as edge_router
from gateway.edge.application import METRICS, Application, by_prefix
from gateway.edge.client_address import TrustedProxies
from gateway.edge.health import Health
from gateway.fleet import presence, probe
from gateway.fleet.backends.backend import Backend
from gateway.fleet.control import Control
from gateway.fleet.discovery import Discovery
from gateway.fleet.drains import Drains
from gateway.fleet.failover import Failover
from gateway.fleet.held_answers import HeldAnswers
from gateway.fleet.presence import Presence, ProcessState
from gateway.fleet.running_models import RunningModels
from gateway.limits import limiter
from gateway.limits.budgets import Budgets
from gateway.limits.fallback import Share
from gateway.limits.limiter import Limiter
from gateway.limits.quota import Quota
from gateway.pages import static
from gateway.pages.openapi import ApiDocument
from gateway.proxy import passthrough
from gateway.proxy.access import Access
from gateway.proxy.body import Bodies
from gateway.proxy.exchange import Exchange
from gateway.proxy.model_lists import ModelLists
from gateway.proxy.show import described
from gateway.settings import Settings
from gateway.stores.migrations import is_current
from gateway.stores.postgres import Database, ReportDatabase
from gateway.stores.redis_client import RedisClient
from gateway.stores.redis_connection import read_scripts
from gateway.stores.redis_keys import SLOT_FREED
from gateway.stores.redis_shards import ShardConnections
from gateway.telemetry.gauges import Gauges
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.metrics_endpoint import MetricsEndpoint

LOG = logging.getLogger("gateway")
# A path that is not there for who may not see it is there in no way.
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# How long an operator waits for sums over many rows.
REPORT_DEADLINE_S = 10.0
# How long who has pulled a model waits for the map to know it.
MODELS_CHANGED_S = 2.0


@dataclass
class Components:
    """What the operator's commands and the tests need of a gateway that is up."""

    database: Database
    reports: ReportDatabase
    store: RedisClient
    discovery: Discovery
    running: RunningModels
    backends: dict[str, Backend]
    in_flight: InFlight
    watch: ScopeTimer
    limits: Limiter
    settler: Settler
    metrics: Metrics
    writer: AuditWriter
    background: Callable[[], Iterable[KeptTask]]
    bodies: Bodies
    held_answers: HeldAnswers = field(default_factory=HeldAnswers)


def dialects() -> dict[str, Dialect]:
    return {"ollama": Ollama(), "openai": OpenAI()}


def hasher_of(settings: Settings) -> PasswordHasher:
    return PasswordHasher(
        time_cost=settings.argon2_time_cost,
        memory_cost=settings.argon2_memory_cost_kib,
        parallelism=settings.argon2_parallelism,
    )


def database_of(settings: Settings) -> Database:
    return Database(settings.database_url, size=settings.database_pool_size, overflow=settings.database_pool_overflow)


@asynccontextmanager
async def fleet(settings: Settings) -> AsyncIterator[dict[str, Backend]]:
    async with AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(Backend(config)) for config in settings.backends]
        yield {backend.name: backend for backend in backends}


@asynccontextmanager
async def build(
    settings: Settings, metrics_folder: Path | None = None, beside: Sequence[KeptTask] = ()
) -> AsyncIterator[tuple[Application, Components]]:
    """`metrics_folder` is where the workers of one gateway share what they have counted; `beside` is what their process keeps
    going outside of this."""
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(database_of(settings))
        reports = await stack.enter_async_context(ReportDatabase(settings.database_url, timeout_s=REPORT_DEADLINE_S))
        store = await stack.enter_async_context(RedisClient(settings.redis_url))
        failures = AuthFailures(store, settings.auth_failure_rate_limit_per_ip_per_min)
        authenticator = await stack.enter_async_context(
            Authenticator(database, store, Verifier(hasher_of(settings)), failures, cache_s=settings.redis_key_cache_ttl_s)
        )
        backends = await stack.enter_async_context(fleet(settings))
        discovery = await stack.enter_async_context(discovery_of(settings, backends, store))
        running = await stack.enter_async_context(RunningModels(backends.values()))
        drains = await stack.enter_async_context(Drains(database, store, backends))
        proxies = await stack.enter_async_context(TrustedProxies(settings.gateway_trusted_proxies))
        scripts = read_scripts(limiter.LUA, presence.LUA)
        lines = await stack.enter_async_context(ShardConnections(settings.redis_url, scripts, store.count_failure))
        active = Presence(lines, uuid.uuid4().hex, lambda: state_of(components, active.process_id))
        limits = await stack.enter_async_context(
            limits_of(settings, database, store, lines, lambda: Share(active.rank, active.count))
        )
        spoken = dialects()
        writer = await stack.enter_async_context(
            AuditWriter(store, limits, database, active.process_id, keep_prompts=kept_prompts(settings))
        )
        purging = await stack.enter_async_context(retaining(settings))
        bounds = {"size": settings.audit_buffer_size, "most_output": settings.max_num_predict}
        weight = int(settings.cached_tokens_weight)
        settler = await stack.enter_async_context(Settler(limits, spoken, writer.write, cached_weight=weight, **bounds))
        watch = await stack.enter_async_context(ScopeTimer())
        metrics, in_flight = Metrics(metrics_folder), InFlight()
        keeping: list[Any] = [authenticator, discovery, drains, proxies, limits, writer, settler, watch]

        def background() -> list[KeptTask]:
            return [
                *beside,
                purging,
                *(one.background for one in (*keeping, sampler, active)),
                *store.background,
                *lines.background,
            ]

        parts = database, reports, store, discovery, running, backends, in_flight, watch, limits, settler, metrics, writer
        components = Components(*parts, background, Bodies(settings.max_request_body_bytes))
        catalog = lambda: discovery.catalog  # noqa: E731
        sampler = Gauges(metrics, in_flight, limits, lines, settler, writer, backends, catalog, store, database)
        await stack.enter_async_context(sampler)
        await stack.enter_async_context(active)
        await stack.enter_async_context(control_of(components))
        routes = _table(settings, components, Access(authenticator, limits, default_quota(settings)), spoken)
        id_header = settings.gateway_request_id_header
        rest = by_prefix(spoken), settler, metrics, in_flight
        application = Application(routes, proxies.client_of, *rest, request_id_header=id_header)
        LOG.info("PostgreSQL: %s", await _state_of(database))
        tell_what_is_in_force(settings, components)
        yield application, components


def admin_api_of(settings: Settings, components: Components) -> AdminApi:
    operations = {operation.path: operation for dialect in dialects().values() for operation in dialect.operations}
    defaults, most = default_quota(settings), settings.max_num_predict
    database, reports, store, discovery = components.database, components.reports, components.store, components.discovery
    key_store = KeyStore(database, hasher_of(settings), store)
    overview = Overview(settings.backends, discovery, reports, store, database)
    explain_now = lambda question: explain(question, fleet_as_seen(settings, components), components.limits, defaults, most)  # noqa: E731
    return AdminApi(
        KeyHandlers(key_store),
        BackendHandlers(overview, components.backends, discovery, database, store),
        ReportHandlers(overview, reports, key_store, operations, explain_now),
        overview,
        components.in_flight,
    )


def fleet_as_seen(settings: Settings, components: Components) -> Fleet:
    """The backends as this process sees them, for explanations."""
    drained = frozenset(name for name, backend in components.backends.items() if backend.is_drained)
    return Fleet(settings.backends, presence.local_view(components.backends), drained, components.discovery.catalog)


def state_of(components: Components, process_id: str) -> ProcessState:
    """What this process publishes of itself."""
    in_flight, limits = components.in_flight, components.limits
    backends = presence.local_view(components.backends)
    waiting, fleet = components.writer.waiting, presence.described(backend.config for backend in components.backends.values())
    return ProcessState(
        process_id, time.time(), in_flight.of_callers, limits.waiting, in_flight.draining, waiting, backends, fleet
    )


def control_of(components: Components) -> Control:
    acts = {"refresh": components.discovery.refreshed, "probe": lambda: probe.probe_all(components.backends)}
    return Control(components.store, presence.described(backend.config for backend in components.backends.values()), acts)


@asynccontextmanager
async def limits_of(
    settings: Settings, database: Database, store: RedisClient, lines: ShardConnections, share: Callable[[], Share]
) -> AsyncIterator[Limiter]:
    limits = Limiter(
        lines,
        Budgets(database, store).seed,
        share=share,
        most_output=settings.max_num_predict,
        queue_wait_s=settings.max_queue_wait_s,
        closed_without_redis=settings.limits_without_redis == "closed",
    )
    async with limits:
        store.subscribe({SLOT_FREED: lambda queue: limits.queue.slot_freed(queue.encode())}, after_gap=lambda: None)
        yield limits


@asynccontextmanager
async def retaining(settings: Settings) -> AsyncIterator[KeptTask]:
    """On a connection of its own: what is slow here must not look like a database that is away."""
    keep = timedelta(days=settings.audit_log_default_retention_days)
    async with Database(settings.database_url, size=1) as database:
        purging = KeptTask(lambda: retention.run_regularly(database, keep), "retention")
        purging.start()
        try:
            yield purging
        finally:
            await purging.end()


def default_quota(settings: Settings) -> Quota:
    return Quota(settings.default_rpm, settings.default_tpm, settings.default_concurrent)


def kept_prompts(settings: Settings) -> timedelta:
    return timedelta(days=settings.prompt_log_default_retention_days)


def discovery_of(settings: Settings, backends: dict[str, Backend], store: RedisClient) -> Discovery:
    return Discovery(
        list(backends.values()),
        store,
        refresh_s=settings.model_discovery_refresh_s,
        cache_s=settings.model_discovery_cache_ttl_s,
    )


def _table(
    settings: Settings, components: Components, access: Access, dialects: dict[str, Dialect]
) -> Callable[[Scope], ASGIApp]:
    lines: dict[tuple[str, str], ASGIApp] = {("GET", "/"): edge_router.running}
    lines |= _calls(settings, components, access, dialects)
    lines |= _lists(components, access)
    lines |= admin_api_of(settings, components).routes(access, components.watch, components.bodies)
    if settings.playground_enabled:
        lines |= static.playground(settings.playground_file)
    if settings.dashboard_enabled:
        lines |= static.routes(static.DASHBOARD)
    if settings.metrics_token or settings.metrics_allow:
        scrape = MetricsEndpoint(components.metrics, settings.metrics_token, settings.metrics_allow)
        lines |= {(method, METRICS): scrape for method in METHODS}
    for method, path in passthrough.ROUTES:
        lines[method, path] = passthrough.AdminVerb(
            method,
            path,
            dialects["ollama"],
            access,
            components.backends,
            components.watch,
            lambda backend: components.discovery.refresh([backend], enough_s=MODELS_CHANGED_S),
            components.bodies,
        )
    if settings.docs_enabled:
        lines |= static.routes(static.DOCS)
        lines |= _document(lines, by_prefix(dialects), settings.gateway_request_id_header)
    return edge_router.router(lines)


def _document(
    lines: dict[tuple[str, str], ASGIApp], dialect_of: Callable[[str], Dialect], id_header: str
) -> dict[tuple[str, str], ASGIApp]:
    """A page of the document that describes `lines`, and itself."""
    line = ("GET", "/openapi.json")
    document = ApiDocument(dialect_of, id_header).of({**lines, line: None})
    return {line: static.Page(strict_json.write(document), "application/json")}


def _calls(
    settings: Settings, components: Components, access: Access, dialects: dict[str, Dialect]
) -> dict[tuple[str, str], ASGIApp]:
    router = Failover(components.backends, components.held_answers, most_tokens=settings.max_num_predict)
    return {
        ("POST", operation.path): Exchange(
            dialect,
            operation,
            access,
            router,
            components.watch,
            lambda: components.discovery.catalog,
            components.settler,
            bodies=components.bodies,
            most_tokens=settings.max_num_predict,
            stand_in=described if operation.path == "/api/show" else None,
        )
        for dialect in dialects.values()
        for operation in dialect.operations
    }


def _lists(components: Components, access: Access) -> dict[tuple[str, str], ASGIApp]:
    lists = ModelLists(access, lambda: components.discovery.catalog, components.running.now)
    catalog = lambda: components.discovery.catalog  # noqa: E731
    health = Health(components.database, components.store, catalog, components.background, components.in_flight)
    return {
        ("GET", "/api/tags"): lists.tags,
        ("GET", "/api/ps"): lists.running,
        ("GET", "/api/version"): lists.version,
        ("GET", "/v1/models"): lists.models,
        ("GET", "/v1/models/{id:path}"): lists.model,
        ("GET", "/healthz"): health.alive,
        ("GET", "/readyz"): health.ready,
    }


def tell_what_is_in_force(settings: Settings, components: Components) -> None:
    """One line each at start."""
    for backend in settings.backends:
        opened = f"with a token in {backend.auth_header}" if backend.auth_token else "without a token"
        LOG.info("backend %s: %s at %s, %s", backend.name, backend.kind, backend.base_url, opened)
    models = len(components.discovery.catalog.models)
    LOG.info("models: %d known, asked for every %g s", models, settings.model_discovery_refresh_s)
    LOG.info("keys: argon2id, remembered for %g s", settings.redis_key_cache_ttl_s)
    own = f"{settings.default_rpm} requests and {settings.default_tpm} tokens a minute, {settings.default_concurrent} at once"
    LOG.info("limits of keys without their own: %s; without Redis: %s", own, settings.limits_without_redis)
    LOG.info("prompt tokens that a backend had cached count %s of one", settings.cached_tokens_weight)
    LOG.info("audit: kept for %d days", settings.audit_log_default_retention_days)
    LOG.info("bodies: at most %d bytes; answers: at most %d tokens", settings.max_request_body_bytes, settings.max_num_predict)
    LOG.info("Redis: %s", "in use" if components.store.up else "away, each process goes on by itself")


async def _state_of(database: Database) -> str:
    try:
        return "schema current" if await is_current(database) else "schema NOT current, run `make migrate`"
    except StoreUnavailable:
        return "away, keys cannot be checked until it answers"
