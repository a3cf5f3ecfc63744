"""Faults of backends that coding agents meet: some speak the agents' APIs, calls are translated for the others."""

import asyncio
import json
import time
from typing import Any

from gateway.ops.drill import fake_backend
from gateway.ops.drill.agent_answers import AGENTS, MESSAGES
from gateway.ops.drill.environment import HEALTHY, NATIVE, Environment
from gateway.ops.drill.fault import OPENAI, answered, as_sent, expect

FOUND_S = 5.0
LAST = {"message_stop", "response.completed", "response.incomplete"}
ERRORS = {"error", "response.failed"}


async def native_fails(environment: Environment) -> None:
    """From a backend that has the client's API to one that has not: the client sees one API."""
    native = environment.backends[NATIVE]
    for path in AGENTS:
        await _until_found(environment, path)
        for stream in (True, False):
            native.behaviour = fake_backend.answer_well
            answer = await environment.ask(path, NATIVE, stream=stream)
            answered(answer)
            [received] = native.received(answer.request_id)
            expect(answer.body == as_sent(path, received), f"{path}: other bytes than the backend's")
            native.behaviour = fake_backend.fail
            answer = await environment.ask(path, NATIVE, stream=stream)
            answered(answer)
            [first] = native.received(answer.request_id)
            [later] = environment.healthy.received(answer.request_id)
            expect((first.path, later.path) == (path, OPENAI), "the backends got other routes")
            expect(answer.headers.get("X-Gateway-Backend") == HEALTHY, "the answer is the faulty backend's")
            expect(answer.headers.get("X-Gateway-Translated-To") == OPENAI, "it does not show the translation")
            expect(_is_whole(path, answer.body, stream=stream), f"{path}: not a whole answer in the form that its clients read")


async def _until_found(environment: Environment, path: str) -> None:
    """A gateway that has just started may not know yet that the backend has this path: then it translates."""
    began = time.monotonic()
    while True:
        answer = await environment.ask(path, NATIVE, stream=False)
        answered(answer)
        if environment.backends[NATIVE].received(answer.request_id)[0].path == path:
            return
        expect(time.monotonic() - began < FOUND_S, f"the backend has {path}, which was not found out in {FOUND_S:g} s")
        await asyncio.sleep(0.1)


def _is_whole(path: str, body: bytes, *, stream: bool) -> bool:
    events = _events(body)
    if stream:
        texts = [event["delta"] for event in events if str(event.get("type")).endswith("delta") and "delta" in event]
        text = "".join(delta.get("text", "") if isinstance(delta, dict) else delta for delta in texts)
        return text == "".join(fake_backend.WORDS) and bool(events) and events[-1].get("type") in LAST
    answer = json.loads(body)
    [content] = answer["content"] if path == MESSAGES else answer["output"][0]["content"]
    return bool(content["text"] == "".join(fake_backend.WORDS))


async def agents_cut(environment: Environment) -> None:
    """Translated and passed through."""
    for name in ("drill-dying", NATIVE):
        environment.backends[name].behaviour = fake_backend.die_in_the_middle
        for path in AGENTS:
            answer = await environment.ask(path, name, stream=True)
            answered(answer)
            expect(not answer.is_cut, f"{path}: the connection broke instead of an error")
            kinds = [event.get("type") for event in _events(answer.body)]
            expect(not LAST & {*kinds}, f"{path}: the answer looks complete")
            expect(kinds and kinds[-1] in ERRORS, f"{path}: the answer ends without an error")
            environment.outcomes[answer.request_id] = "truncated"


def _events(body: bytes) -> list[dict[str, Any]]:
    """The data of server-sent events; nothing if they are something else."""
    lines = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: ")]
    try:
        return [event for event in map(json.loads, lines) if isinstance(event, dict)]
    except ValueError:
        return []
