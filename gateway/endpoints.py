"""Every path with the endpoint that answers it; a path that is not listed here cannot be reached."""

from functools import partial
from typing import Any

from starlette.types import ASGIApp

from gateway.admin.api import AdminApi
from gateway.admin.backends import BackendHandlers
from gateway.admin.endpoint import AdminRoute
from gateway.admin.events import AdminEvents
from gateway.admin.explain import Fleet, Question, explain
from gateway.admin.fleet_view import FleetView
from gateway.admin.keys import KeyHandlers
from gateway.admin.models import JobRoute
from gateway.admin.overview import Overview
from gateway.admin.reports import ReportHandlers
from gateway.auth.key_store import KeyStore
from gateway.components import Components, default_quota, hasher_of
from gateway.core import strict_json
from gateway.dialects import registry
from gateway.edge import router
from gateway.edge.health import Health
from gateway.fleet import presence
from gateway.fleet.backends.backend import Backend
from gateway.fleet.failover import Failover
from gateway.fleet.forecast import forecast
from gateway.fleet.loaded_models import LoadedModels
from gateway.pages import static
from gateway.pages.openapi import ApiDocument
from gateway.proxy.access import Access
from gateway.proxy.callers import Callers
from gateway.proxy.exchange import Exchange
from gateway.proxy.local_answers import ANSWERS
from gateway.proxy.model_lists import ModelLists
from gateway.proxy.passthrough import Passthrough
from gateway.proxy.upload_exchange import UploadExchange
from gateway.settings import Settings
from gateway.telemetry.metrics_endpoint import MetricsEndpoint

Endpoints = dict[tuple[str, str], ASGIApp]

# Calls to a model.
CALLS = (
    "/api/chat",
    "/api/generate",
    "/api/embed",
    "/api/embeddings",
    "/api/show",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/responses",
    "/v1/responses/input_tokens",
)
# Ollama's routes that change a backend or act on its behalf: for keys with the flag admin_models, passed to one backend.
PASSED_THROUGH = (
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
    ("HEAD", "/api/blobs/{digest}"),
    ("POST", "/api/blobs/{digest}"),
    ("GET", "/api/status"),
    ("POST", "/api/me"),
    ("POST", "/api/signout"),
    ("POST", "/api/experimental/web_search"),
    ("POST", "/api/experimental/web_fetch"),
    ("GET", "/api/experimental/model-recommendations"),
)
# Calls of models of other kinds.
SOME_BACKENDS_HAVE = (
    "/v1/rerank",
    "/rerank",
    "/v2/rerank",
    "/v1/images/generations",
    "/v1/audio/speech",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
)
# Paths of pages, and their files in pages/static.
DASHBOARD = {
    "/dashboard": "dashboard.html",
    "/dashboard/dashboard.js": "dashboard.js",
    "/dashboard/fleet.js": "fleet.js",
    "/dashboard/tables.js": "tables.js",
    "/dashboard/nodes.js": "nodes.js",
    "/dashboard/style.css": "style.css",
}
PLAYGROUND = {
    "/playground": "playground.html",
    "/playground/playground.js": "playground.js",
    "/playground/markdown.js": "markdown.js",
    "/playground/nodes.js": "nodes.js",
    "/playground/style.css": "style.css",
}
DOCS = {"/docs": "docs.html", "/docs/docs.js": "docs.js", "/docs/nodes.js": "nodes.js", "/docs/style.css": "style.css"}
# For callers that may not see the metrics, no method reveals that the path exists.
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# How long the answer to a pull waits for the new list of models.
MODELS_CHANGED_S = 2.0


