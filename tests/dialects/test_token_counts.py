"""Token counts of a request: the backend's, requested if a stream would not have them, or an estimate if there are none."""

import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.audit import token_usage
from gateway.audit.record import Record
from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects import tokens
from gateway.dialects.dialect import read_call
from gateway.dialects.ollama import Ollama
from gateway.dialects.openai import OpenAI
from gateway.fleet.attempt import CANNOT, Attempt
from gateway.limits.quota import UNLIMITED
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS, MESSAGES, MODEL, Chat, send
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Forever, Received, Step, answer, compact, ndjson, sse, stream
from tests.support.processes import until

ROUTES = ["/v1/chat/completions", "/v1/completions"]
STREAMED = {"model": MODEL, "messages": MESSAGES, "prompt": "Say hi", "stream": True}
VOLATILE = re.compile(rb'"created":\d+')


@pytest.fixture(params=["ollama", "openai"])
def backend(request: pytest.FixtureRequest) -> Iterator[FakeBackend]:
    with FakeBackend(kind=request.param, models=["llama3.2:latest"], name="alpha") as backend:
        yield backend


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("options", [None, {"include_usage": False}, {}], ids=str)
def test_counts_are_requested_and_removed_again(
    start_gateway: StartGateway, backend: FakeBackend, route: str, options: dict[str, bool] | None
) -> None:
    gateway = start_gateway(backend)
    asked = {**STREAMED, **({} if options is None else {"stream_options": options})}
    if options == {} and backend.healthy.kind == "openai":
        pytest.skip("vLLM takes an empty stream_options for a yes")
    with gateway.http() as direct, gateway.http(gateway.key()) as client:
        plain = direct.post(backend.url + route, json={**asked, "model": "llama3.2:latest"})
        got = client.post(route, json={**asked, "model": "llama3.2:latest"})
    assert VOLATILE.sub(b"", got.content) == VOLATILE.sub(b"", plain.content)
    assert backend.calls(route)[-1].json["stream_options"]["include_usage"] is True
    (row,) = gateway.audit_rows()
    assert (row["prompt_tokens"], row["completion_tokens"], row["tokens_from"]) == (4, 4, "reported")


@pytest.mark.parametrize("route", ROUTES)
def test_counts_that_the_caller_requested_stay(start_gateway: StartGateway, backend: FakeBackend, route: str) -> None:
    gateway = start_gateway(backend)
    asked = {**STREAMED, "model": "llama3.2:latest", "stream_options": {"include_usage": True}}
    with gateway.http() as direct, gateway.http(gateway.key()) as client:
        plain, got = direct.post(backend.url + route, json=asked), client.post(route, json=asked)
    assert VOLATILE.sub(b"", got.content) == VOLATILE.sub(b"", plain.content) and b'"usage"' in got.content


def test_text_that_resembles_counts_stays(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    text = ',"usage":null {"choices":[],"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}'
    choice = {"index": 0, "delta": {"content": text}}
    chunk: dict[str, Any] = {"id": "x", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}
    last = {**chunk, "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}}
    alpha.play("/v1/chat/completions", stream(sse([chunk, last])))
    with gateway.http(gateway.key()) as client:
        got = client.post("/v1/chat/completions", json=STREAMED)
    assert got.content == b"".join(sse([chunk]))
    assert gateway.audit_rows()[0]["completion_tokens"] == 9


def test_counts_are_not_requested_for_whole_answers(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key()) as client:
        assert client.post("/v1/chat/completions", json={**STREAMED, "stream": False}).status_code == 200
    assert "stream_options" not in alpha.calls("/v1/chat/completions")[-1].json


@pytest.mark.parametrize("streamed", [True, False])
def test_missing_counts_are_estimated(start_gateway: StartGateway, alpha: FakeBackend, streamed: bool) -> None:
    gateway = start_gateway(alpha)
    records = [{"model": MODEL, "message": {"role": "assistant", "content": f"word {n}"}, "done": False} for n in range(9)]
    last = {"model": MODEL, "message": {"role": "assistant", "content": "one two three four"}, "done": True}
    alpha.play("/api/chat", stream(ndjson([*records, last]), "application/x-ndjson") if streamed else answer(200, last))
    with gateway.http(gateway.key()) as client:
        client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES, "stream": streamed})
    (row,) = gateway.audit_rows()
    assert row["tokens_from"] == "estimated" and row["prompt_tokens"] == 6
    assert row["completion_tokens"] == (10 if streamed else 5)


