"""Passes a backend's answer on to the client: after its first byte a failure is shown in the answer itself."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator

from starlette.types import Send

from gateway.audit.record import Record
from gateway.audit.settlement import Settler
from gateway.core.asgi import Connection
from gateway.core.cancel_scope import CallScope
from gateway.core.errors import AnswerCutShort, BackendTimeout, ClientGone, ClientStalled, GatewayError
from gateway.dialects import tokens
from gateway.dialects.answered_model import asked_name, frames_renamed, renamed
from gateway.dialects.answers import LONGEST_FRAME, content_type_of, try_read
from gateway.dialects.dialect import Call, Dialect, Framing
from gateway.dialects.large_json import LARGEST_READ_WHOLE
from gateway.dialects.translation.translation import Translation
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.backends.frame_buffer import FrameBuffer
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.opening import Opening
from gateway.fleet.redaction import redact_frames

# How many payloads at the end of a stream show whether it is complete, and how many bytes usually contain them.
TAIL_PIECES, SHORT_TAIL = 4, 4096
LAST_FRAME_WAITS_S = 0.05
# Bytes that are sent at once; of more, all but the last piece waits until the client reads it.
AT_ONCE = 65_536
# A client must read a large whole answer within this many seconds, plus one for each of this many bytes.
READ_WITHIN_S, SLOWEST_CLIENT = 60.0, 65_536
# Where the frames of a stream are parsed on their way: bytes that are parsed before other tasks run, and bytes of one piece.
READ_IN_A_TURN, READ_IN_A_PIECE = 32 * 1024, 2048
# A frame with one token is shorter in any language; only the text of longer ones is counted.
LONGEST_FRAME_OF_A_TOKEN = 600
STREAM_HEADERS = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


def _turns(frames: bytes, framing: Framing) -> Iterator[bytes]:
    """Whole frames, in pieces of at most READ_IN_A_TURN bytes; a longer frame in not much more than twice its length."""
    size = READ_IN_A_TURN
    while len(frames) > size:
        if end := framing.end_of_frames(frames[:size]):
            yield frames[:end]
            frames, size = frames[end:], READ_IN_A_TURN
        else:
            size *= 2
    yield frames


class Answer(ABC):
    """`relay` it in the call's scope, then `finish` it outside of that; or `break_off`.

    A failure before `started` gets an error as its answer; after it, the answer that has begun must show it.
    """

    def __init__(self, dialect: Dialect, call: Call, record: Record, send: Send) -> None:
        self._dialect, self._call, self._record, self._send = dialect, call, record, send
        # The name that the answer must have, if backends write another.
        self._name = asked_name(call.asked_model) if call.is_for_alias else None
        self.started = False
        # The client has all of the answer, though the body may not have ended.
        self.is_complete = False

    @abstractmethod
    async def relay(self, opening: Opening, cancel_scope: CallScope, connection: Connection) -> None:
        """Passes on the answer, of a whole one all but the last piece; closes `opening`."""

    async def break_off(self, error: GatewayError) -> None:
        """Shows the failure, after the status has been sent."""
        self._record.outcome = "shutdown" if error.code == "shutting_down" else "truncated"
        self._record.detail = self._record.detail or error.code

    @abstractmethod
    async def finish(self) -> None:
        """Ends the body. Outside of the scope, because the server reports the end of an answer as a disconnect."""

    async def _start(self, content_type: str, headers: list[tuple[bytes, bytes]], *, has_content: bool = True) -> None:
        self.started = True
        if has_content:
            self._record.first_byte_at = time.monotonic()
        if self._call.capped:
            headers.append((b"x-gateway-max-tokens", b"%d" % self._call.capped))
        kind = (b"content-type", content_type.encode("latin-1"))
        await self._send({"type": "http.response.start", "status": 200, "headers": [kind, *headers]})

    async def _send_most(self, body: bytes) -> bytes:
        """Sends a large body as the client reads it; returns its end, for which there is space then."""
        last = (len(body) - 1) // AT_ONCE * AT_ONCE
        for at in range(0, last, AT_ONCE):
            await self._send({"type": "http.response.body", "body": body[at : at + AT_ONCE], "more_body": True})
            # While the client keeps up, sending never waits: let other tasks run.
            await asyncio.sleep(0)
        await self._send({"type": "http.response.body", "body": b"", "more_body": True})
        return body[last:]

    def _tokens_of(self, answer: bytes) -> int:
        """Estimated from its text, or from its length where it is too large to be parsed."""
        if len(answer) > LARGEST_READ_WHOLE:
            return len(answer) // tokens.LETTERS_PER_TOKEN
        return tokens.of_text(self._dialect.answer_text(answer))


class WholeAnswer(Answer):
    """An answer that has been read to its end; the client gets its length beforehand."""

    _body = b""
    _head: tuple[str, list[tuple[bytes, bytes]]] = "", []

    async def relay(self, opening: Opening, cancel_scope: CallScope, connection: Connection) -> None:
        opening.give_back()
        self._record.end_slot()
        try:
            self._take(opening)
            if len(self._body) > AT_ONCE:
                # Until the client has read most of it, its call is in progress.
                cancel_scope.end_within(READ_WITHIN_S + len(self._body) / SLOWEST_CLIENT, ClientStalled)
                await self._start(*self._head)
                self._body = await self._send_most(self._body)
        finally:
            opening.held.close()

    def _take(self, opening: Opening) -> None:
        self._body = body = renamed(opening.frames, self._name) if self._name is not None else opening.frames
        self._head = content_type_of(opening.upstream.content_type), [(b"content-length", str(len(body)).encode())]
        record = self._record
        translation = opening.translation
        record.usage = self._dialect.usage_of(opening.value) if translation is None else translation.usage
        if record.usage.completion_tokens is None and record.need.output != 0:
            record.relayed_tokens = self._tokens_of(body)
        if record.prompt_log is not None:
            record.prompt_log.add(body)

    async def break_off(self, error: GatewayError) -> None:
        await super().break_off(error)
        # Its length has been sent, too: only a connection that ends early shows the failure.
        raise ClientGone

    async def finish(self) -> None:
        if not self.started:
            await self._start(*self._head)
        await self._send({"type": "http.response.body", "body": self._body})


class StreamedAnswer(Answer):
    """The backend's bytes as they arrive, cut at frames only; after a failure the dialect's error frame.

    It may start before `relay`, with heartbeats.
    """

    def __init__(self, dialect: Dialect, call: Call, record: Record, send: Send, settler: Settler) -> None:
        super().__init__(dialect, call, record, send)
        self._settler, self._in_errors = settler, dialect.framing.in_errors
        self._hides_usage = dialect.hides_usage(call)
        self._changes_frames = self._hides_usage or call.is_for_alias
        self._has_sent_last = False
        self._backend: BackendConfig | None = None
        self._recent: deque[bytes] = deque(maxlen=TAIL_PIECES)
        self._first: list[bytes] = []
        # Frames of the answer itself that were sent before it was relayed.
        self._early = b""
        self._translation: Translation | None = None

    async def send_heartbeat(self, early_frames: bytes) -> None:
        """Sends the first frames of the answer, once and if they are known, or else a frame without content."""
        if not self.started:
            # No backend has answered, so what these headers would report is not known.
            self._record.show_backend = self._record.show_overhead = False
            await self._start(self._dialect.framing.content_type, [*STREAM_HEADERS], has_content=False)
        if not early_frames or self._early:
            frame = self._dialect.heartbeat(self._call, time.time_ns())
            await self._send({"type": "http.response.body", "body": frame, "more_body": True})
            return
        await self._send({"type": "http.response.body", "body": early_frames, "more_body": True})
        self._early, self._first = early_frames, self._first_payload(early_frames)
        self._recent.append(early_frames)

    async def relay(self, opening: Opening, cancel_scope: CallScope, connection: Connection) -> None:
        self._backend, self._translation = opening.backend.config, opening.translation
        content_type = content_type_of(opening.upstream.content_type, self._dialect.framing)
        if self._dialect.needs_first:
            self._first = self._first_payload(opening.frames)
        try:
            cancel_scope.end_within(self._backend.total_timeout_s, BackendTimeout)
            if self.started:
                self._record.first_byte_at = time.monotonic()
                opening.frames = opening.frames.removeprefix(self._early)
            else:
                await self._start(content_type, [*STREAM_HEADERS])
            await self._relay_frames(opening, cancel_scope, connection)
        except BackendFault as fault:
            if not self._has_sent_last:
                self._record.detail = str(fault)
                raise AnswerCutShort(fault.for_client) from fault
        finally:
            opening.close()
            self._read_end()
        if not self.is_complete:
            raise AnswerCutShort

    def _read_end(self) -> bool:
        """Takes the usage from the last frames; returns whether they complete the answer."""
        tail = self._tail()
        if self._translation is None:
            self._record.usage = self._dialect.usage(tail)
        else:
            self._record.usage = self._translation.usage
            # The backend worked for pieces that were to be written later, too.
            self._record.relayed_tokens = max(self._record.relayed_tokens, self._translation.pieces)
        self.is_complete = self._dialect.is_complete(tail, self._call)
        return self.is_complete

    async def _relay_frames(self, opening: Opening, cancel_scope: CallScope, connection: Connection) -> None:
        idle_s, upstream, in_errors = opening.backend.config.idle_timeout_s, opening.upstream, self._in_errors
        frames, is_plain, record, buffer = opening.frames, self._dialect.is_plain, self._record, opening.held
        assert isinstance(buffer, FrameBuffer)
        longest = READ_IN_A_PIECE if self._changes_frames else LONGEST_FRAME

        def pass_at_once(piece: bytes) -> bool:
            """Most pieces are whole frames for a client that keeps up: these are passed on without waking this task."""
            if buffer.rest or not is_plain(piece) or not connection.keeps_up or len(piece) > longest:
                return False
            if len(piece) > READ_IN_A_PIECE and in_errors in piece:
                return False
            if shown := self._process(piece):
                connection.push(shown)
                record.bytes_out += len(shown)
            cancel_scope.within(idle_s, BackendTimeout)
            return True

        while True:
            if self._dialect.has_last_frame(frames) and not opening.at_end:
                buffer.rest += await self._rest_of(opening)
            if len(frames) > READ_IN_A_TURN and (self._changes_frames or in_errors in frames):
                frames = await self._pass_most_turns(frames, cancel_scope, idle_s)
            cancel_scope.within(idle_s, ClientStalled)
            await self._pass_on(frames)
            cancel_scope.within(idle_s, BackendTimeout)
            # What a backend sends after the last frame is neither passed on nor counted.
            piece = b"" if opening.at_end or self._has_sent_last else await upstream.flow(pass_at_once)
            if not piece:
                opening.at_end = opening.at_end or not self._has_sent_last
                break
            frames = buffer.add(piece)
            if len(buffer.rest) > LONGEST_FRAME:
                frames += buffer.take()
        cancel_scope.within(idle_s, ClientStalled)
        await self._pass_on_last(buffer.take())

    async def _pass_most_turns(self, frames: bytes, cancel_scope: CallScope, idle_s: float) -> bytes:
        """Passes on all pieces but the last, which it returns."""
        *turns, last = _turns(frames, self._dialect.framing)
        await asyncio.sleep(0)
        for turn in turns:
            cancel_scope.within(idle_s, ClientStalled)
            await self._pass_on(turn)
            await asyncio.sleep(0)
        return last

    async def _rest_of(self, opening: Opening) -> bytes:
        """What comes after the last frame: usually only the end of the body, after which the backend is free."""
        try:
            async with asyncio.timeout(LAST_FRAME_WAITS_S):
                piece = await opening.upstream.read()
        except (TimeoutError, BackendFault):
            return b""
        if not piece:
            opening.at_end = True
            # Before the client can send its next request.
            opening.free_slot()
        return piece

    async def _pass_on(self, frames: bytes) -> None:
        if not frames:
            return
        shown = self._process(frames)
        if len(shown) > AT_ONCE:
            shown = await self._send_most(shown)
        if not self._has_sent_last and self._dialect.has_last_frame(frames) and self._read_end():
            # A client that has this may send its next request before the body has ended.
            self._has_sent_last = True
            await self._settler.finish_before_last_bytes(self._record, coming=len(shown))
        if shown:
            await self._send({"type": "http.response.body", "body": shown, "more_body": True})

    def _process(self, frames: bytes) -> bytes:
        """Counts and keeps frames; returns them as the client gets them."""
        if self._in_errors in frames and self._backend is not None:
            frames = redact_frames(frames, self._dialect.framing, self._backend)
        self._recent.append(frames)
        size = len(frames)
        if size > LARGEST_READ_WHOLE:
            self._drop_old_frames()
        count = self._dialect.framing.count(frames)
        if size > LONGEST_FRAME_OF_A_TOKEN and size > LONGEST_FRAME_OF_A_TOKEN * count:
            count = max(count, self._tokens_of(frames))
        self._record.relayed_tokens += count
        if self._record.prompt_log is not None:
            self._record.prompt_log.add(frames)
        if self._hides_usage:
            frames = self._dialect.without_usage(frames)
        return frames_renamed(frames, self._name) if self._name is not None else frames

    def _drop_old_frames(self) -> None:
        while len(self._recent) > 1 and sum(map(len, self._recent)) > LONGEST_FRAME:
            self._recent.popleft()

    async def _pass_on_last(self, rest: bytes) -> None:
        """A stream may end without its last newline; half a frame is no frame and is not passed on."""
        if not rest or self._has_sent_last:
            return
        payloads = self._dialect.framing.payloads(rest)
        if all(payload.startswith(b"[DONE]") or try_read(payload) for payload in payloads):
            await self._pass_on(rest)

    def _first_payload(self, frames: bytes) -> list[bytes]:
        """The first payload as the client gets it; none if it is too large to be kept and parsed."""
        first = self._dialect.framing.payloads(frames)[0]
        if len(first) > LARGEST_READ_WHOLE:
            return []
        return [renamed(first, self._name) if self._name is not None else first]

    def _tail(self) -> list[bytes]:
        """The first payload if the dialect needs it, and the last ones: of many frames those at the end, one in any case."""
        framing, recent = self._dialect.framing, b"".join(self._recent)
        tail: list[bytes] = []
        for size in (SHORT_TAIL, LARGEST_READ_WHOLE):
            if len(tail) < TAIL_PIECES:
                begin = framing.end_of_frames(recent[:-size]) if len(recent) > size else 0
                tail = framing.payloads(recent[begin:])[-TAIL_PIECES:]
        return [*self._first, *tail]

    async def break_off(self, error: GatewayError) -> None:
        await super().break_off(error)
        if self._record.first_byte_at is None:
            # As with an error that has a status of its own: nothing is charged, and a caller's mistake is no failure.
            self._record.was_sent = False
            if error.status < 500:
                self._record.outcome = f"refused:{error.code}"
        await self._send(
            {"type": "http.response.body", "body": self._dialect.error_frame(error, self._tail()), "more_body": True}
        )

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})
