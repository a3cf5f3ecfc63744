"""Every path of the gateway and what answers it, written out."""

from gateway import endpoints
from gateway.admin.endpoint import AdminRoute
from gateway.admin.events import AdminEvents
from gateway.admin.models import JobRoute
from gateway.edge.health import Health
from gateway.pages.static import Page
from gateway.proxy.exchange import Exchange
from gateway.proxy.model_lists import ModelLists
from gateway.proxy.passthrough import Passthrough
from gateway.proxy.upload_exchange import UploadExchange
from gateway.telemetry.metrics_endpoint import MetricsEndpoint
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend

ALL_ON = {"DASHBOARD_ENABLED": "true", "PLAYGROUND_ENABLED": "true", "DOCS_ENABLED": "true", "METRICS_TOKEN": "a-long-token"}
NOT_BY_A_CLASS = {"GET /"}
EXPECTED = {
    Exchange: """
        POST /api/chat
        POST /api/generate
        POST /api/embed
        POST /api/embeddings
        POST /api/show
        POST /v1/chat/completions
        POST /v1/completions
        POST /v1/embeddings
        POST /v1/messages
        POST /v1/messages/count_tokens
        POST /v1/responses
        POST /v1/responses/input_tokens
        POST /v1/rerank
        POST /rerank
        POST /v2/rerank
        POST /v1/images/generations
        POST /v1/audio/speech
    """,
    UploadExchange: """
        POST /v1/audio/transcriptions
        POST /v1/audio/translations
    """,
    ModelLists: """
        GET /api/tags
        GET /api/ps
        GET /api/version
        GET /v1/models
        GET /v1/models/{id:path}
    """,
    Passthrough: """
        POST /api/pull
        POST /api/push
        POST /api/create
        POST /api/copy
        DELETE /api/delete
        HEAD /api/blobs/{digest}
        POST /api/blobs/{digest}
        GET /api/status
        POST /api/me
        POST /api/signout
        POST /api/experimental/web_search
        POST /api/experimental/web_fetch
        GET /api/experimental/model-recommendations
    """,
    Health: """
        GET /healthz
        GET /readyz
    """,
    MetricsEndpoint: """
        GET /metrics
        POST /metrics
        PUT /metrics
        PATCH /metrics
        DELETE /metrics
        OPTIONS /metrics
    """,
    AdminEvents: """
        GET /admin/v1/events
    """,
    AdminRoute: """
        GET /admin/v1/overview
        GET /admin/v1/series
        GET /admin/v1/backends
        POST /admin/v1/backends/{name}/drain
        POST /admin/v1/backends/{name}/undrain
        POST /admin/v1/backends/{name}/probe
        POST /admin/v1/refresh
        GET /admin/v1/keys
        POST /admin/v1/keys
        PATCH /admin/v1/keys/{id}
        POST /admin/v1/keys/{id}/rotate
        DELETE /admin/v1/keys/{id}
        GET /admin/v1/audit
        GET /admin/v1/requests/{id}
        GET /admin/v1/usage
        GET /admin/v1/explain
    """,
    JobRoute: """
        POST /admin/v1/warm
        POST /admin/v1/unload
        POST /admin/v1/pull
    """,
    Page: """
        GET /dashboard
        GET /dashboard/dashboard.js
        GET /dashboard/fleet.js
        GET /dashboard/tables.js
        GET /dashboard/nodes.js
        GET /dashboard/style.css
        GET /playground
        GET /playground/playground.js
        GET /playground/markdown.js
        GET /playground/nodes.js
        GET /playground/style.css
        GET /docs
        GET /docs/docs.js
        GET /docs/nodes.js
        GET /docs/style.css
        GET /openapi.json
    """,
}


def test_every_path_and_what_answers_it(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, **ALL_ON)
    table = endpoints.table(gateway.settings, gateway.components)
    # A bound method is an endpoint, too.
    found = {f"{method} {path}": type(getattr(endpoint, "__self__", endpoint)) for (method, path), endpoint in table.items()}
    expected = {line.strip(): kind for kind, text in EXPECTED.items() for line in text.strip().splitlines()}
    assert found.keys() == expected.keys() | NOT_BY_A_CLASS
    assert {route: found[route] for route in expected} == expected
