"""Requests of the Responses API become prompts that every backend can carry, and say so where they cannot."""

import base64
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Kind
from gateway.dialects.translation.chat_request import body_of
from gateway.dialects.translation.conversation import (
    Format,
    Image,
    Message,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolResult,
)
from gateway.dialects.translation.responses_input import EARLIER_OUTPUT, UNANSWERED
from gateway.dialects.translation.responses_names import ClientTool
from gateway.dialects.translation.responses_request import ResponsesPrompt, read, rough_need

BACKENDS: tuple[Kind, ...] = ("ollama", "openai")
USER = Message("user", (Text("Hi"),))
CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "shell", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "done"}
PNG = "data:image/png;base64,AAAA"


def read_with(**fields: Any) -> ResponsesPrompt:
    return read({"model": "m", "input": "Hi", **fields})


def messages_of(*items: Any) -> list[Message]:
    return read_with(input=list(items)).messages


def user(*parts: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": list(parts)}


def test_a_string_is_a_message_of_the_user() -> None:
    assert read_with().messages == [USER]


def test_instructions_come_first_and_a_developer_is_a_system() -> None:
    prompt = read_with(instructions="Be brief.", input=[{"role": "developer", "content": "No jokes."}, user("Hi")])
    assert prompt.messages == [Message("system", (Text("Be brief."),)), Message("system", (Text("No jokes."),)), USER]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"role": "user", "content": "Hi"}, USER),
        ({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, USER),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "Yes"}]}, Message("assistant", (Text("Yes"),))),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}, Message("assistant", (Text("No"),))),
        (user({"type": "input_image", "image_url": PNG}), Message("user", (Image("image/png", "AAAA"),))),
        (
            user({"type": "input_image", "image_url": "https://a/b.png", "detail": "low"}),
            Message("user", (Image(url="https://a/b.png", detail="low"),)),
        ),
        (user({"type": "input_image", "image_url": {"url": PNG}}), Message("user", (Image("image/png", "AAAA"),))),
        (
            user({"type": "input_file", "filename": "a.txt", "file_data": "data:text/plain;base64,SGk="}),
            Message("user", (Text("a.txt:\nHi"),)),
        ),
        (user({"type": "input_file", "file_data": PNG}), Message("user", (Image("image/png", "AAAA"),))),
        (
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "x"},
            Message("assistant", (Thinking("hm"),)),
        ),
        (
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            Message("assistant", (Thinking("hm"),)),
        ),
    ],
)
def test_items_become_messages(item: dict[str, Any], message: Message) -> None:
    assert messages_of(item) == [message]


def test_neighbours_become_one_turn_of_the_assistant() -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    assert messages_of(user("Hi"), thought, {"role": "assistant", "content": "I run it."}, CALL, OUTPUT) == [
        USER,
        Message("assistant", (Thinking("hm"), Text("I run it."), ToolCall("call_1", "shell", '{"a": 1}'))),
        Message("user", (ToolResult("call_1", (Text("done"),)),)),
    ]


def test_parallel_calls_are_paired_by_their_call_id_in_the_order_of_the_client() -> None:
    other = {**CALL, "call_id": "call_2", "id": "fc_2"}
    first, second = OUTPUT, {**OUTPUT, "call_id": "call_2"}
    calls = Message("assistant", (ToolCall("call_1", "shell", '{"a": 1}'), ToolCall("call_2", "shell", '{"a": 1}')))
    for outputs in [(first, second), (second, first)]:
        results = tuple(ToolResult(output["call_id"], (Text("done"),)) for output in outputs)
        assert messages_of(CALL, other, *outputs) == [calls, Message("user", results)]


def test_rounds_of_calls_stay_apart_even_with_the_same_id() -> None:
    """Some servers count their calls anew in each answer."""
    found = messages_of(CALL, OUTPUT, CALL, {**OUTPUT, "output": "again"})
    assert [message.role for message in found] == ["assistant", "user", "assistant", "user"]
    assert found[3] == Message("user", (ToolResult("call_1", (Text("again"),)),))


def test_a_result_stands_behind_its_call_whatever_came_in_between() -> None:
    assert messages_of(CALL, user("Hi"), OUTPUT) == [
        Message("assistant", (ToolCall("call_1", "shell", '{"a": 1}'),)),
        Message("user", (ToolResult("call_1", (Text("done"),)),)),
        USER,
    ]


