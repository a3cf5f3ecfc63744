"""The backend's /v1/completions: a text, or a gap in one, to be completed without a chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.dialects.openai import UNKNOWN
from gateway.dialects.translation.chat_answer import USAGE_OF, finish_of, refuse_errors
from gateway.dialects.translation.chat_request import sampling_fields
from gateway.dialects.translation.conversation import Counted, Event, Finished, Reply, Text, TextPiece
from gateway.dialects.translation.unreadable import Unreadable


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
    body |= sampling_fields(completion.sampling)
    if completion.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def completion_reply_of(answer: Any) -> Reply:
    """A whole answer. Raises Unreadable if it is none."""
    refuse_errors(answer)
    choice = _choice(answer)
    if choice is None or not isinstance(choice.get("text"), str):
        raise Unreadable("the answer has no text")
    reply_id, created = answer.get("id"), answer.get("created")
    return Reply(
        [Text(choice["text"])] if choice["text"] else [],
        finish_of(choice.get("finish_reason"), has_calls=False),
        USAGE_OF(answer),
        reply_id if isinstance(reply_id, str) else "",
        created if created.__class__ is int else 0,
    )


class CompletionReader:
    """Reads the chunks of one stream."""

    def __init__(self) -> None:
        self._finished = False

    def read(self, chunk: Any) -> list[Event]:
        """The events of a chunk: text, the end, counts. Raises Unreadable."""
        refuse_errors(chunk)
        events = self._pieces(_choice(chunk) or {})
        usage = USAGE_OF(chunk)
        return events if usage is UNKNOWN else [*events, Counted(usage)]

    def end(self) -> list[Event]:
        """To be called once the stream has ended as it should: servers may omit the reason of the end."""
        return [] if self._finished else [Finished("stop")]

    def _pieces(self, choice: dict[str, Any]) -> list[Event]:
        if self._finished:
            return []
        text, reason = choice.get("text"), choice.get("finish_reason")
        events: list[Event] = [TextPiece(text)] if isinstance(text, str) and text else []
        if isinstance(reason, str) and reason:
            self._finished = True
            events.append(Finished(finish_of(reason, has_calls=False)))
        return events


def _choice(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The first choice; more are never asked for."""
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None
