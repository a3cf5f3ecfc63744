"""Anthropic's Messages API as Ollama, vLLM, llama.cpp, LM Studio and SGLang serve it: server-sent events with types."""

from collections.abc import Iterator, Sequence
from typing import Any

from gateway.core import strict_json
from gateway.core.errors import GatewayError
from gateway.dialects.answers import BadFrame, cached_token_count, read_answer, token_count, try_read
from gateway.dialects.dialect import Call, Framing, Kind, Operation, Usage
from gateway.dialects.fields import bounded, expect, expect_few_tools, expect_number, expect_objects, is_over
from gateway.dialects.openai import DONE, UNKNOWN, ServerSentEvents
from gateway.dialects.refused_fields import CHECKED_FIELDS
from gateway.dialects.translation import messages_answer, messages_estimate, messages_passthrough, messages_request
from gateway.dialects.translation.messages_stream import PING

KNOWN_FIELDS = frozenset(
    "model messages system max_tokens stream temperature top_p top_k stop_sequences tools tool_choice thinking metadata "
    "output_config output_format".split()
)
NUMBERS = frozenset({"max_tokens", "temperature", "top_p", "top_k"})
# The events with which servers begin a stream.
FIRST_EVENTS = frozenset({"message_start", "ping"})
# What comes after the name of the last event in a stream is shorter.
LAST_EVENT = 160
TEXTS = ("text", "thinking", "partial_json")


class MessageEvents(ServerSentEvents):
    # Some errors are named in their event only.
    in_errors = b"error"

    def count(self, data: bytes) -> int:
        """Other events have no tokens."""
        return data.count(b'"content_block_delta"')


class Anthropic:
    name = "anthropic"
    framing: Framing = MessageEvents()
    known_fields = KNOWN_FIELDS | CHECKED_FIELDS
    tolerates_fields = needs_first = True

    def __init__(self) -> None:
        none: frozenset[Kind] = frozenset()
        ended = ("content", "stop_reason")
        self.operations: Sequence[Operation] = (
            Operation(
                "/v1/messages",
                "on request",
                none,
                _check,
                _clamp,
                ended,
                messages_estimate.rough_need,
                is_optional=True,
                trim=messages_passthrough.without_unsupported,
                passes=_passes,
                without_volatile=messages_request.without_volatile_lines,
            ),
            Operation(
                "/v1/messages/count_tokens",
                "never",
                none,
                _check,
                answers_with=("input_tokens",),
                is_optional=True,
                trim=messages_passthrough.without_unsupported,
                without_volatile=messages_request.without_volatile_lines,
                estimate=_estimate,
            ),
        )

    def error(self, error: GatewayError, request_id: str) -> bytes:
        return strict_json.write(messages_answer.error_body(error.status, _message(error), request_id))

    def heartbeat(self, call: Call, now_ns: int) -> bytes:
        return PING

    def error_frame(self, error: GatewayError, tail: Sequence[bytes] = ()) -> bytes:
        if tail and try_read(tail[-1]).get("type") == "error":
            return b""
        return b"event: error\ndata: " + self.error(error, "") + b"\n\n"

    def judge_frame(self, payload: bytes) -> None:
        value = read_answer(payload)
        if not isinstance(value, dict) or value.get("type") not in FIRST_EVENTS:
            # llama.cpp has its errors without the object around them.
            raise BadFrame("not the beginning of a message", {"error": value} if isinstance(value, dict) else None)

    def is_complete(self, tail: Sequence[bytes], call: Call) -> bool:
        kinds = [try_read(payload).get("type") for payload in tail if not payload.startswith(DONE)]
        return bool(kinds) and kinds[-1] == "message_stop" and "error" not in kinds

    def usage(self, tail: Sequence[bytes]) -> Usage:
        """The first event counts the prompt, the last but one the answer; some servers repeat the prompt's count there."""
        counts: dict[str, Any] = {}
        for payload in tail:
            if b'"usage"' in payload:
                counts |= {name: value for name, value in _usage_in(try_read(payload)).items() if value}
        return _usage(counts)

    def usage_of(self, answer: Any) -> Usage:
        return _usage(_usage_in(answer)) if isinstance(answer, dict) else UNKNOWN

    def has_last_frame(self, frames: bytes) -> bool:
        return b"message_stop" in frames[-LAST_EVENT:]

    def is_plain(self, frames: bytes) -> bool:
        return frames.endswith(b"\n\n") and b"message_stop" not in frames

    def hides_usage(self, call: Call) -> bool:
        return False

    def without_usage(self, frames: bytes) -> bytes:
        return frames

    def answer_text(self, data: bytes) -> str:
        payloads = [data] if data.lstrip()[:1] == b"{" else self.framing.payloads(data)
        return "".join(text for payload in payloads for text in _texts(try_read(payload)))


