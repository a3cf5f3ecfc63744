"""Requests in Anthropic's Messages API, read into the neutral form of a conversation.

`messages_estimate` counts their tokens, `messages_passthrough` prepares them for a backend that has this API itself.
"""

import re
from collections.abc import Iterator
from typing import Any

from gateway.core.errors import BadRequest
from gateway.dialects.fields import boolean, expect, expect_number, expect_objects
from gateway.dialects.translation.conversation import (
    Effort,
    Format,
    Message,
    Prompt,
    Role,
    Text,
    Tool,
    ToolCall,
)
from gateway.dialects.translation.dropped_names import drop
from gateway.dialects.translation.messages_blocks import parts_of, shown, string

# Claude Code begins its system prompt with it. Its hash differs between requests, which makes prompt caches useless.
VOLATILE = "x-anthropic-billing-header:"
VOLATILE_LINE = re.compile(rf"^{VOLATILE}[^\n]*\n?", re.MULTILINE)

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
SAMPLING = ("temperature", "top_p", "top_k")
NUMBERS = frozenset(SAMPLING)
# Fields for a service of Anthropic's, without which the answer is still an answer to the request.
UNSUPPORTED = (
    "billing_policy container context_management diagnostics fallback_credit_token fallbacks inference_geo mcp_servers "
    "service_tier speed user_profile_id workspace_id"
).split()
CLIENT_NAMES = {
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "user": "metadata.user_id",
}
EFFORTS: dict[str, Effort] = {"low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh", "max": "max"}
# Budgets of thinking below these many tokens; Claude Code has used 4000, 10,000 and 31,999.
LOW_BUDGET, MEDIUM_BUDGET = 4096, 16_384


def read(body: dict[str, Any]) -> Prompt:
    """Raises BadRequest on what cannot be read, and on what no backend can be asked for if the answer depends on it."""
    refuse_what_needs_a_memory(body)
    dropped = [name for name in UNSUPPORTED if body.get(name) is not None]
    tools = _tools(body, dropped)
    choice = _tool_choice(body)
    messages = _messages(body)
    expect_number(body, NUMBERS)
    return Prompt(
        messages=messages,
        tools=tools,
        tool_choice=_chosen(choice, tools, dropped),
        parallel_tools=False if choice.get("disable_parallel_tool_use") is True else None,
        most_output=_most_output(body),
        stop=_stop(body),
        sampling={name: body[name] for name in SAMPLING if body.get(name) is not None},
        effort=_effort(body, dropped),
        format=_format(body),
        stream=boolean(body, "stream", default=False),
        user=_user(body),
        dropped=dropped,
        continues_last=_continues_last(messages),
        client_names=_client_names(body),
    )


def without_volatile_lines(body: dict[str, Any]) -> dict[str, Any]:
    """The body without the lines of its system prompt that differ in each request; all else is left as it is."""
    kept = dict(body)
    _keep_stable(kept, "system")
    messages = body.get("messages")
    if isinstance(messages, list) and any(_is_system(message) for message in messages):
        kept["messages"] = list(_stable_messages(messages))
    return kept


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "system"


def _stable_messages(messages: list[Any]) -> Iterator[Any]:
    for message in messages:
        if not _is_system(message):
            yield message
            continue
        kept = dict(message)
        _keep_stable(kept, "content")
        if kept.keys() == message.keys():
            yield kept


def _keep_stable(value: dict[str, Any], name: str) -> None:
    """Takes volatile lines out of a string or a list of blocks, and the field with them if it had nothing else."""
    content = value.get(name)
    if isinstance(content, str) and VOLATILE in content:
        stable: Any = VOLATILE_LINE.sub("", content)
    elif isinstance(content, list) and any(_is_volatile(block) for block in content):
        stable = [kept for block in content if (kept := _stable_block(block)) is not None]
    else:
        return
    if stable:
        value[name] = stable
    else:
        del value[name]


