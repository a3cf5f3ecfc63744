"""Answers of OpenAI's Responses API: the whole response object, and its stream of events."""

import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gateway.core import strict_json
from gateway.core.errors import AnswerCutShort, GatewayError
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.conversation import Counted, Event, Finish, Finished, Reply
from gateway.dialects.translation.responses_output import Output, output_of
from gateway.dialects.translation.responses_request import ResponsesPrompt

ID_BYTES = 24
INCOMPLETE: dict[Finish, str] = {"length": "max_output_tokens", "content_filter": "content_filter"}
# Codes that clients act on; all others are those of a server's error, after which they try again.
CODES = frozenset({"rate_limit_exceeded", "insufficient_quota"})
# The backends' codes for a prompt that is too long differ; clients shorten the conversation after OpenAI's.
TOO_LONG = "context_length_exceeded"
# The fields that a failed response has in any case.
BARE_RESPONSE: Mapping[str, Any] = MappingProxyType({"id": "", "object": "response", "output": [], "usage": None})


def new_id() -> str:
    return f"resp_{secrets.token_hex(ID_BYTES)}"


def write(reply: Reply, prompt: ResponsesPrompt, response_id: str = "", created: int = 0) -> dict[str, Any]:
    response_id = response_id or new_id()
    output = output_of(reply, prompt.names, _stem(response_id))
    return _ended(_response(prompt, response_id, created or reply.created), reply.finish, output, reply.usage)


def _stem(response_id: str) -> str:
    return response_id.removeprefix("resp_")


def _response(prompt: ResponsesPrompt, response_id: str, created: int) -> dict[str, Any]:
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        **prompt.echo,
        "output": [],
        "usage": None,
    }


def _ended(response: dict[str, Any], finish: Finish, output: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    reason = INCOMPLETE.get(finish)
    ended = {"status": "incomplete", "incomplete_details": {"reason": reason}} if reason else {"status": "completed"}
    return {**response, **ended, "output": output, "usage": _usage(usage)}


def _usage(usage: Usage) -> dict[str, Any]:
    read, written = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens or 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


class EventWriter:
    """Writes a stream as server-sent events, without [DONE]. After `end` or `fail` nothing more is written."""

    def __init__(self, prompt: ResponsesPrompt, response_id: str = "", created: int = 0) -> None:
        response_id = response_id or new_id()
        self._response = _response(prompt, response_id, created)
        self._output = Output(prompt.names, _stem(response_id))
        self._finish: Finish | None = None
        self._usage = Usage()
        self._number = 0
        self._ended = False

    def start(self) -> bytes:
        """The first two events. They may be sent while the call waits for a backend."""
        if self._number or self._ended:
            return b""
        return self._lifecycle("response.created") + self._lifecycle("response.in_progress")

    def write(self, event: Event) -> bytes:
        if self._ended:
            return b""
        if isinstance(event, Counted):
            self._usage = event.usage
            return b""
        if self._finish is not None:
            return b""
        if isinstance(event, Finished):
            self._finish = event.finish
        return self.start() + b"".join(self._event(kind, fields) for kind, fields in self._output.take(event))

    def end(self) -> bytes:
        """The last event. A stream that ended before the model had finished has failed."""
        if self._ended:
            return b""
        if self._finish is None:
            return self.fail(AnswerCutShort())
        started = self.start()
        self._response = _ended(self._response, self._finish, self._output.items, self._usage)
        self._ended = True
        return started + self._lifecycle(f"response.{self._response['status']}")

    def fail(self, error: GatewayError) -> bytes:
        """OpenAI's client raises after the first of these events, Codex after the second."""
        if self._ended:
            return b""
        started = self.start()
        self._ended = True
        return started + error_events(error, self._number, {**self._response, "output": self._output.items})

    def _lifecycle(self, kind: str) -> bytes:
        return self._event(kind, {"response": self._response})

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        self._number += 1
        return _frame(kind, self._number - 1, fields)


def error_events(error: GatewayError, number: int, response: Mapping[str, Any] = MappingProxyType({})) -> bytes:
    """The end of a stream: `number` is that of the next event, `response` what is known of the response that has begun."""
    found = {"code": _code(error), "message": error.message, "param": None}
    first = _frame("error", number, {**found, "error": {"type": error.kind or "server_error", **found}})
    failed = {"status": "failed", "error": {"code": found["code"], "message": error.message}}
    return first + _frame("response.failed", number + 1, {"response": {**BARE_RESPONSE, **response, **failed}})


def _frame(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    data = strict_json.write_with_replacements({"type": kind, "sequence_number": number, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"


def _code(error: GatewayError) -> str:
    if error.is_of_context:
        return TOO_LONG
    if error.code in CODES:
        return error.code
    return "invalid_prompt" if 400 <= error.status < 500 and error.status not in (408, 429) else "server_error"