def table(settings: Settings, parts: Components) -> Endpoints:
    access = Access(parts.authenticator, parts.limits, default_quota(settings))
    calls = calls_of(settings, parts, access)
    lists = ModelLists(access, parts.catalog, parts.load.running)
    health = Health(parts.database, parts.store, parts.catalog, parts.background, parts.in_flight)
    admin = admin_api_of(settings, parts, access)
    found: Endpoints = {
        ("GET", "/"): router.ollama_banner,
        **{("POST", path): calls[path] for path in (*CALLS, *SOME_BACKENDS_HAVE)},
        ("GET", "/api/tags"): lists.tags,
        ("GET", "/api/ps"): lists.running_models,
        ("GET", "/api/version"): lists.version,
        ("GET", "/v1/models"): lists.models,
        ("GET", "/v1/models/{id:path}"): lists.model,
        ("GET", "/healthz"): health.alive,
        ("GET", "/readyz"): health.ready,
        ("GET", "/admin/v1/overview"): admin.overview,
        ("GET", "/admin/v1/events"): admin.events,
        ("GET", "/admin/v1/series"): admin.series,
        ("GET", "/admin/v1/backends"): admin.backends,
        ("POST", "/admin/v1/backends/{name}/drain"): admin.drain,
        ("POST", "/admin/v1/backends/{name}/undrain"): admin.undrain,
        ("POST", "/admin/v1/backends/{name}/probe"): admin.probe,
        ("POST", "/admin/v1/refresh"): admin.refresh,
        ("POST", "/admin/v1/warm"): admin.warm,
        ("POST", "/admin/v1/unload"): admin.unload,
        ("POST", "/admin/v1/pull"): admin.pull,
        ("GET", "/admin/v1/keys"): admin.keys,
        ("POST", "/admin/v1/keys"): admin.create_key,
        ("PATCH", "/admin/v1/keys/{id}"): admin.limit_key,
        ("POST", "/admin/v1/keys/{id}/rotate"): admin.rotate_key,
        ("DELETE", "/admin/v1/keys/{id}"): admin.revoke_key,
        ("GET", "/admin/v1/audit"): admin.audit,
        ("GET", "/admin/v1/requests/{id}"): admin.trace,
        ("GET", "/admin/v1/usage"): admin.usage,
        ("GET", "/admin/v1/explain"): admin.explain,
    }
    if settings.playground_enabled:
        own = settings.playground_file
        found |= static.own_playground(own) if own else static.routes(PLAYGROUND)
    if settings.dashboard_enabled:
        found |= static.routes(DASHBOARD)
    if settings.metrics_token or settings.metrics_allow:
        scrape = MetricsEndpoint(parts.metrics, settings.metrics_token, settings.metrics_allow)
        found |= {(method, "/metrics"): scrape for method in METHODS}
    found |= {(method, path): passed_through(method, path, parts, access) for method, path in PASSED_THROUGH}
    if settings.docs_enabled:
        found |= static.routes(DOCS)
        found["GET", "/openapi.json"] = document_of(found, parts, settings.gateway_request_id_header)
    return found


def calls_of(settings: Settings, parts: Components, access: Access) -> dict[str, Exchange]:
    """An exchange for each operation of a model, by path."""
    loaded = LoadedModels(parts.catalog, parts.load, settings.max_keep_alive_s)
    held, in_turn, most_tokens = parts.held_answers, parts.bodies.in_turn, settings.max_num_predict
    failover = Failover(parts.backends, parts.placing, loaded, held, in_turn, most_tokens=most_tokens)
    callers = Callers(parts.limits, settings.sub_user_header.lower().encode())
    return {
        operation.path: (UploadExchange if operation.is_form else Exchange)(
            dialect,
            operation,
            access,
            failover,
            parts.scope_timer,
            parts.catalog,
            parts.settler,
            bodies=parts.bodies,
            callers=callers,
            most_tokens=most_tokens,
            answer_here=ANSWERS.get(operation.path),
            strips_volatile=settings.strip_volatile_prompt_lines,
        )
        for dialect in parts.dialects.values()
        for operation in dialect.operations
    }


def passed_through(method: str, path: str, parts: Components, access: Access) -> Passthrough:
    async def list_models_again(backend: Backend) -> None:
        await parts.discovery.refresh([backend], enough_s=MODELS_CHANGED_S)

    ollama = parts.dialects["ollama"]
    return Passthrough(method, path, ollama, access, parts.backends, parts.scope_timer, list_models_again, parts.bodies)


def document_of(endpoints: Endpoints, parts: Components, id_header: str) -> static.Page:
    """The OpenAPI document of all endpoints, itself included."""
    document = ApiDocument(registry.by_prefix(parts.dialects), id_header).of({**endpoints, ("GET", "/openapi.json"): None})
    return static.Page(strict_json.write(document), "application/json")


def admin_api_of(settings: Settings, parts: Components, access: Access) -> AdminApi:
    key_store = KeyStore(parts.database, hasher_of(settings), parts.store)
    state = partial(parts.placing.queue.board.state, with_estimates=True)
    fleet = FleetView(parts.catalog, parts.load.view, parts.costs, state)
    overview = Overview(settings.backends, parts.discovery, parts.reports, parts.store, parts.database, fleet)
    defaults, most = default_quota(settings), settings.max_num_predict

    async def explain_now(question: Question) -> dict[str, Any]:
        return await explain(question, fleet_as_seen(parts), parts.limits, defaults, most)

    return AdminApi(
        partial(AdminRoute, access, parts.scope_timer, parts.bodies),
        KeyHandlers(key_store),
        BackendHandlers(overview, parts.backends, parts.discovery, parts.database, parts.store),
        ReportHandlers(overview, parts.reports, key_store, registry.operations(parts.dialects), explain_now),
        AdminEvents(access, parts.scope_timer, overview, parts.in_flight),
        lambda verb: JobRoute(access, parts.scope_timer, parts.bodies, verb, parts.model_jobs().plan, parts.in_flight),
    )


def fleet_as_seen(parts: Components) -> Fleet:
    """The backends as this process sees them, for explanations."""
    drained = frozenset(name for name, backend in parts.backends.items() if backend.is_drained)
    backends, states = list(parts.backends.values()), presence.local_view(parts.backends)
    queue = parts.placing.queue
    foresee = partial(forecast, board=queue.board, local=queue.local, eta=queue.eta)
    return Fleet(backends, states, drained, parts.catalog(), parts.placing.claims, foresee)
