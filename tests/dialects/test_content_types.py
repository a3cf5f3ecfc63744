"""Answers have the content types of the dialect, and no browser may take them for anything else."""

import socket
from collections.abc import Iterator

import pytest

from gateway.auth.key import ADMIN_MODELS
from tests.conftest import StartGateway
from tests.support.chat_requests import CHATS, MODEL, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import HTML, PLAIN, End, Head, Piece, Raw, answer, recording
from tests.support.running_gateway import RunningGateway
from tests.support.shared_gateway import Shared

PAGE = b"<html><script>alert(1)</script></html>"
OURS = {"ollama-stream": "application/x-ndjson", "openai-stream": "text/event-stream"}


@pytest.fixture(scope="module")
def started(start_shared_gateway: StartGateway) -> Iterator[Shared]:
    with FakeBackend(models=["llama3.2:latest"], name="alpha") as backend:
        yield Shared(backend, start_shared_gateway(backend, METRICS_ALLOW="127.0.0.1"))


@pytest.fixture
def shared(started: Shared) -> Shared:
    return started.renewed()


@pytest.fixture
def alpha(shared: Shared) -> FakeBackend:
    return shared.backend


@pytest.fixture
def gateway(shared: Shared) -> RunningGateway:
    return shared.gateway


def recorded(chat: Chat) -> bytes:
    ending = "whole.json" if not chat.streamed else "stream.ndjson" if chat.dialect == "ollama" else "stream.sse"
    return recording(f"{chat.dialect}_chat_{ending}")


@pytest.mark.parametrize(
    "reported", ["text/html", "image/svg+xml; charset=utf-8", "application/json; charset=utf-7", "", "x" * 500]
)
@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_unknown_content_types_become_the_dialects_own(
    gateway: RunningGateway, alpha: FakeBackend, chat: Chat, reported: str
) -> None:
    typed = [("Content-Type", reported)] if reported else []
    alpha.play(chat.path, [Head(200, typed, chunked=True), Piece(recorded(chat)), End()])
    with gateway.http(gateway.key()) as client:
        got = client.post(chat.path, json=chat.body)
    assert got.status_code == 200 and got.headers["content-type"] == OURS.get(str(chat), "application/json")
    assert got.headers["x-content-type-options"] == "nosniff"


def test_known_content_types_stay_as_reported(gateway: RunningGateway, alpha: FakeBackend) -> None:
    """Ollama answers a request that only loads a model with one JSON object, even if a stream was requested."""
    with gateway.http(gateway.key()) as client:
        for chat, reported in [(CHATS[1], "application/json; charset=utf-8"), (CHATS[3], "text/event-stream;charset=UTF-8")]:
            alpha.play(chat.path, [Head(200, [("Content-Type", reported)], chunked=True), Piece(recorded(chat)), End()])
            assert client.post(chat.path, json=chat.body).headers["content-type"] == reported


@pytest.mark.parametrize(("status", "expected"), [(200, 502), (502, 502), (302, 502), (404, 404), (403, 403)])
def test_a_page_instead_of_an_answer_is_not_passed_on(
    gateway: RunningGateway, alpha: FakeBackend, status: int, expected: int
) -> None:
    with gateway.http(gateway.key(flags=(ADMIN_MODELS,))) as client:
        for kind in (HTML, PLAIN):
            alpha.play("/api/pull", answer(status, PAGE, kind))
            got = client.post("/api/pull", json={"model": "x"})
            assert (got.status_code, got.headers["content-type"]) == (expected, "application/json")
            assert b"<" not in got.content and got.json()["error"]
        alpha.play("/api/chat", answer(422, PAGE, HTML))
        got = client.post("/api/chat", json=CHATS[0].body)
        assert (got.status_code, got.headers["content-type"]) == (422, "application/json") and b"<" not in got.content


def test_every_answer_forbids_content_sniffing(gateway: RunningGateway) -> None:
    paths = ["/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/playground", "/dashboard", "/nowhere"]
    paths += ["/api/tags", "/api/ps", "/api/version", "/v1/models", "/v1/models/absent", "/admin/v1/keys", "/v1/nowhere"]
    with gateway.http(gateway.key()) as client:
        answers = [client.get(path) for path in paths]
        answers += [client.post("/api/show", json={"model": MODEL}), client.put("/api/chat"), client.post("/api/chat")]
        answers.append(client.options("/api/chat", headers={"Origin": "http://x"}))
    with gateway.http() as client:
        answers.append(client.get("/v1/models"))
    found = {str(got.url): got.headers.get_list("x-content-type-options") for got in answers}
    assert {url: values for url, values in found.items() if values != ["nosniff"]} == {}
    assert answers[3].status_code == 200 and answers[9].status_code == 200


def test_a_header_with_a_line_break_is_refused(gateway: RunningGateway, alpha: FakeBackend) -> None:
    """A backend's header never ends one of the gateway's header lines."""
    alpha.play(
        "/api/chat", [Raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\rX-Evil: 1\r\nContent-Length: 2\r\n\r\n{}")]
    )
    body = b'{"model":"llama3.2","messages":[]}'
    head = f"POST /api/chat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key()}\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 502") and b"X-Evil" not in received
