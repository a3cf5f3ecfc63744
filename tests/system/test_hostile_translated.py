"""A backend whose answers are translated can make the gateway hold and compute only so much."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import JSON, SSE, End, Head, Piece, Step
from tests.support.model_servers import CHAT, CHAT_ONLY, MODEL
from tests.system.test_hostile_backends import LONGEST_DELAY_S, LoopDelays

HELLO = [{"role": "user", "content": "Hi"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/messages": {"max_tokens": 9, "messages": HELLO},
    "/v1/responses": {"input": "Hi"},
    "/api/chat": {"messages": HELLO},
}
# Sixty megabytes of lists would take ten seconds and two gigabytes.
LISTS = b'{"x":[' + b"[]," * (20 * 2**20) + b'[]],"choices":[{"message":{"content":"x"},"finish_reason":"stop"}]}'
SHORTER = b'{"x":[' + b"[]," * (2 * 2**20) + b'[]],"choices":[{"message":{"content":"x"},"finish_reason":"stop"}]}'


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with CHAT_ONLY.backend() as found:
        yield found


@pytest.mark.parametrize(("answer", "status"), [(LISTS, 502), (SHORTER, 502)], ids=["long", "shorter"])
def test_millions_of_lists(start_gateway: StartGateway, backend: FakeBackend, answer: bytes, status: int) -> None:
    gateway = start_gateway(backend)
    whole: list[Step] = [Head(200, [("Content-Type", JSON)], content_length=len(answer)), Piece(answer)]
    with gateway.http(gateway.key()) as client:
        for path, body in ASKED.items():
            backend.play(CHAT, whole)
            with LoopDelays(gateway) as delays:
                got = client.post(path, json={"model": MODEL, "stream": False, **body})
            assert got.status_code == status and delays.longest_s < LONGEST_DELAY_S, path


def test_millions_of_lists_in_a_frame(start_gateway: StartGateway, backend: FakeBackend) -> None:
    gateway = start_gateway(backend)
    first = b'data: {"model":"m","choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
    frame = b"data: " + SHORTER + b"\n\n"
    backend.play(CHAT, [Head(200, [("Content-Type", SSE)], chunked=True), Piece(first), Piece(frame), End()])
    with gateway.http(gateway.key()) as client:
        for path, body in ASKED.items():
            with LoopDelays(gateway) as delays:
                got = client.post(path, json={"model": MODEL, "stream": True, **body})
            assert b'"error"' in got.content and delays.longest_s < LONGEST_DELAY_S, path


def frame_of(delta: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


@pytest.mark.parametrize("delta", ["content", "tool_calls"])
def test_a_stream_without_end(start_gateway: StartGateway, backend: FakeBackend, delta: str) -> None:
    """Its pieces would be kept for the end of the answer."""
    gateway, text = start_gateway(backend), "x" * 60_000
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a":"' + text}}
    more = {"index": 0, "function": {"arguments": text}}
    deltas: list[Any] = [text, text] if delta == "content" else [[call], [more]]
    first, next_ = (frame_of({delta: one}) for one in deltas)
    backend.play(CHAT, [Head(200, [("Content-Type", SSE)], chunked=True), Piece(first), *[Piece(next_)] * 1000, End()])
    with gateway.http(gateway.key()) as client:
        got = client.post("/v1/responses", json={"model": MODEL, "stream": True, **ASKED["/v1/responses"]})
    assert got.content.rstrip().endswith(b"}") and b'"response.failed"' in got.content[-10_000:]
    assert 30 * 2**20 < len(got.content) < 40 * 2**20
    [fake] = gateway.components.backends.values()
    assert gateway.request_lines()[-1]["outcome"] == "truncated" and fake.pieces.used == 0


REPEATED = 70_000
LARGE: list[tuple[str, bytes, bytes, str]] = [
    (
        "/v1/messages",
        b'"max_tokens":9,"messages":[{"role":"user","content":"x"}],"tools":[%b]',
        b'{"type":"a"}',
        "at most 4096",
    ),
    ("/v1/responses", b'"input":"x","tools":[%b]', b'{"type":"a"}', "at most 4096"),
    ("/v1/responses", b'"input":"x","tools":[%b]', b'{"type":"function","name":"f%d"}', "at most 4096"),
    (
        "/v1/responses",
        b'"input":"x","tools":[{"type":"namespace","name":"n","tools":[%b]}]',
        b'{"type":"function","name":"f%d"}',
        "names more than 4096 tools",
    ),
]


@pytest.mark.parametrize(("path", "fields", "tool", "words"), LARGE)
def test_tools_without_end(start_gateway: StartGateway, path: str, fields: bytes, tool: bytes, words: str) -> None:
    """Each backend that has the path would make the gateway examine all of them once more."""
    with ExitStack() as stack:
        backends = [stack.enter_context(FakeBackend(models=[MODEL], name=f"b{at}", is_native=True)) for at in range(4)]
        gateway = start_gateway(*backends)
        tools = b",".join(tool.replace(b"%d", b"%d" % number) for number in range(REPEATED))
        body = b'{"model":"%b",%b}' % (MODEL.encode(), fields.replace(b"%b", tools))
        with gateway.http(gateway.key()) as client, LoopDelays(gateway) as delays:
            got = client.post(path, content=body)
        assert got.status_code == 400 and words in got.json()["error"]["message"]
        assert delays.longest_s < LONGEST_DELAY_S


def test_empty_blocks_are_translated_in_turns(
    start_gateway: StartGateway, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of few tokens may be much work."""
    gateway = start_gateway(backend)
    done: list[str] = []
    turns = gateway.components.bodies._turns
    run = turns.run

    async def counted(key_id: str, *more: Any) -> Any:
        done.append(key_id)
        return await run(key_id, *more)

    monkeypatch.setattr(turns, "run", counted)
    blocks = [{"type": "text", "text": ""}] * 5000
    content = [{"type": "text", "text": "x"}, *blocks]
    body = {"model": MODEL, "max_tokens": 9, "messages": [{"role": "user", "content": content}]}
    with gateway.http(gateway.key()) as client:
        assert client.post("/v1/messages", json=body).status_code == 200
    # One for parsing, and one for translating.
    assert len(done) == 2


@pytest.mark.parametrize("path", ASKED)
def test_tokens_that_wait_for_the_end_count_if_it_does_not_come(
    start_gateway: StartGateway, backend: FakeBackend, path: str
) -> None:
    """The pieces of a call of a tool are written when it has ended; the backend has worked for them."""
    gateway, more = start_gateway(backend), frame_of({"tool_calls": [{"index": 0, "function": {"arguments": "x"}}]})
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a":"'}}
    begin: list[Step] = [Head(200, [("Content-Type", SSE)], chunked=True), Piece(frame_of({"content": "x"}))]
    backend.play(CHAT, [*begin, Piece(frame_of({"tool_calls": [call]})), *[Piece(more)] * 300, End()])
    with gateway.http(gateway.key()) as client:
        client.post(path, json={"model": MODEL, "stream": True, **ASKED[path], "max_tokens": 9000})
    line = gateway.request_lines()[0]
    assert line["outcome"] == "truncated" and line["completion_tokens"] >= 300
