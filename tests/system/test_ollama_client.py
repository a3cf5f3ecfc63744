"""The official ollama client with models that only servers of kind openai have: each call is translated."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import ollama
import pytest

from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Close, End, Forever, Head, Piece, Reset, Step, recording
from tests.support.model_servers import CHAT, CHAT_ONLY, FAILURES, MODEL, PNG, SCHEMA, asked, fail
from tests.support.running_gateway import RunningGateway
from tests.support.shared_gateway import Shared

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi"}]
ANSWER = "alpha heard: Say hi"
ZURICH = {"city": "Zürich"}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "description": "a tool", "parameters": SCHEMA}}
    for name in ("weather", "time")
]


@pytest.fixture(scope="module")
def started(start_shared_gateway: StartGateway) -> Iterator[Shared]:
    with CHAT_ONLY.backend() as backend:
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


@pytest.fixture
def client(gateway: RunningGateway) -> Any:
    return gateway.ollama(gateway.key())


def whole(client: Any, **more: Any) -> Any:
    return client.chat(MODEL, **{"messages": MESSAGES, **more})


def streamed(client: Any, **more: Any) -> Any:
    """The last record with the texts and calls of all."""
    records = list(client.chat(MODEL, stream=True, **{"messages": MESSAGES, **more}))
    assert [record.done for record in records] == [False] * (len(records) - 1) + [True]
    last = records[-1]
    for name in ("content", "thinking"):
        setattr(last.message, name, "".join(getattr(record.message, name) or "" for record in records))
    last.message.tool_calls = [call for record in records for call in record.message.tool_calls or ()]
    return last


Ask = Callable[..., Any]
BOTH = pytest.mark.parametrize("ask", [whole, streamed], ids=["whole", "streamed"])


@BOTH
def test_chat(gateway: RunningGateway, client: Any, alpha: FakeBackend, ask: Ask) -> None:
    answered = ask(client, options={"num_predict": 100, "temperature": 0.5, "num_ctx": 8192}, keep_alive="5m")
    assert (answered.message.role, answered.message.content) == ("assistant", ANSWER)
    assert (answered.model, answered.done_reason) == (MODEL, "stop")
    assert (answered.prompt_eval_count, answered.eval_count) == (4, 4) and answered.total_duration > 0
    request = asked(alpha)[-1]
    assert request.path == CHAT and [message["role"] for message in request.json["messages"]] == ["system", "user"]
    assert request.json["temperature"] == 0.5 and "num_ctx" not in request.json and "options" not in request.json
    row = gateway.audit_rows()[-1]
    assert (row["route"], row["translated_to"], row["prompt_tokens"], row["completion_tokens"]) == ("/api/chat", CHAT, 4, 4)
    assert "num_ctx" in row["dropped"]


@BOTH
def test_thinking(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    alpha.healthy.thinking = "Let me see"
    answered = ask(client, think=True)
    assert (answered.message.thinking, answered.message.content) == ("Let me see", ANSWER)


@BOTH
def test_parallel_tools_and_their_results(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    alpha.healthy.parallel_calls = 2
    first = ask(client, tools=TOOLS).message
    calls = first.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", ZURICH), ("time", ZURICH)]
    results = [{"role": "tool", "tool_name": call.function.name, "content": "error: no such city"} for call in calls]
    second = ask(client, tools=TOOLS, messages=[*MESSAGES, first, *results])
    assert second.message.content == ANSWER
    messages = asked(alpha)[-1].json["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "tool"]
    assert [call["id"] for call in messages[2]["tool_calls"]] == [message["tool_call_id"] for message in messages[3:]]


@BOTH
def test_images(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    answered = ask(client, messages=[{"role": "user", "content": "Say hi", "images": [PNG]}])
    assert "Say hi" in answered.message.content
    parts = asked(alpha)[-1].json["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in parts if part["type"] == "image_url"] == ["data:image/png;base64," + PNG]


@BOTH
def test_an_answer_that_is_cut_at_its_limit(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    alpha.healthy.is_cut = True
    assert ask(client, options={"num_predict": 4}).done_reason == "length"
    assert asked(alpha)[-1].json["max_tokens"] == 4


@BOTH
def test_structured_output(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    assert json.loads(ask(client, format=SCHEMA).message.content.replace(" …", "")) == ZURICH
    assert asked(alpha)[-1].json["response_format"]["json_schema"]["schema"] == SCHEMA


@pytest.mark.parametrize("more", [{}, {"system": "Be brief."}, {"raw": True}, {"suffix": "!"}], ids=str)
def test_generate(client: Any, alpha: FakeBackend, more: dict[str, Any]) -> None:
    answered = client.generate(MODEL, "Say hi", **more)
    assert (answered.response, answered.done, answered.done_reason) == (ANSWER, True, "stop")
    records = list(client.generate(MODEL, "Say hi", stream=True, **more))
    assert "".join(record.response for record in records) == ANSWER and records[-1].eval_count == 4
    is_raw = "raw" in more or "suffix" in more
    assert {request.path for request in asked(alpha)} == {"/v1/completions" if is_raw else CHAT}


def test_embeddings(client: Any, alpha: FakeBackend) -> None:
    embedded = client.embed(MODEL, ["a", "bb"])
    assert [vector[0] for vector in embedded.embeddings] == [1 / 64, 2 / 64] and embedded.prompt_eval_count
    assert client.embed(MODEL, "a").embeddings == [embedded.embeddings[0]]
    assert client.embeddings(MODEL, "a").embedding == embedded.embeddings[0]
    assert {request.path for request in asked(alpha)} == {"/v1/embeddings"}


def test_lists_show_and_loading_need_no_backend(client: Any, alpha: FakeBackend) -> None:
    assert [model.model for model in client.list().models] == [MODEL]
    shown = client.show(MODEL)
    assert "completion" in shown.capabilities and shown.modelinfo
    assert client.generate(MODEL, keep_alive="5m").done_reason == "load"
    assert client.chat(MODEL, [], keep_alive=0).done_reason == "unload"
    assert not asked(alpha)


def test_asynchronous_clients(gateway: RunningGateway) -> None:
    key = gateway.key()

    async def answers() -> list[str]:
        client = ollama.AsyncClient(host=gateway.url, headers={"Authorization": f"Bearer {key}"}, timeout=20)
        answered = await client.chat(MODEL, MESSAGES)
        pieces = [record.message.content or "" async for record in await client.chat(MODEL, MESSAGES, stream=True)]
        generated = await client.generate(MODEL, "Say hi")
        written = [record.response or "" async for record in await client.generate(MODEL, "Say hi", stream=True)]
        embedded = await client.embed(MODEL, "a")
        assert (await client.embeddings(MODEL, "a")).embedding == embedded.embeddings[0]
        assert (await client.show(MODEL)).capabilities
        await client._client.aclose()
        return [answered.message.content or "", "".join(pieces), generated.response or "", "".join(written)]

    assert asyncio.run(answers()) == [ANSWER] * 4


def half_of_a_stream(*last: Step) -> list[Step]:
    begun = recording("openai_chat_stream_vllm.sse")
    return [Head(200, [("Content-Type", "text/event-stream")], chunked=True), Piece(begun[: len(begun) // 2]), *last]


@pytest.mark.parametrize("last", [Reset(), Close(), End()], ids=["reset", "close", "ended"])
def test_a_stream_that_dies_midway_raises(gateway: RunningGateway, client: Any, alpha: FakeBackend, last: Step) -> None:
    alpha.play(CHAT, half_of_a_stream(last))
    seen: list[Any] = []
    with pytest.raises(ollama.ResponseError, match="ended early"):
        seen.extend(client.chat(MODEL, MESSAGES, stream=True))
    assert not any(record.done for record in seen)
    assert gateway.request_lines()[-1]["outcome"] == "truncated"


def test_a_client_that_leaves_frees_its_slot(gateway: RunningGateway, alpha: FakeBackend) -> None:
    alpha.play(CHAT, half_of_a_stream(Forever()))
    key = gateway.key(concurrent=1)
    with gateway.http(key) as http, http.stream("POST", "/api/chat", json={"model": MODEL, "messages": MESSAGES}) as got:
        assert next(got.iter_lines())
    assert alpha.wait_idle(1.0) and gateway.request_lines()[-1]["outcome"] == "client_gone"
    alpha.play(CHAT, None)
    assert whole(gateway.ollama(key)).message.content == ANSWER


@pytest.mark.parametrize("fault", FAILURES)
@pytest.mark.parametrize("first", ["ollama", "openai"])
@BOTH
def test_a_second_backend_answers_in_the_other_way(start_gateway: StartGateway, first: Any, fault: str, ask: Ask) -> None:
    second: Any = "openai" if first == "ollama" else "ollama"
    with FakeBackend(first, [MODEL], name="first") as broken, FakeBackend(second, [MODEL], name="second") as good:
        gateway = start_gateway(broken, good)
        fail(broken, "/api/chat" if first == "ollama" else CHAT, fault, first, ask is streamed)
        assert ask(gateway.ollama(gateway.key())).message.content == "second heard: Say hi"
        row = gateway.audit_rows()[-1]
        assert (row["backend"], row["translated_to"]) == ("second", CHAT if second == "openai" else None)


def test_what_is_refused_and_how(gateway: RunningGateway, client: Any, alpha: FakeBackend) -> None:
    wrong: list[tuple[int, Any]] = [(401, gateway.ollama("nonsense")), (403, gateway.ollama(gateway.key("other")))]
    for status, other in wrong:
        with pytest.raises(ollama.ResponseError) as refused:
            whole(other)
        assert refused.value.status_code == status
    with gateway.http(gateway.key()) as http:
        for more in ({"messages": "hi"}, {"messages": [{"role": "user", "content": 7}]}, {"options": {"num_predict": "many"}}):
            got = http.post("/api/chat", json={"model": MODEL, "messages": MESSAGES, **more})
            assert (got.status_code, list(got.json())) == (400, ["error"])
    with pytest.raises(ollama.ResponseError) as limited:
        limited_client = gateway.ollama(gateway.key(rpm=1))
        for _ in range(2):
            whole(limited_client)
    assert limited.value.status_code == 429
    assert len(asked(alpha)) == 1
