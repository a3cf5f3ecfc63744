"""Commands that running gateways carry out for operators: these share Redis with them, but not their settings and tokens."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from gateway.core import strict_json
from gateway.core.background import TaskGroup
from gateway.core.errors import CommandFailed
from gateway.fleet import presence
from gateway.fleet.backends.config import BackendConfig
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

LOG = logging.getLogger("gateway.control")
ID = re.compile(r"[0-9a-f]{32}")
# A gateway waits for a backend for at most ten seconds, twice for a probe.
WAIT_S, AGAIN_S, POLL_EVERY_S, KEPT_S, DEADLINE_S = 30.0, 1.0, 0.1, 60, 2.0
AT_ONCE = 4

FleetFacts = Sequence[Mapping[str, Any]]
Act = Callable[[], Awaitable[Any]]


class Control:
    """`async with Control(store, fleet, acts)`: carries out commands for gateways with these backends; one gateway runs each.

    `acts` are the commands by name; each answers with JSON.
    """

    def __init__(self, store: RedisClient, fleet: FleetFacts, acts: Mapping[str, Act]) -> None:
        self._store, self._fleet, self._acts = store, list(fleet), acts
        self._answering = TaskGroup("control")

    async def __aenter__(self) -> Self:
        # A command that was published while this was not subscribed is published again by its sender.
        self._store.subscribe({redis_keys.CONTROL: self._receive}, after_gap=lambda: None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._answering.end()

    def _receive(self, text: str) -> None:
        """Ignores all that is no command for this gateway: anybody may publish in Redis."""
        try:
            asked = strict_json.read_loosely(text.encode())
            number, act, fleet = asked["id"], asked["act"], asked["fleet"]
            is_ours = bool(ID.fullmatch(number)) and act in self._acts and fleet == self._fleet
        except (ValueError, TypeError, KeyError, IndexError):
            return
        if is_ours and len(self._answering) < AT_ONCE:
            self._answering.start(self._answer(number, act))

    async def _answer(self, number: str, act: str) -> None:
        try:
            taken = _name(number, "taken")
            if not await self._store.slow_call(lambda redis: redis.set(taken, b"", nx=True, ex=KEPT_S), DEADLINE_S):
                return
            answer = strict_json.write({"answer": await self._acts[act]()})
            await self._store.slow_call(lambda redis: redis.set(_name(number, "answer"), answer, ex=KEPT_S), DEADLINE_S)
        except RedisUnavailable:
            return
        except Exception:
            LOG.exception("%s, requested by a command, failed", act)


def _name(number: str, what: str) -> str:
    return redis_keys.control(number, what)


async def ask(store: RedisClient, fleet: FleetFacts, act: str) -> Any:
    """The answer of a gateway with these backends. Raises CommandFailed."""
    number = uuid.uuid4().hex
    question = strict_json.write({"id": number, "act": act, "fleet": list(fleet)})
    until, asked_at = time.monotonic() + WAIT_S, 0.0
    try:
        while (now := time.monotonic()) < until:
            if now - asked_at > AGAIN_S:
                asked_at = now
                await store.slow_call(lambda redis: redis.publish(redis_keys.CONTROL, question), DEADLINE_S)
            answer = await store.slow_call(lambda redis: redis.get(_name(number, "answer")), DEADLINE_S)
            if answer is not None:
                return strict_json.read_loosely(answer)["answer"]
            await asyncio.sleep(POLL_EVERY_S)
    except RedisUnavailable:
        raise CommandFailed("Redis became unreachable before the running gateway answered: try again") from None
    raise CommandFailed(f"the running gateway did not answer within {WAIT_S:g} s: its log says why")


async def other_fleet(store: RedisClient, own: Iterable[BackendConfig]) -> FleetFacts | None:
    """The backends of the gateways that use this Redis, if none of them has the backends of `own`. None if one has them, if no
    gateway runs, and while Redis is unavailable. Raises CommandFailed if none has them and the gateways differ."""
    try:
        states = await presence.read(store)
    except RedisUnavailable:
        return None
    mine = presence.described(own)
    fleets = [state.fleet for state in states if state.fleet]
    if not fleets or mine in fleets:
        return None
    if any(fleet != fleets[0] for fleet in fleets):
        others = "; ".join(sorted({named_in_words(fleet) for fleet in fleets}))
        raise CommandFailed(
            f"these settings have {named_in_words(mine)}, the running gateways {others}: set OLLAMA_BACKENDS as in one of them"
        )
    return fleets[0]


def named_in_words(fleet: FleetFacts) -> str:
    return ", ".join(f"{backend['name']} at {backend['base_url']}" for backend in fleet)


def configs_of(fleet: FleetFacts) -> list[BackendConfig]:
    """Without tokens, which are not shared, so that these backends cannot be called. Raises CommandFailed."""
    names = ("name", "base_url", "kind", "max_connections")
    try:
        return [BackendConfig(**{name: backend[name] for name in names}) for backend in fleet]
    except (KeyError, TypeError):
        raise CommandFailed("the running gateway is of another version: use its own command line") from None
