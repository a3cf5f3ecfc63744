"""Requests of the Responses API for a backend that has this API: what is taken out, and which are better translated."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import BadRequest
from gateway.dialects.refused_fields import refuse_fields
from gateway.dialects.translation.responses_passthrough import passes_unchanged, without_unsupported
from tests.dialects.translation.native import JSON as ANY_JSON
from tests.dialects.translation.test_responses_request import CALL, FUNCTION, OUTPUT, PNG, VALID, user
from tests.dialects.translation.valid_requests import QUICK, responses_requests

JSON = dict[str, Any]
TEXT = {"type": "input_text", "text": "Hi"}
ANSWER = {"type": "output_text", "text": "Hi", "annotations": []}
FREE = {"type": "custom", "name": "apply_patch"}


def test_a_request_of_codex() -> None:
    body: JSON = {
        "model": "m",
        "instructions": "i",
        "input": [user(TEXT)],
        "tools": [FUNCTION, {"type": "web_search"}, FREE, {"type": "local_shell"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"a": "b"},
    }
    kept, dropped = without_unsupported(body)
    assert dropped == ["include", "prompt_cache_key", "client_metadata", "tools.web_search"]
    assert list(kept) == list(body)[:9]
    assert kept["tools"] == [FUNCTION, FREE, {"type": "local_shell"}]
    assert not passes_unchanged(kept), "llama.cpp has no such tools"
    assert passes_unchanged({**kept, "tools": [FUNCTION]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_predict", -1),
        ("max_tokens", 10**9),
        ("n", 99),
        ("messages", []),
        ("id_slot", 3),
        ("models", ["other"]),
        ("session_params", {"id": "a"}),
        ("fallbacks", ["other"]),
        ("Tools", [{"type": "web_search"}]),
        ("context_management", [{}]),
    ],
)
def test_what_reaches_beyond_the_model_is_taken_out_by_name(name: str, value: Any) -> None:
    kept, dropped = without_unsupported({"model": "m", name: value, "input": "Hi"})
    assert dropped == ([name] if value else [])
    assert kept == {"model": "m", "input": "Hi", "store": False}
    refuse_fields(kept)


@pytest.mark.parametrize(("store", "dropped"), [(True, ["store"]), (False, []), (None, [])])
def test_no_server_keeps_the_answer(store: Any, dropped: list[str]) -> None:
    found = without_unsupported({"store": store, "input": "Hi"})
    assert found == ({"store": False, "input": "Hi"}, dropped)
    assert list(found[0]) == ["store", "input"]


@pytest.mark.parametrize(
    "fields", [{"previous_response_id": "r"}, {"conversation": "c"}, {"prompt": {"id": "p"}}, {"background": True}]
)
def test_what_needs_an_earlier_answer_is_refused(fields: JSON) -> None:
    with pytest.raises(BadRequest):
        without_unsupported({"input": "Hi", **fields})


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        ({"type": "web_search"}, "tools.web_search"),
        ({"type": "web_search_preview"}, "tools.web_search_preview"),
        ({"type": "image_generation"}, "tools.image_generation"),
        ({"type": "mcp", "server_url": "https://a"}, "tools.mcp"),
        ({"type": "code_interpreter"}, "tools.code_interpreter"),
        ({"type": "shell", "environment": {"type": "container_auto"}}, "tools.shell"),
        ({**FUNCTION, "Type": "web_search"}, "tools.type"),
        ({"TYPE": "web_search", "name": "x"}, "tools.type"),
        ({"type": 1}, "tools.1"),
    ],
)
def test_tools_that_a_server_would_run_are_taken_out(tool: JSON, name: str) -> None:
    kept, dropped = without_unsupported({"input": "Hi", "tools": [tool, FUNCTION]})
    assert (kept["tools"], dropped) == ([FUNCTION], [name])
    assert without_unsupported({"input": "Hi", "tools": [tool]}) == ({"input": "Hi", "store": False}, [name])


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [FREE]},
        {"tools": [{"type": "namespace", "name": "n", "tools": [FUNCTION]}]},
        {"tools": [{"type": "local_shell"}]},
        {"tools": [{"type": "tool_search", "execution": "client"}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": 1},
        {"tools": [FUNCTION], "tool_choice": "none"},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "weather"}},
        {"text": {"format": {"type": "json_object"}}},
        {"text": 1},
        {"reasoning": {"effort": "xhigh"}},
        {"input": ""},
        {"input": []},
        {"input": [{"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "x"}]},
        {"input": [{"type": "web_search_call"}]},
        {"input": [{"role": "assistant", "content": "Hi"}]},
        {"input": [{"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": "Hi"}]},
        {"input": [{"type": "message", "role": "assistant", "content": [ANSWER]}]},
        {"input": [{"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]}]},
        {"input": [{**CALL, "namespace": "n"}]},
        {"input": [{**CALL, "arguments": {}}]},
        {"input": [{**OUTPUT, "output": [{"type": "input_image", "image_url": PNG}]}]},
        {"input": [user({"type": "input_file", "file_id": "f"})]},
        {"input": [user({"type": "input_image", "file_id": "f"})]},
        {"input": [user({"type": []})]},
        {"input": [{"role": []}]},
        {"input": [1]},
        VALID,
    ],
)
def test_what_some_server_would_refuse_or_leave_out_is_better_translated(fields: JSON) -> None:
    assert not passes_unchanged(without_unsupported({"model": "m", "input": "Hi", **fields})[0])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [FUNCTION], "tool_choice": "auto", "text": {"format": {"type": "text"}, "verbosity": "low"}},
        {"input": [user(TEXT, {"type": "input_image", "image_url": PNG}), CALL, OUTPUT]},
        {"input": [{"role": "developer", "content": "Hi"}, {**OUTPUT, "output": [TEXT]}]},
        {"input": [{"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": [ANSWER]}]},
        {"input": [{"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}]},
    ],
)
def test_what_every_server_reads_passes(fields: JSON) -> None:
    assert passes_unchanged(without_unsupported({"model": "m", "input": "Hi", **fields})[0])


@QUICK
@given(responses_requests())
def test_little_is_taken_out_of_a_plain_request(body: JSON) -> None:
    kept, dropped = without_unsupported(body)
    assert kept == {**body, "store": False}
    assert dropped == (["store"] if body.get("store") else [])


@QUICK
@given(st.dictionaries(st.text() | st.sampled_from(["input", "tools", "text", "tool_choice", "store", "background"]), ANY_JSON))
def test_any_object_passes_is_translated_or_is_refused(body: JSON) -> None:
    try:
        kept, dropped = without_unsupported(body)
    except BadRequest:
        return
    refuse_fields(kept)
    assert passes_unchanged(kept) in (True, False)
    assert all(name.isascii() and name.isprintable() for name in dropped)
