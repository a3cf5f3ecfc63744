"""The backend's /v1/completions: a text, or a gap in one, to be completed without a chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.core import strict_json
from gateway.dialects.answers import BadFrame, error_code
from gateway.dialects.dialect import Usage
from gateway.dialects.openai import UNKNOWN, OpenAI
from gateway.dialects.translation.conversation import Counted, Event, Finish, Finished, Reply, Text, TextPiece

FINISHES: dict[str, Finish] = {"length": "length", "content_filter": "content_filter"}
DONE = b"[DONE]"
_openai = OpenAI()


@dataclass(slots=True)
class Completion:
    """A request to continue `prompt`, or to fill the gap between it and `suffix`; the other fields are those of a Prompt."""

    prompt: str
    suffix: str = ""
    most_output: int | None = None
    stop: Sequence[str] = ()
    sampling: dict[str, float] = field(default_factory=dict)
    stream: bool = False
    dropped: list[str] = field(default_factory=list)


def completion_body_of(completion: Completion, model: str) -> dict[str, Any]:
    """The body for the backend. Servers limit the output to 16 tokens if there is no `max_tokens`."""
    body: dict[str, Any] = {"model": model, "prompt": completion.prompt}
    if completion.suffix:
        body["suffix"] = completion.suffix
    if completion.most_output is not None:
        body["max_tokens"] = completion.most_output
    if completion.stop:
        body["stop"] = list(completion.stop)
    body |= completion.sampling
    if (penalty := body.get("repeat_penalty")) is not None:
        # vLLM's name for it; llama.cpp and LM Studio have Ollama's.
        body["repetition_penalty"] = penalty
    if completion.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def completion_reply_of(answer: Any) -> Reply:
    """Raises BadFrame if it is not an answer."""
    choice = _choice(answer)
    if choice is None or not isinstance(choice.get("text"), str):
        raise BadFrame("no text in it")
    reply_id, created = answer.get("id"), answer.get("created")
    return Reply(
        [Text(choice["text"])] if choice["text"] else [],
        _finish(choice.get("finish_reason")),
        _openai.usage_of(answer),
        reply_id if isinstance(reply_id, str) else "",
        created if created.__class__ is int else 0,
    )


class CompletionReader:
    """Reads the payloads of a stream one by one."""

    def __init__(self) -> None:
        self._finished = False

    def read(self, payload: bytes) -> list[Event]:
        """Raises BadFrame on an error and on what is not an answer."""
        if payload.startswith(DONE):
            return []
        chunk = _read(payload)
        events: list[Event] = self._pieces(_choice(chunk) or {})
        usage: Usage = _openai.usage_of(chunk)
        return events if usage is UNKNOWN else [*events, Counted(usage)]

    def _pieces(self, choice: dict[str, Any]) -> list[Event]:
        if self._finished:
            return []
        text, reason = choice.get("text"), choice.get("finish_reason")
        events: list[Event] = [TextPiece(text)] if isinstance(text, str) and text else []
        if isinstance(reason, str) and reason:
            self._finished = True
            events.append(Finished(_finish(reason)))
        return events


def _read(payload: bytes) -> dict[str, Any]:
    try:
        chunk = strict_json.read_loosely(payload)
    except ValueError:
        raise BadFrame("not JSON") from None
    if not isinstance(chunk, dict):
        raise BadFrame("not an object")
    if chunk.get("error"):
        raise BadFrame(f"an error{error_code(chunk)}", chunk)
    return chunk


def _choice(answer: Any) -> dict[str, Any] | None:
    """The first choice; more are never asked for."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def _finish(reason: object) -> Finish:
    return FINISHES.get(reason, "stop") if isinstance(reason, str) else "stop"
