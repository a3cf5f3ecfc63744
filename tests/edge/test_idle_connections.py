"""Data that a backend sends without a request reaches no caller: the next one would take it for its answer."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from gateway.fleet.backends.http_client import ConnectionPool
from tests.conftest import StartGateway
from tests.support.chat_requests import MODEL

LIST = b'{"object":"list","data":[{"id":"llama3.2:latest","object":"model","created":1,"owned_by":"me"}]}'


def whole(text: bytes) -> bytes:
    body = LIST if not text else b'{"id":"1","object":"chat.completion","choices":[{"message":{"content":"%b"}}]}' % text
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Chatterbox:
    """A backend on raw sockets that answers correctly, and sends more data on command."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        received = b""
        with suppress(OSError):
            while piece := connection.recv(65_536):
                received += piece
                if received.startswith(b"GET") and received.endswith(b"\r\n\r\n"):
                    received = b""
                    connection.sendall(whole(b""))
                elif received.endswith((b"}", b"[]")):
                    received = b""
                    connection.sendall(whole(b"true"))

    def send_more(self, data: bytes) -> int:
        """Sends more on each connection; returns on how many that worked."""
        sent = 0
        for connection in self.connections:
            with suppress(OSError):
                connection.sendall(data)
                sent += 1
        return sent

    def end(self) -> None:
        for one in (self.listener, *self.connections):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


@pytest.fixture
def chatterbox() -> Iterator[Chatterbox]:
    backend = Chatterbox()
    yield backend
    backend.end()


@pytest.mark.parametrize("more", [whole(b"false"), whole(b"false")[:20]], ids=["an answer", "half a head"])
def test_data_on_an_idle_backend_connection_is_not_an_answer(
    start_gateway: StartGateway, chatterbox: Chatterbox, more: bytes
) -> None:
    gateway = start_gateway({"name": "box", "base_url": chatterbox.url, "kind": "openai"}, MODEL_DISCOVERY_REFRESH_S="3600")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    with gateway.http(gateway.key()) as alice, gateway.http(gateway.key(name="bob")) as bob:
        for _ in range(5):
            assert alice.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "true"
            assert chatterbox.send_more(more) >= 1
            gateway.call(asyncio.sleep(0.05))
            answer = bob.post("/v1/chat/completions", json=body)
            assert (answer.status_code, "true" in answer.text) == (200, True), answer.text


def test_a_backend_connection_that_ends_before_the_request_is_a_fault(
    start_gateway: StartGateway, chatterbox: Chatterbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = ConnectionPool.connect

    async def connect_and_lose(pool: ConnectionPool, *more: Any) -> Any:
        connection = await connect(pool, *more)
        assert connection.transport is not None
        connection.transport.abort()
        await asyncio.sleep(0.01)
        return connection

    gateway = start_gateway({"name": "box", "base_url": chatterbox.url, "kind": "openai"}, MODEL_DISCOVERY_REFRESH_S="3600")
    monkeypatch.setattr(ConnectionPool, "connect", connect_and_lose)
    with gateway.http(gateway.key()) as client:
        got = client.post("/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}]})
    assert (got.status_code, got.json()["error"]["code"]) == (503, "upstream_unavailable")
    [attempt] = gateway.request_lines()[0]["attempts"]
    assert attempt["fault"] == "disconnected"
