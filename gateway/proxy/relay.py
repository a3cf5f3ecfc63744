"""What a client gets once a backend has answered well: from here on a failure is part of the answer."""

import asyncio
import time
from collections import deque
from collections.abc import Iterator

from starlette.types import Send

from gateway.audit.record import Record
from gateway.audit.settlement import Settler
from gateway.core.cancel_scope import CallScope
from gateway.core.connection import Connection
from gateway.core.errors import AnswerCutShort, BackendTimeout, ClientGone, ClientStalled, GatewayError
from gateway.dialects import tokens
from gateway.dialects.dialect import LONGEST_FRAME, Call, Dialect, Framing, content_type_of, try_read
from gateway.dialects.outline import LARGEST_READ_WHOLE
from gateway.fleet import refusals
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.backends.frame_buffer import FrameBuffer
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.failover import Opening
from gateway.fleet.refusals import IN_ERRORS

# The payloads of a stream's end that tell what became of it, and how many bytes of it usually hold them.
TAIL_PIECES, SHORT_TAIL = 4, 4096
LAST_FRAME_WAITS_S = 0.05
# What is sent at once; of more, all but the last waits until the client takes it.
AT_ONCE = 65_536
# A large whole answer must be read in so many seconds, and one more for each so many bytes.
READ_WITHIN_S, SLOWEST_READER = 60.0, 65_536
# Of a stream whose frames are read on their way so much is read at once, and of each piece where there is no turn between.
READ_IN_A_TURN, READ_IN_A_PIECE = 32 * 1024, 2048
# A token with what stands around it is shorter in any language; only the longer ones are read.
LONGEST_FRAME_OF_A_TOKEN = 600


def _turns(frames: bytes, framing: Framing) -> Iterator[bytes]:
    """Whole frames, READ_IN_A_TURN bytes each at the most, a frame that is longer in not much more than twice its length."""
    size = READ_IN_A_TURN
    while len(frames) > size:
        if end := framing.end_of_frames(frames[:size]):
            yield frames[:end]
            frames, size = frames[end:], READ_IN_A_TURN
        else:
            size *= 2
    yield frames


