"""Translated answers as clients get them: soon, counted as the backend counts, truthful at their end."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

from gateway.fleet import failover, translated_response
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import SSE, Close, End, Head, Pause, Piece, Step
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "qwen3-8b"
CHAT = "/v1/chat/completions"
QUESTION: Any = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Say hi"}]}


@pytest.fixture
def beta() -> Iterator[FakeBackend]:
    with FakeBackend(kind="openai", models=[MODEL], name="beta") as backend:
        yield backend


@pytest.fixture
def gateway(start_gateway: StartGateway, beta: FakeBackend) -> RunningGateway:
    return start_gateway(beta)


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> Piece:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    value = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": choices, **more}
    return Piece(b"data: " + json.dumps(value).encode() + b"\n\n")


def stream(*pieces: Step) -> list[Step]:
    return [Head(200, [("Content-Type", SSE)], chunked=True), *pieces, Piece(b"data: [DONE]\n\n"), End()]


def client_of(gateway: RunningGateway) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, auth_token=gateway.key(), max_retries=0, timeout=20)


def row_of(gateway: RunningGateway) -> dict[str, Any]:
    return gateway.audit_rows()[-1]


def test_the_connection_to_the_backend_is_used_again(gateway: RunningGateway, beta: FakeBackend) -> None:
    of_discovery = {request.connection for request in beta.requests}
    with client_of(gateway) as client:
        for _ in range(8):
            with client.messages.stream(**QUESTION) as events:
                assert events.get_final_text() == "beta heard: Say hi"
    # Those of discovery are closed where the bodies of its answers were still to come.
    assert len({request.connection for request in beta.calls(CHAT)} - of_discovery) <= 1


def test_a_long_tool_call_shows_that_the_backend_is_at_work(
    gateway: RunningGateway, beta: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ollama's clients get a tool call whole; until then they would take a long one for silence."""
    monkeypatch.setattr(translated_response, "SILENT_S", 0.0)
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "write", "arguments": ""}}
    pieces = [chunk({"role": "assistant", "content": "So:"}), chunk({"tool_calls": [call]})]
    for text in ('{"a":', '"b"', "}"):
        pieces += [chunk({"tool_calls": [{"index": 0, "function": {"arguments": text}}]})]
    paced = [step for piece in pieces for step in (piece, Pause(0.05))]
    beta.play(CHAT, stream(*paced, chunk({}, "tool_calls")))
    got = list(gateway.ollama(gateway.key()).chat(MODEL, QUESTION["messages"], stream=True))
    assert [len(record.message.tool_calls or ()) for record in got][-2:] == [1, 0]
    empty = [record for record in got if not record.message.content and not record.message.tool_calls and not record.done]
    assert len(empty) >= 3


def test_what_the_backend_did_not_count_is_estimated(gateway: RunningGateway, beta: FakeBackend) -> None:
    beta.play(CHAT, stream(chunk({"role": "assistant", "content": "Hello there, you"}), chunk({}, "stop")))
    with client_of(gateway) as client, client.messages.stream(**QUESTION) as events:
        message = events.get_final_message()
    assert message.usage.output_tokens > 0
    until(lambda: row_of(gateway)["tokens_from"] == "estimated", 5)
    beta.play(
        CHAT, stream(chunk({"content": "Hi"}), chunk({}, "stop"), chunk(usage={"prompt_tokens": 7, "completion_tokens": 9}))
    )
    with client_of(gateway) as client, client.messages.stream(**QUESTION) as events:
        message = events.get_final_message()
    assert (message.usage.input_tokens, message.usage.output_tokens) == (7, 9)
    until(lambda: (row_of(gateway)["tokens_from"], row_of(gateway)["completion_tokens"]) == ("reported", 9), 5)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ([Close()], "ended early"),
        (
            [Piece(b'data: {"error":{"message":"the card at {url} has gone","code":500}}\n\n'), End()],
            "the card at *** has gone",
        ),
        ([Piece(b"data: [1]\n\n"), End()], "error"),
        ([Piece(b"data: [DONE]\n\n"), Close()], ""),
    ],
    ids=["closed", "an error", "not a chunk", "no finish reason"],
)
def test_an_answer_that_breaks_off_ends_with_an_error(
    gateway: RunningGateway, beta: FakeBackend, end: list[Step], words: str
) -> None:
    end = [Piece(step.data.replace(b"{url}", beta.url.encode())) if isinstance(step, Piece) else step for step in end]
    head = Head(200, [("Content-Type", SSE)], chunked=True)
    steps: list[Step] = [head, chunk({"role": "assistant", "content": "Once upon"}), Pause(0.05), *end]
    beta.play(CHAT, steps)
    with client_of(gateway) as client:
        if not words:
            with client.messages.stream(**QUESTION) as events:
                assert events.get_final_message().stop_reason == "end_turn"
            return
        with pytest.raises(anthropic.APIStatusError) as raised, client.messages.stream(**QUESTION) as events:
            assert next(iter(events.text_stream)) == "Once upon"
            events.until_done()
    assert words in raised.value.message and beta.url not in raised.value.message
    until(lambda: row_of(gateway)["outcome"] == "truncated", 5)


def test_nothing_is_sent_before_the_backend_has_proved_to_answer(start_gateway: StartGateway, beta: FakeBackend) -> None:
    with FakeBackend(kind="ollama", models=[MODEL], name="alpha") as alpha:
        gateway = start_gateway(alpha, beta)
        bad: list[Step] = [
            Head(200, [("Content-Type", SSE)], chunked=True),
            Piece(b'data: {"error":{"message":"no","code":500}}\n\n'),
            End(),
        ]
        alpha.play(CHAT, bad)
        with client_of(gateway) as client, client.messages.stream(**QUESTION) as events:
            assert events.get_final_text() == "beta heard: Say hi"
    until(lambda: [attempt["backend"] for attempt in json.loads(row_of(gateway)["attempts"])] == ["alpha"], 5)
    row = row_of(gateway)
    assert (row["backend"], row["translated_to"], row["dialect"]) == ("beta", CHAT, "anthropic")


def test_nothing_is_counted_for_a_client_that_leaves_before_its_request_is_sent(
    gateway: RunningGateway, beta: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failover, "SMALL_REQUEST", 0)
    turns = gateway.components.bodies._turns
    gateway.call(turns._loop_lock.acquire())
    with gateway.http(gateway.key()) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/messages", json=QUESTION, timeout=0.3)
    until(lambda: bool(gateway.request_lines()), 5)
    gateway.loop.call_soon_threadsafe(turns._loop_lock.release)
    row = row_of(gateway)
    assert (row["outcome"], row["prompt_tokens"], row["completion_tokens"]) == ("client_gone", 0, 0)
    assert beta.calls(CHAT) == []
