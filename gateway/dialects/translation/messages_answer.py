"""Answers and errors in Anthropic's Messages API, written whole; messages_stream writes them as they come."""

from collections.abc import Sequence
from typing import Any

from gateway.core.errors import BackendFailed
from gateway.dialects import tokens
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.conversation import Finish, Reply, Text, Thinking, ToolCall
from gateway.dialects.translation.tool_arguments import object_of

# Clients require a signature and send it back; nobody here checks it.
SIGNATURE = "bmV1cm9uZXR6LWdhdGV3YXk="
STOP_REASONS: dict[Finish, str] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def write(reply: Reply, model: str, id: str, input_tokens_estimate: int = 0) -> dict[str, Any]:  # noqa: A002
    """Raises BackendFailed if a tool call has arguments that are no object, unless the answer was cut at its limit."""
    has_calls = any(isinstance(part, ToolCall) for part in reply.parts)
    content = [_block(part, number, reply.finish, id) for number, part in enumerate(reply.parts) if not _is_empty(part)]
    if not has_calls and not any(block["type"] == "text" for block in content):
        # Callers read the text of the first block without asking whether there is one.
        content.append({"type": "text", "text": ""})
    usage = usage_of(reply.usage, input_tokens_estimate, estimate_of(reply.parts))
    return message(model, id, content, stop_reason(reply.finish, has_calls=has_calls), usage)


def message(model: str, id: str, content: list[dict[str, Any]], stop: str | None, usage: dict[str, int]) -> dict[str, Any]:  # noqa: A002
    return {
        "id": id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": usage,
    }


def usage_of(usage: Usage, input_estimate: int, output_estimate: int) -> dict[str, int]:
    """Anthropic counts cached tokens apart from the others of the prompt."""
    prompt = input_estimate if usage.prompt_tokens is None else usage.prompt_tokens
    cached = min(usage.cached_tokens or 0, prompt)
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": output_estimate if usage.completion_tokens is None else usage.completion_tokens,
    }


def stop_reason(finish: Finish, *, has_calls: bool) -> str:
    """Some servers finish an answer with tool calls as if it had none; clients run tools only for the right reason."""
    if finish in ("stop", "tool_calls"):
        return STOP_REASONS["tool_calls" if has_calls else "stop"]
    return STOP_REASONS[finish]


def tool_id(call_id: str, message_id: str, number: int) -> str:
    """The backend's id, or one that no other answer of the conversation has."""
    return call_id or f"toolu_{message_id.removeprefix('msg_')}_{number}"


def wrong_arguments(name: str) -> BackendFailed:
    """A client could run a tool with half of its arguments. If it asks again, the model may write all of them."""
    return BackendFailed(f"The model called the tool {name[:64]} with arguments that are not a JSON object; try again.")


def error_type(status: int) -> str:
    return ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_body(status: int, message: str, request_id: str) -> dict[str, Any]:
    body = {"type": "error", "error": {"type": error_type(status), "message": message}}
    return {**body, "request_id": request_id} if request_id else body


def _is_empty(part: Thinking | Text | ToolCall) -> bool:
    return not isinstance(part, ToolCall) and not part.text


def _block(part: Thinking | Text | ToolCall, number: int, finish: Finish, message_id: str) -> dict[str, Any]:
    match part:
        case Thinking(text):
            return {"type": "thinking", "thinking": text, "signature": SIGNATURE}
        case Text(text):
            return {"type": "text", "text": text}
    value = object_of(part.arguments)
    if value is None:
        if finish != "length":
            raise wrong_arguments(part.name)
        value = {}
    return {"type": "tool_use", "id": tool_id(part.id, message_id, number), "name": part.name, "input": value}


def estimate_of(parts: Sequence[Thinking | Text | ToolCall]) -> int:
    return sum(tokens.of_text(part.name + part.arguments if isinstance(part, ToolCall) else part.text) for part in parts)
