"""Requests in Anthropic's Messages API as prompts: each field, what is refused, what is dropped, what stays stable."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects import tokens
from gateway.dialects.dialect import Kind
from gateway.dialects.translation import messages_request
from gateway.dialects.translation.chat_request import body_of, losses_of
from gateway.dialects.translation.conversation import (
    Format,
    Image,
    Message,
    Prompt,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolResult,
)
from gateway.dialects.translation.messages_estimate import rough_need
from gateway.dialects.translation.messages_request import without_volatile_lines
from tests.support.prompt_tokens import estimate

BACKENDS: tuple[Kind, ...] = ("ollama", "openai")
JSON = dict[str, Any]
HELLO: list[JSON] = [{"role": "user", "content": "Hello"}]
SCHEMA = {"type": "object", "properties": {"zone": {"type": "string"}, "city": {"type": "string"}}, "required": ["city"]}
WEATHER: JSON = {"name": "weather", "description": "The weather", "input_schema": SCHEMA}
SEARCH: JSON = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
HEADER = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch=36ee5;"


def read(body: JSON) -> Prompt:
    """As the gateway reads it, without the line that differs in each request."""
    return messages_request.read(without_volatile_lines(body))


def count_estimate(body: JSON) -> int:
    """The tokens of the prompt, of which the gateway's rough count is not far."""
    exact = estimate(read(body))
    assert abs(rough_need(without_volatile_lines(body)).prompt - exact) <= 0.05 * exact + 2
    return exact


def prompt(**fields: Any) -> Prompt:
    return read({"model": "m", "max_tokens": 100, "messages": HELLO, **fields})


def only_message(content: Any, role: str = "user") -> Message:
    (message,) = prompt(messages=[{"role": role, "content": content}]).messages
    return message


def refusal(**fields: Any) -> str:
    with pytest.raises(BadRequest) as refused:
        prompt(**fields)
    return refused.value.message


def claude_code(header: str = HEADER, *, turns: int = 1) -> JSON:
    """A request as Claude Code sends it."""
    body: JSON = {
        "model": "qwen3-coder",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>\nCLAUDE.md\n</system-reminder>\n"},
                    {"type": "text", "text": "List the files", "cache_control": {"type": "ephemeral"}},
                ],
            }
        ],
        "system": [
            {"type": "text", "text": header},
            {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "# Tone\nBe short.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
        ],
        "tools": [
            {"name": "Bash", "description": "Runs", "input_schema": SCHEMA, "eager_input_streaming": True},
            {"name": "Read", "description": "Reads", "input_schema": SCHEMA, "defer_loading": True, "input_examples": [{}]},
        ],
        "metadata": {"user_id": '{"device_id":"d","session_id":"s"}'},
        "max_tokens": 32_000,
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "stream": True,
    }
    for turn in range(1, turns):
        call = {"type": "tool_use", "id": f"call_{turn}", "name": "Bash", "input": {"zone": "é", "city": "ls"}}
        result = {"type": "tool_result", "tool_use_id": f"call_{turn}", "content": "a.txt\n", "is_error": False}
        thinking = {"type": "thinking", "thinking": "I list.", "signature": "x"}
        body["messages"].append({"role": "assistant", "content": [thinking, call]})
        body["messages"].append({"role": "user", "content": [result]})
    return body


def test_a_request_of_claude_code() -> None:
    found = read(claude_code(turns=2))
    assert found == Prompt(
        messages=[
            Message("system", (Text("You are Claude Code.\n# Tone\nBe short."),)),
            Message("user", (Text("<system-reminder>\nCLAUDE.md\n</system-reminder>\n"), Text("List the files"))),
            Message("assistant", (Thinking("I list."), ToolCall("call_1", "Bash", '{"zone":"é","city":"ls"}'))),
            Message("user", (ToolResult("call_1", (Text("a.txt\n"),)),)),
        ],
        tools=[Tool("Bash", "Runs", SCHEMA), Tool("Read", "Reads", SCHEMA)],
        most_output=32_000,
        effort="high",
        stream=True,
        user='{"device_id":"d","session_id":"s"}',
        dropped=["context_management"],
    )
    assert json.dumps(found.tools[0].schema) == json.dumps(SCHEMA), "the order of keys is part of a cached prompt"


