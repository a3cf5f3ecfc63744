"""Streams of a key with heartbeats: while a call waits, its client gets frames that every official client ignores."""

import asyncio
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import ollama
import openai
import pytest

from gateway.dialects.ollama import Ollama
from gateway.proxy.relay import StreamedAnswer
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import (
    NDJSON,
    SSE,
    Close,
    End,
    Forever,
    Head,
    Hold,
    Pause,
    Piece,
    Script,
    Step,
    answer,
    cut_at,
    recording,
)
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

EVERY_S, SILENT_S = 0.05, 0.2
# The models of two servers without routes for agents, of the first of them alone, and of a server with these routes.
BOTH, CHAT_ONLY, NATIVE = "both:8b", "chat-only:8b", "native:8b"
CHAT, COMPLETIONS, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
NATIVE_CHAT, GENERATE = "/api/chat", "/api/generate"
QUESTION: Any = [{"role": "user", "content": "Say hi"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}},
    COMPLETIONS: {"prompt": "Say hi", "stream": True, "stream_options": {"include_usage": True}},
    MESSAGES: {"messages": QUESTION, "max_tokens": 50, "stream": True},
    RESPONSES: {"input": "Say hi", "stream": True},
    NATIVE_CHAT: {"messages": QUESTION},
    GENERATE: {"prompt": "Say hi"},
}
RECORDINGS = {
    CHAT: ("openai_chat_stream.sse", SSE),
    COMPLETIONS: ("openai_completion_stream.sse", SSE),
    MESSAGES: ("messages_stream_ollama.sse", SSE),
    RESPONSES: ("responses_stream_ollama.sse", SSE),
    NATIVE_CHAT: ("ollama_chat_stream.ndjson", NDJSON),
    GENERATE: ("ollama_generate_stream.ndjson", NDJSON),
}
COMMENT, CREATED = rb": waiting\n", rb'"created_at":"[\d-]+T[\d:.]+Z"'
HEARTBEATS = {
    CHAT: COMMENT,
    COMPLETIONS: COMMENT,
    MESSAGES: rb'event: ping\ndata: \{"type":"ping"\}\n\n',
    RESPONSES: COMMENT,
    NATIVE_CHAT: rb'\{"model":"native:8B",' + CREATED + rb',"message":\{"role":"assistant","content":""\},"done":false\}\n',
    GENERATE: rb'\{"model":"native:8B",' + CREATED + rb',"response":"","done":false\}\n',
}
ERROR_OF_OPENAI = rb'data: \{"error":\{"message":"[^"]+","type":"server_error",.*\}\}\n\n'
ERRORS = {
    CHAT: ERROR_OF_OPENAI,
    COMPLETIONS: ERROR_OF_OPENAI,
    MESSAGES: rb'event: error\ndata: \{"type":"error","error":\{.*\}.*\}\n\n',
    RESPONSES: rb"event: error\ndata: \{.*\}\n\nevent: response\.failed\ndata: \{.*\}\n\n",
    NATIVE_CHAT: rb'\{"error":"[^"]+"\}\n',
    GENERATE: rb'\{"error":"[^"]+"\}\n',
}
Result = TypeVar("Result")
Item = TypeVar("Item")


class Fleet:
    def __init__(self) -> None:
        self.one = FakeBackend("openai", [BOTH, CHAT_ONLY], name="one")
        self.two = FakeBackend("openai", [BOTH], name="two")
        self.native = FakeBackend("ollama", [NATIVE], name="native", is_native=True)
        self.all = (self.one, self.two, self.native)

    def play(self, script: Callable[[FakeBackend], Script | None], *backends: FakeBackend) -> None:
        for backend in backends or self.all:
            for path in BODIES:
                backend.play(path, script(backend))


def silent(backend: FakeBackend) -> Script:
    return lambda request: [Pause(SILENT_S), *backend.healthy(request)]


def held(backend: FakeBackend, gate: threading.Event) -> Script:
    """As a server that loads a model before it answers."""
    return lambda request: [Hold(gate), *backend.healthy(request)]


