"""Bursts beyond limits, a killed process, and the audit of all of it."""

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from typing import Any

from gateway.ops.drill import fake_backend
from gateway.ops.drill.client import ClientAnswer, chat, until
from gateway.ops.drill.environment import PLAIN, Environment
from gateway.ops.drill.fault import OLLAMA, answered, expect
from gateway.ops.drill.fleet_faults import occupy_the_third

BURST = 30
PIECE_S, LEASE_S, AUDIT_S = 3.0, 45.0, 25.0


async def requests_burst(environment: Environment) -> None:
    both = [environment.first, environment.second] * BURST
    _exactly(20, await asyncio.gather(*(environment.ask(OLLAMA, PLAIN, "requests", stream=False, at=at) for at in both)))


def _exactly(limit: int, answers: list[ClientAnswer]) -> None:
    admitted = sum(one.status == 200 for one in answers)
    expect(admitted == limit, f"{admitted} of {len(answers)} admitted, the limit is {limit}")
    late = [one for one in answers if one.status != 200]
    expect(all(one.status == 429 for one in late), f"statuses {sorted({one.status for one in late})} beside 200")
    expect(all(int(one.headers.get("Retry-After", "0")) > 0 for one in late), "a 429 does not say when to retry")


async def slots_burst(environment: Environment) -> None:
    environment.healthy.behaviour = fake_backend.pause_after_one_frame
    environment.healthy.go_on.clear()
    both = [environment.first, environment.second] * 8
    tasks = [asyncio.create_task(environment.ask(OLLAMA, PLAIN, "slots", stream=True, at=at)) for at in both]
    refused_by_then = len(tasks) - 4
    await until(lambda: sum(task.done() for task in tasks) >= refused_by_then, 5)
    environment.healthy.go_on.set()
    _exactly(4, list(await asyncio.gather(*tasks)))
    environment.healthy.behaviour = fake_backend.answer_well
    again = await asyncio.gather(*(environment.ask(OLLAMA, PLAIN, "slots", stream=False) for _ in range(4)))
    expect(all(one.status == 200 for one in again), "slots were not released")


async def tokens_limit(environment: Environment) -> None:
    """Each answer reports 3 + 4 tokens; at most one request is in progress."""
    spent = 3 + len(fake_backend.WORDS)
    answers = [
        await environment.client.ask(environment.first.url + OLLAMA, environment.keys["tokens"], _short()) for _ in range(BURST)
    ]
    admitted = sum(one.status == 200 for one in answers)
    expect(0 < admitted * spent <= 100 + spent, f"{admitted * spent} tokens on a limit of 100")
    expect(answers[-1].status == 429, f"status {answers[-1].status} beyond the limit")
    expect(int(answers[-1].headers.get("Retry-After", "0")) > 0, "a 429 does not say when to retry")


def _short() -> dict[str, Any]:
    return {**chat(PLAIN, stream=False), "options": {"num_predict": len(fake_backend.WORDS)}}


async def all_or_none(environment: Environment) -> None:
    """Five requests a minute, one at once: requests refused by the slot must not count towards the five."""
    environment.healthy.behaviour = fake_backend.pause_after_one_frame
    environment.healthy.go_on.clear()
    held = asyncio.create_task(environment.ask(OLLAMA, PLAIN, "one slot", stream=True))
    await until(lambda: any(not chat.ended for chat in environment.healthy.chats), 3)
    for _ in range(10):
        answered(await environment.ask(OLLAMA, PLAIN, "one slot", stream=False), 429)
    environment.healthy.go_on.set()
    answered(await held)
    environment.healthy.behaviour = fake_backend.answer_well
    for _ in range(4):
        answer = await environment.ask(OLLAMA, PLAIN, "one slot", stream=False)
        expect(answer.status == 200, "refused requests were counted")


async def killed(environment: Environment) -> None:
    """The process was killed at the start: its slot is free again when its lease ends."""
    began = time.monotonic()
    while (answer := await environment.ask(OLLAMA, PLAIN, "killed", stream=False)).status == 429:
        expect(time.monotonic() - began < LEASE_S, f"the slot is still in use after {LEASE_S:g} s")
        await asyncio.sleep(0.5)
    answered(answer)


async def kill_the_third(environment: Environment) -> None:
    """During a call that holds the key's only slot, and others that hold all slots of a backend, or wait for one."""
    third = environment.processes[2]
    environment.healthy.behaviour = fake_backend.pause_after_one_frame
    environment.healthy.go_on.clear()
    url = third.url + OLLAMA
    async with AsyncExitStack() as stack:
        asking = environment.client.asking(url, environment.keys["killed"], chat(PLAIN, stream=True))
        answer, content = await stack.enter_async_context(asking)
        await asyncio.wait_for(content.readany(), PIECE_S)
        dying = [answer.request_id, *await occupy_the_third(stack, environment)]
        third.signal(signal.SIGKILL)
        await third.ended(3)
    environment.outcomes.update(dict.fromkeys(dying, "abandoned"))


async def complete_audit(environment: Environment) -> None:
    rows = await environment.until_rows_are_there(AUDIT_S)
    counts = {request_id: len(rows.get(request_id, ())) for request_id in environment.client.sent}
    expect(0 not in counts.values(), f"{list(counts.values()).count(0)} of {len(counts)} requests are not in the audit")
    expect(set(counts.values()) == {1}, "a request is in the audit twice")
    for request_id, outcome in environment.outcomes.items():
        found = rows[request_id][0]["outcome"]
        expect(found == outcome, f"outcome {found!r} instead of {outcome!r}")
