"""Pages of other origins may read the routes of the API that need a key, and nothing else."""

from typing import Any

import anthropic
import openai
import pytest

from gateway import endpoints
from gateway.auth.key import ADMIN
from tests.conftest import StartGateway
from tests.support.chat_requests import MESSAGES
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

PAGE = {"Origin": "http://elsewhere.example"}
PREFLIGHT = {**PAGE, "Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}
OWN_PAGES = (
    *("/", "/healthz", "/readyz", "/metrics", "/openapi.json", *endpoints.DOCS, *endpoints.DASHBOARD, *endpoints.PLAYGROUND),
    *("/admin/v1/overview", "/admin/v1/keys", "/admin/v1/nowhere", "/nowhere", "/v1x", "/apix/tags", "//metrics"),
)
TO_ALL = ("/v1/models", "/v1/models/llama3.2", "/v1/nowhere", "/v1/", "//v1/models", "/api/tags", "/api/nowhere", "/api/pull")


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(
        alpha,
        DASHBOARD_ENABLED="true",
        DOCS_ENABLED="true",
        METRICS_ALLOW="127.0.0.0/8",
        PLAYGROUND_ENABLED="true",
        MAX_REQUEST_BODY_BYTES="2000",
    )


def test_pages_of_other_origins_may_not_call_keyless_or_admin_routes(gateway: RunningGateway) -> None:
    key = gateway.key(flags=(ADMIN,))
    with gateway.http(key) as client:
        for path in [*OWN_PAGES, *(f"/k/{key}{path}" for path in ("/metrics", "/readyz", "/admin/v1/keys", "/"))]:
            for answer in (client.get(gateway.url + path, headers=PAGE), client.options(gateway.url + path, headers=PREFLIGHT)):
                granted = [name for name in answer.headers if name.startswith("access-control-")]
                assert granted == [], (path, answer.request.method, granted)
            assert client.options(gateway.url + path, headers=PREFLIGHT).status_code >= 400, path


def test_answers_without_a_key_cannot_be_embedded_in_other_pages(gateway: RunningGateway) -> None:
    """Even without access to its bytes another page could load it, as a script or a picture."""
    with gateway.http() as client:
        for path in (
            "/healthz",
            "/readyz",
            "/metrics",
            "/openapi.json",
            *endpoints.DOCS,
            *endpoints.DASHBOARD,
            *endpoints.PLAYGROUND,
        ):
            answer = client.get(path)
            assert answer.status_code == 200 and answer.headers["cross-origin-resource-policy"] == "same-origin", path
            assert answer.headers["x-content-type-options"] == "nosniff", path


def test_pages_of_any_origin_may_call_the_api_and_read_errors(gateway: RunningGateway) -> None:
    key, spent = gateway.key(), gateway.key(rpm=0)
    body = {"model": "llama3.2", "messages": MESSAGES}
    with gateway.http() as client:
        for path in [*TO_ALL, *(f"/k/{key}{path}" for path in TO_ALL)]:
            preflight = client.options(gateway.url + path, headers=PREFLIGHT)
            assert preflight.status_code == 204 and "authorization" in preflight.headers["access-control-allow-headers"], path
            answers = [
                client.get(gateway.url + path, headers={**PAGE, **more})
                for more in ({}, {"x-api-key": key}, {"x-api-key": "wrong"})
            ]
            assert {answer.headers.get("access-control-allow-origin") for answer in [preflight, *answers]} == {"*"}, path
            assert all("x-request-id" in answer.headers["access-control-expose-headers"] for answer in answers), path
        for used, more, status in ((key, {}, 200), (spent, {}, 429), (key, {"user": "x" * 4000}, 413)):
            answer = client.post("/v1/chat/completions", json={**body, **more}, headers={**PAGE, "x-api-key": used})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "*")
        assert "access-control-allow-origin" not in client.get("/v1/models").headers


def test_official_clients_in_pages_may_send_their_headers(gateway: RunningGateway, alpha: FakeBackend) -> None:
    """Those of JavaScript send the same headers as those of Python."""
    messages: Any = MESSAGES
    asking = {"api_key": "x", "max_retries": 0}
    before = len(alpha.requests)
    with anthropic.Anthropic(base_url=alpha.url, **asking) as of_anthropic, pytest.raises(anthropic.APIStatusError):  # type: ignore[arg-type]
        of_anthropic.messages.stream(model="m", max_tokens=1, messages=messages).__enter__()
    with openai.OpenAI(base_url=f"{alpha.url}/v1", **asking) as of_openai, pytest.raises(openai.APIStatusError):  # type: ignore[arg-type]
        of_openai.responses.stream(model="m", input="Hi").__enter__()
    sent = {name for request in alpha.requests[before:] for name, _ in request.headers}
    with gateway.http() as pages:
        allowed = pages.options("/v1/messages", headers=PREFLIGHT).headers["access-control-allow-headers"].split(", ")
    assert {name for name in sent if name.startswith(("x-stainless", "anthropic-", "openai-"))} <= set(allowed)
    assert "x-stainless-lang" in sent and "x-gateway-class" in allowed
