"""A slot of one place in the fleet, held by one call."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

NOTICED_WITHIN_S = 0.1


@dataclass(slots=True, eq=False)
class Slot:
    """The owner must `free` it; to do that again does nothing.

    `why` this place was chosen: order, loaded, home, load, join, tier or spill. `cost_ms` is what the call will probably take,
    and `cached` how many tokens of its prompt are probably cached.
    """

    call: str
    backend: str
    model: str
    why: str
    on_free: Callable[["Slot"], None] = field(repr=False)
    cost_ms: int = 0
    cached: int = 0
    group: str = ""
    client: str = ""
    sub_user: str = ""
    weight: float = 1.0
    began: float = field(default_factory=time.monotonic)
    # When the call came, and the seconds to its first token that were estimated then, before their correction.
    arrived: float = 0.0
    estimated_s: float | None = None
    has_waited: bool = False
    is_free: bool = False

    @property
    def held_ms(self) -> int:
        return int((time.monotonic() - self.began) * 1000)

    @property
    def loads(self) -> bool:
        return self.why == "load"

    def free(self) -> None:
        if not self.is_free:
            self.is_free = True
            self.on_free(self)

    def free_soon(self) -> None:
        """After a moment, in which a backend notices that its connection was closed, and stops."""
        asyncio.get_running_loop().call_later(NOTICED_WITHIN_S, self.free)
