"""Answers reach the client byte for byte; a truncated answer ends with an error, never with an invented end."""

import json
import random
from collections.abc import Iterator
from itertools import pairwise

import ollama
import openai
import pytest

from tests.conftest import StartGateway
from tests.support.chat_requests import CHATS, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import End, Forever, Head, Pause, Piece, Step, cut_at, recording
from tests.support.running_gateway import RunningGateway
from tests.support.shared_gateway import Shared

MODEL = "llama3.2:latest"
STREAMS = [
    ("/api/chat", "ollama_chat_stream.ndjson"),
    ("/api/chat", "ollama_tool_call_stream.ndjson"),
    ("/api/generate", "ollama_generate_stream.ndjson"),
    ("/v1/chat/completions", "openai_chat_stream.sse"),
    ("/v1/chat/completions", "openai_chat_stream_vllm.sse"),
    ("/v1/chat/completions", "openai_chat_stream_llamacpp.sse"),
    ("/v1/chat/completions", "openai_chat_stream_crlf.sse"),
    ("/v1/chat/completions", "openai_tool_call_stream.sse"),
    ("/v1/completions", "openai_completion_stream.sse"),
]
WHOLE = [
    ("/api/chat", "ollama_chat_whole.json"),
    ("/v1/chat/completions", "openai_chat_whole.json"),
    ("/v1/embeddings", "openai_embeddings.json"),
]


@pytest.fixture(scope="module")
def started(start_shared_gateway: StartGateway) -> Iterator[Shared]:
    with FakeBackend(models=["llama3.2:latest"], name="alpha") as backend:
        yield Shared(backend, start_shared_gateway(backend))


@pytest.fixture
def shared(started: Shared) -> Shared:
    return started.renewed()


@pytest.fixture
def alpha(shared: Shared) -> FakeBackend:
    return shared.backend


@pytest.fixture
def gateway(shared: Shared) -> RunningGateway:
    return shared.gateway


def body_for(path: str, *, stream: bool) -> dict[str, object]:
    more: dict[str, object] = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", "input": "hi"}
    if path.startswith("/v1/") and stream:
        more["stream_options"] = {"include_usage": True}
    return {"model": MODEL, "stream": stream, **more}


def media_of(name: str) -> str:
    return {"ndjson": "application/x-ndjson", "sse": "text/event-stream", "json": "application/json"}[name.rpartition(".")[2]]


def in_pieces(data: bytes, cuts: list[int], content_type: str, pause_s: float = 0.0) -> list[Step]:
    edges = [0, *sorted(cuts), len(data)]
    pieces = [data[start:end] for start, end in pairwise(edges) if start < end]
    steps: list[Step] = [Head(200, [("Content-Type", content_type)], chunked=True)]
    for piece in pieces:
        steps += [Piece(piece), Pause(pause_s)]
    return [*steps, End()]