def test_a_call_without_output_gets_one() -> None:
    assert messages_of(CALL, user("Hi"))[1:] == [
        Message("user", (ToolResult("call_1", (Text(UNANSWERED),), is_error=True),)),
        USER,
    ]


def test_an_output_without_call_becomes_a_message_of_the_user() -> None:
    assert messages_of(OUTPUT) == [Message("user", (Text(f"{EARLIER_OUTPUT}:"), Text("done")))]
    named = {"type": "function_call_output", "name": "handoff", "output": "done"}
    assert messages_of(named) == [Message("user", (Text(f"{EARLIER_OUTPUT} handoff:"), Text("done")))]


def test_an_output_may_have_pictures() -> None:
    parts = [{"type": "input_text", "text": "see"}, {"type": "input_image", "image_url": PNG}]
    result = messages_of(CALL, {**OUTPUT, "output": parts})[1]
    assert result == Message("user", (ToolResult("call_1", (Text("see"), Image("image/png", "AAAA"))),))


def test_free_text_calls_become_calls_with_one_string() -> None:
    text = '*** Begin Patch\n+"ü"\\d\n'
    found = messages_of(
        {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": text},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "ok"},
    )
    (call,) = found[0].parts
    assert isinstance(call, ToolCall) and strict_json.read_loosely(call.arguments.encode()) == {"input": text}
    assert found[1] == Message("user", (ToolResult("c", (Text("ok"),)),))


@pytest.mark.parametrize(
    ("call", "output", "expected", "result"),
    [
        (
            {
                "type": "local_shell_call",
                "id": "lsh_1",
                "call_id": "c",
                "status": "completed",
                "action": {"type": "exec", "command": ["ls"], "env": {}, "timeout_ms": 5},
            },
            {"type": "local_shell_call_output", "id": "c", "output": '{"output":"a"}'},
            ToolCall("c", "local_shell", '{"command":["ls"],"timeout_ms":5}'),
            ToolResult("c", (Text('{"output":"a"}'),)),
        ),
        (
            {"type": "shell_call", "call_id": "c", "action": {"commands": ["ls"]}},
            {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "a", "stderr": ""}]},
            ToolCall("c", "shell", '{"commands":["ls"]}'),
            ToolResult("c", (Text('[{"stdout":"a","stderr":""}]'),)),
        ),
        (
            {"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "a"}},
            {"type": "apply_patch_call_output", "call_id": "c", "status": "failed", "output": "no such file"},
            ToolCall("c", "apply_patch", '{"type":"delete_file","path":"a"}'),
            ToolResult("c", (Text("no such file"),), is_error=True),
        ),
    ],
)
def test_calls_of_other_types_are_calls_too(
    call: dict[str, Any], output: dict[str, Any], expected: ToolCall, result: ToolResult
) -> None:
    assert messages_of(call, output) == [Message("assistant", (expected,)), Message("user", (result,))]


def test_a_search_for_tools_adds_what_it_found() -> None:
    found = {"type": "function", "name": "create_event", "parameters": {"type": "object"}}
    prompt = read_with(
        tools=[{"type": "tool_search", "execution": "client", "description": "finds", "parameters": {"type": "object"}}],
        input=[
            {"type": "tool_search_call", "call_id": "c", "execution": "client", "arguments": {"query": "calendar"}},
            {
                "type": "tool_search_output",
                "call_id": "c",
                "tools": [{"type": "namespace", "name": "mcp__cal", "description": "", "tools": [found]}],
            },
        ],
    )
    assert [tool.name for tool in prompt.tools] == ["tool_search", "mcp__cal__create_event"]
    assert prompt.messages[0].parts == (ToolCall("c", "tool_search", '{"query":"calendar"}'),)
    (result,) = prompt.messages[1].parts
    assert isinstance(result, ToolResult) and "mcp__cal__create_event" in str(result.content)


def test_tools_that_an_item_brings_along_are_there() -> None:
    tools = [{"type": "function", "name": "late", "parameters": None}]
    assert read_with(input=[{"type": "additional_tools", "role": "developer", "tools": tools}, user("Hi")]).tools == [
        Tool("late")
    ]


