"""More calls than a backend has slots: they wait for it in one queue of all processes."""

import asyncio
from contextlib import AsyncExitStack

from gateway.ops.drill import fake_backend
from gateway.ops.drill.client import ClientAnswer, Content, chat
from gateway.ops.drill.environment import BUSY, BUSY_SLOTS, Environment, Process
from gateway.ops.drill.fault import OLLAMA, Broken, answered, expect

PIECE_S, FORGOTTEN_S, LEASE_S = 3.0, 1.0, 15.0


async def more_than_slots(environment: Environment) -> None:
    busy = environment.backends[BUSY]
    busy.behaviour = fake_backend.think_first
    before = len(busy.chats)
    both = [environment.first, environment.second] * BUSY_SLOTS
    answers = await asyncio.gather(*(environment.ask(OLLAMA, BUSY, stream=False, at=at) for at in both))
    for answer in answers:
        answered(answer)
    received = busy.chats[before:]
    most = max(sum(other.began <= one.began < other.ended for other in received) for one in received)
    expect(most <= BUSY_SLOTS, f"{most} calls at once on a backend with {BUSY_SLOTS} slots")
    waited = sum(_position(answer) > 0 for answer in answers)
    expect(waited == len(both) - BUSY_SLOTS, f"{waited} of {len(both)} calls have waited")


def _position(answer: ClientAnswer) -> int:
    """The call's first place in the queue; 0 if it has not waited."""
    return int(answer.headers.get("X-Queue-Position", "-1"))


async def waiting_caller_gone(environment: Environment) -> None:
    """Calls of a key that gets heartbeats: the head of an answer comes while they wait, with their place in the queue."""
    busy, key = environment.backends[BUSY], environment.keys["patient"]
    async with AsyncExitStack() as stack:
        running = [content for _, content in await _fill_slots(stack, environment, environment.first)]
        async with environment.client.asking(environment.first.url + OLLAMA, key, chat(BUSY, stream=True)) as (leaving, _):
            answered(leaving)
            expect(_position(leaving) == 1, "a call beyond the slots does not wait")
        environment.outcomes[leaving.request_id] = "client_gone"
        await asyncio.sleep(FORGOTTEN_S)
        waiting = environment.client.asking(environment.second.url + OLLAMA, key, chat(BUSY, stream=True))
        answer, content = await stack.enter_async_context(waiting)
        answered(answer)
        expect(_position(answer) == 1, f"a caller still waits {FORGOTTEN_S:g} s after it left")
        busy.go_on.set()
        for one in (*running, content):
            await one.read()
    expect(busy.received(leaving.request_id) == [], "the backend got a call whose caller had left")
    expect(len(busy.received(answer.request_id)) == 1, "the call that waited was not sent")


async def _fill_slots(stack: AsyncExitStack, environment: Environment, at: Process) -> list[tuple[ClientAnswer, Content]]:
    """With calls that have got their first frames."""
    busy, url = environment.backends[BUSY], at.url + OLLAMA
    busy.behaviour = fake_backend.pause_after_one_frame
    busy.go_on.clear()
    begun = []
    for _ in range(BUSY_SLOTS):
        asking = environment.client.asking(url, environment.keys["plain"], chat(BUSY, stream=True))
        answer, content = await stack.enter_async_context(asking)
        answered(answer)
        await asyncio.wait_for(content.readany(), PIECE_S)
        begun.append((answer, content))
    return begun


async def occupy_the_third(stack: AsyncExitStack, environment: Environment) -> list[str]:
    """Calls that will die with their process: all slots are in use, and one more call waits; the ids of the requests."""
    third = environment.processes[2]
    running = await _fill_slots(stack, environment, third)
    waiting = environment.client.asking(third.url + OLLAMA, environment.keys["patient"], chat(BUSY, stream=True))
    answer, _ = await stack.enter_async_context(waiting)
    return [answer.request_id, *(one.request_id for one, _ in running)]


async def died_with_its_calls(environment: Environment) -> None:
    """The process was killed at the start: its calls hold slots, and a place in the queue, until its lease ends."""
    busy = environment.backends[BUSY]
    busy.behaviour = fake_backend.answer_well
    expected = len(busy.chats) + BUSY_SLOTS
    asking = [environment.ask(OLLAMA, BUSY, stream=False, at=environment.second) for _ in range(BUSY_SLOTS)]
    try:
        async with asyncio.timeout(LEASE_S):
            answers = await asyncio.gather(*asking)
    except TimeoutError:
        raise Broken(f"the slots are still in use after {LEASE_S:g} s") from None
    for answer in answers:
        answered(answer)
    expect(len(busy.chats) == expected, "the backend got a call whose process had died")
