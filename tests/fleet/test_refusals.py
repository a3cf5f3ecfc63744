"""A refusal reaches the caller with its text, is asked of one other backend at most, and opens no breaker."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import ollama
import openai
import pytest

from gateway.core.errors import BackendCannot
from gateway.fleet import refusals
from gateway.fleet.backends.config import BackendConfig
from tests.conftest import StartGateway
from tests.support.chat_requests import CHATS, MESSAGES, MODEL
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import HTML, Forever, Head, Piece, Step, answer, ndjson, sse, stream
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
MMPROJ = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
NO_EMBEDDINGS = "This server does not support embeddings. Start it with `--embeddings`"
TOOL_CALL_OF_OLLAMA = 'llama-server returned invalid tool call arguments for "run": unexpected end of JSON input'
OVERFLOW = {
    "code": 400,
    "message": "request (9412 tokens) exceeds the available context size (8192 tokens), try increasing it",
    "type": "exceed_context_size_error",
    "n_prompt_tokens": 9412,
    "n_ctx": 8192,
}
CANARY = "canary-5d1e"
OUT_OF_MEMORY = {"error": {"message": f"{CANARY}: CUDA error: out of memory", "type": "server_error"}}


@pytest.fixture
def gamma() -> Iterator[FakeBackend]:
    with FakeBackend(models=["llama3.2:latest"], name="gamma") as backend:
        yield backend


@pytest.fixture
def three(alpha: FakeBackend, beta: FakeBackend, gamma: FakeBackend) -> list[FakeBackend]:
    return [alpha, beta, gamma]


@pytest.fixture
def gateway(start_gateway: StartGateway, three: list[FakeBackend]) -> RunningGateway:
    return start_gateway(*three)


def states(gateway: RunningGateway) -> set[str]:
    return {backend.breaker.state for backend in gateway.components.backends.values()}


def failures(gateway: RunningGateway) -> set[int]:
    return {backend.breaker._failures for backend in gateway.components.backends.values()}


def play(backends: list[FakeBackend], path: str, steps: list[Step]) -> None:
    for backend in backends:
        backend.play(path, steps)


def asked(backends: list[FakeBackend], path: str) -> list[int]:
    return [len(backend.calls(path)) for backend in backends]


def llamacpp(status: int, words: str, kind: str = "server_error") -> dict[str, Any]:
    return {"error": {"code": status, "message": words, "type": kind}}


# The error, its status, and the status that the caller gets.
UNABLE: list[tuple[str, int, int, dict[str, Any]]] = [
    (EMBEDDINGS, 501, 501, llamacpp(501, NO_EMBEDDINGS, "not_supported_error")),
    (CHAT, 500, 400, llamacpp(500, MMPROJ)),
    (CHAT, 500, 400, {"error": {"message": "this model is missing data required for image input", "type": "api_error"}}),
    (CHAT, 500, 500, llamacpp(500, "Failed to parse tool call arguments as JSON: unexpected end of input; last read: '\"x'")),
    (CHAT, 500, 500, llamacpp(500, "The model produced output that does not match the expected peg-native format")),
    (CHAT, 500, 500, {"error": {"message": "error parsing tool call: raw='{\"a\":', err=unexpected end of JSON input"}}),
    (CHAT, 500, 500, {"error": {"message": TOOL_CALL_OF_OLLAMA, "type": "api_error"}}),
    (EMBEDDINGS, 500, 400, llamacpp(500, "input is too large to process. increase the physical batch size")),
]


def test_what_a_backend_cannot_do_is_tried_on_one_other_backend_and_then_reported(
    gateway: RunningGateway, three: list[FakeBackend]
) -> None:
    """What a retry cannot change is 400: not all clients know that a 5xx may be final."""
    with gateway.openai(gateway.key(), max_retries=2) as client:
        for number, (path, status, expected_status, error) in enumerate(UNABLE):
            play(three, path, answer(status, error))
            before = asked(three, path)
            with pytest.raises(openai.APIStatusError) as caught:
                if path == CHAT:
                    client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=number % 2 == 0)
                else:
                    client.embeddings.create(model=MODEL, input="x")
            assert caught.value.status_code == expected_status, error
            assert caught.value.body["message"] == error["error"]["message"]  # type: ignore[index]
            assert caught.value.code == "upstream_cannot"
            assert [now - then for now, then in zip(asked(three, path), before, strict=True)] == [1, 1, 0], error
    assert failures(gateway) == {0}
    line = gateway.request_lines()[-1]
    assert (line["outcome"], line["backend"]) == ("refused:upstream_cannot", "beta")
    assert [(attempt["backend"], attempt["fault"]) for attempt in line["attempts"]] == [("alpha", "cannot")]


def test_another_build_may_support_what_the_first_cannot_do(
    gateway: RunningGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    alpha.play(CHAT, answer(500, llamacpp(500, MMPROJ)))
    with gateway.openai(gateway.key()) as client:
        assert client.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content == "beta heard: Say hi"
    assert failures(gateway) == {0}
    assert b'reason="cannot"' not in gateway.call(gateway.components.metrics.exposition())


def test_a_backend_that_cannot_is_reported_before_one_that_fails(
    gateway: RunningGateway, alpha: FakeBackend, beta: FakeBackend, gamma: FakeBackend
) -> None:
    """A backend that could not be reached was not asked; where the other fails, the caller gets the text of the first."""
    play([alpha, gamma], CHAT, answer(500, llamacpp(500, MMPROJ)))
    beta.play(CHAT, answer(500, llamacpp(500, "CUDA error: out of memory")))
    with gateway.http(gateway.key()) as client:
        got = client.post(CHAT, json=CHATS[2].body)
        assert got.status_code == 400 and got.json()["error"]["message"] == MMPROJ
        assert asked([alpha, beta, gamma], CHAT) == [1, 1, 0]
        beta.stop()
        got = client.post(CHAT, json=CHATS[2].body)
    assert got.status_code == 400 and got.json()["error"]["message"] == MMPROJ
    assert asked([alpha, gamma], CHAT) == [2, 1]


def test_other_errors_are_failures_of_the_backend(gateway: RunningGateway, three: list[FakeBackend]) -> None:
    play(three, CHAT, answer(500, llamacpp(500, "CUDA error: operation not supported on this device")))
    with gateway.http(gateway.key()) as client:
        got = client.post(CHAT, json=CHATS[2].body)
    assert got.status_code == 502 and "x-should-retry" not in got.headers
    assert asked(three, CHAT) == [1, 1, 1] and failures(gateway) == {1}


PLACE = " at row 5, column 9:\n{{ raise_exception('no') }}\n        ^\n"
WHY = {
    "runner process has terminated: CUDA error: out of memory": "runner process has terminated, CUDA error, out of memory",
    "model requires more system memory (5.6 GiB) than is available": "model requires more system memory",
    "cudaMalloc failed: canary-5d1e, cudaMalloc failed: again": "cudaMalloc failed",
    "unknown model architecture: 'canary-5d1e'": "unknown model architecture",
    "timed out waiting for llama runner to start - canary-5d1e": "timed out waiting for llama runner to start",
    "Bearer canary-5d1e to http://alpha: a prompt": "",
    " ".join(f"exit status {number}" for number in range(99)): ", ".join(f"exit status {number}" for number in range(99))[:200],
}


def test_the_log_gets_only_known_phrases_of_a_failure() -> None:
    assert {words: refusals.logged_reason(refusals.read({"error": words})) for words in WHY} == WHY


@pytest.mark.parametrize("steps", [answer(500, OUT_OF_MEMORY), stream(sse([OUT_OF_MEMORY], done=False))])
def test_why_a_backend_failed_is_in_the_log_and_not_in_the_answer(
    gateway: RunningGateway, three: list[FakeBackend], steps: list[Step]
) -> None:
    play(three, CHAT, steps)
    with gateway.http(gateway.key()) as client:
        got = client.post(CHAT, json={**CHATS[2].body, "stream": True})
    assert got.status_code == 502 and "memory" not in got.text
    line = gateway.request_lines()[-1]
    assert line["detail"].endswith(": CUDA error, out of memory")
    assert [attempt["detail"] for attempt in line["attempts"]] == 3 * [line["detail"].partition(": ")[2]]
    assert CANARY not in json.dumps(gateway.request_lines())


def test_busy_backends_are_reported_as_busy(gateway: RunningGateway, three: list[FakeBackend]) -> None:
    play(three, CHAT, answer(503, {"error": "server busy, please try again.  maximum pending requests exceeded"}))
    with gateway.http(gateway.key()) as client:
        got = client.post(CHAT, json=CHATS[2].body)
    assert got.status_code == 503 and "is reachable and free at the moment" in got.json()["error"]["message"]


FAILURES = [
    (500, "CUDA error: failed to load image: out of memory"),
    (500, "failed to process image: ggml_backend_alloc failed to allocate buffer"),
    (500, "llama runner process has terminated: failed to decode image"),
    (500, "bad configuration at row 5, column 9 of models.csv"),
    (500, "decode WebP image: bad\ncudaMalloc failed: out of device memory"),
    (500, 'llama-server apply-template error: Post "http://127.0.0.1:1/apply-template": EOF'),
    (500, "failed reading llama-server template response: unexpected EOF"),
    (500, "model runner has unexpectedly stopped, this may be due to resource limitations: invalid tool call arguments"),
    (500, "an error was encountered while running the model: failed to process image"),
    (500, "invalid format: the model's file is no GGUF"),
    (500, "the template: /models/a.tmpl:3: cannot be opened"),
    (502, "bad gateway" + PLACE),
    (503, MMPROJ),
    (504, MMPROJ),
]
# As llama.cpp (jinja, and minja before it) and Ollama write them.
NOT_POSSIBLE = [
    "After the optional system message, conversation roles must alternate user/assistant",
    "Only text is known" + PLACE,
    "Value is not callable: null at row 49, column 79:\n  {%- set a = b.split() %}\n" + PLACE,
    "\n------------\nWhile executing CallExpression at line 3, column 9 in source:\n...\nError: Jinja Exception: no",
    "\nError executing FilterExpression at position 17: Unknown (built-in) filter 'items' for type Undefined",
    "Unable to generate parser for this template. Automatic parser generation failed: no",
    "Invalid diff: now finding less tool calls!\n  Previous (1):\n",
    "Failed to download image",
    TOOL_CALL_OF_OLLAMA,
    'invalid format: "\\"yaml\\""; expected "json" or a valid JSON Schema object',
    "llama-server template error: map[code:500 message:no type:server_error]",
    "this model only supports one image while more than one image requested",
    "decode WebP image: webp: invalid format",
    'template: :1: unexpected "}" in operand',
    "failed to parse Laguna JSON tool call: invalid character 'x'",
    "mismatched arg_key and arg_value counts: 2 keys, 1 values",
    'undeclared Glimmer function "run"',
    "system message cannot contain images",
    'unsupported Qwen3.8 reasoning effort "much"',
]


def meaning(status: int, words: str) -> object:
    return refusals.meaning(status, refusals.read({"error": {"message": words}}), BackendConfig("alpha", "http://alpha"))


def test_a_failure_is_not_taken_for_a_refusal() -> None:
    assert [words for status, words in FAILURES if meaning(status, words) is not None] == []


def test_what_a_backend_cannot_do_is_recognized_by_its_text() -> None:
    assert [words for words in NOT_POSSIBLE if not isinstance(meaning(500, words), BackendCannot)] == []


def test_refusals_in_the_ollama_dialect(gateway: RunningGateway, three: list[FakeBackend]) -> None:
    play(three, "/api/embed", answer(501, {"error": NO_EMBEDDINGS}))
    play(three, "/api/chat", stream(ndjson([{"error": "this model is missing data required for image input"}])))
    client = gateway.ollama(gateway.key())
    with pytest.raises(ollama.ResponseError) as caught:
        client.embed(MODEL, "x")
    assert (caught.value.status_code, caught.value.error) == (501, NO_EMBEDDINGS)
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.chat(MODEL, MESSAGES, stream=True))
    assert (caught.value.status_code, caught.value.error) == (400, "this model is missing data required for image input")
    assert asked(three, "/api/embed") == asked(three, "/api/chat") == [1, 1, 0]


OVERFLOWS: list[list[Step]] = [
    answer(400, {"error": OVERFLOW}),
    answer(200, {"error": OVERFLOW}),
    # Ollama puts its runner's error, as JSON, into the text of its own.
    answer(400, {"error": {"message": json.dumps({"error": OVERFLOW}), "type": "invalid_request_error", "code": None}}),
    # Some servers report it as a failure of their own.
    answer(500, {"error": OVERFLOW}),
    stream(sse([{"error": OVERFLOW}], done=False)),
]


@pytest.mark.parametrize("streamed", [False, True])
def test_an_overflow_of_the_context_keeps_the_fields_that_agents_read(
    gateway: RunningGateway, three: list[FakeBackend], streamed: bool
) -> None:
    with gateway.openai(gateway.key(), max_retries=2) as client:
        for steps in OVERFLOWS if streamed else OVERFLOWS[:-1]:
            play(three, CHAT, steps)
            before = sum(asked(three, CHAT))
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=streamed)
            assert caught.value.body == {**OVERFLOW, "param": None}
            assert sum(asked(three, CHAT)) == before + 1
    assert failures(gateway) == {0}


def test_an_overflow_in_the_ollama_dialect(gateway: RunningGateway, three: list[FakeBackend]) -> None:
    play(three, "/api/chat", answer(400, {"error": json.dumps({"error": OVERFLOW})}))
    with pytest.raises(ollama.ResponseError) as caught:
        gateway.ollama(gateway.key()).chat(MODEL, MESSAGES)
    assert (caught.value.status_code, caught.value.error) == (400, OVERFLOW["message"])


def test_an_endless_or_overlong_error_is_judged_by_its_status(
    gateway: RunningGateway, three: list[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FastAPI's errors repeat the input; the text of a failure may never come."""
    monkeypatch.setattr("gateway.fleet.opening.ERROR_BODY_WAITS_S", 0.2)
    long = json.dumps({"detail": [{"msg": "no", "input": "x" * 300_000}]}).encode()
    with gateway.http(gateway.key()) as client:
        play(three, CHAT, answer(422, long))
        assert client.post(CHAT, json=CHATS[2].body).status_code == 422
        assert asked(three, CHAT) == [1, 0, 0] and failures(gateway) == {0}
        three[0].play(CHAT, [Head(500, [("Content-Type", HTML)], content_length=300), Piece(b"<html>"), Forever()])
        three[1].play(CHAT, None)
        assert client.post(CHAT, json=CHATS[2].body).status_code == 200
    assert gateway.components.backends["alpha"].breaker._failures == 1