def test_a_later_turn_begins_with_the_same_messages() -> None:
    for turns in range(1, 5):
        earlier, later = read(claude_code(turns=turns)), read(claude_code(HEADER.replace("36ee5", "0aaa9"), turns=turns + 1))
        assert later.messages[: len(earlier.messages)] == earlier.messages
        assert later.tools == earlier.tools


# The line that differs in each request


def test_requests_that_differ_in_the_billing_header_are_equal() -> None:
    one, other = claude_code(), claude_code(HEADER.replace("36ee5", "0aaa9"))
    assert one != other
    assert without_volatile_lines(one) == without_volatile_lines(other)
    assert read(one) == read(other)


def test_all_else_is_left_byte_for_byte() -> None:
    body = claude_code(turns=3)
    wanted = {**body, "system": body["system"][1:]}
    assert strict_json.write(without_volatile_lines(body)) == strict_json.write(wanted)
    assert body == claude_code(turns=3), "the body itself is not changed"
    assert strict_json.write(without_volatile_lines(wanted)) == strict_json.write(wanted)


@pytest.mark.parametrize(
    ("system", "left"),
    [
        (f"{HEADER}\nYou are a bot.", "You are a bot."),
        (f"You are a bot.\n{HEADER}\nBe kind.", "You are a bot.\nBe kind."),
        (f"{HEADER}\n\nYou", "\nYou"),
        (f"see {HEADER}", f"see {HEADER}"),
        (
            [{"type": "text", "text": f"{HEADER}\nYou", "cache_control": {}}],
            [{"type": "text", "text": "You", "cache_control": {}}],
        ),
        ([{"type": "text", "text": ""}, {"type": "text", "text": HEADER}, 7], [{"type": "text", "text": ""}, 7]),
    ],
)
def test_the_billing_header_is_a_line_or_a_block(system: Any, left: Any) -> None:
    assert without_volatile_lines({"a": 1, "system": system, "b": 2}) == {"a": 1, "system": left, "b": 2}
    messages = [{"role": "user", "content": system}, None, {}, {"role": "system", "content": system}]
    kept = without_volatile_lines({"messages": messages})["messages"]
    assert kept == [{"role": "user", "content": system}, None, {}, {"role": "system", "content": left}]


@pytest.mark.parametrize("system", [HEADER, HEADER + "\n", [{"type": "text", "text": HEADER}]])
def test_a_system_prompt_with_nothing_but_the_header_goes(system: Any) -> None:
    assert without_volatile_lines({"system": system, "stream": True}) == {"stream": True}
    assert without_volatile_lines({"messages": [{"role": "system", "content": system}, 1]}) == {"messages": [1]}
    assert prompt(system=system).messages == [Message("user", (Text("Hello"),))]


# System prompts and roles


@pytest.mark.parametrize(
    ("system", "text"),
    [
        ("Be kind.", "Be kind."),
        ([{"type": "text", "text": "One"}, {"type": "text", "text": ""}, {"type": "text", "text": "Two"}], "One\nTwo"),
    ],
)
def test_the_system_prompt_comes_first(system: Any, text: str) -> None:
    assert prompt(system=system).messages == [Message("system", (Text(text),)), Message("user", (Text("Hello"),))]


@pytest.mark.parametrize("system", [None, "", []])
def test_an_empty_system_prompt_is_none(system: Any) -> None:
    assert prompt(system=system).messages == [Message("user", (Text("Hello"),))]


