"""The writers of streams in each client API, with one interface."""

import secrets
import time

from gateway.dialects import tokens
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.conversation import Counted, Event, TextPiece, ThinkingPiece, ToolPiece
from gateway.dialects.translation.native_records import Durations, RecordWriter, timestamp
from gateway.dialects.translation.responses_answer import EventWriter
from gateway.dialects.translation.responses_request import ResponsesPrompt


def message_id() -> str:
    return f"msg_{secrets.token_hex(12)}"


class Clock:
    """Times of one answer as Ollama reports them, in nanoseconds."""

    def __init__(self) -> None:
        self._began = self._first = time.monotonic_ns()
        self._has_piece = False

    def note_piece(self) -> None:
        if not self._has_piece:
            self._has_piece, self._first = True, time.monotonic_ns()

    def now(self) -> str:
        return timestamp(time.time_ns())

    def durations(self) -> Durations:
        ended = time.monotonic_ns()
        first = self._first if self._has_piece else ended
        return Durations(ended - self._began, 0, first - self._began, ended - first)


class RecordsOfOllama:
    """Ollama has no frame before the first piece."""

    starts_early = False

    def __init__(self, writer: RecordWriter) -> None:
        self._writer, self._clock = writer, Clock()

    @property
    def failure(self) -> str:
        return self._writer.failure

    def start(self) -> bytes:
        return b""

    def write(self, event: Event) -> bytes:
        self._clock.note_piece()
        return self._writer.write(event, self._clock.now())

    def ping(self) -> bytes:
        return self._writer.ping(self._clock.now())

    def end(self) -> bytes:
        return self._writer.end(self._clock.now(), self._clock.durations())


class EventsOfResponses:
    """Clients require counts: where the backend sends none, estimates take their place."""

    failure = ""
    starts_early = True

    def __init__(self, prompt: ResponsesPrompt, prompt_tokens: int, response_id: str, created: int) -> None:
        self._writer = EventWriter(prompt, response_id, created)
        self._estimated = Usage(prompt_tokens, 0)
        self._output = 0
        self._is_counted = False

    def start(self) -> bytes:
        return self._writer.start()

    def write(self, event: Event) -> bytes:
        match event:
            case Counted():
                self._is_counted = True
            case TextPiece(text) | ThinkingPiece(text):
                self._output += tokens.of_text(text)
            case ToolPiece():
                self._output += tokens.of_text(event.name + event.arguments)
        return self._writer.write(event)

    def ping(self) -> bytes:
        return b": ping\n\n"

    def end(self) -> bytes:
        if not self._is_counted:
            self._writer.write(Counted(Usage(self._estimated.prompt_tokens, self._output)))
        return self._writer.end()
