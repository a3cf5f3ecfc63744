"""`make drill`: the fault sheet, played beside this installation; a table of what held, exit 1 where something did not."""

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
from gateway.ops.drill.environment import Installation, Scene
from gateway.ops.drill.faults import BY_NAME, SHEET, Broken, LeftOut, Line, kill_the_third
from gateway.settings import Settings
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

LONGEST_LINE_S, LONGEST_DRILL_S = 50.0, 90.0
TRIED_MS = 3000
HELD, BROKEN, LEFT_OUT = "held", "BROKEN", "left out"


@dataclass
class Result:
    line: Line
    state: str
    seconds: float
    told: str = ""

    def row(self) -> dict[str, Any]:
        return {
            "line": self.line.name,
            "promise": self.line.promise,
            "what": self.line.words,
            "result": self.state,
            "seconds": round(self.seconds, 2),
            "why": self.told or None,
        }


async def drill(settings: Settings, said: argparse.Namespace) -> None:
    """Raises CommandFailed where a promise does not hold, or where the drill cannot begin."""
    lines = chosen(said.only)
    results: list[Result] = []
    task = asyncio.current_task()
    assert task is not None
    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        async with (
            asyncio.timeout(LONGEST_DRILL_S),
            database_of(settings) as database,
            open_key_store(settings) as key_store,
        ):
            await require_redis(settings)
            console.notify("starting played backends and gateways of the drill's own")
            async with Scene(installation_of(settings), database, key_store, with_third=BY_NAME["killed"] in lines) as scene:
                await play(scene, lines, results, as_json=said.json)
    except asyncio.CancelledError:
        raise CommandFailed("the drill was stopped; what it had started is ended") from None
    except TimeoutError:
        results += [Result(line, BROKEN, 0, "the drill's time was over") for line in lines[len(results) :]]
    if said.json:
        console.show([result.row() for result in results], as_json=True, empty="")
    broken = [result for result in results if result.state == BROKEN]
    told = f"{sum(result.state == HELD for result in results)} held, {len(broken)} broken"
    left_out = len(results) - len(broken) - sum(result.state == HELD for result in results)
    told += f", {left_out} left out" if left_out else ""
    if broken:
        raise CommandFailed(f"{told}: {', '.join(result.line.name for result in broken)}")
    console.notify(told)


async def require_redis(settings: Settings) -> None:
    async with RedisClient(settings.redis_url) as store:
        if store.refusal:
            raise _not_taken(store.refusal)
        if not store.up:
            raise CommandFailed("Redis does not answer, which the drill's two gateways count in together: see `make doctor`")
        try:
            await store.slow_call(lambda redis: redis.set(redis_keys.DRILL_CHECK, b"", px=TRIED_MS), TRIED_MS / 1000)
            await store.slow_call(lambda redis: redis.publish(redis_keys.SLOT_FREED, b""), TRIED_MS / 1000)
        except RedisUnavailable as refused:
            raise _not_taken(f"{type(refused.__cause__).__name__}: {refused.__cause__}".rstrip(": ")) from None


def _not_taken(why: str) -> CommandFailed:
    return CommandFailed(
        f"Redis does not take what begins with {redis_keys.PREFIX} ({why}): let the user of REDIS_URL use all names "
        "and channels that begin with nz: (its ACL then says `~nz:* &nz:*`), and see `make doctor`"
    )


def installation_of(settings: Settings) -> Installation:
    id_header, closed = settings.gateway_request_id_header, settings.limits_without_redis == "closed"
    return Installation(settings.database_url, settings.redis_url, id_header, closed)


def chosen(only: Sequence[str]) -> list[Line]:
    if unknown := set(only) - BY_NAME.keys():
        raise CommandFailed(f"there is no line {min(unknown)!r}: say some of {', '.join(BY_NAME)}")
    return [line for line in SHEET if not only or line.name in only]


async def play(scene: Scene, lines: Sequence[Line], results: list[Result], *, as_json: bool) -> None:
    if BY_NAME["killed"] in lines:
        await kill_the_third(scene)
    widths = [max(len(line.name) for line in SHEET), 3, max(len(line.words) for line in SHEET)]
    for line in lines:
        result = await one(scene, line)
        results.append(result)
        if not as_json:
            cells = [text.ljust(width) for text, width in zip((line.name, line.promise, line.words), widths, strict=True)]
            print(f"{'  '.join(cells)}  {result.seconds:6.2f} s  {result.state:<8}  {result.told}".rstrip(), flush=True)


async def one(scene: Scene, line: Line) -> Result:
    began = time.monotonic()
    scene.sound.behaviour = fake_backend.answer_well
    state, told = HELD, ""
    try:
        async with asyncio.timeout(LONGEST_LINE_S):
            await line.hold(scene)
    except LeftOut as why:
        state, told = LEFT_OUT, str(why)
    except Broken as how:
        state, told = BROKEN, str(how)
    except (OSError, TimeoutError, ValueError, KeyError, CommandFailed, StoreUnavailable) as wrong:
        state, told = BROKEN, f"{type(wrong).__name__}: {wrong}".rstrip(": ")
    finally:
        scene.sound.go_on.set()
    return Result(line, state, time.monotonic() - began, told)


def with_names_of_its_own() -> None:
    """Starts this command anew where its names in Redis are still those of the installation; returns when they are not."""
    if redis_keys.PREFIX != "nz":
        return
    os.environ[redis_keys.PREFIX_VARIABLE] = redis_keys.new_trial_prefix()
    os.execv(sys.executable, [sys.executable, "-m", "gateway", *sys.argv[1:]])  # noqa: S606 # our own command, once more  # nosec B606
