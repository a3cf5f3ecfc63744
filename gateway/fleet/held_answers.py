"""Whole answers in memory, from their first bytes until their readers have them: bounded for each caller and for all."""

from gateway.core.errors import AnswersUnread
from gateway.core.shared_bytes import SharedBytes

MOST_HELD = 256 * 2**20


class HeldAnswers(SharedBytes):
    """What all calls of this process hold, in bytes."""

    def __init__(self) -> None:
        super().__init__(MOST_HELD)


class HeldAnswer:
    """What one call of `caller` holds; `close` is owed to it."""

    __slots__ = ("_all", "_caller", "_size")

    def __init__(self, held: HeldAnswers, caller: str) -> None:
        self._all, self._caller, self._size = held, caller, 0

    def hold(self, size: int) -> None:
        """From now on `size` bytes. Raises AnswersUnread where the caller holds too much."""
        self._all.change(self._caller, size - self._size)
        self._size = size
        if self._all.is_too_much(self._caller):
            raise AnswersUnread

    def close(self) -> None:
        if self._size:
            self._all.change(self._caller, -self._size)
            self._size = 0