@pytest.mark.parametrize(("path", "name"), [*STREAMS, *WHOLE])
def test_every_recording_passes_byte_for_byte_however_it_is_cut(
    gateway: RunningGateway, alpha: FakeBackend, path: str, name: str
) -> None:
    data, content_type = recording(name), media_of(name)
    rng = random.Random(name)
    every = len(data) if len(data) < 3000 else 40
    plans = [[rng.randrange(1, len(data)) for _ in range(3)] for _ in range(8)]
    plans += [list(range(1, len(data), max(1, len(data) // every)))]
    with gateway.http(gateway.key()) as client:
        for cuts in plans:
            alpha.play(path, in_pieces(data, cuts, content_type))
            got = client.post(path, json=body_for(path, stream=(path, name) in STREAMS))
            assert got.status_code == 200, got.text
            assert got.content == data
            assert got.headers["content-type"] == content_type


@pytest.mark.parametrize("framing", ["chunked", "mid_chunk", "length"])
@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize(("path", "name"), [STREAMS[0], STREAMS[3]])
def test_a_stream_cut_at_any_byte_ends_in_the_dialects_error(
    gateway: RunningGateway, alpha: FakeBackend, path: str, name: str, how: str, framing: str
) -> None:
    data = recording(name)
    end_of_first = data.index(b"\n\n" if name.endswith("sse") else b"\n") + 2
    offsets = random.Random(how + framing + name).sample(range(end_of_first, len(data) - 1), 25)
    with gateway.http(gateway.key()) as client:
        for offset in offsets:
            alpha.play(path, cut_at(data, offset, how, media_of(name), framing=framing))  # type: ignore[arg-type]
            got = client.post(path, json=body_for(path, stream=True))
            assert got.status_code == 200
            last = last_frame(got.content)
            assert last["error"], (offset, got.content[-200:])
            relayed = got.content[: got.content.rindex(b"data: " if name.endswith("sse") else b'{"error"')]
            assert data.startswith(relayed) and b"[DONE]" not in got.content[len(relayed) :]


def last_frame(content: bytes) -> dict[str, object]:
    return dict(json.loads(content.strip().splitlines()[-1].removeprefix(b"data: ")))


@pytest.mark.parametrize("framing", ["chunked", "mid_chunk", "length"])
@pytest.mark.parametrize(("path", "name"), WHOLE)
def test_a_whole_answer_cut_short_is_502(
    gateway: RunningGateway, alpha: FakeBackend, path: str, name: str, framing: str
) -> None:
    data = recording(name)
    offsets = random.Random(framing + name).sample(range(len(data) - 1), 25)
    with gateway.http(gateway.key()) as client:
        for offset in [0, *offsets]:
            alpha.play(path, cut_at(data, offset, "close", "application/json", framing=framing))  # type: ignore[arg-type]
            assert client.post(path, json=body_for(path, stream=False)).status_code in (502, 503), offset


@pytest.mark.parametrize("chat", [chat for chat in CHATS if chat.streamed], ids=str)
def test_the_official_clients_raise_where_a_stream_was_cut(gateway: RunningGateway, alpha: FakeBackend, chat: Chat) -> None:
    name = "ollama_chat_stream.ndjson" if chat.dialect == "ollama" else "openai_chat_stream.sse"
    data = recording(name)
    alpha.play(chat.path, cut_at(data, len(data) // 2, "close", media_of(name)))
    with pytest.raises((openai.APIError, ollama.ResponseError)) as raised:
        chat.ask(gateway, gateway.key())
    assert "ended early" in str(raised.value)
    line = gateway.request_lines()[-1]
    assert line["outcome"] == "truncated" and line["status"] == 200


@pytest.mark.parametrize("chat", [chat for chat in CHATS if chat.streamed], ids=str)
def test_a_clean_end_without_the_last_frame_is_a_failure(gateway: RunningGateway, alpha: FakeBackend, chat: Chat) -> None:
    """Ollama ends its answer like this when it aborts repetitive output, and when its runner dies."""
    name = "ollama_chat_stream.ndjson" if chat.dialect == "ollama" else "openai_chat_stream.sse"
    frames = recording(name).splitlines(keepends=True)
    alpha.play(chat.path, in_pieces(b"".join(frames[:2]), [], media_of(name)))
    with pytest.raises((openai.APIError, ollama.ResponseError)):
        chat.ask(gateway, gateway.key())


@pytest.mark.parametrize("chat", [chat for chat in CHATS if chat.streamed], ids=str)
def test_a_stall_ends_in_an_error_but_a_slow_start_does_not(
    start_gateway: StartGateway, alpha: FakeBackend, chat: Chat
) -> None:
    gateway = start_gateway(alpha, OLLAMA_IDLE_TIMEOUT_S="0.4", OLLAMA_READ_TIMEOUT_S="3")
    name = "ollama_chat_stream.ndjson" if chat.dialect == "ollama" else "openai_chat_stream.sse"
    data, key = recording(name), gateway.key()
    slow: list[Step] = [Pause(1.0), *in_pieces(data, [], media_of(name))]
    alpha.play(chat.path, slow)
    chat.ask(gateway, key)
    half = in_pieces(data[: len(data) // 2], [], media_of(name))[:-1]
    alpha.play(chat.path, [*half, Pause(5.0), End()])
    with pytest.raises((openai.APIError, ollama.ResponseError)) as raised:
        chat.ask(gateway, key)
    assert "in time" in str(raised.value)


def test_a_total_limit_ends_an_endless_stream(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, OLLAMA_TOTAL_TIMEOUT_S="0.5")
    line = recording("ollama_chat_stream.ndjson").splitlines(keepends=True)[0]
    steps: list[Step] = [Head(200, [("Content-Type", "application/x-ndjson")], chunked=True)]
    alpha.play("/api/chat", steps + [step for _ in range(100) for step in (Piece(line), Pause(0.05))] + [End()])
    with gateway.http(gateway.key()) as client:
        got = client.post("/api/chat", json=body_for("/api/chat", stream=True))
    assert "error" in last_frame(got.content) and 3 < got.content.count(b"\n") < 40


@pytest.mark.parametrize("chat", [chat for chat in CHATS if chat.streamed], ids=str)
def test_an_answer_ends_at_its_last_frame_whatever_the_backend_sends_afterwards(
    gateway: RunningGateway, alpha: FakeBackend, chat: Chat
) -> None:
    """By then the call is counted and its slot released."""
    name = "ollama_chat_stream.ndjson" if chat.dialect == "ollama" else "openai_chat_stream.sse"
    data = recording(name)
    behind = b"\n" if chat.dialect == "ollama" else b": ping\n\n"
    more: list[Step] = [step for _ in range(20) for step in (Pause(0.1), Piece(behind * 50))]
    alpha.play(chat.path, [*in_pieces(data, [], media_of(name))[:-1], *more, Forever()])
    with gateway.http(gateway.key(concurrent=1)) as client:
        for _ in range(2):
            got = client.post(chat.path, json=chat.body)
            assert got.status_code == 200 and len(got.content) <= len(data)
            assert got.content.endswith((b"[DONE]\n\n", b"}\n")) and b'"error"' not in got.content
    assert alpha.wait_idle()
    assert [row["bytes_out"] for row in gateway.audit_rows()] == [len(got.content)] * 2


def test_a_stream_of_blanks_and_comments_is_rejected(gateway: RunningGateway, alpha: FakeBackend) -> None:
    key = gateway.key()
    for chat in (chat for chat in CHATS if chat.streamed):
        media = media_of("a.ndjson" if chat.dialect == "ollama" else "a.sse")
        blanks = Piece(b"\n\n" * 20_000)
        alpha.play(chat.path, [Head(200, [("Content-Type", media)], chunked=True), *[blanks] * 200, Forever()])
        with gateway.http(key) as client:
            assert client.post(chat.path, json=chat.body).status_code == 502
        assert [attempt["fault"] for attempt in gateway.request_lines()[-1]["attempts"]] == ["bad_first_frame"]


def test_each_piece_is_passed_on_as_it_comes(gateway: RunningGateway, alpha: FakeBackend) -> None:
    """The client receives each frame while the backend is still silent before the next."""
    import threading

    from tests.support.fake_backend.scripts import Hold

    gates = [threading.Event() for _ in range(3)]
    lines = recording("ollama_chat_stream.ndjson").splitlines(keepends=True)
    steps: list[Step] = [Head(200, [("Content-Type", "application/x-ndjson")], chunked=True)]
    for gate, line in zip(gates, lines, strict=False):
        steps += [Piece(line), Hold(gate)]
    alpha.play("/api/chat", [*steps, Piece(b"".join(lines[3:])), End()])
    with gateway.http(gateway.key()) as client, client.stream("POST", "/api/chat", json=body_for("", stream=True)) as got:
        arriving = got.iter_raw()
        for gate, line in zip(gates, lines, strict=False):
            assert next(arriving) == line
            gate.set()
        assert b"".join(arriving) == b"".join(lines[3:])


def test_usage_is_read_from_the_end_of_each_kind_of_answer(gateway: RunningGateway, alpha: FakeBackend) -> None:
    key = gateway.key()
    with gateway.http(key) as client:
        for path, name in [*STREAMS, *WHOLE]:
            content_type = media_of(name)
            alpha.play(path, in_pieces(recording(name), [], content_type))
            client.post(path, json=body_for(path, stream=(path, name) in STREAMS))
            line = gateway.request_lines()[-1]
            assert line["prompt_tokens"], (name, line)