def _is_volatile(block: Any) -> bool:
    return isinstance(block, dict) and isinstance(block.get("text"), str) and VOLATILE in block["text"]


def _stable_block(block: Any) -> Any:
    if not _is_volatile(block):
        return block
    text = VOLATILE_LINE.sub("", block["text"])
    return {**block, "text": text} if text else None


def refuse_what_needs_a_memory(body: dict[str, Any]) -> None:
    thread = body.get("thread")
    if isinstance(thread, dict) and thread.get("previous_message_id") is not None:
        raise BadRequest("the field 'thread' continues an earlier answer, which is not kept here; send all messages")
    if body.get("compaction") is not None:
        raise BadRequest("the field 'compaction' is not taken here: no model server signs a summary; ask for one in a message")


def _messages(body: dict[str, Any]) -> list[Message]:
    if body.get("messages") is None:
        raise BadRequest("the field 'messages' is missing")
    expect_objects(body, "messages")
    found = [] if body.get("system") is None else [_system_message(body["system"], "system")]
    last = _last_of_user(body["messages"])
    for number, message in enumerate(body["messages"]):
        if message.get("clear_at") != "next_user_message" or number > last:
            found.append(_message(message, f"messages.{number}"))
    found = [message for message in found if message.parts]
    if all(message.role == "system" for message in found):
        raise BadRequest("the field 'messages' must have a message with content")
    return found


def _last_of_user(messages: list[dict[str, Any]]) -> int:
    """The last message of the user: a system message that is cleared by the next of these is not shown any more."""
    return max((number for number, message in enumerate(messages) if message.get("role") == "user"), default=-1)


def _message(message: dict[str, Any], where: str) -> Message:
    role = string(message, "role", where)
    if role not in ROLES:
        raise BadRequest(f"the field '{where}.role' must be 'user', 'assistant' or 'system', not {shown(role)}")
    content = message.get("content")
    if role == "system":
        return _system_message(content or "", f"{where}.content")
    return Message(ROLES[role], parts_of(content, f"{where}.content", ROLES[role]))


def _system_message(content: Any, where: str) -> Message:
    """Blocks are lines of one text: templates of several models take only one system text."""
    texts = [part.text for part in parts_of(content, where, "system") if isinstance(part, Text)]
    return Message("system", (Text("\n".join(texts)),) if texts else ())


def _continues_last(messages: list[Message]) -> bool:
    last = messages[-1]
    has_calls = any(isinstance(part, ToolCall) for part in last.parts)
    return last.role == "assistant" and isinstance(last.parts[-1], Text) and not has_calls


def _tools(body: dict[str, Any], dropped: list[str]) -> list[Tool]:
    """A tool with a schema is one that the client runs; others are Anthropic's own, whose schemas only its models know."""
    expect_objects(body, "tools")
    found = []
    for number, tool in enumerate(body.get("tools") or ()):
        where = f"tools.{number}"
        kind = string(tool, "type", where, default="custom")
        if kind == "custom" or isinstance(tool.get("input_schema"), dict):
            found.append(_tool(tool, where))
        else:
            drop(f"tools.{kind}", dropped)
    return found


def _tool(tool: dict[str, Any], where: str) -> Tool:
    name, schema, strict = string(tool, "name", where), tool.get("input_schema"), tool.get("strict")
    if not name:
        raise BadRequest(f"the field '{where}.name' must not be empty")
    if schema is not None and not isinstance(schema, dict):
        raise BadRequest(f"the field '{where}.input_schema' must be an object")
    if strict is not None and not isinstance(strict, bool):
        raise BadRequest(f"the field '{where}.strict' must be true or false")
    # Some backends answer 500 to a schema without a type.
    return Tool(name, string(tool, "description", where, default=""), schema or {"type": "object", "properties": {}}, strict)


def _tool_choice(body: dict[str, Any]) -> dict[str, Any]:
    expect(body, "tool_choice", dict, "an object")
    return body.get("tool_choice") or {}


