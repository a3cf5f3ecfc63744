"""The openai package and Codex understand the answers, and what they send is understood."""

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseStreamEvent

from gateway.core import strict_json
from gateway.core.errors import LimitReached
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.conversation import (
    Counted,
    Event,
    Finish,
    Finished,
    Message,
    Reply,
    Text,
    TextPiece,
    Thinking,
    ThinkingPiece,
    ToolCall,
    ToolPiece,
    ToolResult,
)
from gateway.dialects.translation.responses_answer import EventWriter, write
from gateway.dialects.translation.responses_request import ResponsesPrompt, read

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "d",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
PATCH: Any = {"type": "custom", "name": "apply_patch", "description": "edits files"}
TOOLS: Any = [WEATHER, PATCH, {"type": "local_shell"}, {"type": "web_search"}]
PARTS: list[Thinking | Text | ToolCall] = [
    Thinking("hm"),
    Text("I see."),
    ToolCall("c1", "weather", '{"city":"Bonn"}'),
    ToolCall("c2", "weather", '{"city":"Ulm"}'),
    ToolCall("c3", "apply_patch", '{"input":"*** Begin Patch\\n"}'),
    ToolCall("c4", "local_shell", '{"command":["ls"]}'),
]
COUNTS = Usage(27, 3, 20)


class Backend:
    """Answers each request with the same parts; with an error, the stream fails after them."""

    def __init__(self, parts: list[Any], finish: Finish = "stop", error: LimitReached | None = None) -> None:
        self.reply, self.error = Reply(parts, finish, COUNTS), error
        self.prompts: list[ResponsesPrompt] = []
        self.events: list[Event] = []

    def answer(self, request: httpx.Request) -> httpx.Response:
        prompt = read(strict_json.read_object(request.content))
        self.prompts.append(prompt)
        if not prompt.stream:
            return httpx.Response(200, json=write(self.reply, prompt, created=7))
        return httpx.Response(200, content=b"".join(self._frames(prompt)), headers={"content-type": "text/event-stream"})

    def _frames(self, prompt: ResponsesPrompt) -> Iterator[bytes]:
        writer = EventWriter(prompt, created=7)
        yield writer.start()
        for event in self.events or self._events():
            yield writer.write(event)
        yield writer.fail(self.error) if self.error else writer.end()

    def _events(self) -> Iterator[Event]:
        for index, part in enumerate(self.reply.parts):
            if isinstance(part, ToolCall):
                yield ToolPiece(index, part.id, part.name)
                yield from (ToolPiece(index, arguments=letter) for letter in part.arguments)
            else:
                kind = TextPiece if isinstance(part, Text) else ThinkingPiece
                yield from (kind(letter) for letter in part.text)
        yield Finished(self.reply.finish)
        yield Counted(self.reply.usage)

    def client(self) -> openai.OpenAI:
        transport = httpx.MockTransport(self.answer)
        return openai.OpenAI(api_key="k", base_url="http://gw/v1", http_client=httpx.Client(transport=transport))

    def async_client(self) -> openai.AsyncOpenAI:
        transport = httpx.MockTransport(self.answer)
        return openai.AsyncOpenAI(api_key="k", base_url="http://gw/v1", http_client=httpx.AsyncClient(transport=transport))


def whole(backend: Backend) -> Response:
    with backend.client() as client:
        return client.responses.create(model="m", input="Hi", tools=TOOLS)


def streamed(backend: Backend) -> Response:
    with backend.client() as client, client.responses.stream(model="m", input="Hi", tools=TOOLS) as stream:
        return stream.get_final_response()


def whole_later(backend: Backend) -> Response:
    async def run() -> Response:
        async with backend.async_client() as client:
            return await client.responses.create(model="m", input="Hi", tools=TOOLS)

    return asyncio.run(run())


def streamed_later(backend: Backend) -> Response:
    async def run() -> Response:
        async with backend.async_client() as client, client.responses.stream(model="m", input="Hi", tools=TOOLS) as stream:
            return await stream.get_final_response()

    return asyncio.run(run())


WAYS = pytest.mark.parametrize("ask", [whole, streamed, whole_later, streamed_later])


@WAYS
def test_openai_reads_thoughts_texts_and_calls(ask: Callable[[Backend], Response]) -> None:
    found = ask(Backend(PARTS, "tool_calls"))
    assert found.status == "completed" and found.output_text == "I see." and found.model == "m" and found.created_at == 7
    assert found.usage is not None and (found.usage.total_tokens, found.usage.input_tokens_details.cached_tokens) == (30, 20)
    thought, message, first, second, patch, shell = found.output
    assert thought.type == "reasoning" and thought.summary[0].text == "hm"
    assert message.type == "message" and message.status == "completed"
    for call, city in ((first, "Bonn"), (second, "Ulm")):
        assert call.type == "function_call" and call.name == "weather" and json.loads(call.arguments) == {"city": city}
    assert patch.type == "custom_tool_call" and patch.input == "*** Begin Patch\n" and patch.call_id == "c3"
    assert shell.type == "local_shell_call" and shell.action.command == ["ls"]