def test_system_messages_among_the_others_stay_where_they_are() -> None:
    messages = [*HELLO, {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, *HELLO]
    assert [message.role for message in prompt(messages=messages).messages] == ["user", "system", "user"]
    assert prompt(messages=messages).messages[1].parts == (Text("a\nb"),)


def test_a_system_message_is_cleared_by_the_next_message_of_the_user() -> None:
    note = {"role": "system", "content": "Now", "clear_at": "next_user_message"}
    assert len(prompt(messages=[*HELLO, note]).messages) == 2
    assert len(prompt(messages=[*HELLO, note, *HELLO]).messages) == 2
    assert len(prompt(messages=[*HELLO, {**note, "clear_at": "never"}, *HELLO]).messages) == 3


def test_a_system_message_may_have_nothing_but_settings() -> None:
    assert len(prompt(messages=[*HELLO, {"role": "system", "output_config": {"effort": "low"}}]).messages) == 1


# Content blocks


@pytest.mark.parametrize(
    ("block", "part"),
    [
        ({"type": "text", "text": "a", "citations": None, "cache_control": {"type": "ephemeral"}}, Text("a")),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}},
            Image(media_type="image/png", data="aGk="),
        ),
        ({"type": "image", "source": {"type": "url", "url": "https://a/b.png"}}, Image(url="https://a/b.png")),
        (
            {"type": "image", "source": {"type": "url", "url": "data:image/gif;base64,aGk="}},
            Image(media_type="image/gif", data="aGk="),
        ),
        (
            {
                "type": "document",
                "title": "T",
                "context": "C",
                "source": {"type": "text", "media_type": "text/plain", "data": "D"},
            },
            Text("T\nC\nD"),
        ),
        ({"type": "document", "source": {"type": "content", "content": "D"}}, Text("D")),
        (
            {"type": "search_result", "title": "T", "source": "https://a", "content": [{"type": "text", "text": "x"}]},
            Text("T\nhttps://a\nx"),
        ),
        ({"type": "compaction", "content": "So far"}, Text("So far")),
        ({"type": "tool_result", "tool_use_id": "c"}, ToolResult("c", ())),
        ({"type": "tool_result", "tool_use_id": "c", "content": "ok"}, ToolResult("c", (Text("ok"),))),
        ({"type": "tool_result", "tool_use_id": "c", "content": "", "is_error": True}, ToolResult("c", (), is_error=True)),
        (
            {
                "type": "tool_result",
                "tool_use_id": "c",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}},
                    {"type": "tool_reference", "tool_name": "Grep"},
                ],
            },
            ToolResult("c", (Text("see"), Image("image/png", "aGk="), Text("The tool Grep is available."))),
        ),
    ],
)
def test_blocks_of_a_user(block: JSON, part: object) -> None:
    assert only_message([block]).parts == (part,)


def test_a_document_of_blocks_keeps_its_images() -> None:
    image = {"type": "image", "source": {"type": "url", "url": "https://a"}}
    source = {"type": "content", "content": [{"type": "text", "text": "x"}, image]}
    assert only_message([{"type": "document", "title": "T", "source": source}]).parts == (
        Text("T"),
        Text("x"),
        Image(url="https://a"),
    )


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({"type": "thinking", "thinking": "Hm", "signature": "of some server"}, (Thinking("Hm"),)),
        ({"type": "thinking", "thinking": "", "signature": "s"}, ()),
        ({"type": "redacted_thinking", "data": "xxxx"}, ()),
        ({"type": "fallback", "from": {"model": "a"}, "to": {"model": "b"}}, ()),
        ({"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}, (ToolCall("toolu_1", "f", "{}"),)),
        ({"type": "tool_use", "id": "call_1", "name": "f", "input": {"b": [1, 2.5], "a": "é"}, "caller": {"type": "direct"}},
         (ToolCall("call_1", "f", '{"b":[1,2.5],"a":"é"}'),)),
    ],
)  # fmt: skip
def test_blocks_of_an_assistant(block: JSON, parts: tuple[object, ...]) -> None:
    assert only_message([block, {"type": "text", "text": "."}], "assistant").parts == (*parts, Text("."))


def test_parallel_results_stay_in_the_order_of_the_client() -> None:
    results = [{"type": "tool_result", "tool_use_id": name, "content": name} for name in "ba"]
    parts = only_message([*results, {"type": "text", "text": "go on"}]).parts
    assert parts == (ToolResult("b", (Text("b"),)), ToolResult("a", (Text("a"),)), Text("go on"))


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x"}}, "base64"),
        ({"type": "document", "source": {"type": "url", "url": "https://a"}}, "url"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "file"),
        ({"type": "container_upload", "file_id": "f"}, "container_upload"),
        ({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, "server_tool_use"),
        ({"type": "web_search_tool_result", "tool_use_id": "s", "content": []}, "web_search_tool_result"),
        ({"type": "mcp_tool_use", "id": "s"}, "mcp_tool_use"),
        ({"type": "tool_use", "id": "s", "name": "f", "input": {}}, "tool_use"),
        ({"type": "tool_result", "tool_use_id": "c", "content": [{"type": "tool_result"}]}, "tool_result"),
        ({"type": "video", "text": "x"}, "video"),
    ],
)
def test_blocks_that_would_lose_their_meaning_are_refused_by_name(block: JSON, words: str) -> None:
    message = refusal(messages=[*HELLO, {"role": "user", "content": [{"type": "text", "text": "a"}, block]}])
    assert "messages.1.content.1" in message
    assert words in message


