"""Redis freezes, and a gateway shuts down."""

import asyncio
import json
import signal
import time

from gateway.ops.drill import fake_backend
from gateway.ops.drill.client import chat, fetch
from gateway.ops.drill.environment import PLAIN, Environment
from gateway.ops.drill.fault import OLLAMA, LeftOut, answered, as_sent, expect

PIECE_S, REDIS_S = 3.0, 15.0


async def redis_frozen(environment: Environment) -> None:
    if environment.redis_proxy is None:
        raise LeftOut("only a Redis at one address that needs no client certificate can be frozen for the drill only")
    answered(await environment.ask(OLLAMA, PLAIN, stream=False))
    environment.redis_proxy.freeze()
    try:
        wanted = 503 if environment.is_closed_without_redis else 200
        for _ in range(10):
            answer = await environment.ask(OLLAMA, PLAIN, stream=False)
            answered(answer, wanted)
            expect(answer.seconds < 2, f"it took {answer.seconds:.1f} s")
        await _until_redis_is(environment, "degraded")
    finally:
        environment.redis_proxy.thaw()
    await _until_redis_is(environment, "ok")
    answered(await environment.ask(OLLAMA, PLAIN, stream=False))


async def _until_redis_is(environment: Environment, state: str) -> None:
    began = time.monotonic()
    for process in (environment.first, environment.second):
        while json.loads(await fetch(f"{process.url}/readyz") or b"{}").get("redis") != state:
            expect(time.monotonic() - began < REDIS_S, f"Redis is not {state} for the gateway after {REDIS_S:g} s")
            await asyncio.sleep(0.1)


async def drained(environment: Environment) -> None:
    """SIGTERM: the stream in progress completes, new work is refused, the process exits with 0."""
    environment.healthy.behaviour = fake_backend.pause_after_one_frame
    environment.healthy.go_on.clear()
    url = environment.second.url + OLLAMA
    async with environment.client.asking(url, environment.keys["plain"], chat(PLAIN, stream=True)) as (answer, content):
        first = await asyncio.wait_for(content.readany(), PIECE_S)
        environment.second.signal(signal.SIGTERM)
        expect(await environment.second.refuses_work(3), "it accepts new work while it drains")
        environment.healthy.go_on.set()
        rest = await content.read()
    [received] = environment.healthy.received(answer.request_id)
    expect(first + rest == as_sent(OLLAMA, received), "the stream in progress was not completed")
    code = await environment.second.ended(10)
    expect(code == 0, "it does not exit" if code is None else f"it exited with {code}")