def test_items_of_servers_are_dropped_by_name() -> None:
    prompt = read_with(input=[{"type": "web_search_call", "id": "ws_1"}, {"type": "ghost_snapshot"}, user("Hi")])
    assert prompt.messages == [USER]
    assert prompt.dropped == ["input.web_search_call", "input.ghost_snapshot"]


FUNCTION = {"type": "function", "name": "weather", "description": "d", "strict": True, "parameters": {"type": "object"}}


def test_tools_are_flat() -> None:
    assert read_with(tools=[FUNCTION]).tools == [Tool("weather", "d", {"type": "object"}, strict=True)]


def test_servers_tools_are_dropped_by_name() -> None:
    kinds = ["web_search", "image_generation", "file_search", "code_interpreter", "computer_use_preview", "mcp", "new_kind"]
    prompt = read_with(tools=[*({"type": kind} for kind in kinds), FUNCTION], tool_choice="auto")
    assert [tool.name for tool in prompt.tools] == ["weather"]
    assert prompt.dropped == [f"tools.{kind}" for kind in kinds]
    only = read_with(tools=[{"type": "web_search"}], tool_choice="auto")
    assert (only.tools, only.tool_choice) == ([], "")


def test_namespaces_lead_to_names_that_backends_take_and_back() -> None:
    tools = [
        {"type": "namespace", "name": "mcp__repl", "description": "", "tools": [{"type": "function", "name": "js"}]},
        {"type": "namespace", "name": "mcp__burp__", "description": "", "tools": [{"type": "function", "name": "status"}]},
        {"type": "namespace", "name": "a" * 60, "description": "", "tools": [{"type": "function", "name": "b" * 30}]},
        {"type": "namespace", "name": "a", "description": "", "tools": [{"type": "custom", "name": "b__c"}]},
        {"type": "namespace", "name": "a__b", "description": "", "tools": [{"type": "function", "name": "c"}]},
        {"type": "function", "name": "weather.now"},
    ]
    prompt = read_with(tools=tools)
    names = [tool.name for tool in prompt.tools]
    assert names[:2] == ["mcp__repl__js", "mcp__burp__status"] and len(set(names)) == 6
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    assert [prompt.names.tool_of(name) for name in names] == [
        ClientTool("function", "js", "mcp__repl"),
        ClientTool("function", "status", "mcp__burp__"),
        ClientTool("function", "b" * 30, "a" * 60),
        ClientTool("custom", "b__c", "a"),
        ClientTool("function", "c", "a__b"),
        ClientTool("function", "weather.now"),
    ]
    call = {"type": "function_call", "call_id": "c", "namespace": "mcp__repl", "name": "js", "arguments": "{}"}
    assert read_with(tools=tools, input=[call]).messages[0].parts == (ToolCall("c", "mcp__repl__js", "{}"),)


def test_a_free_text_tool_is_a_function_of_one_string_with_its_grammar() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: begin"}
    (tool,) = read_with(tools=[{"type": "custom", "name": "apply_patch", "description": "edits", "format": grammar}]).tools
    assert tool.name == "apply_patch" and tool.schema["required"] == ["input"]
    assert tool.description.startswith("edits\n\n") and "start: begin" in tool.description


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        (None, "", ["weather", "apply_patch"]),
        ("auto", "auto", ["weather", "apply_patch"]),
        ("none", "none", ["weather", "apply_patch"]),
        ("required", "required", ["weather", "apply_patch"]),
        ({"type": "function", "name": "weather"}, ("weather",), ["weather", "apply_patch"]),
        ({"type": "custom", "name": "apply_patch"}, ("apply_patch",), ["weather", "apply_patch"]),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
            "required",
            ["weather"],
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, "", []),
    ],
)
def test_the_choice_of_tools(choice: Any, expected: Any, names: list[str]) -> None:
    prompt = read_with(tools=[FUNCTION, {"type": "custom", "name": "apply_patch"}], tool_choice=choice)
    assert (prompt.tool_choice, [tool.name for tool in prompt.tools]) == (expected, names)