@pytest.mark.parametrize("role", ["tool", "developer", "", None, 1])
def test_other_roles_are_refused(role: Any) -> None:
    assert "messages.0.role" in refusal(messages=[{"role": role, "content": "a"}])


@pytest.mark.parametrize("messages", [None, [], [{"role": "user", "content": ""}], [{"role": "system", "content": "a"}]])
def test_a_conversation_needs_content(messages: Any) -> None:
    assert "'messages'" in refusal(messages=messages)


def test_messages_without_parts_are_left_out() -> None:
    empty = [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}, {"role": "user", "content": []}]
    assert len(prompt(messages=[*HELLO, *empty]).messages) == 1


def test_an_answer_that_is_begun_is_to_be_continued() -> None:
    begun = [*HELLO, {"role": "assistant", "content": "The answer is ("}]
    assert prompt(messages=begun).continues_last
    assert prompt(messages=begun).messages[-1] == Message("assistant", (Text("The answer is ("),))
    assert not prompt(messages=[*begun, *HELLO]).continues_last
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    assert not prompt(messages=[*HELLO, {"role": "assistant", "content": [call]}]).continues_last
    text = {"type": "text", "text": "Then"}
    assert not prompt(messages=[*HELLO, {"role": "assistant", "content": [call, text]}]).continues_last


def test_what_ollama_ignores_is_named_in_the_words_of_this_api() -> None:
    fields: JSON = {"top_k": 5, "metadata": {"user_id": "u"}, "tools": [WEATHER]}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    lost = losses_of(prompt(**fields, tool_choice=choice), "ollama")
    assert lost == ["top_k", "tool_choice", "tool_choice.disable_parallel_tool_use", "metadata.user_id"]
    assert losses_of(prompt(output_config={"effort": "high"}), "ollama") == ["output_config.effort"]
    begun = [*HELLO, {"role": "assistant", "content": "One"}]
    assert losses_of(prompt(messages=begun, thinking={"type": "enabled", "budget_tokens": 2048}), "openai") == ["thinking"]


# Tools


def test_tools() -> None:
    custom = {
        "type": "custom",
        "name": "f",
        "strict": True,
        "cache_control": {"type": "ephemeral"},
        "allowed_callers": ["direct"],
    }
    found = prompt(tools=[WEATHER, custom])
    assert found.tools == [
        Tool("weather", "The weather", SCHEMA),
        Tool("f", "", {"type": "object", "properties": {}}, strict=True),
    ]
    assert found.dropped == []


@pytest.mark.parametrize(
    "kind",
    "web_search_20260318 web_fetch_20250910 computer_20251124 bash_20250124 text_editor_20250728 code_execution_20260521 "
    "memory_20250818 tool_search_tool_bm25_20251119 mcp_toolset browser_toolset_20260801".split(),
)
def test_tools_of_anthropic_are_dropped_by_name(kind: str) -> None:
    found = prompt(tools=[{"type": kind, "name": kind}, WEATHER])
    assert [tool.name for tool in found.tools] == ["weather"]
    assert found.dropped == [f"tools.{kind}"]


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "auto"}, "auto", None),
        ({"type": "any"}, "required", None),
        ({"type": "none"}, "none", None),
        ({"type": "tool", "name": "weather"}, ("weather",), None),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
        ({"type": "any", "disable_parallel_tool_use": False}, "required", None),
        (None, "", None),
    ],
)
def test_tool_choice(choice: Any, expected: object, parallel: bool | None) -> None:
    found = prompt(tools=[WEATHER, SEARCH], tool_choice=choice)
    assert (found.tool_choice, found.parallel_tools) == (expected, parallel)


