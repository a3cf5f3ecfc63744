"""The state of the fleet in Redis, for all processes: who holds which slot, and who waits."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gateway.core import strict_json
from gateway.fleet import board_state
from gateway.fleet.board_state import BoardState
from gateway.fleet.claim import Claim, Routing
from gateway.fleet.slot import Slot
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisUnavailable
from gateway.stores.redis_connection import RedisConnection
from gateway.stores.redis_shards import ShardConnections

LUA = Path(__file__).parent / "lua" / "board"
# A process that has not ticked for so long is gone, and its calls with it.
LEASE_MS = 8_000
OF_REDIS_CLOCK = 0


class Board:
    """The scripts of lua/board. All of them raise RedisUnavailable; `wake` is called with ms after which to `tick` again.

    `doubt` is called when it is not known whether Redis has done what it was sent.
    """

    def __init__(
        self,
        connections: ShardConnections,
        process: str,
        routing: Routing,
        wake: Callable[[int], None],
        doubt: Callable[[], None],
    ) -> None:
        self._connections, self.process, self.routing = connections, process, routing
        self._wake, self._doubt = wake, doubt

    @property
    def is_usable(self) -> bool:
        return self._connections.is_usable

    def _connection(self) -> RedisConnection:
        return self._connections.for_shard(redis_keys.HOME)

    async def _run(self, script: str, *values: Any) -> Any:
        try:
            return await self._read(script, *values)
        except RedisUnavailable:
            self._doubt()
            raise

    async def take(self, claim: Claim) -> list[Any]:
        """The reply of take.lua: "go", "wait" or "full"."""
        reply: list[Any] = await self._run("take", *claim.arguments(self.routing, self.process))
        if reply[0] == b"go" and reply[7]:
            self._wake(reply[7])
        elif reply[0] == b"wait" and reply[3]:
            self._wake(reply[3])
        return reply

    async def ask(self, claim: Claim) -> list[Any]:
        """The reply of ask.lua: "go", "wait" or "gone"."""
        reply: list[Any] = await self._run("ask", *claim.arguments(self.routing, self.process))
        return reply

    async def preview(self, claim: Claim) -> dict[str, Any]:
        """What `take` would decide, as JSON: see preview.lua."""
        found = strict_json.read_loosely(await self._read("preview", *claim.arguments(self.routing, self.process)))
        assert isinstance(found, dict)
        return found

    async def state(self, *, with_estimates: bool) -> BoardState:
        """All that waits and runs; estimates of the time until first tokens take longer."""
        return board_state.read(await self._read("state", int(with_estimates)))

    async def _read(self, script: str, *values: Any) -> Any:
        return await self._connection().run(script, [redis_keys.FLEET], [OF_REDIS_CLOCK, *values])

    def release(self, call: str, real_ms: int = -1) -> None:
        """Frees a call's slot or its place in the queue, and waits for nothing; it does not raise."""
        self._send("release", self.process, call, real_ms)

    def loaded(self, backend: str, model: str, size: int) -> None:
        """A backend has loaded a model for a call; it does not raise."""
        self._send("loaded", backend, model, size)

    def _send(self, script: str, *values: Any) -> None:
        try:
            reply = self._connection().run(script, [redis_keys.FLEET], [OF_REDIS_CLOCK, *values])
        except RedisUnavailable:
            self._doubt()
        else:
            reply.add_done_callback(self._wake_after)

    async def tick(self) -> tuple[bool, int]:
        """Renews the lease of this process; whether it was known, and how many calls it has on the board."""
        known, calls, wake_ms = await self._run("tick", self.process, LEASE_MS)
        if wake_ms:
            self._wake(wake_ms)
        return bool(known), calls

    async def restore(self, waiting: Iterable[str], running: Iterable[Slot]) -> tuple[int, int]:
        """Makes the board hold exactly these calls of this process; how many were removed and added."""
        waiting = list(waiting)
        values: list[Any] = [self.process, len(waiting), *waiting]
        for slot in running:
            values += [slot.call, slot.backend, slot.model, slot.group, slot.client, slot.sub_user, slot.weight]
            values += [slot.cost_ms, slot.held_ms]
        removed, added = await self._run("restore", *values)
        return removed, added

    async def leave(self) -> None:
        """Takes this process off the board, with all that it has there."""
        await self._run("leave", self.process)

    def _wake_after(self, reply: Any) -> None:
        if reply.cancelled() or reply.exception() is not None:
            self._doubt()
        elif reply.result()[-1]:
            self._wake(reply.result()[-1])
