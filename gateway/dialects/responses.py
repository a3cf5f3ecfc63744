"""OpenAI's Responses API as Ollama, vLLM, llama.cpp, LM Studio and SGLang serve it: numbered server-sent events."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from gateway.core import strict_json
from gateway.core.errors import GatewayError
from gateway.dialects.answers import BadFrame, cached_token_count, read_answer, token_count, try_read
from gateway.dialects.dialect import Call, Framing, Kind, Operation, Usage
from gateway.dialects.fields import boolean, bounded, expect, expect_few_tools, expect_number, is_over
from gateway.dialects.openai import DONE, HEARTBEAT, UNKNOWN, OpenAI, ServerSentEvents, seconds_of
from gateway.dialects.refused_fields import CHECKED_FIELDS
from gateway.dialects.translation import responses_passthrough, responses_request
from gateway.dialects.translation.responses_answer import TOO_LONG, error_events

KNOWN_FIELDS = frozenset(
    "model input instructions max_output_tokens stream temperature top_p tools tool_choice parallel_tool_calls reasoning text "
    "previous_response_id conversation prompt background store include metadata user truncation".split()
)
NUMBERS = frozenset({"max_output_tokens", "temperature", "top_p"})
ENDS = frozenset({"response.completed", "response.incomplete"})
FAILURES = frozenset({"response.failed", "error"})
ENDINGS = (b'"response.completed"', b'"response.incomplete"')
FIRST_EVENTS = frozenset({"response.created", "response.queued", "response.in_progress"})
DELTA = re.compile(rb'"type"\s*+:\s*+"response\.[\w.]++(?<=\.delta)"')
TOO_LONG_FIELDS = {"type": "invalid_request_error", "code": TOO_LONG}


class ResponseEvents(ServerSentEvents):
    # Some errors are named in their event only.
    in_errors = b"error"

    def count(self, data: bytes) -> int:
        """Other events have no tokens."""
        return len(DELTA.findall(data))


class Responses:
    name = "responses"
    framing: Framing = ResponseEvents()
    known_fields = KNOWN_FIELDS | CHECKED_FIELDS
    tolerates_fields = needs_first = True

    def __init__(self) -> None:
        none: frozenset[Kind] = frozenset()
        ended = ("output", "status")
        self._openai = OpenAI()
        self.operations: Sequence[Operation] = (
            Operation(
                "/v1/responses",
                "on request",
                none,
                _check,
                _clamp,
                ended,
                responses_request.rough_need,
                is_optional=True,
                trim=responses_passthrough.without_unsupported,
                passes=_passes,
            ),
            Operation(
                "/v1/responses/input_tokens",
                "never",
                none,
                _check,
                answers_with=("input_tokens",),
                is_optional=True,
                trim=responses_passthrough.without_unsupported,
                estimate=_estimate,
            ),
        )

    def error(self, error: GatewayError, request_id: str) -> bytes:
        fields = self._openai.error_fields(error)
        return strict_json.write({"error": {**fields, **TOO_LONG_FIELDS} if error.is_of_context else fields})

    def heartbeat(self, call: Call, now_ns: int) -> bytes:
        return HEARTBEAT

    def error_frame(self, error: GatewayError, tail: Sequence[bytes] = ()) -> bytes:
        last = try_read(tail[-1]) if tail else {}
        if last.get("type") in FAILURES:
            return b""
        number, begun = last.get("sequence_number"), try_read(tail[0]).get("response") if tail else None
        return error_events(error, number + 1 if isinstance(number, int) else 0, begun if isinstance(begun, dict) else {})

    def judge_frame(self, payload: bytes) -> None:
        value = read_answer(payload)
        kind = value.get("type") if isinstance(value, dict) else None
        if kind in FAILURES:
            inner = value.get("response")
            raise BadFrame("a failed response", inner if isinstance(inner, dict) and inner.get("error") else {"error": value})
        if kind not in FIRST_EVENTS:
            raise BadFrame("not the beginning of a response")

    def is_complete(self, tail: Sequence[bytes], call: Call) -> bool:
        last = next((payload for payload in reversed(tail) if not payload.startswith(DONE)), b"")
        return try_read(last).get("type") in ENDS

    def usage(self, tail: Sequence[bytes]) -> Usage:
        for payload in reversed(tail):
            event = try_read(payload)
            inner = event.get("response")
            if isinstance(inner, dict) and inner.get("usage"):
                found = self.usage_of(inner)
                prefill, decode = seconds_of(event.get("timings"))
                return found if decode is None else replace(found, prefill_s=prefill, decode_s=decode)
        return UNKNOWN

    def usage_of(self, answer: Any) -> Usage:
        fields = answer if isinstance(answer, dict) else {}
        counts: dict[str, Any] = fields["usage"] if isinstance(fields.get("usage"), dict) else fields
        details = counts.get("input_tokens_details")
        cached = cached_token_count(details.get("cached_tokens")) if isinstance(details, dict) else None
        prompt, completion = token_count(counts.get("input_tokens")), token_count(counts.get("output_tokens"))
        # A server that counts nothing reports zeros.
        return Usage(prompt, completion, cached) if prompt or completion else UNKNOWN

    def has_last_frame(self, frames: bytes) -> bool:
        return any(ending in frames for ending in ENDINGS)

    def is_plain(self, frames: bytes) -> bool:
        return frames.endswith(b"\n\n") and not self.has_last_frame(frames)

    def hides_usage(self, call: Call) -> bool:
        return False

    def without_usage(self, frames: bytes) -> bytes:
        return frames

    def answer_text(self, data: bytes) -> str:
        if data.lstrip()[:1] == b"{":
            return "".join(_texts_of_items(try_read(data).get("output")))
        return "".join(_delta(try_read(payload)) for payload in self.framing.payloads(data))


def _delta(value: dict[str, Any]) -> str:
    """Items are repeated when they end; only the name of a tool is not in a delta."""
    if value.get("type") == "response.output_item.added":
        item = value.get("item")
        name = item.get("name") if isinstance(item, dict) else None
        return name if isinstance(name, str) else ""
    delta = value.get("delta")
    return delta if isinstance(delta, str) else ""


def _texts_of_items(items: Any) -> Iterator[str]:
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, dict):
            continue
        yield from (item[name] for name in ("name", "arguments", "input") if isinstance(item.get(name), str))
        if isinstance(item.get("action"), dict):
            yield strict_json.write_with_replacements(item["action"]).decode("utf-8", "replace")
        for name in ("summary", "content"):
            parts = item.get(name)
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    yield part["text"]


def _check(body: dict[str, Any]) -> None:
    """What a translation needs is checked there; a server that has the path may take more than that."""
    responses_request.refuse_state(body)
    expect_number(body, NUMBERS)
    expect(body, "input", (str, list), "a string or a list of items")
    expect(body, "instructions", (str, list), "a string")
    expect_few_tools(body)
    boolean(body, "parallel_tool_calls", default=True)
    for name in ("reasoning", "text"):
        expect(body, name, dict, "an object")


def _passes(body: dict[str, Any], kind: Kind) -> bool:
    return responses_passthrough.passes_unchanged(responses_passthrough.without_unsupported(body)[0], kind)


def _estimate(body: dict[str, Any]) -> int:
    return responses_request.rough_need(body).prompt


def _clamp(body: dict[str, Any], kind: Kind, cap: int, default: int) -> int:
    wished = body.get("max_output_tokens")
    body["max_output_tokens"] = default if wished is None else bounded(wished, cap)
    return cap if is_over(wished, cap) else 0