def test_a_choice_among_no_tools_is_none() -> None:
    assert prompt(tools=[SEARCH], tool_choice={"type": "auto"}).tool_choice == ""
    assert prompt(tool_choice={"type": "none"}).tool_choice == ""


@pytest.mark.parametrize(
    ("choice", "tools", "words"),
    [
        ({"type": "tool", "name": "web_search"}, [SEARCH], "web_search_20250305"),
        ({"type": "any"}, [SEARCH], "web_search_20250305"),
        ({"type": "any"}, [], "not among 'tools'"),
        ({"type": "tool", "name": "f"}, [WEATHER], "not among 'tools'"),
        ({"type": "tool"}, [WEATHER], "'tool_choice.name'"),
        ({"type": "some"}, [WEATHER], "'tool_choice.type'"),
    ],
)
def test_a_tool_that_is_forced_must_be_there(choice: JSON, tools: list[JSON], words: str) -> None:
    assert words in refusal(tools=tools, tool_choice=choice)


# Settings


def test_sampling_and_stops() -> None:
    found = prompt(temperature=0.5, top_p=1, top_k=40, stop_sequences=["a", "", "\n\nHuman:"])
    assert found.sampling == {"temperature": 0.5, "top_p": 1, "top_k": 40}
    assert found.stop == ("a", "\n\nHuman:")
    assert prompt(temperature=None, stop_sequences=None).sampling == {}


@pytest.mark.parametrize(
    ("fields", "effort", "dropped"),
    [
        ({}, None, []),
        ({"thinking": {"type": "disabled"}}, "none", []),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, "none", []),
        ({"thinking": {"type": "adaptive"}}, None, []),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, None, ["thinking.display"]),
        ({"thinking": {"type": "between_tools"}}, None, ["thinking.type"]),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low", []),
        ({"thinking": {"type": "enabled", "budget_tokens": 4000}}, "low", []),
        ({"thinking": {"type": "enabled", "budget_tokens": 10_000}}, "medium", []),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, "high", []),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "max"}}, "max", []),
        ({"output_config": {"effort": "xhigh"}}, "xhigh", []),
        ({"output_config": {"effort": "ultra"}}, None, ["output_config.effort"]),
        ({"output_config": {"effort": None}}, None, []),
    ],
)
def test_effort(fields: JSON, effort: str | None, dropped: list[str]) -> None:
    found = prompt(**fields)
    assert (found.effort, found.dropped) == (effort, dropped)


def test_the_format_by_both_of_its_names() -> None:
    wanted = {"type": "json_schema", "schema": SCHEMA}
    assert prompt(output_config={"format": wanted}).format == Format(SCHEMA, strict=True)
    assert prompt(output_format=wanted).format == Format(SCHEMA, strict=True)
    assert prompt(output_config={"format": None}).format is None


