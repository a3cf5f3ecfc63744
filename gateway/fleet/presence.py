"""Each process publishes its state in Redis once a second, so that any process can report on all and knows who is active."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from gateway.core import strict_json
from gateway.core.background import KeptTask
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.config import BackendConfig
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_shards import ShardConnections

LUA = Path(__file__).parent / "lua"
EVERY_S = 1.0
# How long a killed process still counts as active.
ACTIVE_MS = 15_000
# An active process publishes more often; an older state is of a process that was killed, and is deleted later.
FRESH_S, FORGOTTEN_S = 5.0, 60.0
READ_DEADLINE_S = 2.0


@dataclass
class BackendState:
    """A backend as one process sees it, or all together; `open_for_s` until its breaker lets a request try."""

    breaker: str = "closed"
    open_for_s: float = 0.0
    in_flight: int = 0


@dataclass
class ProcessState:
    """`at` is in seconds since the epoch; `fleet` is from `described`, and `routing` has the fields of Routing; both are empty
    if a process of another version lacks them."""

    process: str
    at: float
    in_flight: int = 0
    waiting: int = 0
    is_draining: bool = False
    # Only known to the process that moves them.
    audit_waiting: int | None = None
    backends: dict[str, BackendState] = field(default_factory=dict)
    fleet: list[dict[str, Any]] = field(default_factory=list)
    routing: dict[str, Any] = field(default_factory=dict)


KNOWN = frozenset(field.name for field in fields(ProcessState)) - {"backends"}


def local_view(backends: Mapping[str, Backend]) -> dict[str, BackendState]:
    """The backends as this process sees them."""
    return {
        name: BackendState(backend.breaker.state, round(backend.breaker.open_for_s, 3), backend.in_flight)
        for name, backend in backends.items()
    }


def described(configs: Iterable[BackendConfig]) -> list[dict[str, Any]]:
    """The backends in their order, without secrets: whether there is a token, never the token."""
    return [
        {
            "name": config.name,
            "base_url": config.base_url,
            "kind": config.kind,
            "max_connections": config.max_connections,
            "has_token": bool(config.auth_token),
            "tier": config.tier,
            "slots": config.slots,
            "slots_of_models": {name: model.slots for name, model in config.models.items() if model.slots},
        }
        for config in configs
    ]


class Presence:
    """`async with Presence(connections, process_id, describe)`: publishes this process until the block ends.

    This process is number `rank`, from 0, of `count` active ones; processes of other versions are counted, too.
    """

    def __init__(self, connections: ShardConnections, process_id: str, describe: Callable[[], ProcessState]) -> None:
        self._connections, self.process_id, self._describe = connections, process_id, describe
        self.rank, self.count = 0, 1
        self.background = KeptTask(self._keep_publishing, "presence")

    async def __aenter__(self) -> Self:
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()
        with suppress(RedisUnavailable):
            connection = self._connections.for_shard(redis_keys.HOME)
            await asyncio.gather(
                connection.send("ZREM", redis_keys.PROCESSES, self.process_id),
                connection.send("HDEL", redis_keys.PROCESS_STATES, self.process_id),
            )

    async def _keep_publishing(self) -> None:
        while True:
            with suppress(RedisUnavailable):
                await self._publish()
            await asyncio.sleep(EVERY_S)

    async def _publish(self) -> None:
        connection = self._connections.for_shard(redis_keys.HOME)
        state = strict_json.write(asdict(self._describe()))
        names = [redis_keys.PROCESSES, redis_keys.PROCESS_STATES]
        active = sorted(await connection.run("publish_process", names, [self.process_id, ACTIVE_MS, state]))
        self.rank, self.count = active.index(self.process_id.encode()), len(active)


async def read(store: RedisClient) -> list[ProcessState]:
    """The states of all active processes. Raises RedisUnavailable."""
    texts = await store.slow_call(lambda redis: redis.hgetall(redis_keys.PROCESS_STATES), READ_DEADLINE_S)
    states = {process: _unpacked(text) for process, text in texts.items()}
    now = time.time()
    gone = [process for process, state in states.items() if state is None or now - state.at > FORGOTTEN_S]
    if gone:
        await store.call(lambda redis: redis.hdel(redis_keys.PROCESS_STATES, *gone))
    return [state for state in states.values() if state is not None and now - state.at <= FRESH_S]


def _unpacked(text: bytes) -> ProcessState | None:
    """None if it is not the state of a process: Redis may hold anything."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        packed = strict_json.read_loosely(text)
        backends = {name: BackendState(**state) for name, state in packed.pop("backends").items()}
        # A process of a later version may publish more fields.
        known = {name: value for name, value in packed.items() if name in KNOWN}
        return ProcessState(**known, backends=backends)
    return None


def merged_view(states: Iterable[ProcessState]) -> dict[str, BackendState]:
    """Each backend as all processes see it: the state of its least open breaker, and the sum of its requests in flight."""
    found: dict[str, list[BackendState]] = {}
    for state in states:
        for name, backend in state.backends.items():
            found.setdefault(name, []).append(backend)
    return {name: _merged(seen_by) for name, seen_by in found.items()}


def _merged(states: list[BackendState]) -> BackendState:
    best = min(states, key=lambda state: (("closed", "half-open", "open").index(state.breaker), state.open_for_s))
    return BackendState(best.breaker, best.open_for_s, sum(state.in_flight for state in states))
