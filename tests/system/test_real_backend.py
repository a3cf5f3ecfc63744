"""Against a real llama.cpp server, whose address is in LLAMA_SERVER_URL: lists, answers, streams, limits, failover to it.

It has the Messages API and both counts of tokens; its Responses, and what only Ollama's clients ask for, are translated.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import StartGateway
from tests.support.chat_requests import MESSAGES
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import FAULTS
from tests.support.model_servers import CHAT
from tests.support.running_gateway import RunningGateway

URL = os.environ.get("LLAMA_SERVER_URL", "")
MODEL = "tiny-random"

# Few values, so that random weights find the end of the arguments.
SCHEMA: Any = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2]}},
    "required": ["ok", "size"],
}

pytestmark = pytest.mark.skipif(not URL, reason="LLAMA_SERVER_URL names no llama.cpp server")


@pytest.fixture
def alpha() -> Iterator[FakeBackend]:
    with FakeBackend("openai", [MODEL], name="alpha") as backend:
        yield backend


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, {"name": "llama", "base_url": URL, "kind": "openai"}, OLLAMA_READ_TIMEOUT_S="20")


@pytest.fixture
def only_llama(start_gateway: StartGateway) -> RunningGateway:
    return start_gateway({"name": "llama", "base_url": URL, "kind": "openai"}, OLLAMA_READ_TIMEOUT_S="20")


def test_its_model_is_listed_to_both_clients(only_llama: RunningGateway) -> None:
    key = only_llama.key()
    with only_llama.openai(key) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
    assert [model.model for model in only_llama.ollama(key).list().models] == [MODEL]
    assert only_llama.ollama(key).show(MODEL).capabilities == ["completion"]


def test_it_answers_whole_and_streamed_with_usage(only_llama: RunningGateway) -> None:
    with only_llama.openai(only_llama.key()) as client:
        whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8)
        assert whole.choices[0].message.content is not None and whole.usage and whole.usage.completion_tokens <= 8
        stream = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens <= 8
        assert client.completions.create(model=MODEL, prompt="Say", max_tokens=4).usage.completion_tokens <= 4
    line = only_llama.request_lines()[1]
    assert line["completion_tokens"] and line["prompt_tokens"] and line["backend"] == "llama"


def test_the_output_is_limited_whatever_is_requested(start_gateway: StartGateway) -> None:
    gateway = start_gateway(
        {"name": "llama", "base_url": URL, "kind": "openai"}, MAX_NUM_PREDICT="6", OLLAMA_READ_TIMEOUT_S="20"
    )
    with gateway.http(gateway.key()) as client:
        for wish in ({}, {"n_predict": 500}, {"max_tokens": -1}, {"max_completion_tokens": 10**9, "n_predict": -1}):
            got = client.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES, **wish}).json()
            assert got["usage"]["completion_tokens"] <= 6, (wish, got)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "error_first_frame", "refused", "frozen"])
def test_it_takes_over_from_a_broken_backend(
    start_gateway: StartGateway, alpha: FakeBackend, fault: str, streamed: bool
) -> None:
    real = {"name": "llama", "base_url": URL, "kind": "openai"}
    gateway = start_gateway(alpha, real, OLLAMA_READ_TIMEOUT_S="2")
    if fault == "refused":
        alpha.stop()
    elif fault == "frozen":
        alpha.freeze()
    else:
        alpha.play("/v1/chat/completions", FAULTS[fault]("openai", streamed))
    with gateway.http(gateway.key()) as client:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "stream": streamed}
        got = client.post("/v1/chat/completions", json=body)
    if fault == "frozen":
        alpha.thaw()
    assert got.status_code == 200 and "alpha heard" not in got.text
    assert gateway.request_lines()[-1]["backend"] == "llama"


def test_a_client_that_leaves_frees_its_slot(only_llama: RunningGateway) -> None:
    with only_llama.http(only_llama.key()) as client:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as got:
            next(got.iter_raw())
        deadline = time.monotonic() + 3
        while b"llamacpp:requests_processing 0" not in _metrics() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert b"llamacpp:requests_processing 0" in _metrics()


def _generated() -> bytes:
    return next(line for line in _metrics().splitlines() if line.startswith(b"llamacpp:tokens_predicted_total "))


def _wait_until_idle() -> None:
    deadline = time.monotonic() + 3
    while b"llamacpp:requests_processing 0" not in _metrics() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"llamacpp:requests_processing 0" in _metrics()


def test_its_paths_are_found_out_without_generating(start_gateway: StartGateway) -> None:
    before = _generated()
    gateway = start_gateway({"name": "llama", "base_url": URL, "kind": "openai"})
    (offer,) = gateway.components.catalog().models[f"{MODEL}:latest"].offers
    assert set(offer.routes) >= {"/v1/messages", "/v1/messages/count_tokens", "/v1/responses/input_tokens"}
    assert "/v1/responses" not in offer.routes
    assert _generated() == before


def test_the_anthropic_client_is_passed_through(only_llama: RunningGateway) -> None:
    with only_llama.anthropic(only_llama.key()) as client:
        asked: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8}
        message = client.messages.create(**asked)
        assert message.usage.output_tokens <= 8 and message.stop_reason in ("max_tokens", "end_turn")
        with client.messages.stream(**asked, system="Be brief.") as stream:
            text = "".join(stream.text_stream)
            assert text == "".join(block.text for block in stream.get_final_message().content)
        assert client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens > 2
        whole = json.loads(client.messages.create(**{**asked, "max_tokens": 400}, output_config=_json()).content[0].text)
        assert isinstance(whole["ok"], bool)
    rows = only_llama.audit_rows()
    assert [row["translated_to"] for row in rows] == [None, None, None, CHAT]
    assert all(row["tokens_from"] == "reported" and row["completion_tokens"] for row in (rows[0], rows[1], rows[3]))


def _json() -> Any:
    return {"format": {"type": "json_schema", "schema": SCHEMA}}


def test_the_tool_loop_of_the_anthropic_client(only_llama: RunningGateway) -> None:
    tools: Any = [{"name": "measure", "description": "a size", "input_schema": SCHEMA}]
    with only_llama.anthropic(only_llama.key()) as client:
        asked: Any = {"model": MODEL, "max_tokens": 600, "tools": tools}
        with client.messages.stream(**asked, messages=MESSAGES) as stream:
            first = stream.get_final_message()
        (call,) = [block for block in first.content if block.type == "tool_use"]
        assert (call.name, first.stop_reason) == ("measure", "tool_use") and call.input["size"] in (1, 2)
        said: Any = [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}]
        result: Any = [{"type": "tool_result", "tool_use_id": call.id, "is_error": True, "content": "no such thing"}]
        history = [*MESSAGES, {"role": "assistant", "content": said}, {"role": "user", "content": result}]
        second = client.messages.create(**{**asked, "max_tokens": 20}, messages=history)
        assert second.stop_reason in ("max_tokens", "end_turn")


def test_the_responses_api_is_translated(only_llama: RunningGateway) -> None:
    tools: Any = [{"type": "function", "name": "measure", "parameters": SCHEMA, "strict": False}]
    with only_llama.openai(only_llama.key()) as client:
        short = client.responses.create(model=MODEL, input="Say hi", max_output_tokens=4)
        assert 0 < short.usage.output_tokens <= 4
        assert short.status == "completed" or short.incomplete_details.reason == "max_output_tokens"
        with client.responses.stream(model=MODEL, input="Say hi", instructions="Be brief.", max_output_tokens=8) as stream:
            events = list(stream)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert events[-1].type in ("response.completed", "response.incomplete")
        assert events[-1].response.output_text == "".join(event.delta for event in events if event.type.endswith("text.delta"))
        called = client.responses.create(model=MODEL, input="Say hi", tools=tools, max_output_tokens=600)
        (call,) = [item for item in called.output if item.type == "function_call"]
        assert json.loads(call.arguments)["size"] in (1, 2)
        said = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "error: no such thing"}
        history = [{"role": "user", "content": "Say hi"}, said, result]
        assert client.responses.create(model=MODEL, input=history, tools=tools, max_output_tokens=20).usage.input_tokens > 20
        form = {"format": {"type": "json_schema", "name": "size", "schema": SCHEMA, "strict": True}}
        assert json.loads(client.responses.create(model=MODEL, input="Say hi", text=form, max_output_tokens=400).output_text)
        assert client.responses.input_tokens.count(model=MODEL, input="Say hi").input_tokens > 2
    assert {row["translated_to"] for row in only_llama.audit_rows()[:-1]} == {CHAT}


def test_the_ollama_client_is_translated(only_llama: RunningGateway) -> None:
    client = only_llama.ollama(only_llama.key())
    options = {"num_predict": 8}
    whole = client.chat(MODEL, MESSAGES, options=options)
    assert whole.done_reason in ("stop", "length") and 0 < whole.eval_count <= 8
    records = list(client.chat(MODEL, MESSAGES, stream=True, options=options))
    assert records[-1].done and records[-1].prompt_eval_count == whole.prompt_eval_count
    for is_raw in (False, True):
        assert 0 < client.generate(MODEL, "Say hi", raw=is_raw, options=options).eval_count <= 8
    assert json.loads(client.chat(MODEL, MESSAGES, format=SCHEMA, options={"num_predict": 400}).message.content or "")
    tool = {"type": "function", "function": {"name": "measure", "description": "a size", "parameters": SCHEMA}}
    called = client.chat(MODEL, MESSAGES, tools=[tool], options={"num_predict": 600}).message.tool_calls
    assert called and called[0].function.arguments["size"] in (1, 2)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4000, "stream": True}),
        ("/v1/responses", {"input": "Say hi", "max_output_tokens": 4000, "stream": True}),
        ("/api/chat", {"messages": MESSAGES, "options": {"num_predict": 4000}}),
    ],
)
def test_a_client_of_another_api_that_leaves_frees_its_slot(only_llama: RunningGateway, path: str, body: Any) -> None:
    with only_llama.http(only_llama.key()) as client:
        with client.stream("POST", path, json={"model": MODEL, **body}) as got:
            assert got.status_code == 200 and next(got.iter_raw())
        _wait_until_idle()
    only_llama.wait_idle()
    assert only_llama.request_lines()[-1]["outcome"] in ("client_gone", "answered")


@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "error_first_frame"])
def test_it_takes_over_the_calls_of_agents(start_gateway: StartGateway, alpha: FakeBackend, fault: str) -> None:
    gateway = start_gateway(alpha, {"name": "llama", "base_url": URL, "kind": "openai"}, OLLAMA_READ_TIMEOUT_S="5")
    alpha.play(CHAT, FAULTS[fault]("openai", True))
    with gateway.anthropic(gateway.key()) as client:
        asked = client.messages.create(model=MODEL, messages=MESSAGES, max_tokens=4, stream=True)
        assert "alpha heard" not in str(list(asked))
    with gateway.openai(gateway.key()) as client:
        asked = client.responses.create(model=MODEL, input="Say hi", max_output_tokens=4, stream=True)
        assert "alpha heard" not in str(list(asked))
    assert [row["backend"] for row in gateway.audit_rows()] == ["llama", "llama"]


def _metrics() -> bytes:
    return subprocess.run(["curl", "-s", f"{URL}/metrics"], capture_output=True, check=True).stdout