def test_counts_of_legacy_embeddings_are_estimated(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key()) as client:
        client.post("/api/embeddings", json={"model": MODEL, "prompt": "x" * 400})
        client.post("/v1/embeddings", json={"model": MODEL, "input": "one two three"})
    first, second = gateway.audit_rows()
    assert (first["prompt_tokens"], first["completion_tokens"], first["tokens_from"]) == (100, 0, "estimated")
    assert (second["prompt_tokens"], second["completion_tokens"], second["tokens_from"]) == (3, 0, "reported")


def test_a_client_that_leaves_pays_for_what_it_received(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    alpha.healthy.pieces, alpha.healthy.pause_s = 200, 0.02
    with gateway.http(gateway.key()) as client, client.stream("POST", "/api/chat", json=CHATS[1].body) as got:
        lines = got.iter_lines()
        for _ in range(5):
            next(lines)
    (row,) = gateway.audit_rows()
    assert (row["outcome"], row["tokens_from"]) == ("client_gone", "partial")
    assert row["prompt_tokens"] == 6 and 5 <= row["completion_tokens"] < 60


@pytest.mark.parametrize(
    ("chat", "body", "made"),
    [
        (CHATS[0], {}, 500),
        (CHATS[0], {"options": {"num_predict": 40}}, 40),
        (CHATS[2], {}, 500),
        (CHATS[2], {"n": 3, "max_tokens": 30}, 90),
        (CHATS[3], {}, 0),
    ],
    ids=str,
)
def test_a_client_that_leaves_before_a_whole_answer_pays_for_what_was_generated(
    start_gateway: StartGateway,
    alpha: FakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    chat: Chat,
    body: dict[str, Any],
    made: int,
) -> None:
    monkeypatch.setattr("gateway.audit.token_usage.TOKENS_PER_S", 10**9)
    gateway = start_gateway(alpha, MAX_NUM_PREDICT="500")
    alpha.play(chat.path, [Forever()])
    connection = send(gateway, gateway.key(tpm=UNLIMITED), chat, **body)
    until(lambda: alpha.in_flight == 1)
    connection.close()
    until(lambda: alpha.in_flight == 0)
    (row,) = gateway.audit_rows()
    assert (row["outcome"], row["tokens_from"], row["completion_tokens"]) == ("client_gone", "partial", made)


def test_an_unfinished_answer_is_estimated_from_the_time_at_the_last_backend() -> None:
    record = Record(
        "id", "id", "POST", need=tokens.Need(6, None, answers=2), upstream_s=5.0, was_sent=True, outcome="client_gone"
    )
    record.attempts = [Attempt("one", "head_timeout", 2000.0), Attempt("two", CANNOT, 1000.0)]
    assert token_usage.usage_of(record, 1000, 0) == token_usage.TokenUsage(6, 2 * 2 * token_usage.TOKENS_PER_S, "partial")
    assert token_usage.usage_of(record, 150, 0) == token_usage.TokenUsage(6, 150, "partial")
    record.need = tokens.Need(6, 0)
    assert token_usage.usage_of(record, 1000, 0).completion == 0


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/completions"])
def test_a_long_frame_counts_by_its_text(start_gateway: StartGateway, alpha: FakeBackend, path: str) -> None:
    gateway = start_gateway(alpha, MAX_NUM_PREDICT="10000")
    text, padding = "word " * 4000, {"logprobs": ["x" * 3000]}
    kind = "application/x-ndjson" if path == "/api/chat" else "text/event-stream"
    with gateway.http(gateway.key(tpm=UNLIMITED)) as client:
        for content in (text, "a"):
            message = {"role": "assistant", "content": content}
            choice = {"text": content, **padding} if path == "/v1/completions" else {"delta": message, **padding}
            value = {"model": MODEL, "message": message, **padding, "choices": [choice]}
            last = {"done": True, "choices": [{"index": 0, "finish_reason": "stop"}]}
            frames = ndjson([value, last]) if path == "/api/chat" else sse([value, last])
            alpha.play(path, stream(frames, kind))
            client.post(path, json=STREAMED)
    long, short = gateway.audit_rows()
    assert (long["tokens_from"], short["tokens_from"]) == ("estimated", "estimated")
    assert long["completion_tokens"] >= len(text) // 4 and short["completion_tokens"] <= 3


def test_no_count_of_a_backend_exceeds_the_requested_limit(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, MAX_NUM_PREDICT="100")
    record = {"model": MODEL, "message": {"role": "assistant", "content": "hi"}, "done": False}
    counts = {"done": True, "done_reason": "stop", "prompt_eval_count": 2**53, "eval_count": 2**53}
    empty_lines = stream([*ndjson([record]), b"\n" * 50_000], "application/x-ndjson")
    with gateway.http(gateway.key(month=200_000)) as client:
        for script in (answer(200, {**record, **counts}), empty_lines, answer(200, {**record, **counts})):
            alpha.play("/api/chat", script)
            got = client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES, "stream": script is empty_lines})
            assert got.status_code == 200
    rows = gateway.audit_rows()
    assert [row["completion_tokens"] for row in rows] == [100, 100, 100]
    assert [row["prompt_tokens"] < 70_000 for row in rows] == [True, True, True]


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [("", 0, 0), ("word " * 100, 100, 150), ("слово " * 50, 250, 320), ("你好世界" * 25, 100, 100), ("a", 1, 1)],
)
def test_estimates_are_of_the_right_size(text: str, least: int, most: int) -> None:
    assert least <= tokens.of_text(text) <= most