def _chosen(choice: dict[str, Any], tools: list[Tool], dropped: list[str]) -> str | tuple[str]:
    """A choice that forces a tool is refused if the tool is not there: an answer without the call would be useless."""
    kind = choice.get("type")
    if kind in ("auto", "none") or not choice:
        return str(kind) if tools and choice else ""
    if kind not in ("any", "tool"):
        raise BadRequest(f"the field 'tool_choice.type' must be 'auto', 'any', 'none' or 'tool', not {shown(kind)}")
    if kind == "any" and tools:
        return "required"
    name = string(choice, "name", "tool_choice") if kind == "tool" else ""
    if name in {tool.name for tool in tools}:
        return (name,)
    missing = [entry for entry in dropped if entry.startswith("tools.")]
    reason = f"no model server here has {', '.join(missing)}" if missing else "it is not among 'tools'"
    raise BadRequest(f"the field 'tool_choice' forces a tool that cannot be used: {reason}")


def _most_output(body: dict[str, Any]) -> int | None:
    expect(body, "max_tokens", int, "an integer")
    most: int | None = body.get("max_tokens")
    if most is not None and most < 1:
        raise BadRequest("the field 'max_tokens' must be at least 1")
    return most


def _stop(body: dict[str, Any]) -> tuple[str, ...]:
    expect(body, "stop_sequences", list, "a list of strings")
    sequences = body.get("stop_sequences") or []
    if not all(isinstance(sequence, str) for sequence in sequences):
        raise BadRequest("the field 'stop_sequences' must be a list of strings")
    return tuple(sequence for sequence in sequences if sequence)


def _effort(body: dict[str, Any], dropped: list[str]) -> Effort | None:
    """Thinking that is off stays off; else a named effort is more exact than a budget. "adaptive" leaves it to the model."""
    expect(body, "thinking", dict, "an object")
    thinking = body.get("thinking") or {}
    if thinking.get("type") == "disabled":
        return "none"
    dropped += ["thinking.type"] if thinking.get("type") not in (None, "enabled", "adaptive") else []
    dropped += ["thinking.display"] if thinking.get("display") is not None else []
    effort = _output_config(body).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise BadRequest("the field 'output_config.effort' must be a string")
    if effort in EFFORTS:
        return EFFORTS[effort]
    dropped += ["output_config.effort"] if effort else []
    return _effort_of_budget(thinking.get("budget_tokens")) if thinking.get("type") == "enabled" else None


def _client_names(body: dict[str, Any]) -> dict[str, str]:
    """An effort is used before a budget."""
    has_effort = _output_config(body).get("effort") in tuple(EFFORTS)
    return {**CLIENT_NAMES, "reasoning_effort": "output_config.effort" if has_effort else "thinking"}


def _effort_of_budget(budget: Any) -> Effort:
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BadRequest("the field 'thinking.budget_tokens' must be an integer")
    return "low" if budget < LOW_BUDGET else "medium" if budget < MEDIUM_BUDGET else "high"


def _output_config(body: dict[str, Any]) -> dict[str, Any]:
    expect(body, "output_config", dict, "an object")
    return body.get("output_config") or {}


def _format(body: dict[str, Any]) -> Format | None:
    """`output_format` is the older name of `output_config.format`."""
    expect(body, "output_format", dict, "an object")
    wanted = _output_config(body).get("format") or body.get("output_format")
    if not wanted:
        return None
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema" or not isinstance(wanted.get("schema"), dict):
        raise BadRequest("the field 'output_config.format' must be an object of the type 'json_schema' with a 'schema'")
    return Format(wanted["schema"], strict=True)


def _user(body: dict[str, Any]) -> str:
    expect(body, "metadata", dict, "an object")
    user = (body.get("metadata") or {}).get("user_id")
    return user if isinstance(user, str) else ""
