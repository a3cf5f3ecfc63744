"""A slot of one place in the fleet, held by one call."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


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
