"""Whole answers in memory, from their first bytes until their readers have them: bounded for each caller and for all."""

from gateway.errors import AnswersUnread

MOST_HELD = 256 * 2**20


class HeldAnswers:
    """What all calls of this process hold, in bytes; no caller may hold more than is left, so that there is room for others."""

    def __init__(self) -> None:
        self.most, self.used = MOST_HELD, 0
        self._of: dict[str, int] = {}

    def change(self, caller: str, by: int) -> None:
        self.used += by
        held = self._of.pop(caller, 0) + by
        if held:
            self._of[caller] = held

    def is_too_much(self, caller: str) -> bool:
        return self._of.get(caller, 0) > self.most - self.used


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
