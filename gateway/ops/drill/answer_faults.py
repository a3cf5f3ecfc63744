"""Faults of backends and callers, and what the answers must be nevertheless."""

import asyncio
import json
from typing import Any

from gateway.ops.drill import fake_backend
from gateway.ops.drill.client import chat, until
from gateway.ops.drill.environment import HEALTHY, PLAIN, SINGLE, Environment
from gateway.ops.drill.fake_backend import CHATS
from gateway.ops.drill.fault import OLLAMA, OPENAI, Broken, answered, as_sent, expect

PIECE_S, FREED_S = 3.0, 1.0


async def pass_bytes(environment: Environment) -> None:
    for path in CHATS:
        for stream in (True, False):
            answer = await environment.ask(path, PLAIN, stream=stream)
            answered(answer)
            [received] = environment.healthy.received(answer.request_id)
            expect(answer.body == as_sent(path, received), f"{path}: other bytes than the backend's")


async def pass_pieces(environment: Environment) -> None:
    """The backend sends the rest only when the first piece has been read here."""
    environment.healthy.behaviour = fake_backend.pause_after_one_frame
    for path in CHATS:
        environment.healthy.go_on.clear()
        url, body = environment.first.url + path, chat(PLAIN, stream=True)
        asking = environment.client.asking(url, environment.keys["plain"], body)
        try:
            async with asyncio.timeout(PIECE_S) as patience, asking as (answer, content):
                first = await content.readany()
                patience.reschedule(None)
                environment.healthy.go_on.set()
                rest = await content.read()
        except TimeoutError:
            raise Broken(f"{path}: the first piece waited for the second") from None
        [received] = environment.healthy.received(answer.request_id)
        expect(first + rest == as_sent(path, received), f"{path}: other bytes than the backend's")


async def fails_over(environment: Environment, name: str, *, is_seen: bool = True) -> None:
    """The first backend fails, the caller gets the second one's answer, and the two never worked at once."""
    environment.healthy.behaviour = fake_backend.think_first
    for path, stream in ((OLLAMA, True), (OPENAI, False)):
        answer = await environment.ask(path, name, stream=stream)
        answered(answer)
        later = environment.healthy.received(answer.request_id)
        expect(len(later) == 1, f"the healthy backend was called {len(later)} times")
        expect(answer.body == as_sent(path, later[0]), "other bytes than the healthy backend's")
        first = environment.backends[name].received(answer.request_id)
        if is_seen:
            expect(len(first) == 1, f"the faulty backend was called {len(first)} times")
            # Both may be noticed in one turn of the loop, in any order; the answer takes longer than that.
            is_over = 0 < first[0].ended < later[0].began + fake_backend.THOUGHT_S / 2
            expect(is_over, "two backends were at work on one request")


async def refused(environment: Environment) -> None:
    await fails_over(environment, "drill-refused", is_seen=False)


async def frozen(environment: Environment) -> None:
    environment.backends["drill-frozen"].behaviour = fake_backend.never_answer
    await fails_over(environment, "drill-frozen")


async def failing(environment: Environment) -> None:
    environment.backends["drill-failing"].behaviour = fake_backend.fail
    await fails_over(environment, "drill-failing")


async def garbage(environment: Environment) -> None:
    environment.backends["drill-garbage"].behaviour = fake_backend.begin_with_garbage
    for path in CHATS:
        answer = await environment.ask(path, "drill-garbage", stream=True)
        answered(answer)
        expect(answer.headers.get("X-Gateway-Backend") == HEALTHY, "the answer is the faulty backend's")
        expect(b"<html>" not in answer.body, "a byte of the faulty backend came through")


async def dying(environment: Environment) -> None:
    environment.backends["drill-dying"].behaviour = fake_backend.die_in_the_middle
    for path in CHATS:
        answer = await environment.ask(path, "drill-dying", stream=True)
        answered(answer)
        expect(not answer.is_cut, f"{path}: the connection broke instead of an error")
        last = _last_frame(answer.body)
        expect(b"[DONE]" not in answer.body and not last.get("done"), f"{path}: the answer looks complete")
        expect("error" in last, f"{path}: the answer ends without an error")
        environment.outcomes[answer.request_id] = "truncated"


def _last_frame(body: bytes) -> dict[str, Any]:
    lines = [line.removeprefix(b"data: ") for line in body.splitlines() if line.strip()]
    try:
        value = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def client_gone(environment: Environment) -> None:
    environment.healthy.behaviour = fake_backend.pause_after_one_frame
    environment.healthy.go_on.clear()
    url = environment.first.url + OLLAMA
    async with environment.client.asking(url, environment.keys["plain"], chat(PLAIN, stream=True)) as (answer, content):
        await asyncio.wait_for(content.readany(), PIECE_S)
    [received] = environment.healthy.received(answer.request_id)
    expect(await until(lambda: received.left, FREED_S), f"the backend still works {FREED_S:g} s after the caller left")
    environment.outcomes[answer.request_id] = "client_gone"


async def refusals_in_dialect(environment: Environment) -> None:
    environment.backends["drill-refusing"].behaviour = fake_backend.refuse
    for path in CHATS:
        answer = await environment.ask(path, "drill-refusing", stream=True)
        answered(answer, 400)
        error = json.loads(answer.body).get("error")
        message = error if path == OLLAMA else error.get("message") if isinstance(error, dict) else None
        expect(message == fake_backend.REFUSAL, f"{path}: not in the form that its clients read")


async def all_down(environment: Environment) -> None:
    answer = await environment.ask(OPENAI, SINGLE, stream=True)
    answered(answer, 503)
    expect(int(answer.headers.get("Retry-After", "0")) > 0, "it does not say when to retry")
