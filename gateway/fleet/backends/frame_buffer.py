"""What is held of frames that have not ended: bounded for each backend over all its calls."""

from gateway.dialects.dialect import Framing
from gateway.fleet.backends.http_client import SMALL, BackendFault


class Budget:
    """Bytes that all calls of one backend may hold together; above it a call fails with `reason`."""

    def __init__(self, most: int, reason: str) -> None:
        self.most, self.reason = most, reason
        self.used = 0


class Share:
    """What one call holds of a budget; `close` is owed to it."""

    __slots__ = ("_budget", "_held")

    def __init__(self, budget: Budget) -> None:
        self._budget, self._held = budget, 0

    def hold(self, size: int) -> None:
        """From now on `size` bytes. Raises BackendFault above the budget."""
        budget = self._budget
        budget.used += size - self._held
        self._held = size
        if budget.used > budget.most:
            raise BackendFault(budget.reason, f"more than {budget.most} bytes held of all answers of this backend")

    def close(self) -> None:
        self._budget.used -= self._held
        self._held = 0


class FrameBuffer:
    """Cuts a stream into frames as its pieces come, and looks at each byte once; `rest` has begun and not ended."""

    __slots__ = ("_framing", "_share", "rest")

    def __init__(self, framing: Framing, budget: Budget) -> None:
        self._framing, self._share = framing, Share(budget)
        self.rest = bytearray()

    def add(self, piece: bytes) -> bytes:
        """The frames that are complete with this piece. Raises BackendFault where the backend makes us hold too much."""
        rest = self.rest
        if not rest:
            end = self._framing.end_of_frames(piece)
            rest += piece[end:]
            return piece[:end]
        # A mark of an end has at most three bytes.
        before = bytes(rest[-2:])
        end = self._framing.end_of_frames(before + piece) - len(before)
        rest += piece
        if end >= 0:
            return self.take(len(rest) - len(piece) + end)
        if len(rest) > SMALL:
            self._share.hold(len(rest))
        return b""

    def take(self, size: int | None = None) -> bytes:
        """The first `size` bytes, or all."""
        taken = bytes(self.rest[:size])
        del self.rest[:size]
        self._share.close()
        return taken

    def close(self) -> None:
        self._share.close()
