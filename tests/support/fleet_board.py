"""The board's scripts on a real Redis, with a clock that tests set: one process is a name."""

import json
from dataclasses import dataclass, field
from typing import Any

import redis

from gateway.fleet import board_state
from gateway.fleet.board import LEASE_MS, LUA
from gateway.fleet.board_state import BoardState
from gateway.stores.redis_scripts import read_scripts

PREFIX = "fleet"
BEGIN_MS = 1_000_000_000
FS = "\x1f"


@dataclass(frozen=True)
class At:
    """A place as a call describes it; times are in ms."""

    backend: str
    model: str = "m"
    tier: int = 1
    slots: int = 1
    swaps: bool = False
    size: int = 0
    load_ms: int = 1000
    prefill_us: int = 1000
    service_ms: int = 1000

    @property
    def arguments(self) -> list[Any]:
        values = [self.backend, self.model, self.tier, self.slots, int(self.swaps), self.size]
        return [*values, self.load_ms, self.prefill_us, self.service_ms]


@dataclass(frozen=True)
class Ask:
    """A call's claim as take.lua gets it."""

    id: str
    places: tuple[At, ...]
    client: str = "alice"
    group: str = "m"
    mode: str = "order"
    process: str = "p1"
    sub_user: str = ""
    weight: float = 1.0
    batch: bool = False
    patience_ms: int = 300_000
    size: int = 100
    tokens: int = 1_000_000
    prompt: int = 0
    spill_ms: int = -1
    sticky_ms: int = 0
    arrived: int = 0
    conversation: tuple[str, tuple[tuple[str, int], ...], tuple[str, int]] = ("", (), ("", 0))

    @property
    def arguments(self) -> list[Any]:
        full, prefixes, shared = self.conversation
        values = [self.mode, self.process, self.id, self.group, self.client, self.sub_user, self.weight, int(self.batch)]
        values += [self.patience_ms, self.size, self.tokens, self.prompt, self.spill_ms, self.sticky_ms, self.arrived]
        values += [full, *shared, len(prefixes)]
        for prefix in prefixes:
            values += prefix
        for place in self.places:
            values += place.arguments
        return values


@dataclass
class FleetBoard:
    """`now` is in ms; `granted` are the calls that have waited and got a slot: backend, model, why."""

    client: "redis.Redis"
    now: int = BEGIN_MS
    granted: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scripts = {name: self.client.register_script(script.text) for name, script in read_scripts(LUA).items()}
        self._known: set[str] = set()

    def run(self, name: str, *values: Any) -> Any:
        reply = self._scripts[name](keys=[PREFIX], args=[self.now, *values])
        for call, found in self.calls().items():
            if found[0] == "r" and call not in self._known:
                self._known.add(call)
                self.granted[call] = [found[1], found[2], found[9]]
        return reply

    def calls(self) -> dict[str, list[str]]:
        """All calls of all processes as the board has them."""
        names: Any = self.client.keys(f"{PREFIX}:calls:*")
        found: list[Any] = [self.client.hgetall(name) for name in names]
        return {call.decode(): text.decode().split(FS) for calls in found for call, text in calls.items()}

    def take(self, ask: Ask) -> list[Any]:
        self._known.discard(ask.id)
        reply = [value.decode() if isinstance(value, bytes) else value for value in self.run("take", *ask.arguments)]
        if reply[0] == "go":
            del self.granted[ask.id]
        return reply

    def ask(self, ask: Ask) -> list[Any]:
        return [value.decode() if isinstance(value, bytes) else value for value in self.run("ask", *ask.arguments)]

    def preview(self, ask: Ask) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("preview", *ask.arguments))
        return found

    def state(self, *, with_estimates: bool = True) -> BoardState:
        return board_state.read(self.run("state", int(with_estimates)))

    def release(self, call: str, real_ms: int = -1, process: str = "p1") -> None:
        self.run("release", process, call, real_ms)

    def loaded(self, backend: str, model: str, size: int) -> None:
        self.run("loaded", backend, model, size)

    def tick(self, process: str = "p1") -> list[int]:
        found: list[int] = self.run("tick", process, LEASE_MS)
        return found

    def running(self, backend: str, model: str = "m") -> int:
        return int(self.client.zcard(f"{PREFIX}:ends:{backend}{FS}{model}"))

    def field(self, backend: str, name: str) -> str:
        found: Any = self.client.hget(f"{PREFIX}:box:{backend}", name)
        return found.decode() if found else ""

    def names(self) -> set[str]:
        return left(self.client, PREFIX)


def left(client: "redis.Redis", prefix: str) -> set[str]:
    """What a board has of calls, without what is remembered of backends, conversations and virtual times."""
    found: Any = client.keys(f"{prefix}:*")
    kept = ("box", "fair", "idle", "recent", "kept", "shared", "firsts", "processes", "turn", "costs", "salt")
    return {name for name in (each.decode().removeprefix(f"{prefix}:") for each in found) if name.split(":")[0] not in kept}
