"""Defects that attackers, confused clients or odd backends could once trigger, and that must not come back."""

import asyncio
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from gateway.auth import key_format
from gateway.auth.authenticator import Authenticator, Verified
from gateway.fleet import discovery
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS, MESSAGES, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import End, Forever, Head, Pause, Piece, Raw, Step, answer, recording, sse, stream
from tests.support.gateway_settings import settings_for
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"


def connect(gateway: RunningGateway) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
    connection.settimeout(5)
    return connection


def head(gateway: RunningGateway, key: str, body: bytes, *more: str) -> bytes:
    lines = ["POST /api/chat HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def is_closed(connection: socket.socket) -> bool:
    try:
        while connection.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "odd:latest", "modified_at": 5},
        {"name": 7, "model": "odd"},
        {"name": "odd", "digest": 5, "details": [1], "size": "x", "model": 5},
        {"name": "odd", "details": {"families": None}, "remote_host": 5},
    ],
)
def test_odd_list_entries_do_not_hide_other_models(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, entry: dict[str, object]
) -> None:
    alpha.play("/api/tags", answer(200, {"models": [entry]}))
    for _ in range(2):
        gateway = start_gateway(alpha, beta)
        with gateway.http(gateway.key()) as client:
            assert client.post("/api/chat", json=CHATS[0].body).status_code == 200
            assert MODEL in {listed["name"] for listed in client.get("/api/tags").json()["models"]}
            assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "text", ["not json", "[1]", '{"models":[1,2]}', '{"models":[{"name":"x"}],"answered_at":"soon"}', '{"models":[{"name":5}]}']
)
def test_invalid_data_in_redis_breaks_nothing(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores, text: str
) -> None:
    with stores.client() as redis:
        redis.set(discovery.snapshot_name(settings_for(alpha).backends[0]), text)
        gateway = start_gateway(alpha)
        key = gateway.key(name="mine")
        for garbage in (text, "{}", '{"digest":5}', json.dumps({"digest": hashlib.sha256(key.encode()).hexdigest()})):
            redis.set(redis_keys.verified_key(key.split("_")[1]), garbage)
            gateway.call(_forget_everything(gateway))
            assert CHATS[0].ask(gateway, key) == "alpha heard: Say hi"
        redis.publish("nz:keys:changed", b"\xff\xfe")
        gateway.call(gateway.key_store().revoke("mine"))
        with gateway.http(key) as client:
            until(lambda: client.get("/api/tags").status_code == 401, 10)


async def _forget_everything(gateway: RunningGateway) -> None:
    authenticator_of(gateway)._verified.clear()


def authenticator_of(gateway: RunningGateway) -> Authenticator:
    """The gateway's authenticator. No component exposes it, so it is found among the collector's objects."""
    import gc

    mine = [found for found in gc.get_objects() if isinstance(found, Authenticator)]
    return next(found for found in mine if found._database is gateway.components.database)


