"""Answers in Anthropic's Messages API, written as a stream: one content block after another, only one of them open."""

from collections import deque
from typing import Any, Literal

from gateway.core import strict_json
from gateway.core.errors import AnswerCutShort
from gateway.dialects import tokens
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.conversation import (
    Counted,
    Event,
    Finish,
    Finished,
    TextPiece,
    ThinkingPiece,
    ToolPiece,
)
from gateway.dialects.translation.messages_answer import SIGNATURE, message, stop_reason, tool_id, usage_of, wrong_arguments
from gateway.dialects.translation.tool_arguments import ArgumentPieces, object_of

Content = TextPiece | ThinkingPiece | ToolPiece
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


class EventWriter:
    """Turns each event into frames at once. Content that comes while a tool call is incomplete waits for its end.

    After an error nothing more is written; `failure` is its message.
    """

    starts_early = False

    def __init__(self, model: str, id: str, input_tokens_estimate: int) -> None:  # noqa: A002
        self._model, self._id, self._input_estimate = model, id, input_tokens_estimate
        self._index = -1
        self._open: Literal["", "text", "thinking", "tool_use"] = ""
        self._call = -1
        self._arguments = ArgumentPieces()
        self._calls: dict[int, str] = {}
        # Texts, and of each call all pieces; the latter also by their call.
        self._waiting: deque[list[Content]] = deque()
        self._waiting_calls: dict[int, list[Content]] = {}
        self._has_content = False
        self._output_estimate = 0
        self._usage = Usage()
        self._finish: Finish | None = None
        self._ended = False
        self.failure = ""

    def start(self) -> bytes:
        usage = usage_of(Usage(), self._input_estimate, 0)
        return _frame("message_start", message=message(self._model, self._id, [], None, usage))

    def ping(self) -> bytes:
        return b"" if self._ended else PING

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
            return self._finish_blocks()
        return self._take(event)

    def end(self) -> bytes:
        """The last frames, or an error if the answer was not finished."""
        if self._ended:
            return b""
        if self._finish is None:
            return self.error("api_error", AnswerCutShort().message)
        self._ended = True
        stop = stop_reason(self._finish, has_calls=bool(self._calls))
        usage = usage_of(self._usage, self._input_estimate, self._output_estimate)
        delta = {"stop_reason": stop, "stop_sequence": None}
        return _frame("message_delta", delta=delta, usage=usage) + _frame("message_stop")

    def error(self, type: str, message: str) -> bytes:  # noqa: A002
        if self._ended:
            return b""
        self._ended, self.failure = True, message
        return _frame("error", error={"type": type, "message": message})

    def _take(self, event: Content) -> bytes:
        if self._waits_for_call and not self._is_of_open_call(event):
            self._wait(event)
            return b""
        frames = self._write_piece(event)
        return frames + self._take_waiting() if self._waiting else frames

    @property
    def _waits_for_call(self) -> bool:
        return self._open == "tool_use" and not self._arguments.is_complete

    def _wait(self, event: Content) -> None:
        """Pieces of one call wait together: they are to be written one after the other."""
        pieces = self._waiting_calls.get(event.index) if isinstance(event, ToolPiece) else None
        if pieces is None:
            pieces = []
            self._waiting.append(pieces)
            if isinstance(event, ToolPiece):
                self._waiting_calls[event.index] = pieces
        pieces.append(event)

    def _take_waiting(self) -> bytes:
        frames: list[bytes] = []
        while self._waiting and not self._waits_for_call and not self._ended:
            pieces = self._waiting.popleft()
            if isinstance(pieces[0], ToolPiece):
                del self._waiting_calls[pieces[0].index]
            frames += [self._write_piece(piece) for piece in pieces]
        return b"".join(frames)

    def _write_piece(self, event: Content) -> bytes:
        return self._tool_piece(event) if isinstance(event, ToolPiece) else self._text_piece(event)

    def _is_of_open_call(self, event: Content) -> bool:
        return isinstance(event, ToolPiece) and event.index == self._call

    def _text_piece(self, event: TextPiece | ThinkingPiece) -> bytes:
        if not event.text:
            return b""
        self._output_estimate += tokens.of_text(event.text)
        if isinstance(event, ThinkingPiece):
            frames = self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            return frames + self._delta("thinking_delta", thinking=event.text)
        frames = self._enter("text", {"type": "text", "text": ""})
        return frames + self._delta("text_delta", text=event.text)

    def _tool_piece(self, event: ToolPiece) -> bytes:
        self._output_estimate += tokens.of_text(event.name + event.arguments)
        frames = b""
        if event.index not in self._calls:
            call_id = tool_id(event.id, self._id, event.index)
            frames = self._enter("tool_use", {"type": "tool_use", "id": call_id, "name": event.name, "input": {}})
            self._call, self._arguments = event.index, ArgumentPieces()
            self._calls[event.index] = event.name
        elif self._open != "tool_use" or not self._is_of_open_call(event):
            # The call's block is closed, as its arguments were complete.
            return self._refuse_arguments(event.index) if event.arguments.strip() else b""
        text = self._arguments.add(event.arguments)
        if self._arguments.is_complete and not self._arguments.is_object:
            return frames + self._refuse_arguments(event.index)
        return frames + (self._delta("input_json_delta", partial_json=text) if text else b"")

    def _enter(self, kind: Literal["text", "thinking", "tool_use"], block: dict[str, Any]) -> bytes:
        if kind == self._open != "tool_use":
            return b""
        frames = self._close()
        self._index, self._open = self._index + 1, kind
        self._has_content = self._has_content or kind != "thinking"
        return frames + self._event("content_block_start", index=self._index, content_block=block)

    def _close(self) -> bytes:
        if not self._open:
            return b""
        last = b""
        if self._open == "thinking":
            last = self._delta("signature_delta", signature=SIGNATURE)
        elif self._open == "tool_use":
            last = self._end_of_arguments()
        self._open = ""
        return last + self._event("content_block_stop", index=self._index)

    def _end_of_arguments(self) -> bytes:
        """A complete object was examined when its last piece came."""
        if not self._arguments.is_complete and object_of(self._arguments.text) is None and self._finish != "length":
            return self._refuse_arguments(self._call)
        return b"" if self._arguments.has_begun else self._delta("input_json_delta", partial_json="{}")

    def _refuse_arguments(self, index: int) -> bytes:
        return self.error("api_error", wrong_arguments(self._calls[index]).message)

    def _finish_blocks(self) -> bytes:
        closed = [self._close()]
        while self._waiting and not self._ended:
            closed += [self._take_waiting(), self._close()]
        frames = b"".join(closed)
        if self._has_content:
            return frames
        # Callers read the text of an answer without asking whether it has any.
        return frames + self._enter("text", {"type": "text", "text": ""}) + self._close()

    def _delta(self, kind: str, **fields: str) -> bytes:
        return self._event("content_block_delta", index=self._index, delta={"type": kind, **fields})

    def _event(self, kind: str, **fields: Any) -> bytes:
        """Nothing after an error."""
        return b"" if self._ended else _frame(kind, **fields)


def _frame(kind: str, **fields: Any) -> bytes:
    data = strict_json.write_with_replacements({"type": kind, **fields})
    return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"
