"""Requests of Anthropic's Messages API for a backend that has this API: what is taken out, and which are better translated."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import BadRequest
from gateway.dialects.refused_fields import refuse_fields
from gateway.dialects.translation.messages_passthrough import passes_unchanged, without_unsupported
from tests.dialects.translation.native import JSON as ANY_JSON
from tests.dialects.translation.test_messages_request import HELLO, SEARCH, WEATHER, claude_code
from tests.dialects.translation.valid_requests import QUICK, anthropic_requests

JSON = dict[str, Any]
OF_ANTHROPIC = [
    ("fallbacks", [{"model": "other"}]),
    ("container", "c"),
    ("mcp_servers", [{"url": "https://a"}]),
    ("context_management", {"edits": []}),
    ("service_tier", "auto"),
    ("inference_geo", "us"),
]
BEYOND_THE_MODEL = [
    ("kv_transfer_params", {"host": "a"}),
    ("lora", [1]),
    ("n_predict", -1),
    ("priority", 9),
    ("Tools", [SEARCH]),
]


def test_a_request_of_claude_code_passes_but_for_one_field() -> None:
    body = claude_code(turns=3)
    kept, dropped = without_unsupported(body)
    wanted = copy.deepcopy(body)
    del wanted["context_management"]
    assert (kept, dropped) == (wanted, ["context_management"])
    assert list(kept) == list(wanted)
    assert passes_unchanged(kept, "openai")


@pytest.mark.parametrize(("name", "value"), [*OF_ANTHROPIC, *BEYOND_THE_MODEL])
def test_what_no_model_server_has_is_taken_out_by_name(name: str, value: Any) -> None:
    body = {"model": "m", name: value, "messages": HELLO, "max_tokens": 1}
    kept, dropped = without_unsupported(body)
    assert dropped == [name]
    assert list(kept) == ["model", "messages", "max_tokens"]
    assert body[name] == value, "the request itself stays as it is"
    refuse_fields(kept)


def test_fields_without_a_value_are_not_named() -> None:
    assert without_unsupported({"fallbacks": None, "messages": HELLO}) == ({"messages": HELLO}, [])


def test_names_from_clients_are_cut_and_made_plain() -> None:
    body = {"a\r\nx-header: 1": 1, "b" * 99: 1, "é": 1, **{f"c{number}": 1 for number in range(99)}}
    dropped = without_unsupported(body)[1]
    assert dropped[:3] == ["a??x-header:?1", "b" * 64, "?"]
    assert len(dropped) == 32


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        (SEARCH, "tools.web_search_20250305"),
        ({**SEARCH, "input_schema": {}}, "tools.web_search_20250305"),
        ({"name": "web_search", "Type": "web_search_20250305", "input_schema": {}}, "tools.type"),
        ({"type": "custom", "TYPE": "web_search", "name": "x", "input_schema": {}}, "tools.type"),
        ({"type": ["web_search"], "name": "x", "input_schema": {}}, "tools.type"),
        ({"type": "bash_20250124", "name": "bash"}, "tools.bash_20250124"),
        ({"type": "mcp_toolset", "mcp_server_name": "a"}, "tools.mcp_toolset"),
    ],
)
def test_tools_that_a_server_would_run_are_taken_out(tool: JSON, name: str) -> None:
    body = {"messages": HELLO, "tools": [tool, WEATHER]}
    assert without_unsupported(body) == ({"messages": HELLO, "tools": [WEATHER]}, [name])
    assert without_unsupported({"messages": HELLO, "tools": [tool]}) == ({"messages": HELLO}, [name])


def test_an_earlier_answer_is_not_kept() -> None:
    with pytest.raises(BadRequest, match="thread"):
        without_unsupported({"thread": {"previous_message_id": "a"}})


def user(*blocks: JSON) -> JSON:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def result(*blocks: JSON) -> JSON:
    return user({"type": "tool_result", "tool_use_id": "c", "content": list(blocks)})


DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}


@pytest.mark.parametrize(
    "fields",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": {}}}},
        {"output_format": {"type": "json_schema", "schema": {}}},
        {"output_config": {"effort": "ultra"}},
        {"output_config": 1},
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
        {"tools": [WEATHER], "tool_choice": {"type": "none"}},
        {"tool_choice": {"type": "any"}},
        {"thinking": {"type": "disabled"}},
        user(DOCUMENT),
        user({"type": "search_result", "content": []}),
        user({"type": "compaction", "content": "x"}),
        user({"type": []}),
        result(DOCUMENT),
        result({"type": "tool_reference", "tool_name": "f"}),
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]},
        {"messages": [{"role": [], "content": "x"}]},
        {"messages": {}},
        {"messages": []},
        {"messages": [*HELLO, {"role": "assistant", "content": "One"}]},
    ],
)
def test_what_some_server_would_leave_out_is_better_translated(fields: JSON) -> None:
    assert not passes_unchanged({"model": "m", "messages": HELLO, **fields}, "openai")


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "x"},
        {"tools": [WEATHER], "tool_choice": {"type": "auto"}},
        {"tools": [WEATHER], "tool_choice": {"type": "any"}},
        {"thinking": {"type": "enabled", "budget_tokens": 2048}},
        {"thinking": None, "tool_choice": None},
        {"output_config": {"effort": "xhigh"}},
        result({"type": "text", "text": "x"}, {"type": "image", "source": {}}),
        user({"type": "tool_result", "tool_use_id": "c"}),
        user({"type": "tool_result", "tool_use_id": "c", "content": "x", "is_error": True}),
    ],
)
def test_what_every_server_reads_passes(fields: JSON) -> None:
    assert passes_unchanged({"model": "m", "messages": HELLO, **fields}, "openai")


def test_what_ollama_does_beyond_others_passes_there() -> None:
    for fields in (
        {"thinking": {"type": "disabled"}},
        {"messages": [*HELLO, {"role": "system", "content": "x"}]},
        {"messages": [*HELLO, {"role": "assistant", "content": "One"}]},
    ):
        body: JSON = {"model": "m", "messages": HELLO, **fields}
        assert passes_unchanged(body, "ollama") and not passes_unchanged(body, "openai")


@QUICK
@given(anthropic_requests())
def test_nothing_is_taken_out_of_a_plain_request(body: JSON) -> None:
    assert without_unsupported(body) == (body, [])


@QUICK
@given(st.dictionaries(st.text() | st.sampled_from(["messages", "tools", "thinking", "tool_choice", "thread"]), ANY_JSON))
def test_any_object_passes_is_translated_or_is_refused(body: JSON) -> None:
    try:
        kept, dropped = without_unsupported(body)
    except BadRequest:
        return
    refuse_fields(kept)
    assert passes_unchanged(kept, "openai") in (True, False)
    assert kept.keys() <= body.keys()
    assert all(name.isascii() and name.isprintable() for name in dropped)
