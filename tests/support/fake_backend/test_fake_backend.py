"""The fake backend keeps its own promises: the clients it stands in for believe it, and every bad manner really happens."""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from itertools import product
from typing import Any
from urllib.parse import urlsplit

import httpx
import ollama
import openai
import pytest

from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.memory import Memory
from tests.support.fake_backend.scripts import (
    FAULTS,
    NDJSON,
    RECORDINGS,
    SSE,
    Dialect,
    End,
    Forever,
    Head,
    Hold,
    How,
    Pause,
    Piece,
    Raw,
    Step,
    answer,
    cut_at,
    frames_of,
    recording,
    stream,
)

MESSAGES = [{"role": "user", "content": "Say hi"}]
ANSWER = "alpha heard: Say hi"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "description": "", "parameters": SCHEMA}}]


@pytest.fixture
def native() -> Iterator[FakeBackend]:
    with FakeBackend(kind="ollama", models=["llama3.2:latest", "bge:latest"], name="alpha") as backend:
        yield backend


@pytest.fixture
def compatible() -> Iterator[FakeBackend]:
    with FakeBackend(kind="openai", models=["meta/Llama"], name="alpha") as backend:
        yield backend


def dial(backend: FakeBackend, timeout_s: float = 2.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", backend.port), timeout_s)


def ask(sock: socket.socket, path: str = "/api/version", method: str = "GET", body: bytes = b"") -> None:
    sock.sendall(
        b"%b %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (method.encode(), path.encode(), len(body), body)
    )


def version_of(sock: socket.socket) -> Any:
    received = b""
    while not received.endswith(b"}"):
        data = sock.recv(65536)
        assert data
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    return json.loads(body)["version"]


def read_all(sock: socket.socket) -> bytes:
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


def test_the_ollama_client_talks_to_it(native: FakeBackend) -> None:
    with ollama.Client(native.url) as client:
        assert client.chat("llama3.2", MESSAGES).message.content == ANSWER
        parts = list(client.chat("llama3.2", MESSAGES, stream=True))
        assert "".join(part.message.content or "" for part in parts) == ANSWER
        assert (len(parts), parts[-1].done, parts[-1].prompt_eval_count, parts[-1].eval_count) == (5, True, 2, 4)
        assert client.generate("llama3.2", "Say hi").response == ANSWER
        assert client.generate("llama3.2", keep_alive=0).done_reason == "unload"
        calls = client.chat("llama3.2", MESSAGES, tools=TOOLS).message.tool_calls
        assert calls is not None
        assert (calls[0].function.name, calls[0].function.arguments) == ("get_weather", {"city": "Zürich"})
        assert len(client.embed("bge", ["a", "bb"]).embeddings) == 2
        assert client.embeddings("bge", "a").embedding[1:] == [0.25, -0.5, 1.0]
        assert [model.model for model in client.list().models] == ["llama3.2:latest", "bge:latest"]
        assert client.ps().models[0].digest == client.list().models[0].digest
        assert client.show("bge").capabilities == ["completion", "tools"]


def test_the_ollama_client_administers_it(native: FakeBackend) -> None:
    with ollama.Client(native.url) as client:
        assert [each.status for each in client.pull("new", stream=True)][-1] == "success"
        client.copy("new", "newer")
        client.delete("new")
        assert native.models == ["llama3.2:latest", "bge:latest", "newer:latest"]
        with pytest.raises(ollama.ResponseError, match=r"model 'nobody:latest' not found \(status code: 404\)"):
            client.show("nobody")
    blob = "/api/blobs/sha256:" + hashlib.sha256(b"weights").hexdigest()
    with httpx.Client(base_url=native.url) as http:
        answers = [http.head(blob), http.post(blob, content=b"other"), http.post(blob, content=b"weights"), http.head(blob)]
        assert [each.status_code for each in answers] == [404, 400, 201, 200]
        assert (http.get("/").text, http.head("/").content, http.get("/nope").text) == (
            "Ollama is running",
            b"",
            "404 page not found",
        )
        assert http.get("/api/chat").status_code == 405


def test_a_memory_holds_what_was_loaded(native: FakeBackend) -> None:
    memory = native.healthy.memory = Memory(load_s=0.1)
    with ollama.Client(native.url) as client:
        began = time.monotonic()
        assert (client.ps().models, client.generate("llama3.2").done_reason) == ([], "load")
        assert time.monotonic() - began >= 0.1
        client.embed("bge", "a")
        assert [model.model for model in client.ps().models] == ["llama3.2:latest", "bge:latest"]
        memory.busy.add("bge:latest")
        assert client.generate("bge", keep_alive=0).done_reason == "unload"
        assert memory.now() == {"llama3.2:latest", "bge:latest"}
        memory.busy.clear()
        assert [model.model for model in client.ps().models] == ["llama3.2:latest"]


def test_a_router_loads_after_its_answer(compatible: FakeBackend) -> None:
    compatible.healthy.memory = Memory(load_s=0.1)

    def status() -> str:
        [entry] = http.get("/models").json()["data"]
        return str(entry["status"]["value"])

    with httpx.Client(base_url=compatible.url) as http:
        model = {"model": "meta/Llama"}
        assert (status(), http.post("/models/unload", json=model).status_code) == ("unloaded", 400)
        assert http.post("/models/load", json=model).json() == {"success": True}
        assert (status(), http.post("/models/load", json=model).status_code) == ("loading", 400)
        time.sleep(0.1)
        assert (status(), http.get("/slots?model=meta/Llama").json()[0]["is_processing"]) == ("loaded", False)
        assert http.post("/models/unload", json=model).json() == {"success": True}
        assert (status(), http.post("/models/load", json={"model": "x"}).status_code) == ("unloaded", 404)


@pytest.mark.parametrize("kind", ["ollama", "openai"])
def test_the_openai_client_talks_to_it(kind: Dialect) -> None:
    model = "m:latest"
    with (
        FakeBackend(kind, [model], name="alpha", token="s3cret") as backend,
        openai.OpenAI(base_url=backend.url + "/v1", api_key="s3cret", max_retries=0) as client,
    ):
        messages: Any = MESSAGES
        assert client.chat.completions.create(model=model, messages=messages).choices[0].message.content == ANSWER
        options: Any = {"include_usage": True}
        with client.chat.completions.create(model=model, messages=messages, stream=True, stream_options=options) as chunks:
            seen = list(chunks)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in seen if chunk.choices) == ANSWER
        assert seen[-1].usage is not None
        assert seen[-1].usage.total_tokens == 6
        with client.chat.completions.create(model=model, messages=messages, stream=True, tools=TOOLS) as chunks:
            first = next(chunk for chunk in chunks if chunk.choices[0].delta.tool_calls)
        calls = first.choices[0].delta.tool_calls
        assert calls is not None
        assert calls[0].function is not None
        assert json.loads(calls[0].function.arguments or "") == {"city": "Zürich"}
        assert client.completions.create(model=model, prompt="Say hi").choices[0].text == ANSWER
        by_default = client.embeddings.create(model=model, input="a").data[0].embedding
        assert by_default == client.embeddings.create(model=model, input="a", encoding_format="float").data[0].embedding
        assert [each.id for each in client.models.list()] == [model]
        assert client.models.retrieve(model).id == model
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="nobody", messages=messages)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()


