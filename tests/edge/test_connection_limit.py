"""Idle clients do not keep others out: neither requests nor health checks."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from gateway.edge.connection_limit import EXTRA
from tests.conftest import TestStores
from tests.support.echo_server import EchoServer
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import environment_for
from tests.support.processes import operate, serving, until

MOST = 8
GET = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n"
FEW_DESCRIPTORS = (
    "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); sys.argv[0] = 'gateway'; "
    "runpy.run_module('gateway', run_name='__main__')"
)


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer(MOST) as server:
        yield server


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as connections:
        yield connections


def ask(connection: socket.socket, path: bytes) -> bytes:
    """The first bytes of the answer; none if the connection has ended."""
    with suppress(ConnectionError):
        connection.sendall(GET % path)
        return connection.recv(65_536)
    return b""


@pytest.mark.parametrize("sent", [b"", b"GET /he", GET % b"/first"], ids=["nothing", "half a head", "a request before"])
def test_connections_that_were_idle_for_longest_are_closed(echo: EchoServer, held: ExitStack, sent: bytes) -> None:
    connections = []
    for _ in range(5 * MOST):
        connections.append(connection := held.enter_context(echo.connect()))
        connection.sendall(sent)
        if sent.endswith(b"\r\n\r\n"):
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
    assert ask(held.enter_context(echo.connect()), b"/next").startswith(b"HTTP/1.1 200")
    until(lambda: echo.connections <= MOST, 5)
    assert ask(connections[0], b"/again") == b""
    if sent.endswith(b"\r\n\r\n"):
        assert ask(connections[-1], b"/again").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("owed", ["of a length", "chunked", "trailers", "not read"])
def test_clients_with_an_unfinished_body_or_an_unread_answer_are_closed_first(
    echo: EchoServer, held: ExitStack, owed: str
) -> None:
    head = b"POST /ignore HTTP/1.1\r\nHost: x\r\n"
    sent = {
        "of a length": head + b"Content-Length: 1000\r\n\r\nx",
        "chunked": head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
        "trailers": head + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\na: b\r\n",
        "not read": (GET % (b"/" + b"x" * 60_000)) * 20,
    }[owed]
    echo.send_little_at_once()
    for _ in range(3 * MOST):
        connection = held.enter_context(echo.connect())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        left = memoryview(sent)
        with suppress(BlockingIOError):
            while left:
                left = left[connection.send(left) :]
    until(lambda: ask(held.enter_context(echo.connect()), b"/next").startswith(b"HTTP/1.1 200"), 5)


def test_requests_behind_unread_answers_are_bounded_in_total(
    echo: EchoServer, held: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.edge.connection_limit.MOST_HELD_BY_ALL", 1_500_000)
    echo.send_little_at_once()
    for _ in range(MOST):
        connection = held.enter_context(echo.connect())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        left = memoryview((GET % (b"/" + b"x" * 60_000)) * 20)
        with suppress(BlockingIOError, ConnectionError):
            while left:
                left = left[connection.send(left) :]
    until(lambda: 0 < echo.held_bytes <= 1_500_000 and echo.connections < MOST, 5)
    assert ask(held.enter_context(echo.connect()), b"/next").startswith(b"HTTP/1.1 200")
    held.close()
    until(lambda: echo.connections == 0, 5)
    assert echo.held_bytes == 0


def test_health_checks_are_answered_when_no_connection_is_idle(echo: EchoServer, held: ExitStack) -> None:
    busy = [held.enter_context(echo.connect()) for _ in range(MOST)]
    for connection in busy:
        connection.sendall(GET % b"/wait/1")
    until(lambda: echo.under_way == MOST, 5)
    for _ in range(3):
        healthy = ask(held.enter_context(echo.connect()), b"/healthz")
        assert healthy.startswith(b"HTTP/1.1 200") and b"connection: close" in healthy
        refused = ask(held.enter_context(echo.connect()), b"/next")
        assert refused.startswith(b"HTTP/1.1 503") and b"connection: close" in refused
    for _ in range(EXTRA):
        half = held.enter_context(echo.connect())
        half.sendall(b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
    until(lambda: echo.under_way == MOST + EXTRA, 5)
    assert ask(held.enter_context(echo.connect()), b"/healthz") == b""
    assert [connection.recv(65_536)[:12] for connection in busy] == [b"HTTP/1.1 200"] * MOST


def test_many_idle_clients_leave_file_descriptors_for_others(tmp_path: Path, stores: TestStores, held: ExitStack) -> None:
    alpha = held.enter_context(FakeBackend(models=["llama3.2:latest"], name="alpha"))
    names = environment_for(alpha, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)
    key = operate(tmp_path, names, "key", "--name", "mine").split()[-1]
    _, url, _ = held.enter_context(serving(tmp_path, names, entry=("-c", FEW_DESCRIPTORS)))
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    for _ in range(400):
        held.enter_context(socket.create_connection(address))
    body = {"model": "llama3.2", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    for _ in range(5):
        assert httpx.get(f"{url}/healthz").status_code == 200
        answer = httpx.post(f"{url}/api/chat", json=body, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200, answer.text
