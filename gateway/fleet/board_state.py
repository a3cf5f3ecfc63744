"""What waits for the backends and what runs there, over all processes, as those who watch see it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

# In the scripts, what has no end.
NEVER_MS = 10**12


class QueueState(NamedTuple):
    """The calls that wait for a model; `first_s` and `last_s` are until the first and the last will have their first tokens."""

    model: str
    calls: int
    tokens: int
    oldest_s: float
    first_s: float | None
    last_s: float | None


class PlaceState(NamedTuple):
    """A backend's model that has calls; `free_in_s` is when one of them will probably end."""

    backend: str
    model: str
    running: int
    free_in_s: float


class BoardState(NamedTuple):
    queues: tuple[QueueState, ...] = ()
    places: tuple[PlaceState, ...] = ()


def read(reply: Sequence[Sequence[Sequence[Any]]]) -> BoardState:
    """The reply of state.lua, the longest queue first."""
    queues = [QueueState(_text(one[0]), one[1], one[2], one[3] / 1000, seconds(one[4]), seconds(one[5])) for one in reply[0]]
    places = [PlaceState(_text(one[0]), _text(one[1]), one[2], one[3] / 1000) for one in reply[1]]
    return BoardState(tuple(sorted(queues, key=lambda queue: (-queue.calls, queue.model))), tuple(sorted(places)))


def seconds(milliseconds: float) -> float | None:
    """None for what is unknown or has no end."""
    return None if milliseconds < 0 or milliseconds >= NEVER_MS else milliseconds / 1000


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
