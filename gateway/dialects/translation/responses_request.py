"""Requests of OpenAI's Responses API, read without any state: the whole conversation is in the request."""

from dataclasses import dataclass, field
from typing import Any

from gateway.core.errors import BadRequest
from gateway.dialects import tokens
from gateway.dialects.fields import boolean, expect, wish
from gateway.dialects.tokens import Need
from gateway.dialects.translation.conversation import EFFORTS, Format, Prompt
from gateway.dialects.translation.dropped_names import drop
from gateway.dialects.translation.responses_input import read_input
from gateway.dialects.translation.responses_names import ToolNames
from gateway.dialects.translation.responses_tools import read_choice, read_tools

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repeat_penalty")
STATE = {
    "previous_response_id": "this gateway keeps no responses; send the whole conversation in 'input'",
    "conversation": "this gateway keeps no conversations; send the whole conversation in 'input'",
    "prompt": "this gateway keeps no prompts; send its text in 'instructions' and 'input'",
}
DROPPED = (
    *(
        "access_programs",
        "client_metadata",
        "context_management",
        "image",
        "include",
        "max_tool_calls",
        "metadata",
        "moderation",
    ),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "service_tier", "store", "stream_options"),
    *("top_logprobs", "truncation"),
)
CLIENT_NAMES = {"reasoning_effort": "reasoning.effort"}
# Values that ask for nothing.
NOTHING = ("auto", "default", "disabled")
NOT_IN_PROMPTS = frozenset("reasoning text input max_output_tokens safety_identifier parallel_tool_calls background".split())
SETTINGS = tokens.SETTINGS | set(DROPPED) | NOT_IN_PROMPTS


@dataclass(slots=True)
class ResponsesPrompt(Prompt):
    """A prompt with what its answer needs: `names` of tools, and the settings that the answer repeats."""

    names: ToolNames = field(default_factory=ToolNames)
    echo: dict[str, Any] = field(default_factory=dict)


def read(body: dict[str, Any]) -> ResponsesPrompt:
    try:
        return _read(body)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def _read(body: dict[str, Any]) -> ResponsesPrompt:
    refuse_state(body)
    names = ToolNames()
    prompt = ResponsesPrompt([], names=names, client_names=CLIENT_NAMES)
    prompt.tools = read_tools(body.get("tools"), names, prompt.dropped)
    prompt.messages = read_input(body.get("instructions"), body.get("input"), prompt.tools, names, prompt.dropped)
    prompt.tool_choice, prompt.tools = read_choice(body.get("tool_choice"), prompt.tools, names)
    if body.get("parallel_tool_calls") is not None:
        prompt.parallel_tools = boolean(body, "parallel_tool_calls", default=True)
    prompt.most_output = _most_output(body)
    prompt.sampling = {name: _number(body, name) for name in SAMPLING if body.get(name) is not None}
    prompt.stream = boolean(body, "stream", default=False)
    prompt.user = _user(body)
    _read_reasoning(body, prompt)
    _read_text(body, prompt)
    for name in DROPPED:
        if body.get(name) and body[name] not in NOTHING:
            drop(name, prompt.dropped)
    prompt.echo = _echo(body)
    return prompt


def refuse_state(body: dict[str, Any]) -> None:
    for name, advice in STATE.items():
        if body.get(name) not in (None, ""):
            raise BadRequest(f"the field {name!r} cannot be used: {advice}")
    if boolean(body, "background", default=False):
        raise BadRequest("the field 'background' cannot be true: this gateway keeps no responses; ask for a stream")


def _most_output(body: dict[str, Any]) -> int | None:
    expect(body, "max_output_tokens", int, "a positive integer")
    found: int | None = body.get("max_output_tokens")
    if found is not None and found < 1:
        raise BadRequest("the field 'max_output_tokens' must be a positive integer")
    return found


def _number(body: dict[str, Any], name: str) -> float:
    expect(body, name, (int, float), "a number")
    found: float = body[name]
    return found


def _user(body: dict[str, Any]) -> str:
    for name in ("user", "safety_identifier"):
        expect(body, name, str, "a string")
    return body.get("user") or body.get("safety_identifier") or ""


def _read_reasoning(body: dict[str, Any], prompt: Prompt) -> None:
    expect(body, "reasoning", dict, "an object")
    effort = (body.get("reasoning") or {}).get("effort")
    if effort is None:
        return
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise BadRequest(f"the 'effort' of the field 'reasoning' must be one of {', '.join(EFFORTS)}")
    prompt.effort = EFFORTS[effort]


def _read_text(body: dict[str, Any], prompt: Prompt) -> None:
    expect(body, "text", dict, "an object")
    text = body.get("text") or {}
    if text.get("verbosity") is not None:
        drop("text.verbosity", prompt.dropped)
    form = text.get("format")
    if form is not None:
        prompt.format = _format(form)


def _format(form: Any) -> Format | None:
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Format()
    if kind != "json_schema":
        raise BadRequest("the 'format' of the field 'text' must have the type text, json_object or json_schema")
    schema, name, strict = form.get("schema"), form.get("name"), form.get("strict")
    if not isinstance(schema, dict):
        raise BadRequest("the 'format' of the field 'text' must have a 'schema' that is an object")
    return Format(schema, name if isinstance(name, str) and name else "answer", strict if isinstance(strict, bool) else None)


def _echo(body: dict[str, Any]) -> dict[str, Any]:
    """The request's settings in the order in which OpenAI repeats them."""
    reasoning, text, model = body.get("reasoning") or {}, body.get("text") or {}, body.get("model")
    parallel = body.get("parallel_tool_calls")
    return {
        "model": model if isinstance(model, str) else "",
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": body["metadata"] if isinstance(body.get("metadata"), dict) else {},
        "parallel_tool_calls": True if parallel is None else parallel,
        "previous_response_id": None,
        "prompt_cache_key": _string_or_none(body.get("prompt_cache_key")),
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": body.get("temperature"),
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_logprobs": 0,
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "user": body.get("user"),
        "background": False,
    }


def _string_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def rough_need(body: dict[str, Any]) -> Need:
    """About what any object needs, before it is read. Nothing that is nested too deeply to be counted is sent to a backend."""
    try:
        found = _of_input(body.get("input")) + tokens.of_fields(body, SETTINGS)
    except RecursionError:
        found = 0
    return Need(max(1, found), wish(body.get("max_output_tokens")))


def _of_input(given: Any) -> int:
    if not isinstance(given, list):
        return tokens.of_content(given)
    return sum(tokens.TOKENS_PER_MESSAGE + _of_item(item) for item in given)


def _of_item(item: Any) -> int:
    if not isinstance(item, dict):
        return tokens.of_value(item)
    names = item.keys() - {"type", "id", "call_id", "role", "status", "encrypted_content"}
    return sum(
        tokens.of_content(item[name]) if isinstance(item[name], list) else tokens.of_field(name, item[name]) for name in names
    )