def _message(error: GatewayError) -> str:
    """Claude Code shortens a conversation after an error that begins with these words, or takes the images out of it."""
    if error.is_of_images:
        return f"Could not process image: {error.message}"
    if "n_ctx" in error.fields and "n_prompt_tokens" in error.fields:
        return f"prompt is too long: {error.fields['n_prompt_tokens']} tokens > {error.fields['n_ctx']} maximum"
    return f"prompt is too long: {error.message}" if error.is_of_context else error.message


def _usage_in(value: dict[str, Any]) -> dict[str, Any]:
    inner = value.get("message")
    counts = value.get("usage") or (inner.get("usage") if isinstance(inner, dict) else None)
    if not isinstance(counts, dict):
        # The answer of count_tokens.
        return {"input_tokens": value["input_tokens"], "output_tokens": 0} if "input_tokens" in value else {}
    return counts


def _usage(counts: dict[str, Any]) -> Usage:
    """Anthropic counts cached tokens apart from the others of the prompt."""
    prompt, completion = token_count(counts.get("input_tokens")), token_count(counts.get("output_tokens"))
    read, written = (cached_token_count(counts.get(f"cache_{name}_input_tokens")) for name in ("read", "creation"))
    if prompt is None and not read:
        return Usage(None, completion)
    cached = read if "cache_read_input_tokens" in counts else None
    return Usage((prompt or 0) + (read or 0) + (written or 0), completion, cached)


def _texts(value: dict[str, Any]) -> Iterator[str]:
    content = value.get("content")
    for part in [value.get("delta"), value.get("content_block"), *(content if isinstance(content, list) else ())]:
        if isinstance(part, dict):
            yield from (part[name] for name in TEXTS if isinstance(part.get(name), str))
            if part.get("type") == "tool_use":
                yield str(part.get("name") or "")
                yield strict_json.write_with_replacements(part.get("input") or {}).decode("utf-8", "replace")


def _check(body: dict[str, Any]) -> None:
    """What a translation needs is checked there; a server that has the path may take more than that."""
    expect_number(body, NUMBERS)
    expect_objects(body, "messages")
    expect_few_tools(body)
    expect(body, "system", (str, list), "a string or a list")
    for name in ("thinking", "metadata", "tool_choice"):
        expect(body, name, dict, "an object")


def _passes(body: dict[str, Any], kind: Kind) -> bool:
    return messages_passthrough.passes_unchanged(messages_passthrough.without_unsupported(body)[0], kind)


def _estimate(body: dict[str, Any]) -> int:
    return messages_estimate.rough_need(body).prompt


def _clamp(body: dict[str, Any], kind: Kind, cap: int, default: int) -> int:
    """Thinking is part of the output; its budget must be smaller than the limit."""
    wished = body.get("max_tokens")
    body["max_tokens"] = most = default if wished is None else bounded(wished, cap)
    thinking = body.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    if isinstance(budget, int | float) and budget >= most:
        body["thinking"] = {**thinking, "budget_tokens": most - 1} if most > 1 else {"type": "disabled"}  # type: ignore[dict-item]
    return cap if is_over(wished, cap) else 0
