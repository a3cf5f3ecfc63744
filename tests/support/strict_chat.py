"""What a strict server finds wrong with the body of a chat/completions request.

It is stricter than each real one: no unknown fields, one system message at the beginning, users and assistants by turns, and
the results of tools directly behind their calls, in their order.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
NUMBERS = frozenset(
    "temperature top_p top_k min_p seed presence_penalty frequency_penalty repeat_penalty repetition_penalty".split()
)
FIELDS = NUMBERS | frozenset(
    "model messages tools tool_choice parallel_tool_calls response_format reasoning_effort chat_template_kwargs max_tokens "
    "max_completion_tokens stop user stream stream_options continue_final_message add_generation_prompt".split()
)
MESSAGE_FIELDS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "reasoning", "reasoning_content", "tool_calls"},
    "tool": {"role", "content", "tool_call_id"},
}


class Wrong(Exception):
    """The body is wrong."""


def problem_of(body: Any) -> str:
    """The first thing that is wrong, or "" if nothing is."""
    try:
        _check(isinstance(body, dict), "the body is no object")
        _check_fields(body)
        _check_tools(body)
        _check_messages(body.get("messages"), prefilled=body.get("continue_final_message") is True)
    except Wrong as wrong:
        return str(wrong)
    return ""


def _check(right: bool, problem: str) -> None:
    if not right:
        raise Wrong(problem)


def _check_fields(body: Json) -> None:
    unknown = sorted(body.keys() - FIELDS)
    _check(not unknown, f"unknown fields: {unknown}")
    _check(isinstance(body.get("model"), str) and bool(body["model"]), "model is missing")
    _check(isinstance(body.get("stream", False), bool), "stream is no boolean")
    _check("stream_options" not in body or body.get("stream") is True, "stream_options without stream")
    for name in NUMBERS & body.keys():
        _check(isinstance(body[name], int | float) and not isinstance(body[name], bool), f"{name} is no number")
    for name in ("max_tokens", "max_completion_tokens"):
        _check(isinstance(body.get(name, 1), int) and body.get(name, 1) > 0, f"{name} is no positive integer")
    _check(isinstance(body.get("user", ""), str), "user is no string")
    _check(body.get("reasoning_effort", "low") in ("low", "medium", "high"), "reasoning_effort is unknown")
    form = body.get("response_format")
    if form is not None:
        _check(form.keys() == {"type", "json_schema"} and form["type"] == "json_schema", "response_format has another shape")
        _check(isinstance(form["json_schema"].get("name"), str), "response_format has no name")
        _check(isinstance(form["json_schema"].get("schema"), dict), "response_format has no schema")


def _check_tools(body: Json) -> None:
    tools = body.get("tools")
    choice = body.get("tool_choice")
    if tools is None:
        _check(choice is None and "parallel_tool_calls" not in body, "a choice without tools")
        return
    _check(isinstance(tools, list) and bool(tools), "tools is no list, or empty")
    _check(choice in (None, "auto", "none", "required"), "tool_choice is unknown")
    for tool in tools:
        _check(tool.keys() == {"type", "function"} and tool["type"] == "function", f"this is no function: {tool}")
        _check_function(tool["function"])
    names = [tool["function"]["name"] for tool in tools]
    _check(len(names) == len(set(names)), "two tools have the same name")


def _check_function(function: Json) -> None:
    unknown = function.keys() - {"name", "description", "parameters", "strict"}
    _check(not unknown, f"a function has unknown fields: {sorted(unknown)}")
    _check(NAME.fullmatch(function["name"]) is not None, f"no name of a function: {function['name']}")
    _check(isinstance(function.get("description", ""), str), "a description is no string")
    parameters: Any = function.get("parameters")
    _check(isinstance(parameters, dict) and parameters.get("type") == "object", "parameters are no schema of an object")
    _check(isinstance(parameters["properties"], dict), "parameters have no properties")


def _check_messages(messages: Any, *, prefilled: bool) -> None:
    _check(isinstance(messages, list) and bool(messages), "messages is no list, or empty")
    for message in messages:
        role = message.get("role")
        _check(role in MESSAGE_FIELDS, f"no role: {role}")
        unknown = message.keys() - MESSAGE_FIELDS[role]
        _check(not unknown, f"a message has unknown fields: {sorted(unknown)}")
        _check_content(message)
    turns = iter(messages[1:] if messages[0]["role"] == "system" else messages)
    last = _check_turns(turns)
    _check(last in (("user", "tool") if not prefilled else ("assistant",)), f"the last message is of the role {last}")


def _check_turns(messages: Iterator[Json]) -> str:
    """Returns the role of the last message."""
    before, ids = "assistant", list[str]()
    for message in messages:
        role = message["role"]
        _check(role != "system", "a system message is not the first")
        if role == "tool":
            _check(bool(ids), "a result without a call")
            _check(message.get("tool_call_id") == ids.pop(0), "the results have another order than the calls")
        else:
            _check(not ids, f"calls without a result: {ids}")
            _check(role == "user" or before != "assistant", "two messages of the assistant without one between them")
            _check(role == "assistant" or before != "user", "two messages of the user without one between them")
            ids = [_checked_call(call) for call in message.get("tool_calls", [])]
        before = role
    _check(not ids, f"calls without a result: {ids}")
    return before


def _check_content(message: Json) -> None:
    content: Any = message.get("content")
    if isinstance(content, str):
        _check(bool(content) or message["role"] in ("tool", "assistant"), "a message is empty")
        return
    _check(message["role"] == "user" and isinstance(content, list) and bool(content), "content is no string")
    for part in content:
        _check(part.get("type") in ("text", "image_url"), f"unknown part: {part.get('type')}")
        if part["type"] == "text":
            _check(part.keys() == {"type", "text"} and isinstance(part["text"], str), "a text has another shape")
        else:
            _check(isinstance(part["image_url"].get("url"), str), "an image has no URL")


def _checked_call(call: Json) -> str:
    _check(call.keys() == {"id", "type", "function"} and call["type"] == "function", "a call has another shape")
    _check(isinstance(call["id"], str) and bool(call["id"]), "a call has no id")
    function = call["function"]
    _check(function.keys() == {"name", "arguments"} and NAME.fullmatch(function["name"]) is not None, "a call has no name")
    try:
        arguments = json.loads(function["arguments"])
    except (TypeError, ValueError):
        raise Wrong("the arguments of a call are no JSON text") from None
    _check(isinstance(arguments, dict), "the arguments of a call are no object")
    return str(call["id"])
