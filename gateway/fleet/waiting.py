"""A call that waits in this process for a slot of the fleet."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from gateway.fleet.claim import Claim
from gateway.fleet.slot import Slot


class Queued(NamedTuple):
    """How a call came to its slot: its first place in the queue, how long it waited, and the estimate when it came."""

    position: int = 0
    waited_s: float = 0.0
    estimated_s: float | None = None


class KeySlot(Protocol):
    """The slot of the caller's key, which others of its calls may use while this one waits."""

    def give_up(self) -> None: ...

    async def take_again(self) -> bool:
        """Whether there was one."""

    async def wait_for_one(self, longest_s: float) -> None: ...


@dataclass(slots=True, eq=False)
class Waiting:
    """`claim_now` describes the call anew, as backends come and go; `queued_at` is in seconds of the event loop's clock."""

    claim: Claim
    claim_now: Callable[[], Claim | None]
    until: float
    queued_at: float
    position: int = 0
    # Seconds to the first token, as estimated when it began to wait.
    estimated_s: float | None = None
    # For the next try, if it waits in vain.
    expected_ms: float = 1000.0
    slot: Slot | None = None
    error: Exception | None = None
    has_left: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def grant(self, slot: Slot) -> None:
        self.slot = slot
        self.changed.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.changed.set()