def test_what_only_anthropic_has_is_named_and_what_nobody_knows_is_ignored() -> None:
    fields: JSON = {
        "service_tier": "auto", "container": "c", "mcp_servers": [{"type": "url"}], "speed": "fast", "inference_geo": "eu",
        "context_management": {"edits": []}, "diagnostics": None, "betas": ["x"], "cache_control": {"type": "ephemeral"},
        "thread": {"type": "create"}, "something_new": {"a": 1},
    }  # fmt: skip
    assert prompt(**fields).dropped == "container context_management inference_geo mcp_servers service_tier speed".split()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}}, "'thread'"),
        ({"compaction": {"type": "summarize"}}, "'compaction'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"max_tokens": "5"}, "'max_tokens'"),
        ({"max_tokens": True}, "'max_tokens'"),
        ({"temperature": "hot"}, "'temperature'"),
        ({"stop_sequences": "a"}, "'stop_sequences'"),
        ({"stop_sequences": [1]}, "'stop_sequences'"),
        ({"stream": "yes"}, "'stream'"),
        ({"system": 5}, "'system'"),
        ({"system": [{"type": "image"}]}, "'system.0'"),
        ({"messages": {}}, "'messages'"),
        ({"messages": [{"role": "user"}]}, "'messages.0.content'"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "'messages.0.content.0'"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "'messages.0.content.0.type'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "'messages.0.content.0.text'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'messages.0.content.0.source'"),
        ({"tools": [{"input_schema": {}}]}, "'tools.0.name'"),
        ({"tools": [{"name": "f", "input_schema": "s"}]}, "'tools.0.input_schema'"),
        ({"thinking": {"type": "enabled"}}, "'thinking.budget_tokens'"),
        ({"output_config": {"format": {"type": "grammar"}}}, "'output_config.format'"),
        ({"metadata": "me"}, "'metadata'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_the_name_of_its_field(fields: JSON, words: str) -> None:
    assert words in refusal(**fields)


# Counts


def test_the_count_includes_system_messages_tools_and_images() -> None:
    plain = count_estimate({"messages": HELLO})
    assert plain == tokens.TOKENS_PER_MESSAGE + 2
    with_system = count_estimate({"messages": HELLO, "system": "x" * 400})
    assert with_system == plain + 100 + tokens.TOKENS_PER_MESSAGE
    assert count_estimate({"messages": HELLO, "tools": [WEATHER]}) > plain + 20
    assert count_estimate({"messages": HELLO, "tools": [SEARCH]}) == plain, "a tool that no backend is sent costs nothing"
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 200_000}}
    assert 700 < count_estimate({"messages": [{"role": "user", "content": [image]}]}) < 1000
    result = {"type": "tool_result", "tool_use_id": "c", "content": [image, {"type": "text", "text": "y" * 4000}]}
    assert 1700 < count_estimate({"messages": [{"role": "user", "content": [result]}]}) < 2000
    assert count_estimate(claude_code()) == count_estimate(claude_code(HEADER + " more" * 100))


# Any JSON

LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)
NAMES = st.sampled_from(
    "model messages system tools tool_choice thinking output_config output_format metadata stop_sequences max_tokens stream "
    "temperature thread compaction role content type text source data media_type url input id name tool_use_id is_error "
    "title context input_schema description strict format schema effort budget_tokens user_id".split()
)
KINDS = st.sampled_from(
    "text image document search_result tool_use tool_result thinking redacted_thinking compaction base64 url content user "
    "assistant system auto any tool none enabled disabled json_schema custom".split()
)
LIKELY = st.recursive(
    LEAVES | KINDS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=6), max_leaves=30
)


def reads_or_refuses(body: JSON) -> None:
    try:
        found = read(body)
        assert rough_need(body).prompt >= 1 and estimate(found) >= 1
        for kind in BACKENDS:
            body_of(found, kind)
            losses_of(found, kind)
    except BadRequest as refused:
        assert refused.message
        return
    assert found.messages
    assert strict_json.write_with_replacements(without_volatile_lines(body))


@given(st.dictionaries(st.text() | NAMES, ANYTHING, max_size=6))
def test_any_object_is_read_or_refused(body: JSON) -> None:
    reads_or_refuses(body)


@given(st.dictionaries(NAMES, LIKELY, max_size=8))
def test_any_likely_object_is_read_or_refused(body: JSON) -> None:
    reads_or_refuses(body)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


PLACES = places(claude_code(turns=3))[1:]


@given(st.sampled_from(PLACES), ANYTHING | LIKELY)
def test_a_request_with_one_value_changed_is_read_or_refused(place: tuple[Any, ...], value: Any) -> None:
    body = copy.deepcopy(claude_code(turns=3))
    parent: Any = body
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    reads_or_refuses(body)


def test_what_is_nested_too_deeply_is_refused() -> None:
    deep: Any = {}
    for _ in range(600):
        deep = {"a": deep}
    call = {"type": "tool_use", "id": "c", "name": "f", "input": deep}
    assert "nested too deeply" in refusal(messages=[*HELLO, {"role": "assistant", "content": [call]}])
    reads_or_refuses({"messages": HELLO, "tools": [{"name": "f", "input_schema": deep}]})


def test_half_a_surrogate_pair_is_no_accident() -> None:
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": "\ud800"}}
    assert "Unicode" in refusal(messages=[*HELLO, {"role": "assistant", "content": [call]}])
    reads_or_refuses({"messages": [{"role": "user", "content": "\ud800"}]})
