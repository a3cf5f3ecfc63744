"""Streams of the Messages and Responses APIs: passed through byte for byte or translated, and never with an invented end."""

import json
import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import End, Forever, Head, Hold, Pause, Piece, Step, cut_at, frames_of, recording
from tests.support.model_servers import CHAT, CHAT_ONLY, MODEL, OLLAMA
from tests.support.running_gateway import RunningGateway

SSE = "text/event-stream"
NATIVE = [
    ("/v1/messages", "messages_stream_ollama.sse"),
    ("/v1/messages", "messages_stream_llamacpp.sse"),
    ("/v1/messages", "messages_tool_call_stream_llamacpp.sse"),
    ("/v1/responses", "responses_stream_ollama.sse"),
    ("/v1/responses", "responses_stream_llamacpp.sse"),
    ("/v1/responses", "responses_tool_call_stream_llamacpp.sse"),
]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/messages": {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}], "stream": True},
    "/v1/responses": {"model": MODEL, "input": "hi", "stream": True},
}
ENDS = {"/v1/messages": "message_stop", "/v1/responses": "response.completed"}
FAILURES = {"/v1/messages": "error", "/v1/responses": "response.failed"}
PATHS = pytest.mark.parametrize("path", BODIES)


@pytest.fixture
def native() -> Iterator[FakeBackend]:
    with OLLAMA.backend() as backend:
        yield backend


@pytest.fixture
def chat_only() -> Iterator[FakeBackend]:
    with CHAT_ONLY.backend() as backend:
        yield backend


def in_pieces(data: bytes, cuts: list[int]) -> list[Step]:
    pieces = [data[start:end] for start, end in pairwise([0, *sorted(cuts), len(data)]) if start < end]
    return [Head(200, [("Content-Type", SSE)], chunked=True), *map(Piece, pieces), End()]