def test_an_openai_server_knows_nothing_of_ollama(compatible: FakeBackend) -> None:
    assert httpx.get(compatible.url + "/health").status_code == 200
    assert httpx.get(compatible.url + "/api/tags").json() == {"detail": "Not Found"}


def test_it_remembers_what_it_received(native: FakeBackend) -> None:
    with httpx.Client(base_url=native.url) as http:
        http.post("/api/show?x=1", json={"model": "bge"}, headers={"X-Two": "a"})
        http.post("/api/show", content=iter([b'{"model":', b'"bge"}']))
    assert native.wait_idle()
    whole, chunked = native.requests
    assert (whole.method, whole.path, whole.json, whole.header("x-two")) == ("POST", "/api/show", {"model": "bge"}, "a")
    assert (chunked.json, chunked.header("transfer-encoding")) == (whole.json, "chunked")
    assert (whole.outcome, whole.connection) == ("answered", chunked.connection)
    assert whole.finished is not None
    assert whole.started <= whole.finished <= chunked.started


def test_scripts_run_in_their_order(native: FakeBackend) -> None:
    native.play("/api/tags", answer(500, b"always"))
    native.play_once("/api/tags", answer(200, b"one"), lambda request: answer(200, request.method.encode()))
    with httpx.Client(base_url=native.url) as http:
        assert [http.get("/api/tags").text for _ in range(4)] == ["one", "GET", "always", "always"]
        native.play("/api/tags", None)
        assert "models" in http.get("/api/tags").json()
    assert native.wait_idle()
    assert len({request.connection for request in native.requests}) == 1


