"""Routes that change a backend: only for keys with that role, sent to the backend they name, passed through as they are."""

import hashlib
import json

import httpx
import pytest

from gateway.auth.key import ADMIN_MODELS, SHOW_BACKEND
from gateway.endpoints import PASSED_THROUGH
from tests.conftest import StartGateway
from tests.support.chat_requests import CHATS
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Head, Piece, Reset
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
BLOB = b"weights" * 100_000
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, beta)


@pytest.mark.parametrize(("method", "route"), PASSED_THROUGH)
def test_every_route_is_refused_without_the_role_and_without_a_key(
    gateway: RunningGateway, alpha: FakeBackend, method: str, route: str
) -> None:
    path = route.replace("{digest}", DIGEST)
    before = len(alpha.requests)
    with gateway.http(gateway.key()) as client:
        assert client.request(method, path, content=b'{"model":"x"}').status_code == 403
    with gateway.http() as client:
        assert client.request(method, path, content=b'{"model":"x"}').status_code == 401
    assert len(alpha.requests) == before


def test_a_pull_streams_from_the_first_backend_and_the_model_is_listed_at_once(
    gateway: RunningGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    client = gateway.ollama(gateway.admin_key())
    assert [progress.status for progress in client.pull("new-model", stream=True)][-1] == "success"
    assert alpha.calls("/api/pull") and not beta.calls("/api/pull")
    gateway.wait_idle()
    gateway.call(gateway.components.discovery.refresh())
    assert "new-model:latest" in gateway.components.discovery.catalog.models


def test_a_header_names_another_backend(gateway: RunningGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    with gateway.http(gateway.admin_key(), headers={"X-Gateway-Backend": "beta"}) as client:
        assert client.post("/api/copy", json={"source": MODEL, "destination": "copy"}).status_code == 200
        assert client.request("DELETE", "/api/delete", json={"model": "copy"}).status_code == 200
    assert beta.calls("/api/copy") and beta.calls("/api/delete") and not alpha.calls("/api/copy")
    with gateway.http(gateway.admin_key(), headers={"X-Gateway-Backend": "gamma"}) as client:
        got = client.post("/api/copy", json={"source": MODEL, "destination": "copy"})
        assert got.status_code == 400 and "X-Gateway-Backend" in got.json()["error"]


def test_an_error_of_the_backend_is_passed_through(gateway: RunningGateway) -> None:
    with gateway.http(gateway.admin_key()) as client:
        assert client.request("DELETE", "/api/delete", json={"model": "absent"}).status_code == 404


def test_only_a_change_of_models_makes_the_gateway_list_them_again(gateway: RunningGateway, alpha: FakeBackend) -> None:
    """A request whose change was refused does not wait for a list that hangs."""
    with gateway.http(gateway.admin_key()) as client:
        asked = len(alpha.calls("/api/tags"))
        assert client.request("DELETE", "/api/delete", json={"model": "absent"}).status_code == 404
        alpha.play("/api/copy", [Reset()])
        assert client.post("/api/copy", json={"source": MODEL, "destination": "copy"}).status_code == 502
        assert client.post("/api/copy", content=b"no JSON").status_code == 400
        assert len(alpha.calls("/api/tags")) == asked
        alpha.play("/api/copy", None)
        assert client.post("/api/copy", json={"source": MODEL, "destination": "copy"}).status_code == 200
        assert len(alpha.calls("/api/tags")) == asked + 1


def test_a_blob_larger_than_any_body_limit_is_streamed(gateway: RunningGateway, alpha: FakeBackend) -> None:
    with gateway.http(gateway.admin_key()) as client:
        assert client.head(f"/api/blobs/{DIGEST}").status_code == 404
        assert client.post(f"/api/blobs/{DIGEST}", content=BLOB).status_code in (200, 201)
        assert client.head(f"/api/blobs/{DIGEST}").status_code == 200
        assert client.post("/api/blobs/../../etc", content=b"x").status_code in (400, 404)
        assert client.post("/api/blobs/sha256:zz", content=b"x").status_code == 400
    posted = next(request for request in alpha.requests if request.method == "POST" and "/api/blobs" in request.path)
    assert posted.body == BLOB


def test_bodies_from_admins_are_parsed_strictly_too(gateway: RunningGateway, alpha: FakeBackend) -> None:
    with gateway.http(gateway.admin_key()) as client:
        for body in (b'{"model":"a","Model":"b"}', b'{"model":"a","model":"b"}', b'{"model":"a"} x'):
            assert client.post("/api/pull", content=body).status_code == 400
    assert not alpha.calls("/api/pull")


def test_a_pull_that_breaks_off_ends_with_an_error(gateway: RunningGateway, alpha: FakeBackend) -> None:
    line = b'{"status":"pulling manifest"}\n'
    alpha.play("/api/pull", [Head(200, [("Content-Type", "application/x-ndjson")], chunked=True), Piece(line), Reset()])
    with gateway.http(gateway.admin_key()) as client:
        got = client.post("/api/pull", json={"model": "x"})
    assert got.content.startswith(line) and json.loads(got.content.splitlines()[-1])["error"]


def test_no_backend_for_these_routes(start_gateway: StartGateway) -> None:
    with FakeBackend("openai", ["x"], name="beta") as beta:
        gateway = start_gateway(beta)
        with gateway.http(gateway.admin_key()) as client:
            assert client.post("/api/pull", json={"model": "x"}).status_code == 400


def test_keys_with_the_flag_see_which_backend_answered(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(flags=(SHOW_BACKEND,))) as client:
        assert client.post("/api/chat", json=CHATS[0].body).headers["x-gateway-backend"] == "alpha"
    with gateway.http(gateway.key()) as client:
        got: httpx.Response = client.post("/api/chat", json=CHATS[0].body)
        assert "x-gateway-backend" not in got.headers


def test_a_refused_request_is_sent_to_no_backend(gateway: RunningGateway, alpha: FakeBackend) -> None:
    with gateway.http(gateway.key(flags=(ADMIN_MODELS,), rpm=0)) as client:
        assert client.post("/api/pull", json={"model": "new"}).status_code == 429
    [row] = gateway.audit_rows()
    assert (row["outcome"], row["backend"]) == ("refused:rate_limit_exceeded", "")
    assert not alpha.calls("/api/pull")
