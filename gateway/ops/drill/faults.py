"""The faults of the drill: each breaks something, or asks for too much, and checks that a promise still holds."""

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.ops.drill import fake_backend
from gateway.ops.drill.client import ClientAnswer, chat, fetch, until
from gateway.ops.drill.environment import ONLY_MODEL, PLAIN, SOUND, Environment, Process
from gateway.ops.drill.fake_backend import CHATS, ReceivedCall

OLLAMA, OPENAI = CHATS
BURST = 30
PIECE_S = 3.0
FREED_S, REVOKED_S, REDIS_S, LEASE_S, AUDIT_S = 1.0, 1.0, 15.0, 45.0, 25.0


class Broken(Exception):
    """A promise did not hold; the message describes how."""


class LeftOut(Exception):
    """A fault cannot be injected here; the message gives the reason."""


@dataclass(frozen=True)
class Fault:
    """`promise` is its number in the list of promises; `check` raises Broken."""

    name: str
    promise: str
    words: str
    check: Callable[[Environment], Awaitable[None]]


def expect(held: object, otherwise: str) -> None:
    if not held:
        raise Broken(otherwise)


def answered(answer: ClientAnswer, status: int = 200) -> None:
    expect(answer.status == status, f"status {answer.status} instead of {status}")


def as_sent(path: str, received: ReceivedCall) -> bytes:
    return b"".join(fake_backend.frames(received)) if received.streams else fake_backend.whole(received)


# ── answers ──


async def pass_bytes(environment: Environment) -> None:
    for path in CHATS:
        for stream in (True, False):
            answer = await environment.ask(path, PLAIN, stream=stream)
            answered(answer)
            [received] = environment.sound.received(answer.request_id)
            expect(answer.body == as_sent(path, received), f"{path}: other bytes than the backend's")


async def pass_pieces(environment: Environment) -> None:
    """The backend sends the rest only when the first piece has been read here."""
    environment.sound.behaviour = fake_backend.pause_after_one_frame
    for path in CHATS:
        environment.sound.go_on.clear()
        url, body = environment.first.url + path, chat(PLAIN, stream=True)
        asking = environment.client.asking(url, environment.keys["plain"], body)
        try:
            async with asyncio.timeout(PIECE_S) as patience, asking as (answer, content):
                first = await content.readany()
                patience.reschedule(None)
                environment.sound.go_on.set()
                rest = await content.read()
        except TimeoutError:
            raise Broken(f"{path}: the first piece waited for the second") from None
        [received] = environment.sound.received(answer.request_id)
        expect(first + rest == as_sent(path, received), f"{path}: other bytes than the backend's")


async def goes_on(environment: Environment, name: str, *, is_seen: bool = True) -> None:
    """The first backend fails, the caller gets the second one's answer, and the two never worked at once."""
    environment.sound.behaviour = fake_backend.think_first
    for path, stream in ((OLLAMA, True), (OPENAI, False)):
        answer = await environment.ask(path, name, stream=stream)
        answered(answer)
        later = environment.sound.received(answer.request_id)
        expect(len(later) == 1, f"the healthy backend was called {len(later)} times")
        expect(answer.body == as_sent(path, later[0]), "other bytes than the healthy backend's")
        first = environment.backends[name].received(answer.request_id)
        if is_seen:
            expect(len(first) == 1, f"the faulty backend was called {len(first)} times")
            # Both may be noticed in one turn of the loop, in any order; the answer takes longer than that.
            is_over = 0 < first[0].ended < later[0].began + fake_backend.THOUGHT_S / 2
            expect(is_over, "two backends were at work on one request")


async def refused(environment: Environment) -> None:
    await goes_on(environment, "drill-refused", is_seen=False)


async def frozen(environment: Environment) -> None:
    environment.backends["drill-frozen"].behaviour = fake_backend.never_answer
    await goes_on(environment, "drill-frozen")


async def failing(environment: Environment) -> None:
    environment.backends["drill-failing"].behaviour = fake_backend.fail
    await goes_on(environment, "drill-failing")