@pytest.mark.parametrize("name", sorted(path.name for path in RECORDINGS.iterdir()))
def test_recordings_arrive_byte_for_byte(native: FakeBackend, name: str) -> None:
    data = recording(name)
    frames = frames_of(data)
    assert b"".join(frames) == data
    native.play("/v1/x", stream(frames))
    assert httpx.post(native.url + "/v1/x").content == data


def test_a_body_may_end_with_the_connection_or_be_framed_by_hand(native: FakeBackend) -> None:
    native.play_once(
        "/x", [Head(200), Piece(b"till the end")], [Head(200, chunked=True), Raw(b"4\r\nby "), Raw(b"h\r\n"), End()]
    )
    with httpx.Client(base_url=native.url) as http:
        assert [http.get("/x").text, http.get("/x").text] == ["till the end", "by h"]
    assert native.wait_idle()
    assert [request.outcome for request in native.requests] == ["answered", "answered"]


@pytest.mark.parametrize(("how", "framing"), list(product(["reset", "close"], ["chunked", "mid_chunk", "length"])))
def test_an_answer_is_cut_where_requested(native: FakeBackend, how: How, framing: Any) -> None:
    data = recording("ollama_generate_stream.ndjson")
    native.play("/api/generate", cut_at(data, 100_000, how, NDJSON, framing))
    received = b""
    error = httpx.ReadError if how == "reset" else httpx.RemoteProtocolError
    with pytest.raises(error), httpx.stream("POST", native.url + "/api/generate") as response:
        for part in response.iter_bytes():
            received += part
    # A parser may keep back the chunk it has not seen the end of.
    assert received == data[:100_000] or (framing == "mid_chunk" and data.startswith(received))
    assert native.wait_idle()
    assert native.requests[0].outcome == "aborted"


@pytest.mark.parametrize(("name", "dialect", "streamed"), list(product(FAULTS, ["ollama", "openai"], [True, False])))
def test_every_fault_happens(native: FakeBackend, name: str, dialect: Dialect, streamed: bool) -> None:
    native.play("/x", FAULTS[name](dialect, streamed))
    expected: dict[str, type[httpx.TransportError]] = {
        "head_timeout": httpx.ReadTimeout,
        "reset": httpx.ReadError,
        "reset_after_head": httpx.ReadError,
        "close_after_head": httpx.RemoteProtocolError,
    }
    if name in expected:
        with pytest.raises(expected[name]):
            httpx.post(native.url + "/x", timeout=0.2)
        return
    response = httpx.post(native.url + "/x")
    assert response.status_code == (int(name) if name.isdigit() else 200)
    assert (b"error" in response.content) == (name in ("429", "500", "503", "error_first_frame"))


def test_a_reset_is_a_reset(native: FakeBackend) -> None:
    native.play("/x", FAULTS["reset"]("ollama", True))
    with dial(native) as sock:
        ask(sock, "/x")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)


def test_pieces_and_pauses_can_be_set(native: FakeBackend) -> None:
    native.healthy.pieces, native.healthy.pause_s = 10, 0.02
    started = time.monotonic()
    lines = httpx.post(native.url + "/api/chat", json={"model": "bge", "messages": MESSAGES}).text.splitlines()
    assert (len(lines), time.monotonic() - started >= 0.2) == (11, True)


def test_a_frozen_backend_continues_when_thawed(native: FakeBackend) -> None:
    with dial(native) as known, dial(native, 0.2) as waiting:
        ask(known)
        assert version_of(known)
        native.freeze()
        ask(known)
        with dial(native) as newcomer:
            ask(newcomer)
            ask(waiting)
            with pytest.raises(TimeoutError):
                waiting.recv(1)
            native.thaw()
            for sock in (known, waiting, newcomer):
                assert version_of(sock)


