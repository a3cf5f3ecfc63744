"""One call in a client's API for a backend that has another, and its answer on the way back. No I/O."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gateway.core import strict_json
from gateway.core.errors import BackendFailed
from gateway.dialects.answers import LONGEST_FRAME, BadFrame, judge_whole
from gateway.dialects.dialect import Call, Dialect, Usage
from gateway.dialects.openai import DONE, OpenAI
from gateway.dialects.translation.conversation import Counted, Event, TextPiece, ThinkingPiece, ToolPiece
from gateway.dialects.translation.unreadable import Unreadable

OPENAI = OpenAI()
OPERATIONS = {operation.path: operation for operation in OPENAI.operations}
# Commas and opening brackets in one answer or frame of a backend; a list of embeddings has one for each number.
MOST_VALUES, MOST_NUMBERS = strict_json.MOST_VALUES, 4_000_000
# Many pieces of a stream are kept until its end: each takes its text and about so many bytes.
SIZE_OF_PIECE = 100


class Reader(Protocol):
    """Reads the chunks of a backend's stream; the last is followed by `end`. Raises Unreadable."""

    def read(self, chunk: Any) -> list[Event]: ...

    def end(self) -> list[Event]: ...


class Writer(Protocol):
    """Writes frames for the client. After a failure `failure` is its message, and what was written last does not count.

    If it `starts_early`, a client may have the frames of `start` before the backend has answered; they depend only on the call.
    """

    starts_early: bool

    @property
    def failure(self) -> str: ...

    def start(self) -> bytes: ...

    def write(self, event: Event) -> bytes: ...

    def ping(self) -> bytes: ...

    def end(self) -> bytes: ...


class Translation:
    """`call` is what the backend is asked, in the OpenAI API; `dropped` names fields of the client that it does not get.

    `whole` turns a whole answer into the client's body, `frames` one payload of a stream into frames of the client.
    """

    dialect: Dialect = OPENAI

    def __init__(
        self,
        call: Call,
        dropped: Sequence[str],
        write_whole: Callable[[Any], dict[str, Any]],
        stream: tuple[Reader, Writer] | None = None,
    ) -> None:
        self.call, self.dropped, self._write_whole = call, list(dropped), write_whole
        self._stream = stream
        self._has_begun = self.is_ended = False
        self._started = b""
        # As the backend reported it; what the client gets may be estimated.
        self.usage = Usage()
        self._tail: list[bytes] = []
        is_chat = call.operation.clamp is not None
        # Of an answer that is not streamed, in bytes; and of each answer or frame.
        self.longest = LONGEST_FRAME if is_chat else None
        self._most_values = MOST_VALUES if is_chat else MOST_NUMBERS
        # Bytes of the stream that may still be in memory.
        self.held = 0
        # Each is about one token.
        self.pieces = 0

    def read(self, data: bytes) -> Any:
        """An answer or a frame of the backend. Raises BadFrame if it is no JSON, or so much that it delays other calls."""
        if strict_json.has_more_values(data, self._most_values):
            raise BadFrame(f"more than {self._most_values} values")
        try:
            return strict_json.read_loosely(data)
        except ValueError:
            raise BadFrame("not JSON") from None

    def whole(self, answer: Any) -> bytes:
        """Raises BadFrame if it is no answer."""
        try:
            judge_whole(answer, self.call.operation)
            self.usage = self.dialect.usage_of(answer)
            return strict_json.write_with_replacements(self._write_whole(answer))
        except Unreadable as wrong:
            raise BadFrame("an answer that cannot be translated", {"error": str(wrong)}) from wrong
        except BackendFailed as wrong:
            raise BadFrame("a tool call that is not JSON", {"error": wrong.message}) from wrong

    def frames(self, payload: bytes) -> bytes:
        """Raises BadFrame if the answer does not begin as one or cannot be translated."""
        reader, writer = self._parts
        if self.is_ended:
            return b""
        if payload.startswith(DONE):
            if not self._has_begun:
                raise BadFrame("no answer in it")
            return self._ended()
        begun = b""
        if not self._has_begun:
            self.dialect.judge_frame(payload)
            self._has_begun, begun = True, self._started or writer.start()
        self._tail = [*self._tail[-1:], payload]
        return begun + self._written(lambda: reader.read(self.read(payload)))

    def early_frames(self) -> bytes:
        """The first of `frames`, as far as the client may have them before the backend has answered."""
        if self._stream is None or not self._stream[1].starts_early:
            return b""
        self._started = self._started or self._stream[1].start()
        return self._started

    def end(self) -> bytes:
        """The frames at the end of the backend's stream; nothing if its answer is not complete."""
        is_complete = not self.is_ended and self.dialect.is_complete(self._tail, self.call)
        return self._ended() if is_complete else b""

    def ping(self) -> bytes:
        """A frame without content, so that a client does not time out; none before the first frame."""
        return self._parts[1].ping() if self._has_begun and not self.is_ended else b""

    @property
    def _parts(self) -> tuple[Reader, Writer]:
        assert self._stream is not None
        return self._stream

    def _ended(self) -> bytes:
        reader, writer = self._parts
        last = self._written(reader.end)
        self.is_ended = True
        return last + self._accepted(writer.end())

    def _written(self, read: Callable[[], list[Event]]) -> bytes:
        try:
            events = read()
        except Unreadable as wrong:
            raise BadFrame("an answer that cannot be translated", {"error": str(wrong)}) from wrong
        writer = self._parts[1]
        for event in events:
            if isinstance(event, Counted):
                self.usage = event.usage
            else:
                self.pieces += 1
                self.held += SIZE_OF_PIECE + _size_of(event)
        return b"".join([self._accepted(writer.write(event)) for event in events])

    def _accepted(self, frames: bytes) -> bytes:
        if failure := self._parts[1].failure:
            raise BadFrame("an answer that cannot be translated", {"error": failure})
        return frames


def _size_of(event: Event) -> int:
    match event:
        case TextPiece(text) | ThinkingPiece(text):
            return len(text)
        case ToolPiece():
            return len(event.arguments)
    return 0


def inner_call(call: Call, path: str, body: dict[str, Any]) -> Call:
    """The call for the backend. Its output is limited to the rest of the context, because agents ask for more."""
    body = {"model": call.asked_model, **body}
    left = call.context - call.needs.prompt - call.needs.prompt // 4
    if call.context and left > 0 and body.get("max_tokens", 0) > left:
        body["max_tokens"] = left
    inner = Call(OPERATIONS[path], call.asked_model, call.model, call.stream, body, context=call.context)
    inner.is_for_alias = call.is_for_alias
    return inner