class Answer:
    """What the client gets: the backend's bytes, cut at frames only; after a failure the dialect's error frame."""

    def __init__(self, dialect: Dialect, call: Call, record: Record, send: Send, settler: Settler) -> None:
        self._dialect, self._call, self.record, self._send, self._settler = dialect, call, record, send, settler
        self._hides_usage = dialect.hides_usage(call)
        self._said_last = False
        self._backend: BackendConfig | None = None
        self._recent: deque[bytes] = deque(maxlen=TAIL_PIECES)
        self._whole: bytes | None = None
        self._whole_head: tuple[str, list[tuple[bytes, bytes]]] = "", []
        self.started = False
        self.is_complete = False

    def keep_whole(self, opening: Opening) -> None:
        self._whole = body = opening.frames
        self._whole_head = content_type_of(opening.upstream.content_type), [(b"content-length", str(len(body)).encode())]
        self.record.usage = self._dialect.usage_of(opening.value)
        if self.record.usage.completion_tokens is None and self.record.need.output != 0:
            self.record.relayed_tokens = self._tokens_of(opening.frames)
        if self.record.prompt_log is not None:
            self.record.prompt_log.add(opening.frames)

    async def pass_most(self, guard: CallScope) -> None:
        """Of a large whole answer all but its end: until the client has taken that, its call is under way."""
        assert self._whole is not None
        guard.end_within(READ_WITHIN_S + len(self._whole) / SLOWEST_READER, ClientStalled)
        await self._start(*self._whole_head)
        self._whole = await self._send_most(self._whole)

    async def _send_most(self, body: bytes) -> bytes:
        """Sends a large body as the client takes it; returns its end, for which there is room then."""
        last = (len(body) - 1) // AT_ONCE * AT_ONCE
        for at in range(0, last, AT_ONCE):
            await self._send({"type": "http.response.body", "body": body[at : at + AT_ONCE], "more_body": True})
            # A client as quick as we are would leave no turn to others.
            await asyncio.sleep(0)
        await self._send({"type": "http.response.body", "body": b"", "more_body": True})
        return body[last:]

    def _tokens_of(self, answer: bytes) -> int:
        """Guessed from what it says, or where that is too much to be read, from its length."""
        if len(answer) > LARGEST_READ_WHOLE:
            return len(answer) // tokens.LETTERS_PER_TOKEN
        return tokens.of_text(self._dialect.said(answer))

    async def relay(self, opening: Opening, guard: CallScope, connection: Connection) -> None:
        self._backend = opening.backend.config
        content_type = content_type_of(opening.upstream.content_type, self._dialect.framing)
        await self._start(content_type, [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")])
        try:
            await self._relay_frames(opening, guard, connection)
        except BackendFault as fault:
            if not self._said_last:
                self.record.detail = str(fault)
                raise AnswerCutShort from fault
        finally:
            self._look_at_end()
        if not self.is_complete:
            raise AnswerCutShort

    def _look_at_end(self) -> bool:
        tail = self._tail()
        self.record.usage = self._dialect.usage(tail)
        self.is_complete = self._dialect.is_complete(tail, self._call)
        return self.is_complete

    async def _relay_frames(self, opening: Opening, guard: CallScope, connection: Connection) -> None:
        idle_s, upstream = opening.backend.config.idle_timeout_s, opening.upstream
        frames, is_plain, record, buffer = opening.frames, self._dialect.is_plain, self.record, opening.held
        assert isinstance(buffer, FrameBuffer)
        longest = READ_IN_A_PIECE if self._hides_usage else LONGEST_FRAME

        def pass_at_once(piece: bytes) -> bool:
            """Most pieces are whole frames for a client that keeps up: they need no turn of this task."""
            if buffer.rest or not is_plain(piece) or not connection.keeps_up or len(piece) > longest:
                return False
            if len(piece) > READ_IN_A_PIECE and IN_ERRORS in piece:
                return False
            if shown := self._hear(piece):
                connection.push(shown)
                record.bytes_out += len(shown)
            guard.within(idle_s, BackendTimeout)
            return True

        while True:
            if self._dialect.says_last(frames) and not opening.at_end:
                buffer.rest += await self._rest_of(opening)
            if len(frames) > READ_IN_A_TURN and (self._hides_usage or IN_ERRORS in frames):
                frames = await self._pass_most_turns(frames, guard, idle_s)
            guard.within(idle_s, ClientStalled)
            await self._pass_on(frames)
            guard.within(idle_s, BackendTimeout)
            # What a backend says behind the last frame is for nobody, and counted nowhere.
            piece = b"" if opening.at_end or self._said_last else await upstream.flow(pass_at_once)
            if not piece:
                break
            frames = buffer.add(piece)
            if len(buffer.rest) > LONGEST_FRAME:
                frames += buffer.take()
        guard.within(idle_s, ClientStalled)
        await self._pass_on_last(buffer.take())

    async def _pass_most_turns(self, frames: bytes, guard: CallScope, idle_s: float) -> bytes:
        """Passes on all turns but the last, which it returns."""
        *turns, last = _turns(frames, self._dialect.framing)
        await asyncio.sleep(0)
        for turn in turns:
            guard.within(idle_s, ClientStalled)
            await self._pass_on(turn)
            await asyncio.sleep(0)
        return last

    async def _rest_of(self, opening: Opening) -> bytes:
        """What comes behind the last frame: usually nothing but the body's end, and then the backend is free."""
        try:
            async with asyncio.timeout(LAST_FRAME_WAITS_S):
                piece = await opening.upstream.read()
        except (TimeoutError, BackendFault):
            return b""
        opening.at_end = not piece
        return piece

    async def _pass_on(self, frames: bytes) -> None:
        if not frames:
            return
        shown = self._hear(frames)
        if len(shown) > AT_ONCE:
            shown = await self._send_most(shown)
        if not self._said_last and self._dialect.says_last(frames) and self._look_at_end():
            # Who has seen this may be gone, and back with the next request, before the body has ended.
            self._said_last = True
            await self._settler.finish_before_last_bytes(self.record, coming=len(shown))
        if shown:
            await self._send({"type": "http.response.body", "body": shown, "more_body": True})

    def _hear(self, frames: bytes) -> bytes:
        """Takes note of frames; returns what the client is shown of them."""
        if IN_ERRORS in frames and self._backend is not None:
            frames = refusals.scrub_frames(frames, self._dialect.framing, self._backend)
        self._recent.append(frames)
        size = len(frames)
        if size > LARGEST_READ_WHOLE:
            self._forget_much()
        count = self._dialect.framing.count(frames)
        if size > LONGEST_FRAME_OF_A_TOKEN and size > LONGEST_FRAME_OF_A_TOKEN * count:
            count = max(count, self._tokens_of(frames))
        self.record.relayed_tokens += count
        if self.record.prompt_log is not None:
            self.record.prompt_log.add(frames)
        return self._dialect.without_usage(frames) if self._hides_usage else frames

    def _forget_much(self) -> None:
        while len(self._recent) > 1 and sum(map(len, self._recent)) > LONGEST_FRAME:
            self._recent.popleft()

    async def _pass_on_last(self, rest: bytes) -> None:
        """A stream may end without its last newline; half a frame is no frame and is not passed on."""
        if not rest or self._said_last:
            return
        payloads = self._dialect.framing.payloads(rest)
        if all(payload.startswith(b"[DONE]") or try_read(payload) for payload in payloads):
            await self._pass_on(rest)

    def _tail(self) -> list[bytes]:
        """The last payloads; of many frames those at the end, the last one in any case."""
        framing, recent = self._dialect.framing, b"".join(self._recent)
        tail: list[bytes] = []
        for size in (SHORT_TAIL, LARGEST_READ_WHOLE):
            if len(tail) < TAIL_PIECES:
                begin = framing.end_of_frames(recent[:-size]) if len(recent) > size else 0
                tail = framing.payloads(recent[begin:])[-TAIL_PIECES:]
        return tail

    async def break_off(self, error: GatewayError) -> None:
        """The status has gone out already: the failure is the last frame."""
        self.record.outcome = "shutdown" if error.code == "shutting_down" else "truncated"
        self.record.detail = self.record.detail or error.code
        if self._whole is not None:
            # Its length has gone out, too: an answer without an end tells the client.
            raise ClientGone
        await self._send({"type": "http.response.body", "body": self._dialect.error_frame(error), "more_body": True})

    async def finish(self) -> None:
        # The watcher has ended: uvicorn would tell it of the answer's end as of a client that left.
        if self._whole is not None:
            if not self.started:
                await self._start(*self._whole_head)
            await self._send({"type": "http.response.body", "body": self._whole})
        else:
            await self._send({"type": "http.response.body", "body": b""})

    async def _start(self, content_type: str, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        self.record.first_byte_at = time.monotonic()
        if self._call.capped:
            headers.append((b"x-gateway-max-tokens", b"%d" % self._call.capped))
        kind = (b"content-type", content_type.encode("latin-1"))
        await self._send({"type": "http.response.start", "status": 200, "headers": [kind, *headers]})
