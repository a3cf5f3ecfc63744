"""The gateway as an ASGI application: components and endpoints put together, and what the log says at the start."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from gateway import endpoints
from gateway.components import Components, chooses_nothing, opened
from gateway.core.background import KeptTask
from gateway.core.errors import StoreUnavailable
from gateway.dialects import registry
from gateway.edge import router
from gateway.edge.application import Application
from gateway.settings import Settings
from gateway.stores.migrations import is_current
from gateway.stores.postgres import Database

LOG = logging.getLogger("gateway")


@asynccontextmanager
async def build(
    settings: Settings, metrics_folder: Path | None = None, beside: Sequence[KeptTask] = ()
) -> AsyncIterator[tuple[Application, Components]]:
    """The arguments are those of `components.opened`."""
    async with opened(settings, metrics_folder, beside) as parts:
        application = Application(
            router.router(endpoints.table(settings, parts)),
            parts.proxies.client_of,
            registry.by_prefix(parts.dialects),
            parts.settler,
            parts.metrics,
            parts.in_flight,
            request_id_header=settings.gateway_request_id_header,
        )
        LOG.info("PostgreSQL: %s", await _state_of(parts.database))
        log_settings_in_force(settings, parts)
        yield application, parts


def log_settings_in_force(settings: Settings, components: Components) -> None:
    """One line each at start."""
    for backend in settings.backends:
        opened = f"with a token in {backend.auth_header}" if backend.auth_token else "without a token"
        LOG.info("backend %s: %s at %s, %s", backend.name, backend.kind, backend.base_url, opened)
    models = components.discovery.catalog.size
    LOG.info("models: %d known, refreshed every %g s", models, settings.model_discovery_refresh_s)
    queue = f"{settings.queue_size} of them for a model, each for {settings.queue_wait_s:g} s"
    LOG.info("routing: %s; calls that find no slot wait, at most %s", settings.routing, queue)
    if chooses_nothing(settings):
        LOG.warning('ROUTING=fast chooses nothing: each backend is a tier of its own; give equals the same "tier"')
    LOG.info("keys: argon2id, cached for %g s", settings.redis_key_cache_ttl_s)
    own = f"{settings.default_rpm} requests and {settings.default_tpm} tokens a minute, {settings.default_concurrent} at once"
    LOG.info("default limits of a key: %s; without Redis: %s", own, settings.limits_without_redis)
    LOG.info("a cached prompt token counts as %s tokens", settings.cached_tokens_weight)
    LOG.info("audit: kept for %d days", settings.audit_log_default_retention_days)
    LOG.info("bodies: at most %d bytes; answers: at most %d tokens", settings.max_request_body_bytes, settings.max_num_predict)
    LOG.info("Redis: %s", "in use" if components.store.up else "unreachable, each process works without it")


async def _state_of(database: Database) -> str:
    try:
        return "schema current" if await is_current(database) else "schema NOT current, run `make migrate`"
    except StoreUnavailable:
        return "unreachable, keys cannot be checked until it answers"