@pytest.mark.parametrize("ask", [whole, whole_later])
def test_openai_reads_an_answer_that_was_cut(ask: Callable[[Backend], Response]) -> None:
    found = ask(Backend([Text("I se")], "length"))
    assert found.status == "incomplete" and found.incomplete_details and found.output_text == "I se"
    assert found.incomplete_details.reason == "max_output_tokens"


def stream_of(backend: Backend) -> list[ResponseStreamEvent]:
    with backend.client() as client, client.responses.create(model="m", input="Hi", tools=TOOLS, stream=True) as stream:
        return list(stream)


def test_openai_reads_a_stream_that_was_cut() -> None:
    last = stream_of(Backend([Text("I se")], "length"))[-1]
    assert last.type == "response.incomplete" and last.response.output_text == "I se" and last.response.usage


def test_every_event_is_one_that_openai_knows_with_all_its_fields() -> None:
    for event in stream_of(Backend(PARTS, "tool_calls")):
        again = type(event).model_validate(event.model_dump(mode="json", by_alias=True, exclude_unset=True), strict=False)
        assert again.type == event.type and not isinstance(event, dict)
    answer = whole(Backend(PARTS, "tool_calls"))
    Response.model_validate(answer.model_dump(mode="json", by_alias=True, exclude_unset=True))


@pytest.mark.parametrize("later", [False, True])
def test_openai_raises_when_a_stream_fails(later: bool) -> None:
    backend = Backend([Text("I se")], error=LimitReached("Too many tokens; try again in 5 s."))

    async def run() -> None:
        async with backend.async_client() as client:
            async for _ in await client.responses.create(model="m", input="Hi", stream=True):
                pass

    with pytest.raises(openai.APIError, match="try again in 5 s") as raised:
        if later:
            asyncio.run(run())
        else:
            stream_of(backend)
    assert raised.value.code == "rate_limit_exceeded"


def test_openai_continues_a_conversation_with_what_it_was_given() -> None:
    backend = Backend(PARTS, "tool_calls")
    with backend.client() as client:
        items: list[Any] = [{"role": "user", "content": "Hi"}]
        first = client.responses.create(model="m", input=items, tools=TOOLS, instructions="Be brief.")
        items += [item.to_dict() for item in first.output]
        items += [{"type": "function_call_output", "call_id": call, "output": "o"} for call in ("c1", "c2", "c4")]
        items.append({"type": "custom_tool_call_output", "call_id": "c3", "output": "o"})
        client.responses.create(model="m", input=items, tools=TOOLS, instructions="Be brief.")
    before, after = (prompt.messages for prompt in backend.prompts)
    assert after[: len(before)] == before
    assert after[len(before)] == Message("assistant", tuple(PARTS))
    results = [part for part in after[-1].parts if isinstance(part, ToolResult)]
    assert [result.call_id for result in results] == ["c1", "c2", "c4", "c3"]
    assert backend.prompts[0].dropped == ["tools.web_search"]


# What Codex 0.15x sends in its second turn, shortened: several messages of a user, tools of all types, no state.
CODEX: dict[str, Any] = {
    "model": "qwen3-coder",
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>…</permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment_context/>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "List the files."}]},
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "I list."}],
            "content": None,
            "encrypted_content": None,
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "One moment."}],
            "phase": "commentary",
        },
        {"type": "function_call", "name": "shell_command", "arguments": '{"command":"ls"}', "call_id": "call_1"},
        {
            "type": "function_call",
            "name": "js",
            "namespace": "mcp__node_repl",
            "arguments": '{"code":"1+1"}',
            "call_id": "call_2",
        },
        {
            "type": "custom_tool_call",
            "status": "completed",
            "call_id": "call_3",
            "name": "apply_patch",
            "input": "*** Begin Patch",
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "a.py"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "2"}]},
        {"type": "custom_tool_call_output", "call_id": "call_3", "output": "aborted"},
    ],
    "tools": [
        {
            "type": "function",
            "name": "shell_command",
            "description": "Runs a command.",
            "strict": False,
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
        },
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "A FREEFORM tool, so do not wrap the patch in JSON.",
            "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch"'},
        },
        {"type": "web_search", "external_web_access": False},
        {"type": "image_generation", "output_format": "png"},
        {
            "type": "namespace",
            "name": "mcp__node_repl",
            "description": "Tools in the mcp__node_repl namespace.",
            "tools": [
                {
                    "type": "function",
                    "name": "js",
                    "description": "",
                    "strict": False,
                    "parameters": {"type": "object", "properties": {}},
                }
            ],
        },
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-session",
    "client_metadata": {"x-codex-installation-id": "1"},
    "text": {"verbosity": "low"},
}