def test_it_freezes_in_the_middle_of_a_stream(native: FakeBackend) -> None:
    native.play("/x", [Head(200), Piece(b"a"), Pause(0.1), Piece(b"b")])
    with dial(native, 0.3) as sock:
        ask(sock, "/x")
        received = b""
        while not received.endswith(b"\r\n\r\na"):
            received += sock.recv(4096)
        native.freeze()
        with pytest.raises(TimeoutError):
            sock.recv(4096)
        native.thaw()
        assert read_all(sock) == b"b"


def test_a_frozen_backend_with_a_full_backlog_accepts_no_connection(native: FakeBackend) -> None:
    native.freeze(accepting=False)
    with pytest.raises(TimeoutError):
        dial(native, 0.2)
    native.thaw()
    assert httpx.get(native.url + "/api/version").status_code == 200


def test_it_stops_and_starts_on_its_port(native: FakeBackend) -> None:
    native.play("/x", [Head(200, chunked=True), Forever()])
    with dial(native) as sock:
        ask(sock, "/x")
        assert sock.recv(4096).endswith(b"\r\n\r\n")
        native.stop()
        assert read_all(sock) == b""
    with pytest.raises(ConnectionRefusedError):
        dial(native)
    assert (native.requests[0].outcome, native.in_flight, native.open_connections) == ("aborted", 0, 0)
    port = urlsplit(native.url).port
    native.start()
    assert httpx.get(native.url + "/api/version").status_code == 200
    assert native.port == port


PREFIX: list[Step] = [Head(200, [("Content-Type", SSE)], chunked=True), Piece(b"data: {}\n\n")]


@pytest.mark.parametrize(
    "silence", [[Forever()], [*PREFIX, Pause(60)], [*PREFIX, Hold(threading.Event())], [Head(200), Piece(bytes(10**8))]]
)
def test_a_client_that_disconnects_is_noticed(native: FakeBackend, silence: list[Step]) -> None:
    native.play("/x", silence)
    with dial(native) as sock:
        ask(sock, "/x")
        deadline = time.monotonic() + 2
        while not native.in_flight:
            assert time.monotonic() < deadline
        time.sleep(0.05)
        assert native.requests[0].outcome is None
        left = time.monotonic()
    assert native.wait_idle(1.0)
    request = native.requests[0]
    assert request.outcome == "client_left"
    assert request.finished is not None
    assert request.finished - left < 0.5


def test_a_stream_can_be_held_as_long_as_a_test_needs(native: FakeBackend) -> None:
    go_on = threading.Event()
    native.play("/x", [*PREFIX, Hold(go_on), Piece(b"data: [DONE]\n\n"), End()])
    with httpx.stream("GET", native.url + "/x") as response:
        pieces = response.iter_raw()
        assert (next(pieces), native.in_flight) == (b"data: {}\n\n", 1)
        go_on.set()
        assert b"".join(pieces) == b"data: [DONE]\n\n"


def test_an_idle_connection_goes_stale() -> None:
    with FakeBackend(close_idle_as_request_arrives=True) as backend, dial(backend) as sock:
        ask(sock)
        assert version_of(sock)
        sock.sendall(b"P")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        assert (backend.stale_resets, len(backend.requests)) == (1, 1)
        with dial(backend) as fresh:
            ask(fresh)
            assert version_of(fresh)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"GET / HTTP/1.1\r\nX: " + b"a" * 70_000, b"431"), (b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/1.0\r\n\r\n", b"200")],
)
def test_heads_are_bounded_and_checked(native: FakeBackend, sent: bytes, status: bytes) -> None:
    with dial(native) as sock:
        sock.sendall(sent)
        assert read_all(sock).startswith(b"HTTP/1.1 " + status)


def test_nothing_is_left_behind() -> None:
    before = threading.active_count()
    with FakeBackend() as backend, dial(backend) as sock:
        ask(sock)
        assert version_of(sock)
        assert threading.active_count() == before + 1
    assert (threading.active_count(), backend.open_connections) == (before, 0)
