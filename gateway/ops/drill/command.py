"""`make drill`: injects the faults beside this installation, one after the other; exits with 1 if a promise was broken."""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.components import database_of
from gateway.core.errors import CommandFailed, StoreUnavailable
from gateway.edge.stop_signals import stop_signals
from gateway.ops.cli import console
from gateway.ops.cli.keys import open_key_store
from gateway.ops.drill import fake_backend
from gateway.ops.drill.environment import Environment, Installation, temporary_names
from gateway.ops.drill.fault import Broken, Fault, LeftOut
from gateway.ops.drill.faults import BY_NAME, FAULTS
from gateway.ops.drill.limit_faults import kill_the_third
from gateway.settings import Settings
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

LONGEST_FAULT_S, LONGEST_DRILL_S = 50.0, 90.0
TRIED_MS = 3000
OF_THE_KILLED = ("killed", "orphans")
HELD, BROKEN, LEFT_OUT = "held", "BROKEN", "left out"


@dataclass
class Result:
    fault: Fault
    state: str
    seconds: float
    detail: str = ""

    def row(self) -> dict[str, Any]:
        return {
            "line": self.fault.name,
            "promise": self.fault.promise,
            "what": self.fault.description,
            "result": self.state,
            "seconds": round(self.seconds, 2),
            "why": self.detail or None,
        }


async def drill(settings: Settings, arguments: argparse.Namespace) -> None:
    """Raises CommandFailed if a promise is broken, or if the drill cannot start."""
    faults = chosen(arguments.only)
    results: list[Result] = []
    task = asyncio.current_task()
    assert task is not None
    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with (
            temporary_names(settings.redis_url),
            asyncio.timeout(LONGEST_DRILL_S),
            database_of(settings) as database,
            open_key_store(settings) as key_store,
        ):
            await require_redis(settings)
            console.notify("starting the drill's own fake backends and gateways")
            async with Environment(
                installation_of(settings), database, key_store, with_third=needs_third(faults)
            ) as environment:
                await inject(environment, faults, results, as_json=arguments.json)
    except asyncio.CancelledError:
        raise CommandFailed("the drill was stopped; everything it had started has ended") from None
    except TimeoutError:
        results += [Result(fault, BROKEN, 0, "the drill ran out of time") for fault in faults[len(results) :]]
    if arguments.json:
        console.show([result.row() for result in results], as_json=True, empty="")
    broken = [result for result in results if result.state == BROKEN]
    summary = f"{sum(result.state == HELD for result in results)} held, {len(broken)} broken"
    left_out = len(results) - len(broken) - sum(result.state == HELD for result in results)
    summary += f", {left_out} left out" if left_out else ""
    if broken:
        raise CommandFailed(f"{summary}: {', '.join(result.fault.name for result in broken)}")
    console.notify(summary)


async def require_redis(settings: Settings) -> None:
    async with RedisClient(settings.redis_url) as store:
        if store.refusal:
            raise _not_taken(store.refusal)
        if not store.up:
            raise CommandFailed(
                "Redis, in which the drill's two gateways share their counts, does not answer: see `make doctor`"
            )
        try:
            await store.slow_call(lambda redis: redis.set(redis_keys.DRILL_CHECK, b"", px=TRIED_MS), TRIED_MS / 1000)
            await store.slow_call(lambda redis: redis.publish(redis_keys.SLOT_FREED, b""), TRIED_MS / 1000)
        except RedisUnavailable as refused:
            raise _not_taken(f"{type(refused.__cause__).__name__}: {refused.__cause__}".rstrip(": ")) from None


def _not_taken(why: str) -> CommandFailed:
    return CommandFailed(
        f"Redis refuses names that begin with {redis_keys.PREFIX} ({why}): allow the user of REDIS_URL all names "
        "and channels that begin with nz: (`~nz:* &nz:*` in its ACL), and see `make doctor`"
    )


def installation_of(settings: Settings) -> Installation:
    id_header, closed = settings.gateway_request_id_header, settings.limits_without_redis == "closed"
    return Installation(settings.database_url, settings.redis_url, id_header, closed)


def chosen(only: Sequence[str]) -> list[Fault]:
    if unknown := set(only) - BY_NAME.keys():
        raise CommandFailed(f"unknown fault {min(unknown)!r}; choose from {', '.join(BY_NAME)}")
    return [fault for fault in FAULTS if not only or fault.name in only]


def needs_third(faults: Sequence[Fault]) -> bool:
    return any(fault.name in OF_THE_KILLED for fault in faults)


async def inject(environment: Environment, faults: Sequence[Fault], results: list[Result], *, as_json: bool) -> None:
    if needs_third(faults):
        await kill_the_third(environment)
    widths = [max(len(fault.name) for fault in FAULTS), 3, max(len(fault.description) for fault in FAULTS)]
    for fault in faults:
        result = await inject_one(environment, fault)
        results.append(result)
        if not as_json:
            cells = [
                text.ljust(width) for text, width in zip((fault.name, fault.promise, fault.description), widths, strict=True)
            ]
            print(f"{'  '.join(cells)}  {result.seconds:6.2f} s  {result.state:<8}  {result.detail}".rstrip(), flush=True)


async def inject_one(environment: Environment, fault: Fault) -> Result:
    began = time.monotonic()
    environment.healthy.behaviour = fake_backend.answer_well
    state, detail = HELD, ""
    try:
        async with asyncio.timeout(LONGEST_FAULT_S):
            await fault.check(environment)
    except LeftOut as why:
        state, detail = LEFT_OUT, str(why)
    except Broken as how:
        state, detail = BROKEN, str(how)
    except (OSError, TimeoutError, ValueError, KeyError, CommandFailed, StoreUnavailable) as wrong:
        state, detail = BROKEN, f"{type(wrong).__name__}: {wrong}".rstrip(": ")
    finally:
        for backend in environment.backends.values():
            backend.go_on.set()
    return Result(fault, state, time.monotonic() - began, detail)


def restart_with_own_names() -> None:
    """Restarts this command with names of its own in Redis, if its names are still those of the installation."""
    if redis_keys.PREFIX != "nz":
        return
    os.environ[redis_keys.PREFIX_VARIABLE] = redis_keys.new_drill_prefix()
    os.execv(sys.executable, [sys.executable, "-m", "gateway", *sys.argv[1:]])  # noqa: S606 # our own command, once more  # nosec B606
