"""The official openai client's Responses API with backends that have it themselves, and with others through a translation."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from tests.conftest import StartGateway
from tests.support.fake_backend import native_responses
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import (
    PLAIN,
    SSE,
    Close,
    End,
    Forever,
    Head,
    Piece,
    Reset,
    Step,
    answer,
    recording,
)
from tests.support.model_servers import (
    CHAT,
    CHAT_ONLY,
    FAILURES,
    LLAMACPP,
    MODEL,
    OLLAMA,
    PNG,
    SCHEMA,
    ModelServer,
    asked,
    fail,
)
from tests.support.running_gateway import RunningGateway
from tests.support.shared_gateway import Shared

ANSWER = "alpha heard: Say hi"
ZURICH = {"city": "Zürich"}
TOOLS: Any = [
    {"type": "function", "name": name, "description": "a tool", "parameters": SCHEMA, "strict": False}
    for name in ("weather", "time")
]
PIXEL = "data:image/png;base64," + PNG


@pytest.fixture
def alpha(shared: Shared) -> FakeBackend:
    return shared.backend


@pytest.fixture
def gateway(shared: Shared) -> RunningGateway:
    return shared.gateway


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Any]:
    with gateway.openai(gateway.key()) as found:
        yield found


def whole(client: Any, **more: Any) -> Any:
    return client.responses.create(**{"model": MODEL, "input": "Say hi", **more})


def streamed(client: Any, **more: Any) -> Any:
    """With the helper that puts an answer together by the indexes of its events."""
    with client.responses.stream(**{"model": MODEL, "input": "Say hi", **more}) as stream:
        for _ in stream:
            pass
        return stream.get_final_response()


Ask = Callable[..., Any]
BOTH = pytest.mark.parametrize("ask", [whole, streamed], ids=["whole", "streamed"])


def asked_body(server: ModelServer, alpha: FakeBackend) -> Any:
    request = asked(alpha)[-1]
    assert request.path == server.responses
    return request.json


def calls_of(response: Any) -> list[Any]:
    return [item for item in response.output if item.type == "function_call"]


@BOTH
def test_text(gateway: RunningGateway, client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    response = ask(client, instructions="Be brief.")
    assert (response.output_text, response.status, response.model) == (ANSWER, "completed", MODEL)
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (4, 4, 8)
    body = asked_body(server, alpha)
    if server.responses == CHAT:
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
    else:
        assert body["instructions"] == "Be brief." and body["store"] is False
    row = gateway.audit_rows()[-1]
    assert (row["route"], row["dialect"], row["backend"], row["status"]) == ("/v1/responses", "responses", "alpha", 200)
    assert (row["translated_to"] or "") == ("" if server is OLLAMA else CHAT)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (4, 4)


def test_the_events_are_numbered_and_have_stable_ids(client: Any, alpha: FakeBackend) -> None:
    alpha.healthy.thinking = "Let me see"
    events: Any = list(client.responses.create(model=MODEL, input="Say hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    added, done = ([event for event in events if event.type == f"response.output_item.{name}"] for name in ("added", "done"))
    assert [event.item.id for event in added] == [event.item.id for event in done]
    assert [event.output_index for event in added] == [0, 1] and [event.item.type for event in done] == ["reasoning", "message"]
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == ANSWER and {event.item_id for event in deltas} == {added[1].item.id}
    assert next(event for event in events if event.type == "response.output_text.done").text == ANSWER


def test_asynchronous_clients(gateway: RunningGateway) -> None:
    key = gateway.key()

    async def answers() -> list[str]:
        made: Any = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=20)
        async with made as client:
            response = await client.responses.create(model=MODEL, input="Say hi")
            events = await client.responses.create(model=MODEL, input="Say hi", stream=True)
            pieces = [event.delta async for event in events if event.type == "response.output_text.delta"]
            async with client.responses.stream(model=MODEL, input="Say hi") as stream:
                final = await stream.get_final_response()
        return [response.output_text, "".join(pieces), final.output_text]

    assert asyncio.run(answers()) == [ANSWER] * 3


@BOTH
def test_thinking_comes_before_the_text(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    alpha.healthy.thinking = "Let me see"
    response = ask(client, reasoning={"effort": "medium", "summary": "auto"})
    assert [item.type for item in response.output] == ["reasoning", "message"]
    item = response.output[0]
    assert "".join(part.text for part in [*item.summary, *(item.content or [])]) == "Let me see"
    assert response.output_text == ANSWER


@BOTH
def test_an_answer_can_be_sent_back(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    alpha.healthy.thinking = "Let me see"
    first = ask(client)
    said = [item.model_dump(exclude_none=True) for item in first.output]
    second = ask(client, input=[{"role": "user", "content": "Say hi"}, *said, {"role": "user", "content": "Again"}])
    assert second.output_text == "alpha heard: Again"
    assert ANSWER in asked(alpha)[-1].body.decode()


@BOTH
def test_parallel_tools_and_their_results(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    alpha.healthy.parallel_calls = 2
    first = ask(client, tools=TOOLS)
    calls = calls_of(first)
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", ZURICH), ("time", ZURICH)]
    assert len({call.call_id for call in calls}) == 2 and len({call.id for call in calls}) == 2
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "error: no such city"} for call in calls]
    said = [item.model_dump(exclude_none=True) for item in calls]
    second = ask(client, tools=TOOLS, input=[{"role": "user", "content": "Say hi"}, *said, *results])
    assert second.output_text == ANSWER
    body = asked_body(server, alpha)
    if server.responses == CHAT:
        assert [message["role"] for message in body["messages"]] == ["user", "assistant", "tool", "tool"]
        assert [call["id"] for call in body["messages"][1]["tool_calls"]] == [call.call_id for call in calls]


@BOTH
def test_the_tools_of_codex(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    """No server takes all of them, so that they are translated: calls come back in the types of the client."""
    patch = {"type": "custom", "name": "apply_patch", "description": "a patch", "format": {"type": "text"}}
    server_of_tools = {"type": "namespace", "name": "mcp__files__", "description": "files", "tools": [TOOLS[0]]}
    others = [{"type": "web_search"}, {"type": "image_generation"}, {"type": "local_shell"}]
    # The client itself warns of a type that it does not know.
    others += [{"type": "something_new"}] if ask is whole else []
    alpha.healthy.parallel_calls = 2
    response = ask(client, tools=[patch, server_of_tools, *others])
    assert asked(alpha)[-1].path == CHAT
    custom, member = [item for item in response.output if item.type != "message"]
    assert (custom.type, custom.name, custom.input) == ("custom_tool_call", "apply_patch", "Zürich")
    assert (member.type, member.name, member.namespace) == ("function_call", "weather", "mcp__files__")
    said = [item.model_dump(exclude_none=True) for item in (custom, member)]
    results = [
        {"type": "custom_tool_call_output", "call_id": custom.call_id, "output": "done"},
        {"type": "function_call_output", "call_id": member.call_id, "output": [{"type": "input_text", "text": "noon"}]},
    ]
    again = ask(client, tools=[patch, server_of_tools], input=[{"role": "user", "content": "Say hi"}, *said, *results])
    assert again.output_text == ANSWER


@BOTH
def test_images(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    content = [{"type": "input_text", "text": "Say hi"}, {"type": "input_image", "image_url": PIXEL, "detail": "auto"}]
    response = ask(client, input=[{"role": "user", "content": content}])
    assert "Say hi" in response.output_text
    body = asked_body(server, alpha)
    if server.responses == CHAT:
        assert body["messages"][0]["content"][1]["image_url"]["url"] == PIXEL
    else:
        assert body["input"][0]["content"] == content


@BOTH
def test_an_answer_that_is_cut_at_its_limit(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    """Ollama's own Responses API calls it completed."""
    alpha.healthy.is_cut = True
    if server is OLLAMA:
        assert ask(client, max_output_tokens=4).status == "completed"
        return
    if ask is whole:
        response = ask(client, max_output_tokens=4)
    else:
        last: Any = list(client.responses.create(model=MODEL, input="Say hi", max_output_tokens=4, stream=True))[-1]
        assert last.type == "response.incomplete"
        response = last.response
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 4


