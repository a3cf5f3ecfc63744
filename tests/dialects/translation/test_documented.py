"""Each row of the tables of translated fields is what the code does."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from gateway.core.errors import BadRequest
from gateway.dialects.translation import messages_request, native_chat, native_embed, native_generate, responses_request
from gateway.dialects.translation.chat_request import body_of, losses_of
from gateway.dialects.translation.completions import Completion, completion_body_of
from gateway.dialects.translation.conversation import Prompt
from gateway.dialects.translation.embeddings import Embedding, embeddings_body_of
from tests.dialects.translation.native import PNG
from tests.dialects.translation.native import WEATHER as NATIVE_TOOL
from tests.support import documents

JSON = dict[str, Any]
Wanted = Prompt | Completion | Embedding
PAGE, NOT_BY_OLLAMA = "docs/translation.md", "not by Ollama"
SCHEMA = {"type": "object", "properties": {}}
WEATHER = {"name": "weather", "input_schema": SCHEMA}
FUNCTION = {"type": "function", "name": "weather", "parameters": SCHEMA}
HELLO = {"role": "user", "content": "Hello"}


def said(*blocks: JSON) -> JSON:
    return {"messages": [HELLO, {"role": "assistant", "content": [*blocks, {"type": "text", "text": "Hm"}]}, HELLO]}


def asked(**block: Any) -> JSON:
    return {"messages": [{"role": "user", "content": [block, {"type": "text", "text": "Hello"}]}]}


def document(**source: str) -> JSON:
    return asked(type="document", source=source)


def items(*given: JSON) -> JSON:
    return {"input": [HELLO, *given]}


def options(**fields: Any) -> JSON:
    return {"options": fields}


CALL = {"type": "tool_use", "id": "c", "name": "weather", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": "sunny"}
TOOL = {"tools": [WEATHER]}
# The fields of a request with the row's field; the second part is what the request has without it, if it needs more.
MESSAGES: Mapping[str, tuple[JSON, JSON]] = {
    "`system`": ({"system": "Be brief."}, {}),
    "`messages`: `text`": (asked(type="text", text="More"), {}),
    "`messages`: `image`": (asked(type="image", source={"type": "base64", "media_type": "image/png", "data": PNG}), {}),
    "`messages`: `document`": (document(type="text", data="More"), {}),
    "`messages`: `search_result`": (asked(type="search_result", title="t", source="s", content=[]), {}),
    "`messages`: `tool_use` and `tool_result`": (
        {"messages": [HELLO, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [RESULT]}]},
        {},
    ),
    "`messages`: `thinking`": (said({"type": "thinking", "thinking": "Well", "signature": "s"}), said()),
    "`messages`: `redacted_thinking`": (said({"type": "redacted_thinking", "data": "x"}), said()),
    "`messages`: `cache_control`": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}]}
            ]
        },
        {},
    ),
    "`messages`: `document` that is a PDF": (document(type="base64", media_type="application/pdf", data="AAAA"), {}),
    "`messages`: `server_tool_use`": (said({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}), {}),
    "`max_tokens`": ({"max_tokens": 7}, {}),
    "`stop_sequences`": ({"stop_sequences": ["x"]}, {}),
    "`temperature`": ({"temperature": 0.5}, {}),
    "`top_p`": ({"top_p": 0.5}, {}),
    "`top_k`": ({"top_k": 5}, {}),
    "`tools` with an `input_schema`": (TOOL, {}),
    "`tools` of Anthropic's own": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, {}),
    "`tool_choice`: `any`": ({**TOOL, "tool_choice": {"type": "any"}}, TOOL),
    "`tool_choice`: `tool`": ({**TOOL, "tool_choice": {"type": "tool", "name": "weather"}}, TOOL),
    "`tool_choice`: `none`": ({**TOOL, "tool_choice": {"type": "none"}}, TOOL),
    "`tool_choice` of a tool that is not there": ({**TOOL, "tool_choice": {"type": "tool", "name": "other"}}, TOOL),
    "`tool_choice.disable_parallel_tool_use`": (
        {**TOOL, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        TOOL,
    ),
    "`thinking`: `enabled`": ({"thinking": {"type": "enabled", "budget_tokens": 4096}}, {}),
    "`thinking`: `disabled`": ({"thinking": {"type": "disabled"}}, {}),
    "`thinking.display`": ({"thinking": {"type": "adaptive", "display": "summarized"}}, {}),
    "`output_config.effort`": ({"output_config": {"effort": "max"}}, {}),
    "`output_config.format`": ({"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}, {}),
    "`metadata.user_id`": ({"metadata": {"user_id": "u"}}, {}),
    "`stream`": ({"stream": True}, {}),
    "`context_management`": ({"context_management": {"edits": []}}, {}),
    "`container`": ({"container": "c"}, {}),
    "`mcp_servers`": ({"mcp_servers": [{"url": "https://a"}]}, {}),
    "`fallbacks`": ({"fallbacks": [{"model": "other"}]}, {}),
    "`service_tier`": ({"service_tier": "auto"}, {}),
    "`inference_geo`": ({"inference_geo": "us"}, {}),
    "`thread.previous_message_id`": ({"thread": {"previous_message_id": "msg_1"}}, {}),
    "`compaction`": ({"compaction": {}}, {}),
    "an unknown field": ({"unheard_of": 1}, {}),
}
FUNCTIONS = {"tools": [FUNCTION]}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "sunny"}
PATCH = {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "x"}
SHELL = {"type": "local_shell_call", "call_id": "c", "action": {"type": "exec", "command": ["ls"]}}
THOUGHT = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "Hm"}]}
FILE = {"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}
RESPONSES: Mapping[str, tuple[JSON, JSON]] = {
    "`instructions`": ({"instructions": "Be brief."}, {}),
    "`input`: `message`": (items({"type": "message", "role": "developer", "content": "Be brief."}), {}),
    "`input`: `function_call` and `function_call_output`": (
        items({"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}, OUTPUT),
        {},
    ),
    "`input`: `custom_tool_call`": (items(PATCH), {}),
    "`input`: `local_shell_call`": (items(SHELL), {}),
    "`input`: `reasoning`": (items(THOUGHT), {}),
    "`input`: `web_search_call`": (items({"type": "web_search_call", "id": "w", "status": "completed"}), {}),
    "`input`: `item_reference`": (items({"type": "item_reference", "id": "m"}), {}),
    "`input`: `compaction`": (items({"type": "compaction", "encrypted_content": "x"}), {}),
    "`input_file` with a `file_id`": (items(FILE), {}),
    "`tools`: `function`": (FUNCTIONS, {}),
    "`tools`: `namespace`": ({"tools": [{"type": "namespace", "name": "n", "tools": [FUNCTION]}]}, {}),
    "`tools`: `custom`": ({"tools": [{"type": "custom", "name": "apply_patch"}]}, {}),
    "`tools`: `local_shell`": ({"tools": [{"type": "local_shell"}]}, {}),
    "`tools`: `web_search`": ({"tools": [{"type": "web_search"}]}, {}),
    "`tool_choice`: `required`": ({**FUNCTIONS, "tool_choice": "required"}, FUNCTIONS),
    "`tool_choice`: `function`": ({**FUNCTIONS, "tool_choice": {"type": "function", "name": "weather"}}, FUNCTIONS),
    "`tool_choice`: `none`": ({**FUNCTIONS, "tool_choice": "none"}, FUNCTIONS),
    "`parallel_tool_calls`": ({**FUNCTIONS, "parallel_tool_calls": False}, FUNCTIONS),
    "`max_output_tokens`": ({"max_output_tokens": 16}, {}),
    "`temperature`": ({"temperature": 0.5}, {}),
    "`top_p`": ({"top_p": 0.5}, {}),
    "`reasoning.effort`": ({"reasoning": {"effort": "xhigh"}}, {}),
    "`text.format`": ({"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}}, {}),
    "`text.verbosity`": ({"text": {"verbosity": "low"}}, {}),
    "`user`": ({"user": "u"}, {}),
    "`safety_identifier`": ({"safety_identifier": "u"}, {}),
    "`stream`": ({"stream": True}, {}),
    "`include`": ({"include": ["reasoning.encrypted_content"]}, {}),
    "`store`": ({"store": True}, {}),
    "`metadata`": ({"metadata": {"a": "b"}}, {}),
    "`prompt_cache_key`": ({"prompt_cache_key": "k"}, {}),
    "`service_tier`": ({"service_tier": "flex"}, {}),
    "`truncation`": ({"truncation": "middle"}, {}),
    "`max_tool_calls`": ({"max_tool_calls": 3}, {}),
    "`top_logprobs`": ({"top_logprobs": 3}, {}),
    "`client_metadata`": ({"client_metadata": {"a": "b"}}, {}),
    "`previous_response_id`": ({"previous_response_id": "resp_1"}, {}),
    "`conversation`": ({"conversation": "conv_1"}, {}),
    "`prompt`": ({"prompt": {"id": "p"}}, {}),
    "`background`": ({"background": True}, {}),
    "an unknown field": ({"unheard_of": 1}, {}),
}
OPTIONS: Mapping[str, tuple[JSON, JSON]] = {
    "`options.num_predict`": (options(num_predict=7), {}),
    "`options.stop`": (options(stop=["x"]), {}),
    "`options.num_ctx`": (options(num_ctx=2048), {}),
    "`options.mirostat`": (options(mirostat=1), {}),
    **{
        f"`options.{name}`": (options(**{name: 1}), {})
        for name in "temperature top_p top_k min_p seed repeat_penalty presence_penalty frequency_penalty".split()
    },
}
NATIVE_CALL = {"function": {"name": "get_weather", "arguments": {}}}
NATIVE_RESULT = {"role": "tool", "tool_name": "get_weather", "content": "sunny"}
OF_ALL: Mapping[str, tuple[JSON, JSON]] = {
    "`think`": ({"think": True}, {}),
    "`format`": ({"format": "json"}, {}),
    "`keep_alive`": ({"keep_alive": "5m"}, {}),
    "`logprobs`": ({"logprobs": True}, {}),
}
CHATS: Mapping[str, tuple[JSON, JSON]] = {
    "`messages`: `content`": ({"messages": [{"role": "user", "content": "More"}]}, {}),
    "`messages`: `images`": ({"messages": [{**HELLO, "images": [PNG]}]}, {}),
    "`messages`: `thinking`": (
        {"messages": [HELLO, {"role": "assistant", "content": "a", "thinking": "Hm"}, HELLO]},
        {"messages": [HELLO, {"role": "assistant", "content": "a"}, HELLO]},
    ),
    "`messages`: `tool_calls`": (
        {"messages": [HELLO, {"role": "assistant", "content": "", "tool_calls": [NATIVE_CALL]}, NATIVE_RESULT]},
        {},
    ),
    "`tools`": ({"tools": [NATIVE_TOOL]}, {}),
    "`stream`": ({"stream": False}, {}),
    "`truncate`": ({"truncate": True}, {}),
    "`shift`": ({"shift": True}, {}),
    "`top_logprobs`": ({"top_logprobs": 3}, {}),
    "an unknown field": ({"unheard_of": 1}, {}),
    **OPTIONS,
    **OF_ALL,
}
PROMPTS: Mapping[str, tuple[JSON, JSON]] = {
    "`prompt`": ({"prompt": "More"}, {}),
    "`system`": ({"system": "Be brief."}, {}),
    "`images`": ({"images": [PNG]}, {}),
    "`suffix`": ({"suffix": "end"}, {}),
    "`raw`": ({"raw": True}, {}),
    "`template`": ({"template": "{{ .Prompt }}"}, {}),
    "`context`": ({"context": [1, 2]}, {}),
    **OF_ALL,
}
EMBEDDINGS: Mapping[str, tuple[JSON, JSON]] = {
    "`input`": ({"input": "More"}, {}),
    "`dimensions`": ({"dimensions": 7}, {}),
    "`truncate`": ({"truncate": True}, {}),
    "`options.num_ctx`": (options(num_ctx=2048), {}),
    "`keep_alive`": ({"keep_alive": "5m"}, {}),
}
# Of each section: how a request is read, the plainest one, and the request of each row.
SECTIONS: Mapping[str, tuple[Callable[[JSON], Wanted], JSON, Mapping[str, tuple[JSON, JSON]]]] = {
    "Anthropic's messages": (messages_request.read, {"messages": [HELLO]}, MESSAGES),
    "OpenAI's responses": (responses_request.read, {"input": [HELLO]}, RESPONSES),
    "Ollama's chats": (native_chat.read_chat, {"messages": [HELLO]}, CHATS),
    "Ollama's prompts": (native_generate.read_generate, {"prompt": "Hello"}, PROMPTS),
    "Ollama's embeddings": (native_embed.read_embed, {"input": "Hello"}, EMBEDDINGS),
}
ROWS = [
    (name, *row[:2]) for name in SECTIONS for row in documents.tables(documents.section(PAGE, name)) if row[1] != "what happens"
]


def written(wanted: Wanted) -> JSON:
    """What servers of the other kind are sent."""
    if isinstance(wanted, Completion):
        return completion_body_of(wanted, "m")
    return embeddings_body_of(wanted, "m") if isinstance(wanted, Embedding) else body_of(wanted, "openai")


def lost_by_ollama(wanted: Wanted) -> list[str]:
    return losses_of(wanted, "ollama") if isinstance(wanted, Prompt) else []


@pytest.mark.parametrize(("heading", "field", "fate"), ROWS)
def test_a_row_is_what_the_code_does(heading: str, field: str, fate: str) -> None:
    read, plain, examples = SECTIONS[heading]
    fields, others = examples[field]
    if fate == "refused":
        with pytest.raises(BadRequest):
            read({**plain, **fields})
        return
    found, without = read({**plain, **fields}), read({**plain, **others})
    named = [name for name in found.dropped if name not in without.dropped]
    assert (written(found) != written(without)) == (fate in ("carried", NOT_BY_OLLAMA))
    assert bool(named) == (fate == "dropped")
    if heading in ("Anthropic's messages", "OpenAI's responses"):
        lost = lost_by_ollama(found)
        assert bool(lost) == (fate == NOT_BY_OLLAMA)
        named += lost
    spans = [part for span in documents.spans(field) for part in (span, span.partition(".")[0])]
    assert all(name.partition(".")[0] in spans or name == "user" for name in named), named


def test_every_row_has_an_example_and_each_example_a_row() -> None:
    for heading, (_, _, examples) in SECTIONS.items():
        assert {field for name, field, _ in ROWS if name == heading} == set(examples)


def test_the_fates_are_explained() -> None:
    explained = documents.section(PAGE, "What translations carry").partition("###")[0]
    assert {fate for _, _, fate in ROWS} == set(re.findall(r"^\| ([a-zO][\w ]+?) \|", explained, re.MULTILINE))


def test_every_field_that_is_dropped_by_name_has_a_row() -> None:
    """At least of those of the Responses API; the page has the most frequent of Anthropic's and of Ollama's options."""
    fates = {field: fate for name, field, fate in ROWS if name == "OpenAI's responses"}
    rest = {"access_programs", "context_management", "image", "moderation", "prompt_cache_options", "prompt_cache_retention"}
    assert {f"`{name}`" for name in set(responses_request.DROPPED) - rest - {"stream_options"}} <= fates.keys()
    assert all(fates[f"`{name}`"] == "dropped" for name in responses_request.DROPPED if f"`{name}`" in fates)


def test_the_budgets_of_thinking_are_those_of_the_page() -> None:
    text = documents.section(PAGE, "Anthropic's messages")
    low, medium = messages_request.LOW_BUDGET, messages_request.MEDIUM_BUDGET
    assert f"low below {low:,} tokens, medium below {medium:,}, else high" in text