async def garbage(environment: Environment) -> None:
    environment.backends["drill-garbage"].behaviour = fake_backend.begin_with_garbage
    for path in CHATS:
        answer = await environment.ask(path, "drill-garbage", stream=True)
        answered(answer)
        expect(answer.headers.get("X-Gateway-Backend") == SOUND, "the answer is the faulty backend's")
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
    environment.sound.behaviour = fake_backend.pause_after_one_frame
    environment.sound.go_on.clear()
    url = environment.first.url + OLLAMA
    async with environment.client.asking(url, environment.keys["plain"], chat(PLAIN, stream=True)) as (answer, content):
        await asyncio.wait_for(content.readany(), PIECE_S)
    [received] = environment.sound.received(answer.request_id)
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
    answer = await environment.ask(OPENAI, ONLY_MODEL, stream=True)
    answered(answer, 503)
    expect(int(answer.headers.get("Retry-After", "0")) > 0, "it does not say when to retry")


# ── who may ──


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
        while (await _doomed(environment, process)).status == 200:
            expect(time.monotonic() - began < REVOKED_S, f"the key still works {REVOKED_S:g} s later")
            await asyncio.sleep(0.05)
        answered(await _doomed(environment, process), 401)


async def _doomed(environment: Environment, process: Process) -> ClientAnswer:
    answer = await environment.client.ask(process.url + "/api/version", environment.keys["doomed"], method="GET", counts=False)
    if answer.status == 200:
        environment.client.sent.append(answer.request_id)
    return answer


async def unknown_is_forbidden(environment: Environment) -> None:
    for path in CHATS:
        unknown = await environment.ask(path, "drill-nowhere", "narrow", stream=False)
        forbidden = await environment.ask(path, ONLY_MODEL, "narrow", stream=False)
        expect(unknown.status == forbidden.status == 403, f"statuses {unknown.status} and {forbidden.status}")
        expect(unknown.body == forbidden.body, f"{path}: the answers differ")
        expect(unknown.headers.keys() == forbidden.headers.keys(), f"{path}: the headers differ")


async def admin_verbs(environment: Environment) -> None:
    before = len(environment.sound.heads)
    for method, path in (("POST", "/api/pull"), ("DELETE", "/api/delete"), ("POST", "/api/create"), ("POST", "/api/copy")):
        answered(
            await environment.client.ask(
                environment.first.url + path, environment.keys["plain"], {"model": PLAIN}, method=method
            ),
            403,
        )
    paths = [head.split(" ")[1] for head in environment.sound.heads[before:]]
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


# ── limits and audit ──


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
    environment.sound.behaviour = fake_backend.pause_after_one_frame
    environment.sound.go_on.clear()
    both = [environment.first, environment.second] * 8
    tasks = [asyncio.create_task(environment.ask(OLLAMA, PLAIN, "slots", stream=True, at=at)) for at in both]
    refused_by_then = len(tasks) - 4
    await until(lambda: sum(task.done() for task in tasks) >= refused_by_then, 5)
    environment.sound.go_on.set()
    _exactly(4, list(await asyncio.gather(*tasks)))
    environment.sound.behaviour = fake_backend.answer_well
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
    environment.sound.behaviour = fake_backend.pause_after_one_frame
    environment.sound.go_on.clear()
    held = asyncio.create_task(environment.ask(OLLAMA, PLAIN, "one slot", stream=True))
    await until(lambda: any(not chat.ended for chat in environment.sound.chats), 3)
    for _ in range(10):
        answered(await environment.ask(OLLAMA, PLAIN, "one slot", stream=False), 429)
    environment.sound.go_on.set()
    answered(await held)
    environment.sound.behaviour = fake_backend.answer_well
    for _ in range(4):
        answer = await environment.ask(OLLAMA, PLAIN, "one slot", stream=False)
        expect(answer.status == 200, "refused requests were counted")


async def killed(environment: Environment) -> None:
    """The process was killed at the start: its slot is free again when its lease ends."""
    began = time.monotonic()
    while (answer := await environment.ask(OLLAMA, PLAIN, "killed", stream=False)).status == 429:
        expect(time.monotonic() - began < LEASE_S, f"the slot is still taken after {LEASE_S:g} s")
        await asyncio.sleep(0.5)
    answered(answer)


