"""The records of Ollama's own API: an answer is one, a stream has one a line, the last with times and counts."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from gateway.core import strict_json
from gateway.core.errors import AnswerCutShort, BackendFailed, GatewayError
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.conversation import (
    Counted,
    Event,
    Finish,
    Finished,
    Reply,
    Text,
    TextPiece,
    Thinking,
    ThinkingPiece,
    ToolCall,
    ToolPiece,
)
from gateway.dialects.translation.native_fields import unloads
from gateway.dialects.translation.tool_arguments import object_of

BILLION = 10**9
# Ends of lines to Python's str.splitlines and so to ollama-python; JSON escapes the others anyway, as Go does these.
LINE_ENDS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))

Fields = dict[str, Any]
# Makes the fields of a record from its text, its thinking and its tool calls.
Content = Callable[[str, str, list[Fields]], Fields]


class Durations(NamedTuple):
    """In nanoseconds; what is not known is 0 and is left out."""

    total: int = 0
    load: int = 0
    prompt_eval: int = 0
    eval: int = 0


UNTIMED = Durations()


def timestamp(nanoseconds: int) -> str:
    """A time since 1970 as Ollama writes it."""
    seconds, rest = divmod(nanoseconds, BILLION)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def frame(record: Fields) -> bytes:
    """A record as a line of its own that no client cuts in two."""
    data = strict_json.write_with_replacements(record)
    for end, escaped in LINE_ENDS:
        data = data.replace(end, escaped)
    return data + b"\n"


def done_reason(finish: Finish) -> str:
    """Ollama has no other reasons for an answer."""
    return "length" if finish == "length" else "stop"


def metrics(usage: Usage, durations: Durations) -> Fields:
    """Ollama leaves out a metric that is zero. What the backend reports is more exact than the clock."""
    fields = {
        "total_duration": durations.total,
        "load_duration": durations.load,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_cached_count": usage.cached_tokens,
        "prompt_eval_duration": _nanoseconds(usage.prefill_s, durations.prompt_eval),
        "eval_count": usage.completion_tokens,
        "eval_duration": _nanoseconds(usage.decode_s, durations.eval),
    }
    return {name: value for name, value in fields.items() if value}


def _nanoseconds(reported_s: float | None, measured: int) -> int:
    return measured if reported_s is None else round(reported_s * BILLION)


def tool_calls(calls: Sequence[ToolCall], finish: Finish) -> list[Fields]:
    """Tool calls with their arguments as objects. Raises BackendFailed if some are not, as a client would run what it gets.

    An answer that is cut by its limit may end within a call, which is left out then: the answer's reason says so.
    """
    read = [(call, object_of(call.arguments)) for call in calls]
    whole = [(call, arguments) for call, arguments in read if arguments is not None]
    if len(whole) < len(read) and finish != "length":
        name = next(call.name for call, arguments in read if arguments is None)
        raise BackendFailed(f"the model called the tool {name[:64]!r} with arguments that are not a JSON object; try again")
    return [
        {
            **({"id": call.id} if call.id else {}),
            "function": {"index": index, "name": call.name, "arguments": arguments},
        }
        for index, (call, arguments) in enumerate(whole)
    ]


def last_fields(finish: Finish, usage: Usage, durations: Durations, more: Fields) -> Fields:
    return {"done": True, "done_reason": done_reason(finish), **more, **metrics(usage, durations)}


def whole_content(reply: Reply, content: Content) -> Fields:
    text = "".join(part.text for part in reply.parts if isinstance(part, Text))
    thinking = "".join(part.text for part in reply.parts if isinstance(part, Thinking))
    calls = [part for part in reply.parts if isinstance(part, ToolCall)]
    return content(text, thinking, tool_calls(calls, reply.finish))


def load_record(body: Fields, model: str, created_at: str, content: Content) -> Fields:
    """The answer to a request without a prompt, which asks for no answer of the model."""
    reason = "unload" if unloads(body) else "load"
    return {"model": model, "created_at": created_at, **content("", "", []), "done": True, "done_reason": reason}


class RecordWriter:
    """Writes each event of an answer as a record at once; tool calls together when the answer is finished.

    Before that no call is sure to be complete, as the pieces of several may come interleaved. After an error nothing more is
    written; `failure` is its message.
    """

    def __init__(self, model: str, content: Content, last: Fields) -> None:
        """`last` has the fields that only the last record has."""
        self._model, self._content, self._last = model, content, last
        self._calls: dict[int, _OpenCall] = {}
        self._finish: Finish | None = None
        self._usage = Usage()
        self._ended = False
        self.failure = ""

    def write(self, event: Event, created_at: str) -> bytes:
        if self._ended:
            return b""
        match event:
            case TextPiece(text):
                return self._frame(created_at, text=text) if text else b""
            case ThinkingPiece(text):
                return self._frame(created_at, thinking=text) if text else b""
            case ToolPiece():
                self._calls.setdefault(event.index, _OpenCall()).add(event)
            case Finished(finish):
                self._finish = finish
                return self._frame_of_calls(created_at, finish)
            case Counted(usage):
                self._usage = usage
        return b""

    def ping(self, created_at: str) -> bytes:
        """A record without content: an empty line would break clients."""
        return b"" if self._ended else self._frame(created_at)

    def end(self, created_at: str, durations: Durations = UNTIMED) -> bytes:
        """The last record, or an error if the answer was not finished."""
        if self._ended:
            return b""
        if self._finish is None:
            return self.fail(AnswerCutShort())
        self._ended = True
        last = last_fields(self._finish, self._usage, durations, self._last)
        return frame({"model": self._model, "created_at": created_at, **self._content("", "", []), **last})

    def fail(self, error: GatewayError) -> bytes:
        if self._ended:
            return b""
        self._ended, self.failure = True, error.message
        return frame({"error": error.message})

    def _frame_of_calls(self, created_at: str, finish: Finish) -> bytes:
        opened = [call.complete() for _, call in sorted(self._calls.items())]
        self._calls.clear()
        try:
            calls = tool_calls(opened, finish)
        except BackendFailed as failure:
            return self.fail(failure)
        return self._frame(created_at, calls=calls) if calls else b""

    def _frame(self, created_at: str, text: str = "", thinking: str = "", calls: Sequence[Fields] = ()) -> bytes:
        content = self._content(text, thinking, list(calls))
        return frame({"model": self._model, "created_at": created_at, **content, "done": False})


class _OpenCall:
    def __init__(self) -> None:
        self.id = self.name = ""
        self.arguments: list[str] = []

    def add(self, piece: ToolPiece) -> None:
        self.id, self.name = self.id or piece.id, self.name or piece.name
        self.arguments.append(piece.arguments)

    def complete(self) -> ToolCall:
        return ToolCall(self.id, self.name, "".join(self.arguments))