def test_an_answer_that_is_too_large_ends_at_once_and_is_no_backends_failure(
    gateway: RunningGateway, three: list[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.fleet.backends.http_client.LONGEST_WHOLE_ANSWER", 50_000)
    monkeypatch.setattr("gateway.fleet.opening.LONGEST_FRAME", 50_000)
    large = b'{"choices":[{"message":{"content":"' + b"x" * 200_000 + b'"}}]}'
    with gateway.openai(gateway.key(), max_retries=2) as client:
        for streamed, steps in ((False, answer(200, large)), (True, stream([b"data: " + large + b"\n\n"]))):
            play(three, CHAT, steps)
            for _ in range(4):
                with pytest.raises(openai.InternalServerError) as caught:
                    client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=streamed)
                assert (caught.value.status_code, caught.value.code) == (502, "answer_too_large")
    assert asked(three, CHAT) == [8, 0, 0]
    assert failures(gateway) == {0}


def test_a_timeout_opens_no_breaker_while_other_calls_succeed(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    """A large request takes long; a backend that answers others meanwhile works."""
    gateway = start_gateway(alpha, OLLAMA_READ_TIMEOUT_S="0.5")
    key, body, chat = gateway.key(), {"model": MODEL, "prompt": "x"}, CHATS[0]
    breaker = gateway.components.backends["alpha"].breaker
    alpha.play("/api/generate", [Forever()])
    with gateway.http(key) as client:
        assert client.post("/api/generate", json=body).status_code == 504
        assert breaker._failures == 1
        waiting = threading.Thread(target=client.post, args=("/api/generate",), kwargs={"json": body})
        waiting.start()
        until(lambda: len(alpha.calls("/api/generate")) == 2)
        assert chat.ask(gateway, key) == "alpha heard: Say hi"
        waiting.join()
    assert gateway.request_lines()[-1]["status"] == 504 and breaker._failures == 0


# ── whether the request or the backend is wrong ──

WRONG = [
    "Failed to parse messages: [json.exception.type_error.302] type must be string, but is number",
    'Failed to parse tools: Unsupported tool type: {"type":"z"}; tools = []',
    "Unknown reasoning format: z",
    "Invalid url value",
]


def test_wrong_requests_that_llama_cpp_reports_as_its_own_failure_are_recognized(
    gateway: RunningGateway, three: list[FakeBackend]
) -> None:
    with gateway.http(gateway.key()) as client:
        for words in WRONG:
            play(three, CHAT, answer(500, llamacpp(500, words)))
            before = asked(three, CHAT)
            got = client.post(CHAT, json=CHATS[2].body)
            assert got.status_code == 400 and got.json()["error"]["message"] == words
            assert [now - then for now, then in zip(asked(three, CHAT), before, strict=True)] == [1, 1, 0]
    assert failures(gateway) == {0}


MALFORMED: list[dict[str, Any]] = [
    {"role": 5, "content": "x"},
    {"role": None, "content": "x"},
    {"role": "assistant", "tool_calls": [{}]},
    {"role": "assistant", "tool_calls": 5},
    {"role": "assistant", "tool_calls": [5]},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": "f"}]},
]


def test_malformed_messages_reach_no_backend(gateway: RunningGateway, three: list[FakeBackend]) -> None:
    with gateway.http(gateway.key()) as client:
        for path in (CHAT, "/api/chat"):
            for message in MALFORMED:
                got = client.post(path, json={"model": MODEL, "messages": [message]})
                assert got.status_code == 400 and ("role" in got.text or "tool_calls" in got.text), message
            none = {"role": "assistant", "content": "x", "tool_calls": None}
            assert client.post(path, json={"model": MODEL, "messages": [none]}).status_code == 200
    assert asked(three, CHAT) == [1, 0, 0]


UNKNOWN: list[tuple[str, list[Step]]] = [
    ("whole", answer(500, llamacpp(500, "words that nobody knows"))),
    ("streamed", stream(sse([llamacpp(500, "words that nobody knows")], done=False))),
]


@pytest.mark.parametrize(("form", "failing"), UNKNOWN, ids=[form for form, _ in UNKNOWN])
def test_requests_of_one_key_that_fail_everywhere_open_no_breaker(
    gateway: RunningGateway, three: list[FakeBackend], form: str, failing: list[Step]
) -> None:
    play(three, CHAT, failing)
    asking = {**CHATS[2].body, "stream": form == "streamed"}
    with gateway.http(gateway.key()) as client:
        for _ in range(5):
            assert client.post(CHAT, json=asking).status_code == 502
    assert states(gateway) == {"closed"} and failures(gateway) == {1}
    play(three, CHAT, answer(500, llamacpp(500, "words that nobody knows")))
    for _ in range(2):
        with gateway.http(gateway.key()) as client:
            client.post(CHAT, json=asking)
    assert states(gateway) == {"open"}, "what fails for three keys is broken"


def test_requests_of_one_key_open_the_breaker_of_a_backend_that_fails_while_another_answers(
    gateway: RunningGateway, alpha: FakeBackend
) -> None:
    for failing in (answer(500, llamacpp(500, "words that nobody knows")), answer(500, b"<html>no</html>", HTML)):
        alpha.play(CHAT, failing)
        breaker = gateway.components.backends["alpha"].breaker
        breaker.succeeded()
        with gateway.http(gateway.key()) as client:
            for _ in range(3):
                assert breaker.state == "closed"
                assert client.post(CHAT, json=CHATS[2].body).status_code == 200
        assert breaker.state == "open"
