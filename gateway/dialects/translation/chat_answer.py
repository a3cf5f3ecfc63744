"""Answers of chat/completions as vLLM, llama.cpp, LM Studio, SGLang and Ollama give them, whole or in chunks. No I/O.

They answer what `chat_request` wrote. Chunks are turned into events one by one. What cannot be read without doubt raises
Unreadable: the caller reports it, and nothing wrong reaches the client.
"""

from typing import Any

from gateway.dialects.answers import error_text
from gateway.dialects.openai import UNKNOWN, OpenAI
from gateway.dialects.translation.chat_tool_calls import ToolCalls
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
)
from gateway.dialects.translation.unreadable import Unreadable

FINISHES: dict[object, Finish] = {
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "content_filter": "content_filter",
}
FAILURES = frozenset({"abort", "error"})
USAGE_OF = OpenAI().usage_of


def reply_of(answer: Any, beginning: str = "") -> Reply:
    """A whole answer; `beginning` is the part of it that was in the prompt. Raises Unreadable if it is none."""
    refuse_errors(answer)
    choice = _first_choice(answer)
    if choice is None:
        raise Unreadable("the answer has no choice")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise Unreadable("the answer has no message")
    thoughts, text = _thoughts_and_text(message)
    if beginning and "timings" in answer:
        text = text.removeprefix(beginning)
    calls = ToolCalls()
    pieces = calls.read_whole(message.get("tool_calls"))
    calls.end()
    parts: list[Thinking | Text | ToolCall] = [ToolCall(piece.id, piece.name, piece.arguments) for piece in pieces]
    if text:
        parts.insert(0, Text(text))
    if thoughts:
        parts.insert(0, Thinking(thoughts))
    finish = finish_of(choice.get("finish_reason"), has_calls=bool(pieces))
    return Reply(parts, finish, USAGE_OF(answer), _string(answer.get("id")), _whole_number(answer.get("created")))


class ChunkReader:
    """Reads the chunks of one stream."""

    def __init__(self) -> None:
        self._calls = ToolCalls()
        self._is_finished = False

    def read(self, chunk: Any) -> list[Event]:
        """The events of a chunk: thinking, text, tools, the end, counts. Raises Unreadable."""
        refuse_errors(chunk)
        choice = _first_choice(chunk)
        events = [] if choice is None else self._events(choice)
        usage = USAGE_OF(chunk)
        if usage != UNKNOWN:
            events.append(Counted(usage))
        return events

    def end(self) -> list[Event]:
        """To be called once the stream has ended as it should: servers may omit the reason of the end."""
        return [] if self._is_finished else self._end(None)

    def _events(self, choice: dict[str, Any]) -> list[Event]:
        delta = choice.get("delta") or choice.get("message") or {}
        if not isinstance(delta, dict):
            raise Unreadable("the delta of a chunk is not an object")
        thoughts, text = _thoughts_and_text(delta)
        events: list[Event] = [ThinkingPiece(thoughts)] if thoughts else []
        if text:
            events.append(TextPiece(text))
        events += self._calls.read(delta.get("tool_calls"))
        if events and self._is_finished:
            raise Unreadable("the answer continues after its end")
        if (reason := choice.get("finish_reason")) and not self._is_finished:
            events += self._end(reason)
        return events

    def _end(self, reason: object) -> list[Event]:
        self._calls.end()
        self._is_finished = True
        return [Finished(finish_of(reason, has_calls=self._calls.count > 0))]


def refuse_errors(answer: Any) -> None:
    if not isinstance(answer, dict):
        raise Unreadable("the answer is not an object")
    if answer.get("error") or answer.get("object") == "error":
        raise Unreadable(error_text(answer) or "the backend reported an error")


def _first_choice(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The first choice: only one was asked for."""
    choices = answer.get("choices")
    if choices is None:
        return None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Unreadable("the choices are not a list of objects")
    return next((choice for choice in choices if not choice.get("index")), None)


def _thoughts_and_text(message: dict[str, Any]) -> tuple[str, str]:
    """Servers name what a model thinks `reasoning`, `reasoning_content`, or both for the same text."""
    thoughts = _optional(message, "reasoning") or _optional(message, "reasoning_content")
    content = message.get("content")
    thoughts_in_parts = text = ""
    if isinstance(content, list):
        thoughts_in_parts, text = _read_parts(content)
    else:
        text = _optional(message, "content")
    return thoughts or thoughts_in_parts, text + _optional(message, "refusal")


def _optional(message: dict[str, Any], name: str) -> str:
    value = message.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unreadable(f"the {name} of a message is not a string")
    return value


def _read_parts(parts: list[Any]) -> tuple[str, str]:
    thoughts, texts = [], []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in ("thinking", "reasoning"):
            thoughts.append(_inner_text(part.get("thinking") or part.get("reasoning") or part.get("text")))
        elif kind in ("text", "output_text", "refusal"):
            texts.append(_inner_text(part))
        else:
            raise Unreadable("the content of a message has a part that is not text")
    return "".join(thoughts), "".join(texts)


def _inner_text(value: Any) -> str:
    """The text of a part; Mistral's thoughts are a list of parts again."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return "".join(_inner_text(part) for part in value if not isinstance(part, list))
    text = (value.get("text") or value.get("refusal")) if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise Unreadable("the text of a part is not a string")
    return text or ""


def finish_of(reason: object, *, has_calls: bool) -> Finish:
    """Ollama and vLLM may end with "stop" after tool calls, for which clients would not run the tools."""
    if isinstance(reason, str):
        if reason in FAILURES:
            raise Unreadable(f"the backend ended the answer with {reason!r}")
        if reason in FINISHES:
            return FINISHES[reason]
    return "tool_calls" if has_calls else "stop"


def _string(value: object) -> str:
    return value if isinstance(value, str) else ""


def _whole_number(value: object) -> int:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0
