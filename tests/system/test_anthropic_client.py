"""The official anthropic client with backends that have the Messages API themselves, and with others through a translation."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import StartGateway
from tests.support.fake_backend import native_messages
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import PLAIN, Close, End, Forever, Head, Piece, Reset, Step, answer, recording
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

MESSAGES: Any = [{"role": "user", "content": "Say hi"}]
TOOLS: Any = [{"name": name, "description": "a tool", "input_schema": SCHEMA} for name in ("weather", "time")]
ANSWER = "alpha heard: Say hi"
ZURICH = {"city": "Zürich"}


@pytest.fixture
def alpha(shared: Shared) -> FakeBackend:
    return shared.backend


@pytest.fixture
def gateway(shared: Shared) -> RunningGateway:
    return shared.gateway


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[Any]:
    with gateway.anthropic(gateway.key()) as found:
        yield found


def whole(client: Any, **more: Any) -> Any:
    return client.messages.create(**{"model": MODEL, "max_tokens": 100, "messages": MESSAGES, **more})


def streamed(client: Any, **more: Any) -> Any:
    with client.messages.stream(**{"model": MODEL, "max_tokens": 100, "messages": MESSAGES, **more}) as stream:
        return stream.get_final_message()


BOTH = pytest.mark.parametrize("ask", [whole, streamed], ids=["whole", "streamed"])
Ask = Callable[..., Any]


def chat_body(server: ModelServer, alpha: FakeBackend) -> Any:
    """What the backend got; a translation must have taken place if it lacks the Messages API."""
    request = asked(alpha)[-1]
    assert request.path == server.messages
    return request.json


@BOTH
def test_text(gateway: RunningGateway, client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    message = ask(client, system="Be brief.")
    assert [(block.type, block.text) for block in message.content] == [("text", ANSWER)]
    assert (message.role, message.model, message.stop_reason) == ("assistant", MODEL, "end_turn")
    assert message.usage.input_tokens > 0 and message.usage.output_tokens == 4
    body = chat_body(server, alpha)
    given = [{"role": "system", "content": body["system"]}, *body["messages"]] if "system" in body else body["messages"]
    assert [message["role"] for message in given] == ["system", "user"] and "Be brief." in str(given[0]["content"])
    row = gateway.audit_rows()[-1]
    translated_to = "" if server.messages != CHAT else CHAT
    assert (row["route"], row["backend"], row["status"]) == ("/v1/messages", "alpha", 200)
    assert (row["translated_to"] or "") == translated_to
    assert (row["prompt_tokens"], row["completion_tokens"]) == (4, 4)


def test_a_stream_has_the_events_in_their_order(client: Any) -> None:
    with client.messages.stream(model=MODEL, max_tokens=100, messages=MESSAGES) as stream:
        kinds = [event.type for event in stream]
    kinds = [kind for kind, before in zip(kinds, [None, *kinds], strict=False) if kind != before]
    plain = [kind for kind in kinds if kind.startswith(("message", "content"))]
    assert (plain[0], plain[-1]) == ("message_start", "message_stop")
    assert plain.index("content_block_start") < plain.index("content_block_delta") < plain.index("content_block_stop")
    assert "message_delta" in plain


def test_asynchronous_clients(gateway: RunningGateway) -> None:
    from anthropic import AsyncAnthropic

    key = gateway.key()

    async def answers() -> list[str]:
        async with AsyncAnthropic(base_url=gateway.url, api_key=key, max_retries=0, timeout=20) as client:
            message: Any = await client.messages.create(model=MODEL, max_tokens=100, messages=MESSAGES)
            async with client.messages.stream(model=MODEL, max_tokens=100, messages=MESSAGES) as stream:
                pieces = [text async for text in stream.text_stream]
            raw: Any = await client.messages.create(model=MODEL, max_tokens=100, messages=MESSAGES, stream=True)
            deltas = [event.delta.text async for event in raw if event.type == "content_block_delta"]
        return [message.content[0].text, "".join(pieces), "".join(deltas)]

    assert asyncio.run(answers()) == [ANSWER] * 3


@BOTH
def test_thinking_comes_before_the_text(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    alpha.healthy.thinking = "Let me see"
    message = ask(client, max_tokens=3000, thinking={"type": "enabled", "budget_tokens": 2000})
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.content[0].thinking, message.content[1].text) == ("Let me see", ANSWER)
    assert message.usage.output_tokens == 6


@BOTH
def test_a_thinking_block_can_be_sent_back(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    alpha.healthy.thinking = "Let me see"
    first = ask(client)
    said = [block.model_dump(exclude_none=True) for block in first.content]
    ask(client, messages=[*MESSAGES, {"role": "assistant", "content": said}, {"role": "user", "content": "Again"}])
    assert "Let me see" in asked(alpha)[-1].body.decode()


@BOTH
def test_parallel_tools(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    alpha.healthy.parallel_calls = 2
    alpha.healthy.thinking = "Let me see"
    message = ask(client, tools=TOOLS, tool_choice={"type": "auto"})
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("weather", ZURICH), ("time", ZURICH)]
    assert len({call.id for call in calls}) == 2 and message.stop_reason == "tool_use"
    assert message.content[0].type == "thinking"
    names = [tool.get("name") or tool["function"]["name"] for tool in chat_body(server, alpha)["tools"]]
    assert names == ["weather", "time"]


@BOTH
def test_the_tool_loop_with_an_error_as_result(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    alpha.healthy.parallel_calls = 2
    first = ask(client, tools=TOOLS)
    calls = [block for block in first.content if block.type == "tool_use"]
    failed = {"type": "tool_result", "tool_use_id": calls[0].id, "is_error": True, "content": "no such city"}
    found = {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "noon"}]}
    said = [block.model_dump(exclude_none=True) for block in first.content]
    results = {"role": "user", "content": [failed, found, {"type": "text", "text": "Go on"}]}
    second = ask(client, tools=TOOLS, messages=[*MESSAGES, {"role": "assistant", "content": said}, results])
    assert "Go on" in second.content[-1].text
    messages = chat_body(server, alpha)["messages"]
    if server.messages != CHAT:
        assert messages[-1]["content"][0]["is_error"] is True
        return
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert [message["tool_call_id"] for message in messages[2:4]] == [call.id for call in calls]
    # Chats have no field for it, and a model must not take it for a result.
    assert messages[2]["content"] != "no such city" and "no such city" in messages[2]["content"]
    assert messages[3]["content"] == "noon"


@BOTH
def test_images(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": PNG}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "Say hi"}]
    message = ask(client, messages=[{"role": "user", "content": content}])
    assert "Say hi" in message.content[0].text
    parts = chat_body(server, alpha)["messages"][0]["content"]
    if server.messages == CHAT:
        assert parts[0]["image_url"]["url"] == "data:image/png;base64," + PNG
    else:
        assert parts == content


def test_an_image_by_address_is_refused_where_the_server_takes_none(
    client: Any, alpha: FakeBackend, server: ModelServer
) -> None:
    import anthropic

    content = [{"type": "image", "source": {"type": "url", "url": "https://pictures.example/a.png"}}]
    messages: Any = [{"role": "user", "content": content}]
    if server.kind == "openai":
        whole(client, messages=messages)
        assert "https://pictures.example/a.png" in asked(alpha)[-1].body.decode()
        return
    with pytest.raises(anthropic.BadRequestError) as refused:
        whole(client, messages=messages)
    assert "image" in refused.value.message


@BOTH
def test_an_answer_that_is_cut_at_its_limit(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    alpha.healthy.is_cut = True
    assert ask(client, max_tokens=4).stop_reason == "max_tokens"


@BOTH
def test_structured_output_is_always_translated(client: Any, alpha: FakeBackend, ask: Ask) -> None:
    """Servers with the Messages API leave the schema out."""
    if ask is streamed:
        message = ask(client, extra_body={"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}})
    else:
        message = ask(client, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert message.content[0].text.replace(" …", "") == '{"city": "Zürich"}'
    request = asked(alpha)[-1]
    assert request.path == CHAT and request.json["response_format"]["json_schema"]["schema"] == SCHEMA


@BOTH
def test_cached_tokens_are_counted_apart(client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask) -> None:
    """Ollama's own Messages API does not tell them from the others."""
    alpha.healthy.cached = lambda _: 1
    usage = ask(client).usage
    expected = (2, 0) if server is OLLAMA else (1, 1)
    assert (usage.input_tokens, usage.cache_read_input_tokens or 0) == expected