def test_the_excess_is_bounded_by_the_requests_in_flight(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    """A backend that suddenly answers with much more: each request in flight may exceed its reserve, no other is admitted."""
    most, tpm, at_once = 300, 2000, 6
    gateway = start_gateway(alpha, MAX_NUM_PREDICT=str(most))
    chance = random.Random(2)

    def script(request: Received) -> list[Step]:
        count = chance.choice([10, most])
        assert request.json["options"]["num_predict"] == most
        done = {"model": MODEL, "message": {"role": "assistant", "content": "x"}, "done": True}
        return answer(200, compact({**done, "prompt_eval_count": 6, "eval_count": count}))

    alpha.play("/api/chat", script)
    key = gateway.key(tpm=tpm, concurrent=at_once, day=10**12)

    def ask() -> None:
        with gateway.http(key) as client:
            for _ in range(30):
                client.post("/api/chat", json=CHATS[0].body)

    threads = [threading.Thread(target=ask) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in gateway.audit_rows())
    assert tpm - most - 6 < spent <= tpm + at_once * most


def test_a_requested_limit_is_never_exceeded(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    alpha.healthy.pieces = 50
    with gateway.http(gateway.key(tpm=500)) as client:
        while client.post("/api/chat", json={**CHATS[0].body, "options": {"num_predict": 50}}).status_code == 200:
            pass
    spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in gateway.audit_rows())
    assert 400 < spent <= 500


def test_budgets_survive_the_loss_of_all_data_in_redis(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    gateway = start_gateway(alpha)
    few: dict[str, Any] = {"options": {"num_predict": 20}}
    with gateway.http(gateway.key(month=60)) as client:
        while client.post("/api/chat", json={**CHATS[0].body, **few}).status_code == 200:
            pass
        before = len(gateway.audit_rows())
        with stores.client() as redis:
            redis.flushall()
        assert client.post("/api/chat", json={**CHATS[0].body, **few}).status_code == 429
    assert len(gateway.audit_rows()) == before + 1


def test_scripts_that_redis_has_lost_are_loaded_again(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key(rpm=3)) as client, stores.client() as redis:
        statuses = []
        for _ in range(5):
            redis.script_flush()
            statuses.append(client.get("/api/tags").status_code)
    assert statuses == [200, 200, 200, 429, 429]
    until(lambda: len(gateway.audit_rows()) == 5)


COUNTS = b'{"prompt_tokens":7,"completion_tokens":9,"total_tokens":16}'
ZEROS = b'{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}'
WORDS = b'{"model":"m","choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}'


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b'{"choices":[],"usage":' + COUNTS + b"}", None),
        (b'{"choices":null,"usage":' + COUNTS + b"}", None),
        (b'{"model":"m","usage":' + COUNTS + b"}", None),
        (b'{"choices":[],"usage":' + ZEROS + b"}", None),
        (b'{"usage":null,' + WORDS[1:], WORDS),
        (WORDS[:-1] + b', "usage" : null}', WORDS),
        (b'{"error":{"message":"usage"},"usage":null}', b'{"error":{"message":"usage"}}'),
        (b'{"choices":[]}', b'{"choices":[]}'),
    ],
    ids=["alone", "null choices", "no choices", "zeros", "null first", "null with blanks", "an error", "no usage at all"],
)
def test_unrequested_counts_are_removed_in_any_form(sent: bytes, shown: bytes | None) -> None:
    dialect = OpenAI()
    assert dialect.without_usage(b"data: " + sent + b"\n\n") == (b"" if shown is None else b"data: " + shown + b"\n\n")


