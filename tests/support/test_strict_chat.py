"""The strict server finds each wrong body wrong, and a right one right."""

import copy
from typing import Any

import pytest

from tests.support.strict_chat import problem_of

CALL = {"id": "a", "type": "function", "function": {"name": "run", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "run", "parameters": {"type": "object", "properties": {}}}}
USER: dict[str, Any] = {"role": "user", "content": "hi"}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "b"}]}
RESULTS: list[dict[str, Any]] = [{"role": "tool", "tool_call_id": name, "content": ""} for name in "ab"]
RIGHT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "system", "content": "Be short."}, USER, CALLED, *RESULTS],
    "tools": [TOOL],
    "stream": True,
    "stream_options": {"include_usage": True},
}


def test_a_right_body() -> None:
    assert not problem_of(RIGHT)
    assert not problem_of({**RIGHT, "messages": [*RIGHT["messages"], USER], "tool_choice": "auto", "temperature": 0.5})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"thinking": {}}, "unknown fields"),
        ({"stream": False}, "stream_options without stream"),
        ({"tools": []}, "tools is no list, or empty"),
        ({"tools": [TOOL, TOOL]}, "two tools have the same name"),
        ({"tools": [{"type": "function", "function": {"name": "a.b"}}]}, "no name of a function"),
        ({"tool_choice": "any"}, "tool_choice is unknown"),
        ({"max_tokens": 0}, "max_tokens is no positive integer"),
        ({"reasoning_effort": "xhigh"}, "reasoning_effort is unknown"),
        ({"response_format": {"type": "json_object"}}, "response_format has another shape"),
        ({"messages": [USER, USER]}, "two messages of the user"),
        ({"messages": [USER, {"role": "system", "content": "a"}]}, "a system message is not the first"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "the last message is of the role assistant"),
        ({"messages": [USER, CALLED, RESULTS[0]]}, "calls without a result"),
        ({"messages": [USER, CALLED, RESULTS[1], RESULTS[0]]}, "the results have another order"),
        ({"messages": [USER, CALLED, USER]}, "calls without a result"),
        ({"messages": [RESULTS[0]]}, "a result without a call"),
        ({"messages": [{"role": "developer", "content": "a"}]}, "no role: developer"),
        ({"messages": [{**USER, "content": None}]}, "content is no string"),
        ({"messages": [{**USER, "content": [{"type": "input_text", "text": "a"}]}]}, "unknown part"),
        ({"messages": [{**USER, "cache_control": {}}]}, "a message has unknown fields"),
    ],
)
def test_a_wrong_body(fields: dict[str, Any], problem: str) -> None:
    assert problem in problem_of({**copy.deepcopy(RIGHT), **fields})