async def kill_the_third(environment: Environment) -> None:
    """During a call that holds the key's only slot."""
    third = environment.processes[2]
    environment.sound.behaviour = fake_backend.pause_after_one_frame
    environment.sound.go_on.clear()
    url = third.url + OLLAMA
    async with environment.client.asking(url, environment.keys["killed"], chat(PLAIN, stream=True)) as (answer, content):
        await asyncio.wait_for(content.readany(), PIECE_S)
        third.signal(signal.SIGKILL)
        await third.ended(3)
    environment.outcomes[answer.request_id] = "abandoned"


# ── when something is down ──


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
    environment.sound.behaviour = fake_backend.pause_after_one_frame
    environment.sound.go_on.clear()
    url = environment.second.url + OLLAMA
    async with environment.client.asking(url, environment.keys["plain"], chat(PLAIN, stream=True)) as (answer, content):
        first = await asyncio.wait_for(content.readany(), PIECE_S)
        environment.second.signal(signal.SIGTERM)
        expect(await environment.second.refuses_work(3), "it accepts new work while it drains")
        environment.sound.go_on.set()
        rest = await content.read()
    [received] = environment.sound.received(answer.request_id)
    expect(first + rest == as_sent(OLLAMA, received), "the stream in progress was not completed")
    code = await environment.second.ended(10)
    expect(code == 0, "it does not exit" if code is None else f"it exited with {code}")


async def complete_audit(environment: Environment) -> None:
    rows = await environment.until_rows_are_there(AUDIT_S)
    counts = {request_id: len(rows.get(request_id, ())) for request_id in environment.client.sent}
    expect(0 not in counts.values(), f"{list(counts.values()).count(0)} of {len(counts)} requests are not in the audit")
    expect(set(counts.values()) == {1}, "a request is in the audit twice")
    for request_id, outcome in environment.outcomes.items():
        found = rows[request_id][0]["outcome"]
        expect(found == outcome, f"outcome {found!r} instead of {outcome!r}")


FAULTS: tuple[Fault, ...] = (
    Fault("bytes", "A1", "answers arrive byte for byte, streamed and whole", pass_bytes),
    Fault("pieces", "A1", "each piece of a stream arrives as soon as it was sent", pass_pieces),
    Fault("refused", "A2", "a backend refuses connections: the next answers", refused),
    Fault("frozen", "A2", "a backend never answers: the next answers", frozen),
    Fault("failing", "A2", "a backend answers 500: the next answers", failing),
    Fault("garbage", "A2", "a backend's first frame is garbage: the next answers", garbage),
    Fault("dying", "A3", "a backend dies in mid-stream: the stream ends with an error", dying),
    Fault("left", "A5", "a caller hangs up: its backend is free within a second", client_gone),
    Fault("dialect", "A7", "a backend refuses: clients get the error in their dialect", refusals_in_dialect),
    Fault("down", "-", "all backends of a model are down: 503, with a time to retry", all_down),
    Fault("key", "W1", "no key, a wrong key: 401", wrong_key),
    Fault("revoke", "W1", "a revoked key stops within a second, in every process", revoked),
    Fault("unknown", "W3", "an unknown model and a forbidden one look the same", unknown_is_forbidden),
    Fault("verbs", "W5", "routes that change models are closed to an ordinary key", admin_verbs),
    Fault("secrets", "W6", "keys never reach backends, backends' tokens never callers", secrets_stay),
    Fault("requests", "L1", "a burst on two processes: exactly the limit is admitted", requests_burst),
    Fault("slots", "L1", "more at once than allowed: exactly the limit runs", slots_burst),
    Fault("tokens", "L2", "tokens per minute: the limit is enforced", tokens_limit),
    Fault("none", "L3", "a request refused by one limit counts for no other", all_or_none),
    Fault("redis", "-", "Redis freezes: known keys still work, and it is used again", redis_frozen),
    Fault("killed", "L4", "a killed process's slots are released", killed),
    Fault("drain", "-", "SIGTERM: calls complete, new work is refused, exit 0", drained),
    Fault("books", "L6", "each request of this drill is in the audit, once, as it was", complete_audit),
)
BY_NAME: Mapping[str, Fault] = {line.name: line for line in FAULTS}