def test_a_revocation_is_not_overwritten(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = start_gateway(alpha), start_gateway(alpha)
    key = first.key(name="mine")
    store = Authenticator._store_in_redis
    is_storing, is_revoked, has_stored = threading.Event(), threading.Event(), threading.Event()

    async def store_late(self: Authenticator, presented: object, verified: Verified, version: bytes) -> None:
        is_storing.set()
        await asyncio.to_thread(is_revoked.wait, 20)
        await store(self, presented, verified, version)  # type: ignore[arg-type]
        has_stored.set()

    monkeypatch.setattr(Authenticator, "_store_in_redis", store_late)
    asking = threading.Thread(target=lambda: CHATS[0].ask(first, key))
    asking.start()
    assert is_storing.wait(20)
    first.call(first.key_store().revoke("mine"))
    is_revoked.set()
    asking.join()
    assert has_stored.wait(20)
    monkeypatch.undo()
    for gateway in (first, second):
        with gateway.http(key) as client:
            assert client.get("/api/tags").status_code == 401


def test_cache_times_do_not_add_up(start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores) -> None:
    """A revocation without an announcement (here: directly in the database) takes effect after one cache time, not two."""
    first, second = (start_gateway(alpha, REDIS_KEY_CACHE_TTL_S="2") for _ in range(2))
    key = first.key()
    CHATS[0].ask(first, key)
    first.call(first.components.database.run("revoke_key", key.split("_")[1]))
    time.sleep(1.5)
    with second.http(key) as client:
        assert client.get("/api/tags").status_code == 200, "within the cache time"
        time.sleep(0.9)
        assert client.get("/api/tags").status_code == 401


def test_a_burst_of_wrong_keys_from_one_address_is_limited_and_delays_no_known_key(
    start_gateway: StartGateway, alpha: FakeBackend
) -> None:
    gateway = start_gateway(
        alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="10", ARGON2_TIME_COST="10", ARGON2_MEMORY_COST_KIB="16384"
    )
    key = gateway.key()
    statuses: list[int] = []

    def guess() -> None:
        with gateway.http(key_format.mint().whole) as client:
            statuses.append(client.get("/api/tags").status_code)

    with gateway.http(key) as client:
        assert client.get("/api/tags").status_code == 200
        threads = [threading.Thread(target=guess) for _ in range(60)]
        for thread in threads:
            thread.start()
        good = [client.get("/api/tags").status_code for _ in range(50)]
        for thread in threads:
            thread.join()
    assert set(good) == {200}
    # On a busy machine, requests that wait too long for argon2 are refused.
    assert statuses.count(401) <= 10 and set(statuses) <= {401, 429, 503} and statuses.count(503) <= 10


def test_a_client_that_stops_reading_is_disconnected(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.edge.deadlines.STALL_DEADLINE_S", 0.5)
    gateway = start_gateway(alpha)
    key, line = gateway.key(), recording("ollama_chat_stream.ndjson").splitlines(keepends=True)
    large = b'{"model":"m","message":{"role":"assistant","content":"' + b"x" * 6_000_000 + b'"},"done":true}\n'
    alpha.play(
        "/api/chat", [Head(200, [("Content-Type", "application/x-ndjson")], chunked=True), Piece(line[0]), Piece(large), End()]
    )
    for body in (CHATS[1].body, CHATS[0].body):
        connection = connect(gateway)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head(gateway, key, json.dumps(body).encode()))
        deadline = time.monotonic() + 5
        while gateway.server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.02)
        was_disconnected = not gateway.server.server_state.connections
        connection.close()
        assert was_disconnected
        gateway.wait_idle(2)
        alpha.play("/api/chat", answer(200, large))


def test_the_rest_of_a_refused_body_has_a_deadline(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.edge.deadlines.HEAD_DEADLINE_S", 0.4)
    gateway = start_gateway(alpha)
    with connect(gateway) as connection:
        connection.sendall(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert b"401" in connection.recv(65536)
        connection.sendall(b"x")
        assert is_closed(connection)


def test_a_line_break_after_a_request_body_does_not_end_the_stream(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.edge.deadlines.HEAD_DEADLINE_S", 0.3)
    gateway = start_gateway(alpha)
    alpha.healthy.pieces, alpha.healthy.pause_s = 10, 0.1
    with connect(gateway) as connection:
        connection.sendall(head(gateway, gateway.key(), json.dumps(CHATS[1].body).encode(), "Connection: close") + b"\r\n")
        received = b""
        while piece := connection.recv(65536):
            received += piece
    assert b'"done": true' in received or b'"done":true' in received
    assert received.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/api/chat", b'{"model":"m","message":{"role":"assistant","content":"half"},"done":false}'),
        ("/v1/chat/completions", b'{"detail":"Not Found"}'),
        ("/v1/embeddings", b'{"object":"list"}'),
        ("/v1/chat/completions", b'{"choices":[]}'),
    ],
)
def test_a_whole_answer_without_content_is_a_failure(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, path: str, content: bytes
) -> None:
    gateway = start_gateway(alpha, beta)
    alpha.play(path, answer(200, content))
    with gateway.http(gateway.key()) as client:
        got = client.post(path, json={"model": MODEL, "messages": MESSAGES, "input": "hi", "stream": False})
    assert got.status_code == 200 and gateway.request_lines()[-1]["backend"] == "beta"


def test_a_stream_ends_only_when_all_choices_have_ended(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [{"index": 1, "delta": {"content": "b"}, "finish_reason": None}]},
    ]
    alpha.play("/v1/chat/completions", stream(sse(chunks, done=False), "text/event-stream"))
    body = {"model": MODEL, "messages": MESSAGES, "stream": True}
    with gateway.http(gateway.key()) as client:
        assert "error" in client.post("/v1/chat/completions", json={**body, "n": 2}).text
        assert "error" not in client.post("/v1/chat/completions", json=body).text