def test_settings() -> None:
    prompt = read_with(
        stream=True,
        max_output_tokens=16,
        temperature=0.5,
        top_p=1,
        parallel_tool_calls=False,
        reasoning={"effort": "xhigh", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"b": 1, "a": 2}, "strict": True}, "verbosity": "low"},
        safety_identifier="u1",
        store=True,
        include=["reasoning.encrypted_content"],
        truncation="auto",
        service_tier="auto",
        metadata={},
        prompt_cache_key="k",
        client_metadata={"a": "b"},
        unknown_field=1,
    )
    assert prompt.stream and prompt.most_output == 16 and prompt.sampling == {"temperature": 0.5, "top_p": 1}
    assert prompt.parallel_tools is False and prompt.effort == "xhigh" and prompt.user == "u1"
    assert prompt.format == Format({"b": 1, "a": 2}, "n", strict=True)
    assert list(prompt.format.schema or {}) == ["b", "a"]
    assert set(prompt.dropped) == {"text.verbosity", "store", "include", "prompt_cache_key", "client_metadata"}
    assert prompt.echo["store"] is False


@pytest.mark.parametrize(("form", "expected"), [({"type": "text"}, None), ({"type": "json_object"}, Format()), (None, None)])
def test_other_formats(form: Any, expected: Any) -> None:
    assert read_with(text={"format": form}).format == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"previous_response_id": "resp_1"}, "'previous_response_id'.*send the whole conversation"),
        ({"conversation": {"id": "c"}}, "'conversation'.*send the whole conversation"),
        ({"prompt": {"id": "p"}}, "'prompt'.*'instructions'"),
        ({"background": True}, "'background'"),
        ({"input": None}, "'input' is missing"),
        ({"input": []}, "'input' is empty"),
        ({"input": 1}, "'input' must be"),
        ({"input": [1]}, r"'input\[0\]' must be an object"),
        ({"input": [{"content": "x"}]}, r"'input\[0\]' must have a 'type'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "keeps no items"),
        ({"input": [{"type": "compaction", "encrypted_content": "x"}]}, "compaction"),
        ({"input": [{"role": "king", "content": "x"}]}, "'role'"),
        ({"input": [user({"type": "input_image", "file_id": "f"})]}, "keeps none"),
        ({"input": [user({"type": "input_image", "image_url": "file:///etc/passwd"})]}, "data URL or a web address"),
        ({"input": [user({"type": "input_file", "file_id": "f"})]}, "does not fetch"),
        ({"input": [user({"type": "input_file", "file_data": "data:application/pdf;base64,AA=="})]}, "no backend"),
        ({"input": [user({"type": "input_audio"})]}, "input_audio"),
        ({"input": [{"role": "system", "content": [{"type": "input_image", "image_url": PNG}]}]}, "has an image"),
        ({"input": [{"type": "function_call", "name": "a", "arguments": "{}"}]}, "'call_id'"),
        ({"input": [{"type": "function_call", "call_id": "c", "arguments": "{}"}]}, "'name'"),
        ({"tools": [{"type": "function"}]}, "'name'"),
        ({"tools": {}}, "'tools'"),
        ({"tool_choice": "required"}, "none that a backend"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "does not have"),
        ({"tool_choice": {"type": "web_search"}}, "no backend"),
        ({"max_output_tokens": 0}, "positive"),
        ({"max_output_tokens": "5"}, "positive"),
        ({"reasoning": {"effort": "much"}}, "effort"),
        ({"text": {"format": {"type": "json_schema"}}}, "schema"),
        ({"text": {"format": {"type": "xml"}}}, "format"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        read_with(**fields)


def test_the_estimate_counts_everything_that_a_model_reads_and_no_pictures_as_text() -> None:
    text = "word " * 1000
    parts: list[dict[str, Any]] = [
        {"input": text},
        {"input": [user({"type": "input_text", "text": text})]},
        {"input": [{**OUTPUT, "output": text}]},
        {"instructions": text, "input": ""},
        {"tools": [{**FUNCTION, "description": text}], "input": ""},
    ]
    assert all(1200 < rough_need(part).prompt < 1500 for part in parts)
    picture = base64.b64encode(bytes(300_000)).decode()
    content = user({"type": "input_image", "image_url": f"data:image/png;base64,{picture}"})
    assert 700 < rough_need({"input": [content]}).prompt < 2000
    assert rough_need({"input": [{"type": "reasoning", "summary": [], "encrypted_content": text}]}).prompt < 20


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)
FIELDS = """model input instructions tools tool_choice text reasoning stream max_output_tokens background prompt temperature
            user metadata store include truncation parallel_tool_calls conversation""".split()
KINDS = """message function_call function_call_output custom_tool_call custom_tool_call_output local_shell_call reasoning
           local_shell_call_output shell_call shell_call_output apply_patch_call apply_patch_call_output tool_search_call
           tool_search_output additional_tools item_reference other
           input_text input_image input_file refusal function custom namespace""".split()
NAMES = """type role content text image_url file_data filename refusal call_id id name namespace arguments input output summary
           action operation tools status command commands path diff""".split()
LIKELY = st.sampled_from([*KINDS, "user", "assistant", "c", PNG]) | JSON
OBJECT = st.dictionaries(st.sampled_from(NAMES), LIKELY | st.lists(st.dictionaries(st.sampled_from(NAMES), LIKELY), max_size=2))
BODY = st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(FIELDS, JSON), "input": JSON | st.lists(OBJECT), "tools": JSON | st.lists(OBJECT)}
)


