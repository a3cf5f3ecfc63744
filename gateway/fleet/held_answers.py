"""Whole answers in memory, from their first bytes until their readers have them."""

from gateway.core.errors import AnswersUnread
from gateway.core.shared_bytes import SharedBytes

MOST_HELD = 256 * 2**20


class HeldAnswers(SharedBytes):
    """What all calls of this process hold."""

    def __init__(self) -> None:
        super().__init__(MOST_HELD)

    def check(self, caller: str) -> None:
        if self.is_too_much(caller):
            raise AnswersUnread