@pytest.mark.parametrize("content_type", ["text/event-stream; x=\u20ac", "text/event-stream\xe9", "a\x0bb\x01"])
@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_odd_content_types_of_backends(start_gateway: StartGateway, alpha: FakeBackend, chat: Chat, content_type: str) -> None:
    gateway = start_gateway(alpha)
    ending = "whole.json" if not chat.streamed else "stream.ndjson" if chat.dialect == "ollama" else "stream.sse"
    data = recording(f"{chat.dialect}_chat_{ending}")
    raw = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    alpha.play(chat.path, [Raw(raw), End()])
    with gateway.http(gateway.key()) as client:
        assert client.post(chat.path, json=chat.body).status_code in (200, 502)


def test_an_unneeded_upgrade_request_is_ignored(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    body = json.dumps(CHATS[0].body).encode()
    headers = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA")
    with connect(gateway) as connection:
        for _ in range(2):
            connection.sendall(head(gateway, gateway.key(), body, *headers))
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_fields_that_bypass_the_allow_list_are_refused(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key()) as client:
        for field in ({"draft_model": "secret"}, {"kv_transfer_params": {"remote_host": "x"}}, {"tools": [{"x": 1}]}):
            body = {"model": MODEL, "messages": MESSAGES, **field}
            assert client.post("/v1/chat/completions", json=body).status_code == 400
        assert client.post("/api/chat", json={"model": MODEL, "options": {"use_mmap": 5}}).status_code == 400
        assert client.post("/api/chat", json={"model": MODEL, "options": {"stop": "x"}}).status_code == 400
        assert client.post("/api/chat", content=b'{"model":"\\ud800x"}').status_code == 400
    assert not alpha.calls("/v1/chat/completions")


def test_endless_comments_before_the_first_frame_cost_little(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    comments: list[Step] = [Piece(b": ping\n\n" * 30) for _ in range(1000)]
    data = recording("openai_chat_stream.sse")
    alpha.play(
        "/v1/chat/completions",
        [Head(200, [("Content-Type", "text/event-stream")], chunked=True), *comments, Pause(0.2), Piece(data), End()],
    )
    with gateway.http(gateway.key()) as client:
        began = time.process_time()
        got = client.post("/v1/chat/completions", json={**CHATS[3].body, "stream_options": {"include_usage": True}})
        spent = time.process_time() - began
    assert got.content.endswith(data) and len(got.content) < len(data) + 200_000
    assert spent < 20, "quadratic reading took minutes"


def test_blob_uploads_may_be_slow_and_their_client_may_leave(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, OLLAMA_READ_TIMEOUT_S="1")
    key, digest = gateway.admin_key(), f"sha256:{hashlib.sha256(b'x' * 8).hexdigest()}"

    def slowly() -> Iterator[bytes]:
        for _ in range(8):
            time.sleep(0.25)
            yield b"x"

    with gateway.http(key) as client:
        assert client.post(f"/api/blobs/{digest}", content=slowly()).status_code in (200, 201)
    start = f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 8\r\n\r\n".encode()
    alpha.play(f"/api/blobs/{digest}", [Pause(0.0), Forever()])
    for sent in (b"xxx", b"x" * 8):
        with connect(gateway) as connection:
            connection.sendall(start + sent)
            time.sleep(0.3)
        gateway.wait_idle(1.0)
        line = gateway.request_lines()[-1]
        assert line["outcome"] == "client_gone", line
    assert gateway.components.backends["alpha"].in_flight == 0
