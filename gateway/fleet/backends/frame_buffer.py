"""Cuts what a backend sends into frames; frames that have not ended are bounded for each backend over all its calls."""

from gateway.core.shared_bytes import Reservation, SharedBytes
from gateway.dialects.dialect import Framing
from gateway.fleet.backends.http_client import SMALL, BackendFault


class UnfinishedFrames(SharedBytes):
    """The unfinished frames that all calls of one backend hold."""

    def check(self, caller: str) -> None:
        if self.used > self.most:
            raise BackendFault("endless_frames", f"the unfinished frames of this backend's answers exceed {self.most} bytes")


class HeldPieces(SharedBytes):
    """The pieces of translated streams that all calls of one backend hold until the ends of the streams."""

    def check(self, caller: str) -> None:
        if self.used > self.most:
            raise BackendFault("endless_answer", f"the pieces of this backend's answers exceed {self.most} bytes")


class FrameBuffer:
    """Cuts a stream into frames as its pieces come and reads each byte once; `rest` is a frame that has not ended."""

    __slots__ = ("_framing", "_reservation", "rest")

    def __init__(self, framing: Framing, unfinished: UnfinishedFrames) -> None:
        self._framing, self._reservation = framing, Reservation(unfinished)
        self.rest = bytearray()

    def add(self, piece: bytes) -> bytes:
        """The frames that are complete with this piece. Raises BackendFault if the backend makes us hold too much."""
        rest = self.rest
        if not rest:
            end = self._framing.end_of_frames(piece)
            rest += piece[end:]
            return piece[:end]
        # The end of a frame has at most three bytes.
        before = bytes(rest[-2:])
        end = self._framing.end_of_frames(before + piece) - len(before)
        rest += piece
        if end >= 0:
            return self.take(len(rest) - len(piece) + end)
        if len(rest) > SMALL:
            self._reservation.hold(len(rest))
        return b""

    def take(self, size: int | None = None) -> bytes:
        """The first `size` bytes, or all."""
        taken = bytes(self.rest[:size])
        del self.rest[:size]
        self._reservation.close()
        return taken

    def close(self) -> None:
        self._reservation.close()