SLOW = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


@SLOW
@given(BODY)
def test_any_json_is_read_or_refused(body: dict[str, Any]) -> None:
    check_is_read_or_refused(body)


def check_is_read_or_refused(body: dict[str, Any]) -> None:
    try:
        prompt = read(body)
    except BadRequest:
        return
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool.name) for tool in prompt.tools)
    calls = [part.id for message in prompt.messages for part in message.parts if isinstance(part, ToolCall)]
    results = [part.call_id for message in prompt.messages for part in message.parts if isinstance(part, ToolResult)]
    assert sorted(calls) == sorted(results)
    assert rough_need(body).prompt >= 1
    for kind in BACKENDS:
        try:
            body_of(prompt, kind)
        except BadRequest as refused:
            assert refused.message


VALID: dict[str, Any] = {
    "model": "m",
    "instructions": "i",
    "input": [
        {"role": "developer", "content": [{"type": "input_text", "text": "d"}]},
        user({"type": "input_text", "text": "u"}, {"type": "input_image", "image_url": PNG}),
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}], "content": None},
        CALL,
        {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "x"},
        {"type": "local_shell_call", "call_id": "c3", "action": {"type": "exec", "command": ["ls"]}},
        OUTPUT,
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "o"}]},
        {"type": "function_call_output", "call_id": "c3", "output": "o"},
    ],
    "tools": [
        FUNCTION,
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f", "parameters": {}}]},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        {"type": "local_shell"},
        {"type": "shell", "environment": {"type": "local"}},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
    "reasoning": {"effort": "low"},
}


def mutated(value: Any, steps: list[int], other: Any) -> Any:
    """A copy in which one value, which the steps lead to, is another."""
    if not steps or not isinstance(value, dict | list) or not value:
        return other
    names = list(value) if isinstance(value, dict) else list(range(len(value)))
    chosen = names[steps[0] % len(names)]
    pairs = ((name, mutated(value[name], steps[1:], other) if name == chosen else value[name]) for name in names)
    return dict(pairs) if isinstance(value, dict) else [one for _, one in pairs]


@SLOW
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), JSON)
def test_a_request_with_one_wrong_value_is_read_or_refused(steps: list[int], other: Any) -> None:
    check_is_read_or_refused(mutated(VALID, steps, other))


def test_depth_and_broken_unicode_are_no_surprise() -> None:
    deep: Any = {}
    for _ in range(3000):
        deep = {"a": deep}
    for body in (
        {"input": [{"type": "tool_search_call", "call_id": "c", "arguments": deep}]},
        {"input": [{**OUTPUT, "output": deep}]},
        {"input": "x", "tools": [{"type": "function", "name": "\ud83d", "parameters": deep}]},
    ):
        try:
            read(body)
        except BadRequest:
            continue
    assert rough_need({"input": [{**OUTPUT, "output": deep}]}).prompt >= 1


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    items = [
        user("Hi"),
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        CALL,
        OUTPUT,
        {"role": "assistant", "content": "Yes"},
        user("And?"),
    ]
    ends = [1, 4, 6]
    whole = messages_of(*items)
    for end in ends:
        part = messages_of(*items[:end])
        assert whole[: len(part)] == part