def events_of(content: bytes) -> list[Any]:
    lines = content.split(b"\n")
    return [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: ")]


@pytest.mark.parametrize(("path", "name"), NATIVE)
def test_every_recording_passes_byte_for_byte_however_it_is_cut(
    start_gateway: StartGateway, native: FakeBackend, path: str, name: str
) -> None:
    gateway, data, rng = start_gateway(native), recording(name), random.Random(name)
    plans = [[rng.randrange(1, len(data)) for _ in range(3)] for _ in range(8)] + [list(range(1, len(data)))]
    with gateway.http(gateway.key()) as client:
        for cuts in plans:
            native.play(path, in_pieces(data, cuts))
            got = client.post(path, json=BODIES[path])
            assert (got.status_code, got.content, got.headers["content-type"]) == (200, data, SSE)
    line = gateway.request_lines()[-1]
    assert line["prompt_tokens"] and line["completion_tokens"] and line["tokens_from"] == "reported"


@pytest.mark.parametrize("framing", ["chunked", "mid_chunk", "length"])
@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize(("path", "name"), [NATIVE[0], NATIVE[2], NATIVE[3]])
def test_a_stream_cut_at_any_byte_ends_in_an_error(
    start_gateway: StartGateway, native: FakeBackend, path: str, name: str, how: Any, framing: Any
) -> None:
    gateway, data = start_gateway(native), recording(name)
    first = data.index(b"\n\n") + 2
    offsets = [first, *random.Random(how + framing + name).sample(range(first, len(data) - 1), 25)]
    with gateway.http(gateway.key()) as client:
        for offset in offsets:
            native.play(path, cut_at(data, offset, how, framing=framing))
            got = client.post(path, json=BODIES[path])
            events = events_of(got.content)
            assert got.status_code == 200 and events[-1]["type"] == FAILURES[path], (offset, got.content[-300:])
            assert ENDS[path] not in [event["type"] for event in events]
            relayed = got.content[: got.content.rindex(b"event: error\n")]
            assert data.startswith(relayed)
            if path == "/v1/responses":
                assert [event["sequence_number"] for event in events] == list(range(len(events)))


@pytest.mark.parametrize("name", ["openai_chat_stream.sse", "openai_tool_call_stream.sse", "openai_chat_stream_crlf.sse"])
@PATHS
def test_a_translated_stream_cut_at_any_byte_ends_in_an_error(
    start_gateway: StartGateway, chat_only: FakeBackend, path: str, name: str
) -> None:
    gateway, data = start_gateway(chat_only), recording(name)
    end = b"\r\n\r\n" if b"\r\n" in data else b"\n\n"
    first, last = data.index(end, data.index(b'"choices"')) + 4, data.index(b'"finish_reason":"')
    rng = random.Random(name)
    with gateway.http(gateway.key()) as client:
        for offset in rng.sample(range(first, last), 40):
            chat_only.play(CHAT, cut_at(data, offset, rng.choice(["reset", "close"]), framing="chunked"))
            events = events_of(client.post(path, json=BODIES[path]).content)
            assert events[-1]["type"] == FAILURES[path], (offset, events[-3:])
            assert ENDS[path] not in [event["type"] for event in events]
            if path == "/v1/responses":
                assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert {line["outcome"] for line in gateway.request_lines()} == {"truncated"}


@PATHS
def test_an_answer_ends_at_its_last_frame_whatever_follows(
    start_gateway: StartGateway, native: FakeBackend, chat_only: FakeBackend, path: str
) -> None:
    own = next(name for found, name in NATIVE if found == path)
    more: list[Step] = [step for _ in range(5) for step in (Pause(0.05), Piece(b": ping\n\n" * 50))]
    for backend, asked, name in ((native, path, own), (chat_only, CHAT, "openai_chat_stream.sse")):
        gateway = start_gateway(backend)
        backend.play(asked, [*in_pieces(recording(name), [])[:-1], *more, Forever()])
        with gateway.http(gateway.key(concurrent=1)) as client:
            for _ in range(2):
                got = client.post(path, json=BODIES[path])
                assert events_of(got.content)[-1]["type"] == ENDS[path]
        assert backend.wait_idle()
        assert [line["outcome"] for line in gateway.request_lines()] == ["answered"] * 2


SECRETS = "cannot reach {url}/x as Bearer s3cret-token"
MESSAGE: dict[str, Any] = {"role": "assistant", "content": [], "usage": {"input_tokens": 1, "output_tokens": 0}}
BEGINNINGS: dict[str, dict[str, Any]] = {
    "/v1/messages": {"type": "message_start", "message": MESSAGE},
    "/v1/responses": {"type": "response.created", "sequence_number": 0, "response": {"status": "in_progress"}},
}
# As Ollama and vLLM, llama.cpp, and servers of the Responses API write a failure into a stream that has begun.
REPORTED: list[tuple[str, str, dict[str, Any]]] = [
    ("/v1/messages", "error", {"type": "error", "error": {"type": "api_error", "message": SECRETS}}),
    ("/v1/messages", "error", {"code": 500, "message": SECRETS, "type": "server_error"}),
    ("/v1/messages", "error", {"message": SECRETS}),
    ("/v1/responses", "error", {"type": "error", "sequence_number": 1, "message": SECRETS}),
    ("/v1/responses", "error", {"code": 500, "message": SECRETS}),
    ("/v1/responses", "response.failed", {"type": "response.failed", "response": {"error": {"message": SECRETS}}}),
    ("/v1/responses", "response.incomplete", {"type": "response.incomplete", "response": {"error": {"message": SECRETS}}}),
]


@pytest.mark.parametrize(("path", "name", "event"), REPORTED)
def test_a_failure_within_a_stream_has_no_secret_of_the_backend(
    start_gateway: StartGateway, path: str, name: str, event: dict[str, Any]
) -> None:
    with FakeBackend(models=[MODEL], is_native=True, token="s3cret-token") as backend:
        gateway = start_gateway({"name": "native", "base_url": backend.url, "auth_token": "s3cret-token"})
        first = f"event: {BEGINNINGS[path]['type']}\ndata: {json.dumps(BEGINNINGS[path])}\n\n".encode()
        last = f"event: {name}\ndata: {json.dumps(event)}\n\n".replace("{url}", backend.url).encode()
        with gateway.http(gateway.key()) as client:
            for steps in (in_pieces(first + last, [len(first)]), in_pieces(first + last, [])):
                backend.play(path, steps)
                got = client.post(path, json=BODIES[path])
                assert got.status_code == 200 and b"cannot reach ***/x as Bearer ***" in got.content
                assert b"s3cret" not in got.content and str(backend.port).encode() not in got.content


def _steps_with_gates(frames: list[bytes], gates: list[threading.Event]) -> list[Step]:
    steps: list[Step] = [Head(200, [("Content-Type", SSE)], chunked=True)]
    for frame, gate in zip(frames, gates, strict=False):
        steps += [Piece(frame), Hold(gate)]
    return [*steps, Piece(b"".join(frames[len(gates) :])), End()]


@pytest.mark.parametrize("is_translated", [False, True], ids=["passed", "translated"])
@PATHS
def test_each_piece_is_passed_on_as_it_comes(
    start_gateway: StartGateway, native: FakeBackend, chat_only: FakeBackend, path: str, is_translated: bool
) -> None:
    """The client has the frames of each of the backend's while the backend is still silent before its next one."""
    backend, asked = (chat_only, CHAT) if is_translated else (native, path)
    name = "openai_chat_stream.sse" if is_translated else next(name for found, name in NATIVE if found == path)
    frames, gates = frames_of(recording(name)), [threading.Event() for _ in range(6)]
    gateway, received = start_gateway(backend), b""
    backend.play(asked, _steps_with_gates(frames, gates))
    with gateway.http(gateway.key()) as client, client.stream("POST", path, json=BODIES[path]) as got:
        arriving = got.iter_raw()
        for frame, gate in zip(frames, gates, strict=False):
            if frame.startswith(b":"):
                gate.set()
                continue
            text = _text_in(frame)
            received += next(arriving)
            while text not in received:
                received += next(arriving)
            gate.set()
        assert events_of(received + b"".join(arriving))[-1]["type"] == ENDS[path]


def _text_in(frame: bytes) -> bytes:
    """The text in a frame as it is written in all three APIs; nothing for frames without one."""
    event = json.loads(frame.partition(b"data: ")[2])
    delta = event["choices"][0]["delta"].get("content") if event.get("choices") else event.get("delta")
    text = delta.get("text") if isinstance(delta, dict) else delta
    return json.dumps(text, ensure_ascii=False)[1:-1].encode() if isinstance(text, str) else b""


@pytest.mark.parametrize("framing", ["chunked", "mid_chunk", "length"])
@PATHS
def test_a_whole_answer_cut_short_is_502(start_gateway: StartGateway, native: FakeBackend, path: str, framing: Any) -> None:
    gateway, body = start_gateway(native), {**BODIES[path], "stream": False}
    with gateway.http(gateway.key()) as client:
        data = client.post(path, json=body).content
        for offset in [0, *random.Random(framing).sample(range(len(data) - 2), 25)]:
            native.play(path, cut_at(data, offset, "close", "application/json", framing=framing))
            assert client.post(path, json=body).status_code in (502, 503), offset


def test_a_stream_whose_backend_stalls_ends_in_an_error(start_gateway: StartGateway, native: FakeBackend) -> None:
    gateway = start_gateway(native, OLLAMA_IDLE_TIMEOUT_S="0.4", OLLAMA_READ_TIMEOUT_S="3")
    with gateway.http(gateway.key()) as client:
        for path, name in (NATIVE[0], NATIVE[3]):
            data = recording(name)
            native.play(path, [*in_pieces(data[: len(data) // 2], [])[:-1], Pause(5.0), End()])
            last = events_of(client.post(path, json=BODIES[path]).content)[-1]
            assert last["type"] == FAILURES[path] and "in time" in json.dumps(last)


@pytest.mark.parametrize("name", ["openai_chat_stream.sse", "openai_chat_stream_llamacpp.sse", "openai_tool_call_stream.sse"])
@PATHS
def test_tokens_of_a_translated_stream_are_those_that_the_backend_reports(
    start_gateway: StartGateway, chat_only: FakeBackend, path: str, name: str
) -> None:
    gateway: RunningGateway = start_gateway(chat_only)
    data = recording(name)
    usage = next(event["usage"] for event in reversed(events_of(data.replace(b"[DONE]", b"{}"))) if event.get("usage"))
    chat_only.play(CHAT, in_pieces(data, []))
    with gateway.http(gateway.key()) as client:
        client.post(path, json=BODIES[path])
    line = gateway.request_lines()[-1]
    assert (line["prompt_tokens"], line["completion_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
