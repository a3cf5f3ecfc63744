"""What the rooms know of a client's connection."""

from collections.abc import Callable
from typing import Protocol


class Connection(Protocol):
    def watch(self, gone: Callable[[], None] | None) -> None:
        """Call `gone` once when the client closes its connection, at once where it has; None: nobody asks any more."""

    @property
    def keeps_up(self) -> bool:
        """Whether the answer's head has gone out and the client takes what comes: then `push` is allowed."""

    def push(self, body: bytes) -> None:
        """Sends a piece of the answer at once."""
