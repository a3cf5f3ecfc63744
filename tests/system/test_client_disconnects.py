"""A client that disconnects is noticed within a second: before the answer, while waiting and within a stream."""

import random
import socket
import threading
import time
from collections.abc import Callable

import pytest

from tests.conftest import StartGateway
from tests.support.chat_requests import CHATS, Chat, send
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import FAULTS, Forever, Head, Piece, Step, recording
from tests.support.running_gateway import RunningGateway

NOTICED_WITHIN_S = 1.0


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, OLLAMA_READ_TIMEOUT_S="20", OLLAMA_IDLE_TIMEOUT_S="20")


def wait_until(done: Callable[[], object], seconds: float = 5.0) -> float:
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds, "it did not happen in time"
        time.sleep(0.002)
    return time.monotonic() - began


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize("phase", ["before the head", "in the answer"])
def test_the_backend_is_released_within_a_second(gateway: RunningGateway, alpha: FakeBackend, chat: Chat, phase: str) -> None:
    name = "ollama_chat_stream.ndjson" if chat.dialect == "ollama" else "openai_chat_stream.sse"
    first = recording(name)[: len(recording(name)) // 2]
    kind = "application/x-ndjson" if chat.dialect == "ollama" else "text/event-stream"
    began: list[Step] = [Head(200, [("Content-Type", kind)], chunked=True), Piece(first), Forever()]
    alpha.play(chat.path, FAULTS["head_timeout"](chat.dialect, chat.streamed) if phase == "before the head" else began)
    connection = send(gateway, gateway.key(), chat)
    wait_until(lambda: alpha.in_flight == 1)
    if phase == "in the answer" and chat.streamed:
        connection.recv(65536)
    connection.close()
    assert wait_until(lambda: alpha.in_flight == 0) < NOTICED_WITHIN_S
    assert alpha.calls(chat.path)[-1].outcome == "client_left"
    line = gateway.request_lines()[-1]
    assert line["outcome"] == "client_gone"
    assert gateway.components.backends["alpha"].in_flight == 0


def test_many_random_disconnects_leave_nothing_behind(gateway: RunningGateway, alpha: FakeBackend) -> None:
    alpha.healthy.pieces, alpha.healthy.pause_s = 10, 0.005
    key, rng, many = gateway.key(), random.Random(7), 400

    def leave(times: int) -> None:
        for _ in range(times):
            connection = send(gateway, key, rng.choice(CHATS))
            time.sleep(rng.random() * 0.08)
            connection.close()

    threads = [threading.Thread(target=leave, args=(many // 8,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The last disconnects may not have been noticed yet.
    wait_until(lambda: len(gateway.request_lines()) == many)
    assert gateway.components.backends["alpha"].in_flight == 0
    assert alpha.wait_idle(1.0)
    assert {line["outcome"] for line in gateway.request_lines()} <= {"client_gone", "answered"}
    assert CHATS[0].ask(gateway, key) == "alpha heard: Say hi"


def test_a_client_that_leaves_at_the_last_frame_was_answered(gateway: RunningGateway, alpha: FakeBackend) -> None:
    """openai-python closes at [DONE], while the backend's body may not have ended yet."""
    kind = [("Content-Type", "text/event-stream")]
    alpha.play("/v1/chat/completions", [Head(200, kind, chunked=True), Piece(recording("openai_chat_stream.sse")), Forever()])
    connection = send(gateway, gateway.key(), CHATS[3])
    received = b""
    while b"[DONE]" not in received:
        received += connection.recv(65536)
    connection.close()
    line = gateway.request_lines()[-1]
    assert line["outcome"] == "answered" and line["completion_tokens"]
    assert alpha.wait_idle(NOTICED_WITHIN_S)


def test_a_client_that_stops_reading_delays_only_its_own_answer(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, OLLAMA_IDLE_TIMEOUT_S="0.5")
    key = gateway.key()
    line = recording("ollama_chat_stream.ndjson").splitlines(keepends=True)[0] * 500
    alpha.play_once("/api/chat", [Head(200, [("Content-Type", "application/x-ndjson")], chunked=True), *[Piece(line)] * 400])
    connection = send(gateway, key, CHATS[1])
    wait_until(lambda: alpha.in_flight == 1)
    assert CHATS[0].ask(gateway, key) == "alpha heard: Say hi"
    wait_until(lambda: gateway.components.in_flight.total == 0)
    assert gateway.request_lines()[-1]["detail"] == "stalled"
    connection.close()


def test_a_slowly_sent_head_or_body_meets_a_deadline(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.edge.deadlines.HEAD_DEADLINE_S", 0.3)
    monkeypatch.setattr("gateway.proxy.body.BODY_DEADLINE_S", 0.3)
    port = int(gateway.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(5)
        connection.sendall(b"POST /api/chat HT")
        assert connection.recv(10) == b""
    head = f"POST /api/chat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key()}\r\nContent-Length: 50\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(5)
        connection.sendall(head.encode() + b'{"mod')
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_an_endless_head_is_cut_off(gateway: RunningGateway) -> None:
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
        connection.settimeout(5)
        connection.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(OSError):  # connection reset or broken pipe
            for _ in range(2000):
                connection.sendall(b"X-Filler: " + b"x" * 1000 + b"\r\n")
                time.sleep(0.0005)