def test_only_events_with_nothing_but_counts_are_removed() -> None:
    """With any end of an event; an event that is too large to be examined keeps them."""
    for end in (b"\n\n", b"\r\n\r\n", b"\n\r\n", b"\r\r", b"\n\r"):
        counts, words = b'data: {"choices":[],"usage":' + COUNTS + b"}" + end, b"data: " + WORDS + end
        waiting, named = b'data: {"usage":null,' + WORDS[1:] + end, b'data: {"choices":[{"text":"usage"}]}' + end
        long = b'data: {"choices":[{"delta":{"content":"' + b"x" * 20_000 + b'"}}],"usage":' + COUNTS + b"}" + end
        sent = counts + words + waiting + b": usage" + end + long + named + counts + words + counts
        shown = OpenAI().without_usage(sent + b"data: [DONE]" + end)
        assert shown == words + words + b": usage" + end + long + named + words + b"data: [DONE]" + end
        assert OpenAI().without_usage(sent.replace(long, b"")) == words + words + b": usage" + end + named + words


# ── what a caller who leaves early pays ──

TEXT = "A word or two. " * 13_334
OF_TEXT = len(TEXT) / 4
HIDDEN_IN_MESSAGES: list[dict[str, Any]] = [
    {"Content": TEXT},
    {"CONTENT": TEXT},
    {"thinking": TEXT},
    {"reasoning": TEXT},
    {"reasoning_content": TEXT},
    {"name": TEXT},
    {"tool_call_id": TEXT},
    {"Tool_Calls": [{"function": {"name": "f", "arguments": {TEXT: 1}}}]},
    {"role": TEXT},
    {"content": [{"type": "text", "text": "hi", "Text": TEXT}]},
    {"content": [{"type": "refusal", "refusal": TEXT}]},
    {"content": [{"type": TEXT, "image_url": {"url": "data:,"}}]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": TEXT}]}]},
    {"content": {"text": TEXT}},
]
HIDDEN_BESIDE_THEM: list[dict[str, Any]] = [
    {"documents": [{"title": "a", "text": TEXT}]},
    {"chat_template": TEXT},
    {"chat_template_kwargs": {"deeply": {"hidden": [[{"x": TEXT}]]}}},
    {"response_format": {"type": "json_schema", "json_schema": {"description": TEXT}}},
    {"reasoning_effort": TEXT},
    {"tool_choice": {"function": {"name": TEXT}}},
    {"functions": [{"name": TEXT}]},
    {"prompt_token_ids": [7] * 50_010},
    {"whatever": [1, 2, TEXT]},
]
HIDDEN_ELSEWHERE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "hi", "suffix": TEXT}),
    ("/v1/completions", {"prompt": [7] * 50_010}),
    ("/v1/completions", {"prompt": [{"prompt_string": TEXT}]}),
    ("/v1/completions", {"prompt": [{"Prompt_string": TEXT, "multimodal_data": ["aGk="]}]}),
    ("/v1/completions", {"prompt": "hi", "input_extra": [{"filename": "a", "text": TEXT}]}),
    ("/v1/embeddings", {"input": "hi", "messages": [{"role": "user", "content": TEXT}]}),
    ("/v1/embeddings", {"input": ["hi", [1, 2], {"content": [{"text": TEXT}]}]}),
    ("/api/generate", {"prompt": "hi", "suffix": TEXT}),
    ("/api/generate", {"prompt": "hi", "system": TEXT}),
    ("/api/generate", {"prompt": "hi", "template": TEXT}),
    ("/api/generate", {"prompt": "hi", "context": [7] * 50_010}),
    ("/api/generate", {"prompt": "hi", "think": TEXT}),
    ("/api/embed", {"input": ["hi", TEXT]}),
    ("/api/embeddings", {"prompt": "hi", "suffix": TEXT}),
]
CHAT_PATHS = ("/api/chat", "/v1/chat/completions")
HIDDEN: list[tuple[str, dict[str, Any]]] = [
    *((path, {"messages": [{"role": "user", "content": "hi", **more}]}) for more in HIDDEN_IN_MESSAGES for path in CHAT_PATHS),
    *((path, {"messages": MESSAGES, **more}) for more in HIDDEN_BESIDE_THEM for path in CHAT_PATHS),
    *HIDDEN_ELSEWHERE,
]


