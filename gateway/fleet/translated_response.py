"""A backend's response in the client's dialect: everything that reads it sees an answer as the client gets it."""

import time
from collections.abc import Callable

from gateway.core.shared_bytes import Reservation
from gateway.dialects.answers import LONGEST_FRAME, BadFrame, LongFrame, error_code, error_text
from gateway.dialects.dialect import Framing
from gateway.dialects.translation.translation import Translation
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.backends.frame_buffer import FrameBuffer, HeldPieces, UnfinishedFrames
from gateway.fleet.backends.http_client import SMALL, BackendFault, BackendResponse
from gateway.fleet.redaction import redact

# How long a client gets nothing while the backend sends.
SILENT_S = 10.0
# Bytes of the pieces of one answer: several times those of the longest that a model writes.
LONGEST_HELD = 32 * 2**20


class TranslatedResponse:
    """Has the methods of BackendResponse; `read_beginning`, which is for errors, returns the backend's own bytes."""

    def __init__(
        self,
        upstream: BackendResponse,
        translation: Translation,
        framing: Framing,
        config: BackendConfig,
        bound: UnfinishedFrames,
        pieces: HeldPieces,
    ) -> None:
        self._upstream, self._translation, self._config = upstream, translation, config
        self.status, self.headers = upstream.status, upstream.headers
        # What the backend was asked.
        self.operation = translation.call.operation
        self.content_type = framing.content_type if translation.call.stream else "application/json"
        self._framing = translation.dialect.framing
        self._buffer, self._held = FrameBuffer(self._framing, bound), Reservation(pieces)
        self._has_yielded = self._at_end = False
        self._written_at = 0.0

    def fail(self, error: Exception) -> None:
        self._upstream.fail(error)

    async def read(self) -> bytes:
        """The next frames for the client, b"" at the end. Raises BackendFault; before the first frame BadFrame, LongFrame."""
        while not self._at_end:
            try:
                frames = self._translated(await self._upstream.read())
            except BadFrame as bad:
                if not self._has_yielded:
                    raise
                raise self._fault(bad) from bad
            if frames:
                self._has_yielded, self._written_at = True, time.monotonic()
                return frames
        return b""

    async def flow(self, take: Callable[[bytes], bool]) -> bytes:
        """As BackendResponse.flow: calls `take` with frames and returns the first that it does not accept."""
        while (frames := await self.read()) and take(frames):
            pass
        return frames

    async def read_whole(self, limit: int | None = None, hold: Callable[[int], None] | None = None) -> bytes:
        """Raises as BackendResponse.read_whole does, and BadFrame."""
        whole = await self._upstream.read_whole(limit or self._translation.longest, hold)
        answer = self._translation.read(whole)
        if isinstance(answer, dict) and answer.get("error"):
            raise BadFrame(f"an error{error_code(answer)}", answer)
        return self._translation.whole(answer)

    async def read_beginning(self, limit: int) -> bytes:
        return await self._upstream.read_beginning(limit)

    def close(self) -> None:
        self._buffer.close()
        self._held.close()
        self._upstream.close()

    def _translated(self, piece: bytes) -> bytes:
        """The client's frames for what the backend sent; b"" if they are still to come."""
        if not piece:
            self._at_end = True
            return self._payloads(self._buffer.take()) + self._translation.end()
        frames = self._payloads(self._buffer.add(piece))
        if len(self._buffer.rest) > LONGEST_FRAME:
            raise BackendFault("endless_frames") if self._has_yielded else LongFrame("no end of a frame")
        if not frames and self._has_yielded and time.monotonic() - self._written_at > SILENT_S:
            # The backend is at work, but what it sends cannot be written before it is complete, such as a tool call.
            return self._translation.ping()
        return frames

    def _payloads(self, frames: bytes) -> bytes:
        if not frames:
            return b""
        payloads = self._framing.payloads(frames)
        if not payloads:
            # Comments show that a server is at work; a line's end alone, or the first letters of a field, show nothing.
            return self._translation.ping() if frames.lstrip().startswith(b":") else b""
        translated = [self._translation.frames(payload) for payload in payloads]
        if self._translation.held > SMALL:
            self._hold(self._translation.held)
        return b"".join(translated)

    def _hold(self, size: int) -> None:
        if size > LONGEST_HELD:
            raise BackendFault("endless_answer", f"the pieces of an answer exceed {LONGEST_HELD} bytes")
        self._held.hold(size)

    def _fault(self, bad: BadFrame) -> BackendFault:
        fault = BackendFault("bad_frame", str(bad))
        if reported := redact(error_text(bad.error), self._config):
            fault.for_client = f"The model server's answer ended with an error: {reported}"
        return fault