@BOTH
def test_structured_output_is_always_translated(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    """llama.cpp leaves the schema out."""
    form = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
    response = ask(client, text=form)
    assert response.output_text.replace(" …", "") == '{"city": "Zürich"}'
    request = asked(alpha)[-1]
    assert request.path == CHAT and request.json["response_format"]["json_schema"]["schema"] == SCHEMA


def test_cached_tokens_are_counted(client: Any, alpha: FakeBackend, server: ModelServer) -> None:
    """Ollama's own Responses API does not count them."""
    alpha.healthy.cached = lambda _: 1
    for ask in (whole, streamed):
        assert ask(client).usage.input_tokens_details.cached_tokens == (0 if server is OLLAMA else 1)


def test_tokens_are_counted_by_the_server_or_estimated(gateway: RunningGateway, client: Any, server: ModelServer) -> None:
    assert client.responses.input_tokens.count(model=MODEL, input="Say hi").input_tokens >= 2
    with gateway.http(gateway.key()) as http:
        counted = http.post("/v1/responses/input_tokens", json={"model": MODEL, "input": "Say hi"})
    assert counted.json()["object"] == "response.input_tokens"
    assert counted.headers.get("x-gateway-estimated") == (None if server is LLAMACPP else "true")


@pytest.mark.parametrize(
    "more", [{"previous_response_id": "resp_1"}, {"conversation": "conv_1"}, {"background": True}], ids=str
)
def test_state_is_refused_everywhere(client: Any, alpha: FakeBackend, more: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        whole(client, **more)
    assert next(iter(more)) in refused.value.message and not asked(alpha)
    assert whole(client, store=True).store in (False, None)


def half_of_a_chat(*last: Step) -> list[Step]:
    begun = recording("openai_chat_stream.sse")
    return [Head(200, [("Content-Type", "text/event-stream")], chunked=True), Piece(begun[: len(begun) // 2]), *last]


def half_of_a_response(*last: Step) -> list[Step]:
    return [*native_responses.death_midway("ollama")[:-1], *last]


def test_a_client_that_leaves_frees_its_slot(gateway: RunningGateway, alpha: FakeBackend, server: ModelServer) -> None:
    half = half_of_a_chat if server.responses == CHAT else half_of_a_response
    alpha.play(server.responses, half(Forever()))
    with gateway.openai(gateway.key(concurrent=1)) as client:
        with client.responses.create(model=MODEL, input="Say hi", stream=True) as stream:
            assert next(iter(stream)).type == "response.created"
        left = time.monotonic()
        assert alpha.wait_idle(1.0) and time.monotonic() - left < 1.0
        assert gateway.request_lines()[-1]["outcome"] == "client_gone"
        alpha.play(server.responses, None)
        assert whole(client).output_text == ANSWER


@pytest.mark.parametrize("last", [Reset(), Close(), End()], ids=["reset", "close", "ended"])
def test_a_stream_that_dies_midway_raises(
    gateway: RunningGateway, client: Any, alpha: FakeBackend, server: ModelServer, last: Step
) -> None:
    half = half_of_a_chat if server.responses == CHAT else half_of_a_response
    alpha.play(server.responses, half(last))
    seen: list[Any] = []
    with pytest.raises(openai.APIError) as raised:
        seen.extend(client.responses.create(model=MODEL, input="Say hi", stream=True))
    assert "ended early" in raised.value.message
    with gateway.http(gateway.key()) as http:
        body = {"model": MODEL, "input": "Say hi", "stream": True}
        events = [
            json.loads(line[6:]) for line in http.post("/v1/responses", json=body).text.split("\n") if line[:6] == "data: "
        ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    begun, failed = events[0]["response"], Response.model_validate(events[-1]["response"])
    assert (failed.id, failed.created_at, failed.model) == (begun["id"], begun["created_at"], begun["model"])
    assert (failed.status, failed.error and failed.error.code) == ("failed", "server_error")
    assert {line["outcome"] for line in gateway.request_lines()} == {"truncated"}


@BOTH
def test_a_prompt_that_is_too_long_has_openais_code(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    """Clients shorten the conversation after it; each kind of server has another one."""
    words = "This model's maximum context length is 4096 tokens, but the request has 9000."
    alpha.play(server.responses, answer(400, {"error": {"message": words, "type": "BadRequestError", "code": 400}}))
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client)
    assert (raised.value.code, raised.value.type) == ("context_length_exceeded", "invalid_request_error")
    assert words in raised.value.message


@pytest.mark.parametrize("fault", FAILURES)
@pytest.mark.parametrize("first", [OLLAMA, CHAT_ONLY], ids=str)
@BOTH
def test_a_second_backend_answers_in_the_other_way(
    start_gateway: StartGateway, first: ModelServer, fault: str, ask: Ask
) -> None:
    second = CHAT_ONLY if first is OLLAMA else OLLAMA
    with first.backend("first") as broken, second.backend("second") as good:
        gateway = start_gateway(broken, good)
        fail(broken, first.responses, fault, "openai", ask is streamed)
        with gateway.openai(gateway.key()) as client:
            assert ask(client).output_text == "second heard: Say hi"
        assert asked(good)[-1].path == second.responses
        row = gateway.audit_rows()[-1]
        assert (row["backend"], row["translated_to"] or "") == ("second", "" if second is OLLAMA else CHAT)


@pytest.mark.parametrize(("capabilities", "effort"), [(["completion"], None), (["completion", "thinking"], "medium")], ids=str)
def test_an_effort_reaches_only_those_of_ollamas_models_that_think(
    start_gateway: StartGateway, capabilities: list[str], effort: str | None
) -> None:
    """Others would answer 400 to it, and Codex sends it to every model."""
    with OLLAMA.backend() as backend:
        listed = {"name": MODEL, "model": MODEL, "capabilities": capabilities}
        backend.play("/api/tags", answer(200, {"models": [listed]}))
        gateway = start_gateway(backend)
        with gateway.openai(gateway.key()) as client:
            assert whole(client, reasoning={"effort": "medium"}).output_text == ANSWER
        with gateway.anthropic(gateway.key()) as other:
            thinking: Any = {"type": "enabled", "budget_tokens": 5000}
            form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
            other.messages.create(
                model=MODEL,
                max_tokens=8000,
                messages=[{"role": "user", "content": "hi"}],
                thinking=thinking,
                output_config=form,
            )
        assert [request.path for request in asked(backend)] == [CHAT, CHAT]
        assert [request.json.get("reasoning_effort") for request in asked(backend)] == [effort, effort]
        dropped = [row["dropped"] or "" for row in gateway.audit_rows()]
        assert dropped == (["", ""] if effort else ["reasoning.effort", "thinking"])


@pytest.mark.parametrize("status", [404, 405, 200])
def test_a_server_that_has_lost_the_path_is_asked_in_the_other_way(start_gateway: StartGateway, status: int) -> None:
    """Its list of paths may be some minutes old. LM Studio answers 200 on paths that it does not have."""
    words = {"error": "Unexpected endpoint or method. (POST /v1/responses)"}
    with OLLAMA.backend() as backend:
        gateway = start_gateway(backend)
        backend.play("/v1/responses", answer(status, words) if status == 200 else answer(status, b"not here", PLAIN))
        with gateway.openai(gateway.key()) as client:
            assert whole(client).output_text == ANSWER
        assert [request.path for request in asked(backend)] == ["/v1/responses", CHAT]
        row = gateway.audit_rows()[-1]
        assert (row["status"], row["translated_to"]) == (200, CHAT) and "no_route" in row["attempts"]


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_chat_server_without_its_own_path_is_unavailable(start_gateway: StartGateway, is_stream: bool) -> None:
    """As for a client that asks for the chat itself: all its servers have that path, so that the model must be gone."""
    with CHAT_ONLY.backend() as backend:
        gateway = start_gateway(backend)
        backend.play(CHAT, answer(404, b"404 page not found", PLAIN))
        with gateway.http(gateway.key()) as client:
            body = {"model": MODEL, "stream": is_stream}
            got = [
                client.post("/v1/responses", json={**body, "input": "Say hi"}),
                client.post("/v1/messages", json={**body, "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}),
                client.post(CHAT, json={**body, "messages": [{"role": "user", "content": "Hi"}]}),
            ]
        assert [found.status_code for found in got] == [503] * 3
        assert {"model_gone" in row["attempts"] for row in gateway.audit_rows()} == {True}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_a_stream_without_an_answer_is_none(start_gateway: StartGateway, path: str) -> None:
    with CHAT_ONLY.backend("empty") as empty, CHAT_ONLY.backend("good") as good:
        gateway = start_gateway(empty, good)
        empty.play(CHAT, [Head(200, [("Content-Type", SSE)], chunked=True), Piece(b"data: [DONE]\n\n"), End()])
        with gateway.http(gateway.key()) as client:
            fields = {"input": "Say hi"} if path == "/v1/responses" else {"messages": [{"role": "user", "content": "Say hi"}]}
            got = client.post(path, json={"model": MODEL, "stream": True, **fields})
        assert got.status_code == 200 and "good" in got.text
        assert "bad_first_frame" in gateway.audit_rows()[-1]["attempts"]


def test_what_is_refused_and_how(gateway: RunningGateway, client: Any, alpha: FakeBackend) -> None:
    with gateway.openai("nonsense") as wrong, pytest.raises(openai.AuthenticationError):
        whole(wrong)
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        whole(client, model="nobody")
    assert "not available to this key" in forbidden.value.message and forbidden.value.request_id
    wrong_bodies: list[dict[str, Any]] = [
        {"input": 7},
        {"max_output_tokens": "many"},
        {"input": [{"role": "user", "content": 7}]},
    ]
    for more in wrong_bodies:
        with pytest.raises(openai.BadRequestError) as bad:
            whole(client, **more)
        assert bad.value.type == "invalid_request_error"
    assert not asked(alpha)


def test_a_limit_that_is_reached(gateway: RunningGateway) -> None:
    with gateway.openai(gateway.key(rpm=1)) as client:
        first = client.responses.with_raw_response.create(model=MODEL, input="Say hi")
        assert first.headers["x-ratelimit-remaining-requests"] == "0" and first.headers["x-request-id"]
        with pytest.raises(openai.RateLimitError) as limited:
            streamed(client)
    assert 0 < int(limited.value.response.headers["retry-after"]) <= 60


def test_what_a_key_with_this_right_sees_of_the_way_taken(gateway: RunningGateway, server: ModelServer) -> None:
    with gateway.http(gateway.key(flags=("show_backend",))) as http:
        got = http.post("/v1/responses", json={"model": MODEL, "input": "Say hi", "include": ["reasoning.encrypted_content"]})
    assert got.headers.get("x-gateway-translated-to", "") == ("" if server is OLLAMA else CHAT)
    assert "include" in got.headers["x-gateway-dropped"]
