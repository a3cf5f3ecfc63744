"""Commands that running gateways carry out for operators: these share Redis with them, but not their settings and tokens."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

from gateway.core import strict_json
from gateway.core.background import TaskGroup
from gateway.core.errors import CommandFailed
from gateway.fleet import presence
from gateway.fleet.backends.config import BackendConfig, ModelConfig
from gateway.fleet.jobs import Job, Rows
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

LOG = logging.getLogger("gateway.control")
ID = re.compile(r"[0-9a-f]{32}")
# A gateway waits for a backend for at most ten seconds, twice for a probe.
WAIT_S, AGAIN_S, POLL_EVERY_S, KEPT_S, DEADLINE_S = 30.0, 1.0, 0.1, 60, 2.0
# A job ends when nobody has asked for its progress for so long; who asks waits as long for progress.
ABSENT_S = 10
AT_ONCE = 4
# What makes a backend another one.
SERVER = ("name", "base_url", "kind", "max_connections", "has_token")
GATEWAY_ENDS = "the gateway that did this is shutting down: try again"

FleetFacts = Sequence[Mapping[str, Any]]
Act = Callable[[], Awaitable[Any]]
Plan = Callable[[str, Mapping[str, Any]], Awaitable[Job]]


class OperatorGone(Exception):
    """Nobody waits for a job any more."""


class Control:
    """`async with Control(store, fleet, acts, jobs, plan)`: carries out commands for gateways with these backends.

    One gateway carries out each. `acts` are the commands by name; each answers with JSON. `plan` makes a job of the name and
    the arguments of one of `jobs`, whose progress is reported; it ends when the command does.
    """

    def __init__(self, store: RedisClient, fleet: FleetFacts, acts: Mapping[str, Act], jobs: Iterable[str], plan: Plan) -> None:
        self._store, self._fleet, self._acts = store, list(fleet), acts
        self._jobs, self._plan = frozenset(jobs), plan
        self._answering, self._working = TaskGroup("control"), TaskGroup("jobs of commands")

    async def __aenter__(self) -> Self:
        # A command that was published while this was not subscribed is published again by its sender.
        self._store.subscribe({redis_keys.CONTROL: self._receive}, after_gap=lambda: None)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._answering.end()
        await self._working.end()

    def _receive(self, text: str) -> None:
        """Ignores all that is no command for this gateway: anybody may publish in Redis."""
        try:
            asked = strict_json.read_loosely(text.encode())
            number, act, fleet, arguments = asked["id"], asked["act"], asked["fleet"], asked.get("arguments", {})
            is_ours = bool(ID.fullmatch(number)) and fleet == self._fleet and isinstance(arguments, dict)
            is_act, is_job = act in self._acts, act in self._jobs
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return
        if is_ours and is_act and len(self._answering) < AT_ONCE:
            self._answering.start(self._answer(number, act))
        elif is_ours and is_job and len(self._working) < AT_ONCE:
            self._working.start(self._work(number, act, arguments))

    async def _answer(self, number: str, act: str) -> None:
        try:
            if not await self._take(number):
                return
            await self._write(number, "answer", {"answer": await self._acts[act]()})
        except RedisUnavailable:
            return
        except Exception:
            LOG.exception("%s, requested by a command, failed", act)

    async def _take(self, number: str) -> bool:
        taken = _name(number, "taken")
        return bool(await self._store.slow_call(lambda redis: redis.set(taken, b"", nx=True, ex=KEPT_S), DEADLINE_S))

    async def _write(self, number: str, part: str, value: Any) -> None:
        name, text = _name(number, part), strict_json.write_with_replacements(value)
        await self._store.slow_call(lambda redis: redis.set(name, text, ex=KEPT_S), DEADLINE_S)

    async def _work(self, number: str, verb: str, arguments: Mapping[str, Any]) -> None:
        try:
            if await self._take(number):
                await self._write(number, "answer", await self._done(number, verb, arguments))
        except (RedisUnavailable, OperatorGone) as ended:
            LOG.info("%s, requested by a command, ended: %s", verb, type(ended).__name__)
        except asyncio.CancelledError:
            with suppress(RedisUnavailable):
                await self._write(number, "answer", {"error": GATEWAY_ENDS})
            raise

    async def _done(self, number: str, verb: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        try:
            async with await self._plan(verb, arguments) as job:
                beat = 0
                async for rows in job.progress():
                    beat += 1
                    await self._write(number, "progress", {"beat": beat, "rows": rows})
                    if not await self._store.slow_call(lambda redis: redis.exists(_name(number, "operator")), DEADLINE_S):
                        raise OperatorGone
                return {"answer": job.rows}
        except CommandFailed as failed:
            return {"error": str(failed)}


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
            answer = await _read(store, number, "answer")
            if answer is not None:
                return answer["answer"]
            await asyncio.sleep(POLL_EVERY_S)
    except RedisUnavailable:
        raise CommandFailed("Redis became unreachable before the running gateway answered: try again") from None
    raise CommandFailed(f"the running gateway did not answer within {WAIT_S:g} s: its log says why")


async def _read(store: RedisClient, number: str, part: str) -> Any:
    text = await store.slow_call(lambda redis: redis.get(_name(number, part)), DEADLINE_S)
    return None if text is None else strict_json.read_loosely(text)


async def follow(store: RedisClient, fleet: FleetFacts, job: str, arguments: Mapping[str, Any]) -> AsyncGenerator[Rows, None]:
    """The progress of a job that a gateway with these backends does; the job ends when this is closed. Raises CommandFailed."""
    number = uuid.uuid4().hex
    question = strict_json.write({"id": number, "act": job, "fleet": list(fleet), "arguments": dict(arguments)})
    operator = _name(number, "operator")
    beat, due, asked_at = 0, time.monotonic() + WAIT_S, 0.0
    try:
        while (now := time.monotonic()) < due:
            if now - asked_at > AGAIN_S:
                asked_at = now
                await store.slow_call(lambda redis: redis.set(operator, b"", ex=ABSENT_S), DEADLINE_S)
                if not beat:
                    await store.slow_call(lambda redis: redis.publish(redis_keys.CONTROL, question), DEADLINE_S)
            if (answer := await _read(store, number, "answer")) is not None:
                if "error" in answer:
                    raise CommandFailed(answer["error"])
                yield answer["answer"]
                return
            progress = await _read(store, number, "progress")
            if progress is not None and progress["beat"] != beat:
                beat, due = progress["beat"], now + ABSENT_S
                yield progress["rows"]
            await asyncio.sleep(POLL_EVERY_S)
    except RedisUnavailable:
        raise CommandFailed("Redis became unreachable before the running gateway had done this: try again") from None
    finally:
        with suppress(RedisUnavailable):
            await store.slow_call(lambda redis: redis.delete(operator), DEADLINE_S)
    raise CommandFailed(f"the running gateway did not answer within {ABSENT_S if beat else WAIT_S:g} s: its log says why")


async def other_fleet(store: RedisClient, own: Iterable[BackendConfig]) -> FleetFacts | None:
    """The backends of the gateways that use this Redis, if none of them has the backends of `own`. None if one has them, if no
    gateway runs, and while Redis is unavailable. Raises CommandFailed if none has them and the gateways differ."""
    try:
        states = await presence.read(store)
    except RedisUnavailable:
        return None
    mine = presence.described(own)
    fleets = [state.fleet for state in states if state.fleet]
    if not fleets or any(_is_same(fleet, mine) for fleet in fleets):
        return None
    if any(not _is_same(fleet, fleets[0]) for fleet in fleets):
        others = "; ".join(sorted({named_in_words(fleet) for fleet in fleets}))
        raise CommandFailed(
            f"these settings have {named_in_words(mine)}, the running gateways {others}: set OLLAMA_BACKENDS as in one of them"
        )
    return fleets[0]


def _is_same(fleet: FleetFacts, other: FleetFacts) -> bool:
    """Whether these are the same servers; how many calls they get, and in which order, may change."""
    return [[one.get(fact) for fact in SERVER] for one in fleet] == [[one.get(fact) for fact in SERVER] for one in other]


def named_in_words(fleet: FleetFacts) -> str:
    return ", ".join(f"{backend['name']} at {backend['base_url']}" for backend in fleet)


def configs_of(fleet: FleetFacts) -> list[BackendConfig]:
    """Without tokens, which are not shared, so that these backends cannot be called. Raises CommandFailed."""
    names = ("name", "base_url", "kind", "max_connections", "tier", "slots")
    try:
        return [
            BackendConfig(**{name: backend[name] for name in names}, models=_models_of(backend["slots_of_models"]))
            for backend in fleet
        ]
    except (KeyError, TypeError, AttributeError):
        raise CommandFailed("the running gateway is of another version: use its own command line") from None


def _models_of(slots: Mapping[str, int]) -> dict[str, ModelConfig]:
    return {name: ModelConfig(number) for name, number in slots.items()}