def test_tokens_are_counted_by_the_server_or_estimated(gateway: RunningGateway, client: Any, server: ModelServer) -> None:
    raw = client.messages.with_raw_response.count_tokens(model=MODEL, messages=MESSAGES, tools=TOOLS)
    counted = raw.parse().input_tokens
    if server is LLAMACPP:
        assert counted > 2 and "x-gateway-estimated" not in raw.headers
    else:
        assert counted > 2 and raw.headers["x-gateway-estimated"] == "true"


@BOTH
@pytest.mark.parametrize(
    ("status", "text"),
    [
        (500, "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"),
        (400, "Multimodal data provided, but model does not support multimodal requests."),
        (400, "qwen3 is not a multimodal model"),
    ],
    ids=["llama.cpp", "Ollama", "vLLM"],
)
def test_claude_code_takes_images_out_after_these_words(
    client: Any, alpha: FakeBackend, server: ModelServer, ask: Ask, status: int, text: str
) -> None:
    import anthropic

    alpha.play(server.messages, answer(status, {"error": {"message": text, "type": "server_error", "code": status}}))
    with pytest.raises(anthropic.BadRequestError) as raised:
        ask(client)
    error: Any = raised.value.body
    assert error["error"]["message"] == f"Could not process image: {text}"


def half_of_a_stream(server: ModelServer, *last: Step) -> list[Step]:
    if server.messages != CHAT:
        return native_messages.silent_midway(*last)
    begun = recording("openai_chat_stream.sse")
    return [Head(200, [("Content-Type", "text/event-stream")], chunked=True), Piece(begun[: len(begun) // 2]), *last]


def test_a_client_that_leaves_frees_its_slot(gateway: RunningGateway, alpha: FakeBackend, server: ModelServer) -> None:
    alpha.play(server.messages, half_of_a_stream(server, Forever()))
    with gateway.anthropic(gateway.key(concurrent=1)) as client:
        with client.messages.create(model=MODEL, max_tokens=50, messages=MESSAGES, stream=True) as stream:
            assert next(iter(stream)).type == "message_start"
        left = time.monotonic()
        assert alpha.wait_idle(1.0) and time.monotonic() - left < 1.0
        assert gateway.request_lines()[-1]["outcome"] == "client_gone"
        alpha.play(server.messages, None)
        assert whole(client).content[0].text == ANSWER


@pytest.mark.parametrize("last", [Reset(), Close(), End()], ids=["reset", "close", "ended"])
def test_a_stream_that_dies_midway_raises(
    gateway: RunningGateway, client: Any, alpha: FakeBackend, server: ModelServer, last: Step
) -> None:
    import anthropic

    alpha.play(server.messages, half_of_a_stream(server, last))
    with pytest.raises(anthropic.APIStatusError) as raised:
        list(client.messages.create(model=MODEL, max_tokens=50, messages=MESSAGES, stream=True))
    assert "ended early" in str(raised.value)
    with pytest.raises(anthropic.APIStatusError):
        streamed(client)
    assert {line["outcome"] for line in gateway.request_lines()} == {"truncated"}


def test_an_error_in_the_middle_of_a_native_stream_is_one_for_the_client(start_gateway: StartGateway) -> None:
    """llama.cpp sends it without the object that clients expect around it; Ollama only ends its stream."""
    import anthropic

    for server in (OLLAMA, LLAMACPP):
        with server.backend() as backend:
            gateway = start_gateway(backend)
            backend.play("/v1/messages", native_messages.error_midway(server.kind))
            with gateway.anthropic(gateway.key()) as client, pytest.raises(anthropic.APIStatusError):
                streamed(client)
            assert gateway.request_lines()[-1]["outcome"] != "answered"


@pytest.mark.parametrize("fault", FAILURES)
@pytest.mark.parametrize("first", [OLLAMA, CHAT_ONLY], ids=str)
@BOTH
def test_a_second_backend_answers_in_the_other_way(
    start_gateway: StartGateway, first: ModelServer, fault: str, ask: Ask
) -> None:
    second = CHAT_ONLY if first is OLLAMA else OLLAMA
    with first.backend("first") as broken, second.backend("second") as good:
        gateway = start_gateway(broken, good)
        fail(broken, first.messages, fault, "openai", ask is streamed)
        with gateway.anthropic(gateway.key()) as client:
            message = ask(client)
        assert message.content[0].text == "second heard: Say hi"
        assert asked(good)[-1].path == second.messages
        row = gateway.audit_rows()[-1]
        assert (row["backend"], row["translated_to"] or "") == ("second", "" if second is OLLAMA else CHAT)


@pytest.mark.parametrize("status", [404, 405, 200])
def test_a_server_that_has_lost_the_path_is_asked_in_the_other_way(start_gateway: StartGateway, status: int) -> None:
    """Its list of paths may be some minutes old. LM Studio answers 200 on paths that it does not have."""
    words = {"error": "Unexpected endpoint or method. (POST /v1/messages)"}
    with OLLAMA.backend() as backend:
        gateway = start_gateway(backend)
        backend.play("/v1/messages", answer(status, words) if status == 200 else answer(status, b"not here", PLAIN))
        with gateway.anthropic(gateway.key()) as client:
            assert whole(client).content[0].text == ANSWER
        assert [request.path for request in asked(backend)] == ["/v1/messages", CHAT]
        row = gateway.audit_rows()[-1]
        assert (row["status"], row["translated_to"]) == (200, CHAT) and "no_route" in row["attempts"]


def error_of(raised: Any) -> Any:
    return raised.body["error"]


def test_what_is_refused_and_how(gateway: RunningGateway, client: Any, alpha: FakeBackend) -> None:
    import anthropic

    with gateway.anthropic("nonsense") as wrong, pytest.raises(anthropic.AuthenticationError) as unknown:
        whole(wrong)
    assert error_of(unknown.value)["type"] == "authentication_error"
    with pytest.raises(anthropic.PermissionDeniedError) as forbidden:
        whole(client, model="nobody")
    assert error_of(forbidden.value)["type"] == "permission_error"
    for more in ({"messages": "hi"}, {"messages": [{"role": "user", "content": 7}]}, {"max_tokens": "many"}):
        with pytest.raises(anthropic.BadRequestError) as bad:
            whole(client, **more)
        assert error_of(bad.value)["type"] == "invalid_request_error"
    body: Any = forbidden.value.body
    assert body["type"] == "error" and body["request_id"] == forbidden.value.request_id
    assert not asked(alpha)


def test_a_request_has_its_id_in_the_answer(gateway: RunningGateway, client: Any) -> None:
    raw = client.messages.with_raw_response.create(model=MODEL, max_tokens=50, messages=MESSAGES)
    assert raw.headers["request-id"] == raw.headers["x-request-id"] == gateway.request_lines()[-1]["request_id"]
    assert raw.parse()._request_id == raw.headers["request-id"]


def test_a_limit_that_is_reached(gateway: RunningGateway) -> None:
    import anthropic

    with gateway.anthropic(gateway.key(rpm=1)) as client:
        first = client.messages.with_raw_response.create(model=MODEL, max_tokens=50, messages=MESSAGES)
        assert first.headers["anthropic-ratelimit-requests-limit"] == "1"
        assert first.headers["anthropic-ratelimit-requests-remaining"] == "0"
        with pytest.raises(anthropic.RateLimitError) as limited:
            streamed(client)
    headers = limited.value.response.headers
    assert 0 < int(headers["retry-after"]) <= 60
    assert headers["anthropic-ratelimit-requests-remaining"] == "0" and headers["anthropic-ratelimit-requests-reset"]
    assert error_of(limited.value)["type"] == "rate_limit_error"


def test_the_key_may_be_a_bearer_token(gateway: RunningGateway) -> None:
    from anthropic import Anthropic

    with Anthropic(base_url=gateway.url, auth_token=gateway.key(), max_retries=0, timeout=20) as client:
        assert whole(client).content[0].text == ANSWER
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).type == "model"


def test_fields_that_only_anthropic_has_are_no_error(client: Any) -> None:
    more = {
        "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
        "metadata": {"user_id": "someone"},
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "xhigh"},
        "mcp_servers": [],
        "something_new": {"a": [1]},
    }
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    tools = [
        {**TOOLS[0], "type": "custom", "cache_control": {"type": "ephemeral"}, "defer_loading": True},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    ]
    answered = whole(client, extra_body=more, system=system, tools=tools, extra_headers={"anthropic-beta": "new-2026-01-01"})
    assert [block.name for block in answered.content if block.type == "tool_use"] == ["weather"]
