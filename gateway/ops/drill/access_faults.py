"""Keys that may not do what is asked, and secrets that must not leave the gateway."""

import asyncio
import time

from gateway.ops.drill.agent_answers import AGENTS
from gateway.ops.drill.client import ClientAnswer, chat
from gateway.ops.drill.environment import PLAIN, SINGLE, Environment, Process
from gateway.ops.drill.fake_backend import CHATS
from gateway.ops.drill.fault import OLLAMA, answered, expect

REVOKED_S = 1.0


async def wrong_key(environment: Environment) -> None:
    key = environment.keys["plain"]
    for bad in ("", "nz_wrong", key[:-1] + ("a" if key[-1] != "a" else "b")):
        answered(
            await environment.client.ask(environment.first.url + OLLAMA, bad, chat(PLAIN, stream=False), counts=False), 401
        )


async def revoked(environment: Environment) -> None:
    processes = (environment.first, environment.second)
    for process in processes:
        answered(await environment.ask(OLLAMA, PLAIN, "doomed", stream=False, at=process))
    await environment.key_store.revoke(environment.key_ids["doomed"])
    began = time.monotonic()
    for process in processes:
        while (await _try_key(environment, process)).status == 200:
            expect(time.monotonic() - began < REVOKED_S, f"the key still works {REVOKED_S:g} s later")
            await asyncio.sleep(0.05)
        answered(await _try_key(environment, process), 401)


async def _try_key(environment: Environment, process: Process) -> ClientAnswer:
    answer = await environment.client.ask(process.url + "/api/version", environment.keys["doomed"], method="GET", counts=False)
    if answer.status == 200:
        environment.client.sent.append(answer.request_id)
    return answer


async def unknown_is_forbidden(environment: Environment) -> None:
    for path in (*CHATS, *AGENTS):
        unknown = await environment.ask(path, "drill-nowhere", "narrow", stream=False)
        forbidden = await environment.ask(path, SINGLE, "narrow", stream=False)
        expect(unknown.status == forbidden.status == 403, f"statuses {unknown.status} and {forbidden.status}")
        expect(_without_id(unknown) == _without_id(forbidden), f"{path}: the answers differ")
        expect(unknown.headers.keys() == forbidden.headers.keys(), f"{path}: the headers differ")


def _without_id(answer: ClientAnswer) -> bytes:
    """Errors of Anthropic's API have the request's id."""
    return answer.body.replace(answer.request_id.encode(), b"")


async def model_routes(environment: Environment) -> None:
    before = len(environment.healthy.heads)
    for method, path in (("POST", "/api/pull"), ("DELETE", "/api/delete"), ("POST", "/api/create"), ("POST", "/api/copy")):
        answered(
            await environment.client.ask(
                environment.first.url + path, environment.keys["plain"], {"model": PLAIN}, method=method
            ),
            403,
        )
    paths = [head.split(" ")[1] for head in environment.healthy.heads[before:]]
    expect(set(paths) <= {"/api/tags", "/api/ps", "/api/version"}, "a backend got the request")


async def secrets_stay(environment: Environment) -> None:
    """In everything sent so far."""
    for path in CHATS:
        answer = await environment.ask(path, PLAIN, stream=True)
        sent = answer.body.decode("latin-1") + str(dict(answer.headers))
        expect(environment.token not in sent, "a backend's token reached the caller")
    heads = "".join(head for backend in environment.backends.values() for head in backend.heads)
    expect(environment.token in heads, "the backend's token was not sent")
    expect(not any(key in heads for key in environment.keys.values()), "a key reached a backend")