def at_once(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Most of a test is waiting."""
    with ThreadPoolExecutor(20) as pool:
        return list(pool.map(work, items))


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    fleet = Fleet()
    with fleet.one, fleet.two, fleet.native:
        yield fleet


@pytest.fixture
def fleet(running: Fleet, gateway: RunningGateway) -> Iterator[Fleet]:
    yield running
    running.play(lambda _: None)
    for backend in gateway.components.backends.values():
        backend.breaker.succeeded()


@pytest.fixture(scope="module")
def gateway(start_shared_gateway: StartGateway, running: Fleet) -> RunningGateway:
    started = start_shared_gateway(*running.all)
    # Discovery has found the routes of the server that has them.
    until(lambda: all(is_passed(started, path) for path in (MESSAGES, RESPONSES)))
    return started


def is_passed(gateway: RunningGateway, path: str) -> bool:
    post(gateway, gateway.key(), path, NATIVE)
    return not gateway.request_lines()[-1]["translated_to"]


@pytest.fixture(scope="module")
def key(gateway: RunningGateway) -> str:
    return gateway.key(heartbeat_after_s=EVERY_S)


def post(gateway: RunningGateway, key: str, path: str, model: str, **more: Any) -> httpx.Response:
    with gateway.http(key) as client:
        return client.post(path, json={**BODIES[path], "model": model, **more})


def read_held(gateway: RunningGateway, key: str, path: str, model: str, gate: threading.Event) -> httpx.Response:
    """Opens the gate of the backend once two heartbeats have arrived."""
    content = b""
    with gateway.http(key) as client, client.stream("POST", path, json={**BODIES[path], "model": model}) as got:
        for piece in got.iter_raw():
            content += piece
            if len(re.findall(HEARTBEATS[path], content)) >= 2:
                gate.set()
    return httpx.Response(got.status_code, headers=got.headers, content=content)


def parts(path: str, content: bytes) -> tuple[int, bytes]:
    """How many heartbeats are at the beginning, and what follows."""
    beginning = re.match(rb"(?:%b)*" % HEARTBEATS[path], content)
    assert beginning is not None
    return len(re.findall(HEARTBEATS[path], beginning[0])), content[beginning.end() :]


def events_of(content: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in content.split(b"\n") if line.startswith(b"data: ")]


def lines_of(gateway: RunningGateway, count: int) -> dict[str, dict[str, Any]]:
    """The audit rows of the last calls, one of each path, by path."""
    found = {row["route"]: row for row in gateway.audit_rows()[-count:]}
    assert len(found) == count
    return found


def chat(gateway: RunningGateway, key: str, model: str) -> str:
    with gateway.openai(key) as client:
        chunks = client.chat.completions.create(model=model, messages=QUESTION, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def completion(gateway: RunningGateway, key: str, model: str) -> str:
    with gateway.openai(key) as client:
        chunks = client.completions.create(model=model, prompt="Say hi", stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)


def asynchronous_chat(gateway: RunningGateway, key: str, model: str) -> str:
    async def text() -> str:
        made: Any = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=20)
        async with made as client:
            chunks = await client.chat.completions.create(model=model, messages=QUESTION, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    return asyncio.run(text())


def response(gateway: RunningGateway, key: str, model: str) -> str:
    with gateway.openai(key) as client, client.responses.stream(model=model, input="Say hi") as stream:
        numbers = [event.sequence_number for event in stream]
        assert numbers == list(range(len(numbers)))
        return str(stream.get_final_response().output_text)


def message(gateway: RunningGateway, key: str, model: str) -> str:
    with gateway.anthropic(key) as client, client.messages.stream(model=model, messages=QUESTION, max_tokens=50) as stream:
        return str(stream.get_final_text())


def asynchronous_message(gateway: RunningGateway, key: str, model: str) -> str:
    import anthropic

    async def text() -> str:
        async with anthropic.AsyncAnthropic(base_url=gateway.url, api_key=key, max_retries=0, timeout=20) as client:
            stream = await client.messages.create(model=model, messages=QUESTION, max_tokens=50, stream=True)
            return "".join([event.delta.text async for event in stream if event.type == "content_block_delta"])  # type: ignore[union-attr]

    return asyncio.run(text())


def native_chat(gateway: RunningGateway, key: str, model: str) -> str:
    chunks = gateway.ollama(key).chat(model, QUESTION, stream=True)
    return "".join(chunk.message.content or "" for chunk in chunks)


def native_generate(gateway: RunningGateway, key: str, model: str) -> str:
    return "".join(chunk.response for chunk in gateway.ollama(key).generate(model, "Say hi", stream=True))


def asynchronous_native_chat(gateway: RunningGateway, key: str, model: str) -> str:
    async def text() -> str:
        client = ollama.AsyncClient(host=gateway.url, headers={"Authorization": f"Bearer {key}"})
        found = "".join([chunk.message.content or "" async for chunk in await client.chat(model, QUESTION, stream=True)])
        await client._client.aclose()
        return found

    return asyncio.run(text())


Ask = Callable[[RunningGateway, str, str], str]
CLIENTS: Sequence[Ask] = (
    chat,
    completion,
    asynchronous_chat,
    response,
    message,
    asynchronous_message,
    native_chat,
    native_generate,
    asynchronous_native_chat,
)


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], threading.Event]:
    """An event that is set once so many answers have two heartbeats each."""
    counts: Counter[StreamedAnswer] = Counter()
    gates: list[tuple[int, threading.Event]] = []
    send = StreamedAnswer.send_heartbeat

    async def counted(answer: StreamedAnswer, early_frames: bytes) -> None:
        await send(answer, early_frames)
        counts[answer] += 1
        for wanted, gate in gates:
            if sum(count >= 2 for count in counts.values()) >= wanted:
                gate.set()

    def gate_for(wanted: int) -> threading.Event:
        counts.clear()
        gates[:] = [(wanted, threading.Event())]
        return gates[0][1]

    monkeypatch.setattr(StreamedAnswer, "send_heartbeat", counted)
    return gate_for


Waiting = Callable[[int], threading.Event]


def test_clients_ignore_heartbeats(gateway: RunningGateway, key: str, fleet: Fleet, waiting: Waiting) -> None:
    for model, name in ((CHAT_ONLY, "one"), (NATIVE, "native")):
        gate = waiting(len(CLIENTS))
        fleet.play(lambda backend, gate=gate: held(backend, gate))  # type: ignore[misc]
        texts = at_once(lambda ask, model=model: ask(gateway, key, model), CLIENTS)  # type: ignore[misc]
        assert texts == [f"{name} heard: Say hi"] * len(CLIENTS)


def test_another_backend_continues_the_stream(gateway: RunningGateway, key: str, fleet: Fleet, waiting: Waiting) -> None:
    gate = waiting(len(CLIENTS))
    fleet.play(lambda _: [Hold(gate), *answer(503)], fleet.one)
    assert at_once(lambda ask: ask(gateway, key, BOTH), CLIENTS) == ["two heard: Say hi"] * len(CLIENTS)
    for row in gateway.audit_rows()[-len(CLIENTS) :]:
        assert (row["status"], row["outcome"], row["backend"]) == (200, "answered", "two")
        assert [attempt["backend"] for attempt in json.loads(row["attempts"])] == ["one"]


def test_clients_raise_errors_that_come_after_heartbeats(
    gateway: RunningGateway, key: str, fleet: Fleet, waiting: Waiting
) -> None:
    import anthropic

    def error_of(ask: Ask) -> str:
        with pytest.raises((openai.APIError, anthropic.APIError, ollama.ResponseError)) as raised:
            ask(gateway, key, BOTH)
        return str(raised.value)

    gate = waiting(len(CLIENTS))
    fleet.play(lambda _: [Hold(gate), *answer(500)])
    errors = at_once(error_of, CLIENTS)
    assert all("The model server failed to answer" in text for text in errors), errors
    assert {row["status"] for row in gateway.audit_rows()[-len(CLIENTS) :]} == {200}


@pytest.mark.parametrize("silence", ["before the head", "after the head", "in the first frame"])
def test_the_answer_follows_the_heartbeats_byte_for_byte(gateway: RunningGateway, key: str, fleet: Fleet, silence: str) -> None:
    """Wherever the backend's pieces are cut."""

    def check(path: str) -> None:
        (name, kind), gate = RECORDINGS[path], threading.Event()
        data = recording(name)
        cuts = [5, *sorted(random.Random(path).sample(range(6, len(data)), 20))]
        pieces = [Piece(data[start:end]) for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        head = Head(200, [("Content-Type", kind)], chunked=True)
        begun: list[Step] = [head, pieces.pop(0)] if silence == "in the first frame" else [head]
        steps = [Hold(gate), head] if silence == "before the head" else [*begun, Hold(gate)]
        fleet.native.play(path, [*steps, *pieces, End()])
        got = read_held(gateway, key, path, "native:8B", gate)
        assert (got.status_code, got.headers["content-type"]) == (200, kind)
        assert (got.headers["cache-control"], got.headers["x-accel-buffering"]) == ("no-cache", "no")
        count, rest = parts(path, got.content)
        assert count >= 2 and rest == data

    at_once(check, BODIES)
    for row in lines_of(gateway, len(BODIES)).values():
        assert (row["outcome"], row["tokens_from"]) == ("answered", "reported")
        # It is the time of the answer, not that of the first heartbeat.
        assert 2 * EVERY_S * 1000 < row["ttfb_ms"] <= row["total_ms"]


def test_an_error_after_heartbeats_is_in_the_stream(gateway: RunningGateway, key: str, fleet: Fleet) -> None:
    def check(path: str) -> None:
        gate = threading.Event()
        fleet.native.play(path, [Hold(gate), *answer(500)])
        got = read_held(gateway, key, path, "native:8B", gate)
        count, rest = parts(path, got.content)
        assert got.status_code == 200 and count >= 2 and re.fullmatch(ERRORS[path], rest), rest

    at_once(check, BODIES)
    for row in lines_of(gateway, len(BODIES)).values():
        assert (row["status"], row["outcome"], row["ttfb_ms"]) == (200, "truncated", None)
        assert (row["prompt_tokens"], row["completion_tokens"], row["tokens_from"]) == (0, 0, "none")
        assert row["detail"] and [attempt["backend"] for attempt in json.loads(row["attempts"])] == ["native"]
    assert not any(backend.in_flight for backend in gateway.components.backends.values())


def test_a_refusal_after_heartbeats_is_the_callers_mistake(gateway: RunningGateway, key: str, fleet: Fleet) -> None:
    gate = threading.Event()
    fleet.native.play(NATIVE_CHAT, [Hold(gate), *answer(400, {"error": "invalid options: seed"})])
    _, rest = parts(NATIVE_CHAT, read_held(gateway, key, NATIVE_CHAT, "native:8B", gate).content)
    assert json.loads(rest) == {"error": "invalid options: seed"}
    row = gateway.audit_rows()[-1]
    assert (row["status"], row["outcome"], row["tokens_from"]) == (200, "refused:upstream_refused", "none")


def test_a_stream_that_breaks_off_after_heartbeats(gateway: RunningGateway, key: str, fleet: Fleet) -> None:
    def check(path: str) -> None:
        (name, kind), gate = RECORDINGS[path], threading.Event()
        data = recording(name)
        fleet.native.play(path, [Hold(gate), *cut_at(data, len(data) * 2 // 3, "close", kind)])
        count, rest = parts(path, read_held(gateway, key, path, "native:8B", gate).content)
        error = re.search(ERRORS[path] + rb"$", rest)
        assert count >= 2 and error and data.startswith(rest[: error.start()])
        if path == RESPONSES:
            numbers = [event["sequence_number"] for event in events_of(rest)]
            assert numbers == list(range(len(numbers)))

    at_once(check, BODIES)
    for row in lines_of(gateway, len(BODIES)).values():
        assert (row["outcome"], row["tokens_from"]) == ("truncated", "partial") and row["ttfb_ms"] > 2 * EVERY_S * 1000


def test_the_first_events_of_a_translated_response_come_once(gateway: RunningGateway, key: str, fleet: Fleet) -> None:
    gate = threading.Event()
    fleet.play(lambda _: [Pause(2 * EVERY_S), *answer(503)], fleet.one)
    fleet.play(lambda backend: held(backend, gate), fleet.two)
    content = read_held(gateway, key, RESPONSES, BOTH, gate).content
    events = events_of(content)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    assert kinds.count("response.created") == kinds.count("response.in_progress") == 1
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    responses = [event["response"] for event in events if "response" in event]
    assert len({(found["id"], found["created_at"], found["model"]) for found in responses}) == 1
    begun = rb"event: response.created\n.*\n\nevent: response.in_progress\n.*\n\n"
    assert re.match(begun + rb"(: waiting\n){2,}event: response.output_item.added\n", content)


def test_a_translated_response_that_fails_after_its_first_events(gateway: RunningGateway, key: str, fleet: Fleet) -> None:
    gate = threading.Event()
    fleet.play(lambda _: [Hold(gate), Close()])
    events = events_of(read_held(gateway, key, RESPONSES, BOTH, gate).content)
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "error", "response.failed"]
    assert [event["sequence_number"] for event in events] == [0, 1, 2, 3]
    assert events[3]["response"]["id"] == events[0]["response"]["id"] != ""
    assert (events[3]["response"]["status"], events[3]["response"]["model"]) == ("failed", BOTH)


def test_calls_that_get_no_heartbeat(gateway: RunningGateway, key: str, fleet: Fleet) -> None:
    """Whole answers, streams of other keys, quick ones, and calls that load a model, whose answer is one object."""
    without = gateway.key()

    def check(path: str) -> None:
        whole = post(gateway, key, path, NATIVE, stream=False)
        assert whole.status_code == 200 and isinstance(whole.json(), dict) and "content-length" in whole.headers
        assert re.search(HEARTBEATS[path], post(gateway, without, path, "native:8B").content) is None

    fleet.play(silent)
    at_once(check, BODIES)
    with gateway.http(key) as client:
        for model in (NATIVE, CHAT_ONLY):
            assert client.post(NATIVE_CHAT, json={"model": model}).json()["done_reason"] == "load"
    fleet.play(lambda _: None)
    assert parts(CHAT, post(gateway, key, CHAT, NATIVE).content)[0] == 0


def test_errors_keep_their_status_until_the_first_heartbeat(gateway: RunningGateway, key: str, fleet: Fleet) -> None:
    refused, limited = gateway.key(BOTH, heartbeat_after_s=EVERY_S), gateway.key(rpm=0, heartbeat_after_s=EVERY_S)
    fleet.play(lambda _: answer(500))
    for path in BODIES:
        asked = [("nz_nobody_nothing", NATIVE), (key, "unknown"), (refused, NATIVE), (limited, NATIVE), (key, NATIVE)]
        statuses = [post(gateway, by, path, model).status_code for by, model in asked]
        assert statuses == [401, 403, 403, 429, 502]


def test_headers_of_an_answer_that_began_with_a_heartbeat(gateway: RunningGateway, fleet: Fleet) -> None:
    key = gateway.key(heartbeat_after_s=EVERY_S, flags=("show_backend", "show_overhead"), rpm=100)
    soon = post(gateway, key, CHAT, NATIVE)
    assert soon.headers["x-gateway-backend"] == "native" and "x-gateway-overhead-ms" in soon.headers
    gate = threading.Event()
    fleet.play(lambda backend: held(backend, gate))
    late = read_held(gateway, key, CHAT, NATIVE, gate)
    assert "x-gateway-backend" not in late.headers and "x-gateway-overhead-ms" not in late.headers
    assert late.headers["x-ratelimit-limit-requests"] == "100" and late.headers["x-request-id"]


def test_a_client_that_leaves_during_heartbeats(gateway: RunningGateway, key: str, fleet: Fleet) -> None:
    def leave(path: str) -> None:
        with gateway.http(key) as client, client.stream("POST", path, json={**BODIES[path], "model": NATIVE}) as got:
            next(got.iter_raw())

    fleet.play(lambda _: [Forever()])
    at_once(leave, BODIES)
    left = time.monotonic()
    until(lambda: fleet.native.in_flight == 0)
    assert time.monotonic() - left < 1.0
    for row in lines_of(gateway, len(BODIES)).values():
        assert (row["status"], row["outcome"], row["tokens_from"]) == (200, "client_gone", "partial")


def test_heartbeats_wait_for_a_client_that_does_not_read(
    gateway: RunningGateway, key: str, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client gets its answer when it reads on."""
    sent: list[float] = []
    gate = threading.Event()

    def large(*_: object) -> bytes:
        sent.append(time.monotonic())
        return b" " * 4 * 2**20 + b"\n"

    monkeypatch.setattr(Ollama, "heartbeat", large)
    fleet.play(lambda backend: held(backend, gate))
    body = {**BODIES[NATIVE_CHAT], "model": NATIVE}
    with gateway.http(key) as client, client.stream("POST", NATIVE_CHAT, json=body) as got:
        until(lambda: sent and time.monotonic() - sent[-1] > 6 * EVERY_S)
        assert len(sent) <= 5
        gate.set()
        records = [json.loads(line) for line in got.iter_lines() if line.strip()]
    assert "".join(record["message"]["content"] for record in records) == "native heard: Say hi" and records[-1]["done"]


def test_a_process_that_stops_ends_waiting_streams_with_an_error(start_gateway: StartGateway, fleet: Fleet) -> None:
    fleet.play(lambda _: [Forever()])
    gateway = start_gateway(fleet.native, GATEWAY_DRAIN_S="0.1")
    key, waiting = gateway.key(heartbeat_after_s=EVERY_S), threading.Barrier(len(BODIES) + 1)

    def check(path: str) -> None:
        with gateway.http(key) as client, client.stream("POST", path, json={**BODIES[path], "model": NATIVE}) as got:
            pieces = got.iter_raw()
            first = next(pieces)
            waiting.wait(10)
            content = first + b"".join(pieces)
        assert re.search(ERRORS[path] + rb"$", content) and b"shutting down" in content

    def stop() -> None:
        waiting.wait(10)
        gateway.stop()

    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(stop)
        at_once(check, BODIES)
        stopped.result()
