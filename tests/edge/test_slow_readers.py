"""A large answer is in progress until its client has read it: it holds a slot and memory, but no backend."""

import json
import socket
from contextlib import suppress

import pytest

from tests.conftest import StartGateway
from tests.support.chat_requests import MESSAGES, MODEL
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer, stream
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

# More than two sockets' buffers hold between them.
LARGE = 16 * 2**20
WHOLE = {"model": MODEL, "messages": MESSAGES, "stream": False}


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> RunningGateway:
    monkeypatch.setattr("gateway.fleet.held_answers.MOST_HELD", 5 * LARGE // 2)
    return start_gateway(alpha)


def play(alpha: FakeBackend, size: int) -> None:
    alpha.play("/api/chat", answer(200, {"model": "m", "message": {"role": "assistant", "content": "x" * size}, "done": True}))


def ask_and_read_little(gateway: RunningGateway, key: str, *, streamed: bool = False) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
    body = json.dumps({**WHOLE, "stream": streamed}).encode()
    head = f"POST /api/chat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    assert connection.recv(300).startswith(b"HTTP/1.1 200 ")
    return connection


def status(gateway: RunningGateway, key: str) -> int:
    with gateway.http(key) as client:
        return client.post("/api/chat", json=WHOLE).status_code


def test_an_answer_keeps_its_slot_until_it_is_read(gateway: RunningGateway, alpha: FakeBackend) -> None:
    key, held = gateway.key(concurrent=1), gateway.components.held_answers
    play(alpha, LARGE)
    with ask_and_read_little(gateway, key) as connection:
        assert status(gateway, key) == 429
        assert gateway.components.backends["alpha"].in_flight == 0 and alpha.wait_idle(1.0)
        assert held.used > LARGE and gateway.components.in_flight.total == 1
        end = b""
        while not end.endswith(b"}"):
            end = connection.recv(2**20)
        # Who has the last bytes may ask again at once.
        assert status(gateway, key) == 200
    gateway.wait_idle()
    assert held.used == 0
    assert [row["outcome"] for row in gateway.audit_rows()] == ["answered", "refused:rate_limit_exceeded", "answered"]


def test_a_large_last_frame_keeps_its_slot(gateway: RunningGateway, alpha: FakeBackend) -> None:
    key = gateway.key(concurrent=1)
    last = b'{"model":"m","message":{"role":"assistant","content":"%b"},"done":true}\n' % (b"x" * 7 * 2**20)
    alpha.play("/api/chat", stream([last]))
    with ask_and_read_little(gateway, key, streamed=True) as connection:
        until(lambda: alpha.wait_idle(0))
        assert status(gateway, key) == 429
        end = b""
        while not end.endswith(b"0\r\n\r\n"):
            end = end[-4:] + connection.recv(2**20)
    assert [row["outcome"] for row in gateway.audit_rows()] == ["answered", "refused:rate_limit_exceeded"]


@pytest.mark.parametrize("is_last", [True, False])
def test_a_client_that_stalls_in_a_large_frame_has_not_received_it(
    start_gateway: StartGateway, alpha: FakeBackend, is_last: bool
) -> None:
    gateway = start_gateway(alpha, OLLAMA_IDLE_TIMEOUT_S="0.3")
    frame = b'{"model":"m","message":{"role":"assistant","content":"%b"},"done":%b}\n'
    alpha.play("/api/chat", stream([frame % (b"x" * 7 * 2**20, b"true" if is_last else b"false")]))
    with ask_and_read_little(gateway, gateway.key(), streamed=True) as connection:
        until(gateway.request_lines)
        end = b""
        with suppress(ConnectionError):
            while more := connection.recv(2**20):
                end = end[-4:] + more
        assert not end.endswith(b"0\r\n\r\n")
    [line] = gateway.request_lines()
    assert (line["outcome"], line["detail"]) == ("client_gone", "stalled")


def test_a_client_that_leaves_while_reading_frees_everything_at_once(gateway: RunningGateway, alpha: FakeBackend) -> None:
    key = gateway.key(concurrent=1)
    play(alpha, LARGE)
    ask_and_read_little(gateway, key).close()
    until(lambda: gateway.components.in_flight.total == 0)
    assert gateway.components.held_answers.used == 0 and status(gateway, key) == 200
    lines = gateway.request_lines()
    assert [line["outcome"] for line in lines] == ["client_gone", "answered"] and lines[0]["bytes_out"] < LARGE


def test_a_client_that_reads_too_slowly_meets_a_deadline(
    gateway: RunningGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.proxy.relay.READ_WITHIN_S", 0.3)
    monkeypatch.setattr("gateway.proxy.relay.SLOWEST_CLIENT", LARGE * 10)
    play(alpha, LARGE)
    with ask_and_read_little(gateway, gateway.key()) as connection:

        def has_ended() -> bool:
            connection.recv(10)
            return gateway.components.in_flight.total == 0

        until(has_ended)
    assert gateway.request_lines()[-1]["detail"] == "stalled" and gateway.components.held_answers.used == 0


def test_memory_that_one_key_holds_does_not_limit_other_keys(gateway: RunningGateway, alpha: FakeBackend) -> None:
    greedy, modest = gateway.key(name="greedy"), gateway.key(name="modest")
    play(alpha, LARGE)
    with ask_and_read_little(gateway, greedy):
        asked = len(alpha.calls("/api/chat"))
        with gateway.http(greedy) as client:
            got = client.post("/api/chat", json=WHOLE)
        assert got.status_code == 502 and got.headers["x-should-retry"] == "false" and "retry-after" not in got.headers
        assert "read them first" in got.json()["error"] and len(alpha.calls("/api/chat")) == asked + 1
        play(alpha, LARGE // 2)
        assert status(gateway, modest) == 200
    until(lambda: gateway.components.held_answers.used == 0)
    play(alpha, LARGE)
    assert status(gateway, greedy) == 200
    assert gateway.components.backends["alpha"].breaker._failures == 0


def test_an_answer_that_is_too_large_is_not_requested_from_a_second_backend(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.fleet.held_answers.MOST_HELD", 200_000)
    gateway = start_gateway(alpha, beta)
    for backend in (alpha, beta):
        play(backend, 150_000)
    assert status(gateway, gateway.key()) == 502
    assert [len(backend.calls("/api/chat")) for backend in (alpha, beta)] == [1, 0]
    line = gateway.request_lines()[-1]
    assert (line["outcome"], line["backend"]) == ("refused:answers_unread", "alpha")