def test_a_request_of_codex_is_read() -> None:
    prompt = read(strict_json.read_object(json.dumps(CODEX).encode()))
    assert [message.role for message in prompt.messages] == ["system", "system", "user", "user", "assistant", "user"]
    assert prompt.messages[4].parts == (
        Thinking("I list."),
        Text("One moment."),
        ToolCall("call_1", "shell_command", '{"command":"ls"}'),
        ToolCall("call_2", "mcp__node_repl__js", '{"code":"1+1"}'),
        ToolCall("call_3", "apply_patch", '{"input":"*** Begin Patch"}'),
    )
    assert [tool.name for tool in prompt.tools] == ["shell_command", "apply_patch", "mcp__node_repl__js"]
    assert prompt.stream and prompt.tool_choice == "auto" and prompt.effort is None and prompt.format is None
    assert set(prompt.dropped) == {
        *("tools.web_search", "tools.image_generation", "text.verbosity", "include", "prompt_cache_key", "client_metadata")
    }


def codex_reads(stream: bytes) -> list[Any]:
    """What Codex's own parser makes of a stream: it takes whole items from `output_item.done`, and of the deltas those of
    texts, of thoughts with an index, and of custom tools."""
    found: list[Any] = []
    for frame in stream.split(b"\n\n"):
        data = frame.partition(b"data: ")[2]
        event = json.loads(data) if data else {}
        match event.get("type"):
            case "response.output_item.done":
                found.append(codex_item(event["item"]))
            case "response.output_text.delta" | "response.custom_tool_call_input.delta":
                found.append(event["delta"])
            case "response.reasoning_summary_text.delta":
                found.append((event["summary_index"], event["delta"]))
            case "response.completed":
                found.append((event["response"]["id"], event["response"]["usage"]["total_tokens"]))
            case "response.failed":
                found.append(event["response"]["error"]["code"])
    return found


# The fields that Codex requires of an item; it ignores an item without them.
CODEX_NEEDS = {
    "message": ("role", "content"),
    "reasoning": ("summary",),
    "function_call": ("name", "arguments", "call_id"),
    "custom_tool_call": ("name", "input", "call_id"),
    "local_shell_call": ("status", "action", "call_id"),
}


def codex_item(item: dict[str, Any]) -> tuple[str, ...]:
    needed = CODEX_NEEDS[item["type"]]
    assert all(item.get(name) is not None for name in needed)
    return (item["type"], str(item.get("namespace", "")), str(item.get("name", "")))


def test_codex_reads_an_answer() -> None:
    writer = EventWriter(read(CODEX), "resp_1")
    stream = writer.start()
    for event in (
        ThinkingPiece("hm"),
        TextPiece("Hi"),
        ToolPiece(0, "c1", "mcp__node_repl__js", "{}"),
        ToolPiece(1, "c2", "apply_patch", '{"input":"***'),
        ToolPiece(1, arguments=' Begin"}'),
        Finished("tool_calls"),
        Counted(COUNTS),
    ):
        stream += writer.write(event)
    assert codex_reads(stream + writer.end()) == [
        (0, "hm"),
        ("reasoning", "", ""),
        "Hi",
        ("message", "", ""),
        "***",
        " Begin",
        ("function_call", "mcp__node_repl", "js"),
        ("custom_tool_call", "", "apply_patch"),
        ("resp_1", 30),
    ]


def test_codex_learns_why_a_stream_failed() -> None:
    writer = EventWriter(read(CODEX), "resp_1")
    assert codex_reads(writer.write(TextPiece("Hi")) + writer.fail(LimitReached())) == ["Hi", "rate_limit_exceeded"]


def test_openai_keeps_calls_apart_that_arrive_by_turns() -> None:
    backend = Backend([])
    pieces = [ToolPiece(index, arguments=text) for text in ('{"city"', ':"', "x", '"}') for index in (0, 1)]
    backend.events = [ToolPiece(0, "c1", "weather"), ToolPiece(1, "c2", "apply_patch"), *pieces, Finished("tool_calls")]
    first, second = streamed(backend).output
    assert first.type == "function_call" and first.arguments == '{"city":"x"}'
    assert second.type == "custom_tool_call" and second.input == "x"


def test_a_call_of_openai_is_parsed_against_its_tools() -> None:
    backend = Backend([ToolCall("c1", "weather", '{"city":"Bonn"}')], "tool_calls")
    with backend.client() as client, client.responses.stream(model="m", input="Hi", tools=TOOLS) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert snapshots[-1] == '{"city":"Bonn"}' and isinstance(call, ResponseFunctionToolCall)