def need_of(path: str, body: dict[str, Any]) -> int:
    dialect = next(found for found in (Ollama(), OpenAI()) if any(path == one.path for one in found.operations))
    operation = next(one for one in dialect.operations if one.path == path)
    return read_call(dialect, operation, strict_json.write({"model": "a", **body})).need(1000).prompt


def words(value: Any) -> str:
    return " ".join(re.findall(r"[A-Za-z_]+", str(value).replace(TEXT, "TEXT")))[:60]


@pytest.mark.parametrize(("path", "body"), HIDDEN, ids=[f"{path} {words(body)}" for path, body in HIDDEN])
def test_text_in_any_field_is_counted(path: str, body: dict[str, Any]) -> None:
    assert OF_TEXT <= need_of(path, body) <= OF_TEXT * 1.1


PICTURE = "iVBORw0KGgo" * 10_000
TOOLS = [{"type": "function", "function": {"name": "f", "description": "word " * 100, "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("path", "body", "tokens_at_most", "tokens_at_least"),
    [
        ("/api/chat", {"messages": MESSAGES}, 6, 6),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "temperature": 0.5, "max_tokens": 9, "stop": ["x"], "user": "me"},
            6,
            6,
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": "Say hi"}]}]}, 6, 6),
        ("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS}, 190, 140),
        ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_object"}}, 12, 6),
        ("/v1/chat/completions", {"messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}, 16, 6),
        ("/api/chat", {"messages": [{**MESSAGES[0], "images": [PICTURE]}]}, 900, 774),
        ("/api/chat", {"messages": [{**MESSAGES[0], "Images": [PICTURE, PICTURE]}]}, 1800, 1542),
        ("/api/chat", {"messages": [{**MESSAGES[0], "images": None, "thinking": "", "tool_calls": None}]}, 6, 6),
        ("/api/generate", {"prompt": "Say hi", "images": [PICTURE], "options": {"stop": [TEXT]}}, 900, 770),
        ("/api/generate", {"prompt": "Say hi", "system": "", "context": [105_154, 7] * 50}, 102, 102),
        ("/api/generate", {"prompt": "", "system": TEXT}, -1, -1),
        ("/v1/completions", {"prompt": [{"prompt_string": "Say hi", "multimodal_data": [PICTURE]}]}, 900, 770),
        ("/v1/embeddings", {"input": [[1, 2, 3], [4, 5]]}, 5, 5),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:," + PICTURE}}]}]},
            900,
            772,
        ),
    ],
    ids=lambda value: words(value) if isinstance(value, dict) else "",
)
def test_ordinary_requests_have_realistic_estimates(
    path: str, body: dict[str, Any], tokens_at_most: int, tokens_at_least: int
) -> None:
    assert tokens_at_least <= need_of(path, body) <= tokens_at_most


def test_a_client_that_leaves_first_pays_for_what_was_sent(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    alpha.healthy.pieces, alpha.healthy.pause_s = 200, 0.02
    message: dict[str, Any] = MESSAGES[0]
    with gateway.http(gateway.key(tpm=UNLIMITED)) as client:
        for body in ({"messages": [{**message, "Content": TEXT}]}, {"messages": MESSAGES, "documents": [{"text": TEXT}]}):
            with client.stream("POST", "/v1/chat/completions", json={**STREAMED, **body}) as got:
                next(got.iter_lines())
    billed = [(row["outcome"], row["tokens_from"], row["prompt_tokens"] >= OF_TEXT) for row in gateway.audit_rows()]
    assert billed == [("client_gone", "partial", True)] * 2


def test_frames_of_several_tokens_are_not_requested() -> None:
    dialect = OpenAI()
    call = read_call(dialect, dialect.operations[0], strict_json.write({**STREAMED, "stream_interval": 1000}))
    assert strict_json.read_object(call.body_for("openai", MODEL, 100)).keys() & {"stream", "stream_interval"} == {"stream"}


BEYOND: list[dict[str, Any]] = [
    {"draft_model": "other"},
    {"Draft_Model": "other"},
    {"kv_transfer_params": {"remote_host": "evil.example"}},
    {"models": ["other"]},
    {"lora": [{"id": 0, "scale": 1.0}]},
    {"lora_path": "other"},
    {"bootstrap_host": "evil.example"},
    {"id_slot": 0},
    {"custom_logit_processor": "code"},
    {"prompt_embeds": "AAAA"},
    {"extra_body": {"draft_model": "other"}},
    {"vllm_xargs": {"KV_transfer_params": "x"}},
    *[{name: "other"} for name in ("rid", "request_id", "lora_id", "ngram_corpus_id", "http_worker_ipc")],
    *[{name: 0} for name in ("slot", "data_parallel_rank", "routed_dp_rank", "disagg_prefill_dp_rank", "dp_rank")],
    {"priority": -5},
    {"Priority": 1},
    {"Extra_Body": {}},
    *[{"sampling_params": {name: 1}} for name in ("max_tokens", "max_new_tokens", "n_predict", "num_predict", "min_tokens")],
    *[{"extra_body": {name: 2}} for name in ("n", "best_of", "n_cmpl", "max_completion_tokens", "stream_interval")],
    *[{"custom_params": {name: False}} for name in ("stream", "ignore_eos")],
    {"extra_body": {"model": "other"}},
    {"extra_body": {"messages": []}},
    {"extra_body": {"stream_options": {}}},
    {"extra_body": {"Max_Tokens": 5}},
    {"extra_body": {"priority": 1}},
    {"extra_body": {"sampling_params": {"custom_params": {"n": 8}}}},
    {"sampling_params": {"extra_body": {"vllm_xargs": {"rid": "other"}}}},
    {"sampling_params": [{"n": 8}]},
    {"extra_body": '{"n": 8}'},
]
COMPLETE = {"messages": MESSAGES, "prompt": "hi", "input": "hi"}


@pytest.mark.parametrize("beyond", BEYOND, ids=words)
def test_fields_that_reach_beyond_the_model_are_refused_on_every_route(beyond: dict[str, Any]) -> None:
    for dialect in (Ollama(), OpenAI()):
        for operation in dialect.operations:
            body = {"model": "a", **COMPLETE, **beyond}
            with pytest.raises(BadRequest, match=r"is not allowed|must be (0|written|an object)"):
                read_call(dialect, operation, strict_json.write(body))


def test_empty_values_of_such_fields_are_accepted() -> None:
    unset: dict[str, Any] = {"draft_model": None, "id_slot": -1, "lora": [], "models": [], "vllm_xargs": {"mine": 1}}
    unset |= {"priority": 0, "extra_body": {"n": None, "priority": None, "extra_args": {}}, "sampling_params": None}
    assert need_of("/v1/chat/completions", {"messages": MESSAGES, **unset}) < 40


def test_extras_may_be_nested_as_deeply_as_a_body() -> None:
    deep: dict[str, Any] = {"rid": "other"}
    for _ in range(200):
        deep = {"extra_body": deep}
    with pytest.raises(BadRequest, match="not allowed"):
        need_of("/v1/chat/completions", {"messages": MESSAGES, **deep})


def test_estimating_takes_time_in_proportion_to_parsing() -> None:
    """Each request is estimated in one pass whose time grows with the text, whatever its form; parsing is done in C."""
    small: list[Any] = [[], {}, "a", 1, None, {"a": ["b"]}]
    for value in ([*small] * 300, [[[[1]]]] * 300, {str(number): small for number in range(300)}):
        message = {"role": "user", "content": [{"type": "text", "x": value}] * 2, "y": value}
        body = {"messages": [message], "prompt": [value], "input": [value], "z": value}
        counting, reading = [], []
        for _ in range(3):
            raw = strict_json.write({"model": "a", **body})
            began = time.thread_time()
            strict_json.read_object(raw)
            reading.append(time.thread_time() - began)
            began = time.thread_time()
            for name, each in body.items():
                tokens.of_input(each) if name in ("prompt", "input") else tokens.of_field(name, each)
            counting.append(time.thread_time() - began)
        assert min(counting) < 10 * min(reading)
