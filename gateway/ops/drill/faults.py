"""The fault sheet: each line breaks something, or asks for too much, and says what must come of it."""

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.ops.drill import fake_backend
from gateway.ops.drill.client import Heard, chat, look, until
from gateway.ops.drill.environment import ALONE, PLAIN, SOUND, Process, Scene
from gateway.ops.drill.fake_backend import CHATS, Asked

OLLAMA, OPENAI = CHATS
BURST = 30
PIECE_S = 3.0
FREED_S, REVOKED_S, REDIS_S, LEASE_S, BOOKS_S = 1.0, 1.0, 15.0, 45.0, 25.0


class Broken(Exception):
    """A promise did not hold; the message says how."""


class LeftOut(Exception):
    """A line cannot be played here; the message says why."""


@dataclass(frozen=True)
class Line:
    """`promise` is its number in the list of promises; `hold` raises Broken."""

    name: str
    promise: str
    words: str
    hold: Callable[[Scene], Awaitable[None]]


def expect(held: object, otherwise: str) -> None:
    if not held:
        raise Broken(otherwise)


def answered(heard: Heard, status: int = 200) -> None:
    expect(heard.status == status, f"status {heard.status} instead of {status}")


def as_sent(path: str, asked: Asked) -> bytes:
    return b"".join(fake_backend.frames(asked)) if asked.streams else fake_backend.whole(asked)


# ── answers ──


async def pass_bytes(scene: Scene) -> None:
    for path in CHATS:
        for stream in (True, False):
            heard = await scene.ask(path, PLAIN, stream=stream)
            answered(heard)
            [asked] = scene.sound.asked(heard.request_id)
            expect(heard.body == as_sent(path, asked), f"{path}: other bytes than the backend's")


async def pass_pieces(scene: Scene) -> None:
    """The backend says the rest only when the first piece has been read here."""
    scene.sound.behaviour = fake_backend.pause_after_one_frame
    for path in CHATS:
        scene.sound.go_on.clear()
        url, body = scene.first.url + path, chat(PLAIN, stream=True)
        asking = scene.client.asking(url, scene.keys["plain"], body)
        try:
            async with asyncio.timeout(PIECE_S) as patience, asking as (heard, content):
                first = await content.readany()
                patience.reschedule(None)
                scene.sound.go_on.set()
                rest = await content.read()
        except TimeoutError:
            raise Broken(f"{path}: the first piece waited for the second") from None
        [asked] = scene.sound.asked(heard.request_id)
        expect(first + rest == as_sent(path, asked), f"{path}: other bytes than the backend's")


async def goes_on(scene: Scene, name: str, *, is_seen: bool = True) -> None:
    """The first backend fails, the caller hears the second, and both were never at work at once."""
    scene.sound.behaviour = fake_backend.think_first
    for path, stream in ((OLLAMA, True), (OPENAI, False)):
        heard = await scene.ask(path, name, stream=stream)
        answered(heard)
        later = scene.sound.asked(heard.request_id)
        expect(len(later) == 1, f"the sound backend was asked {len(later)} times")
        expect(heard.body == as_sent(path, later[0]), "other bytes than the sound backend's")
        first = scene.backends[name].asked(heard.request_id)
        if is_seen:
            expect(len(first) == 1, f"the faulty backend was asked {len(first)} times")
            # Both ends are seen here in one turn of the loop, in any order; the answer takes longer than that.
            is_over = 0 < first[0].ended < later[0].began + fake_backend.THOUGHT_S / 2
            expect(is_over, "two backends were at work on one request")


async def refused(scene: Scene) -> None:
    await goes_on(scene, "drill-refused", is_seen=False)


async def frozen(scene: Scene) -> None:
    scene.backends["drill-frozen"].behaviour = fake_backend.say_nothing
    await goes_on(scene, "drill-frozen")


async def failing(scene: Scene) -> None:
    scene.backends["drill-failing"].behaviour = fake_backend.fail
    await goes_on(scene, "drill-failing")


async def garbage(scene: Scene) -> None:
    scene.backends["drill-garbage"].behaviour = fake_backend.begin_with_garbage
    for path in CHATS:
        heard = await scene.ask(path, "drill-garbage", stream=True)
        answered(heard)
        expect(heard.headers.get("X-Gateway-Backend") == SOUND, "the answer is the faulty backend's")
        expect(b"<html>" not in heard.body, "a byte of the faulty backend came through")


async def dying(scene: Scene) -> None:
    scene.backends["drill-dying"].behaviour = fake_backend.die_in_the_middle
    for path in CHATS:
        heard = await scene.ask(path, "drill-dying", stream=True)
        answered(heard)
        expect(not heard.is_cut, f"{path}: the connection broke instead of an error")
        last = _last_frame(heard.body)
        expect(b"[DONE]" not in heard.body and not last.get("done"), f"{path}: told as if it were complete")
        expect("error" in last, f"{path}: it ends without an error")
        scene.outcomes[heard.request_id] = "truncated"


def _last_frame(body: bytes) -> dict[str, Any]:
    lines = [line.removeprefix(b"data: ") for line in body.splitlines() if line.strip()]
    try:
        value = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def client_gone(scene: Scene) -> None:
    scene.sound.behaviour = fake_backend.pause_after_one_frame
    scene.sound.go_on.clear()
    url = scene.first.url + OLLAMA
    async with scene.client.asking(url, scene.keys["plain"], chat(PLAIN, stream=True)) as (heard, content):
        await asyncio.wait_for(content.readany(), PIECE_S)
    [asked] = scene.sound.asked(heard.request_id)
    expect(await until(lambda: asked.left, FREED_S), f"the backend works on {FREED_S:g} s after the caller left")
    scene.outcomes[heard.request_id] = "client_gone"


async def refusals_in_dialect(scene: Scene) -> None:
    scene.backends["drill-refusing"].behaviour = fake_backend.refuse
    for path in CHATS:
        heard = await scene.ask(path, "drill-refusing", stream=True)
        answered(heard, 400)
        told = json.loads(heard.body).get("error")
        words = told if path == OLLAMA else told.get("message") if isinstance(told, dict) else None
        expect(words == fake_backend.REFUSAL, f"{path}: not told as its clients read it")


async def all_down(scene: Scene) -> None:
    heard = await scene.ask(OPENAI, ALONE, stream=True)
    answered(heard, 503)
    expect(int(heard.headers.get("Retry-After", "0")) > 0, "it does not say when to come back")


# ── who may ──


async def wrong_key(scene: Scene) -> None:
    key = scene.keys["plain"]
    for bad in ("", "nz_wrong", key[:-1] + ("a" if key[-1] != "a" else "b")):
        answered(await scene.client.ask(scene.first.url + OLLAMA, bad, chat(PLAIN, stream=False), counts=False), 401)


async def revoked(scene: Scene) -> None:
    processes = (scene.first, scene.second)
    for process in processes:
        answered(await scene.ask(OLLAMA, PLAIN, "doomed", stream=False, at=process))
    await scene.key_store.revoke(scene.key_ids["doomed"])
    began = time.monotonic()
    for process in processes:
        while (await _doomed(scene, process)).status == 200:
            expect(time.monotonic() - began < REVOKED_S, f"it works {REVOKED_S:g} s later")
            await asyncio.sleep(0.05)
        answered(await _doomed(scene, process), 401)


async def _doomed(scene: Scene, process: Process) -> Heard:
    heard = await scene.client.ask(process.url + "/api/version", scene.keys["doomed"], method="GET", counts=False)
    if heard.status == 200:
        scene.client.sent.append(heard.request_id)
    return heard


async def unknown_is_forbidden(scene: Scene) -> None:
    for path in CHATS:
        unknown = await scene.ask(path, "drill-nowhere", "narrow", stream=False)
        forbidden = await scene.ask(path, ALONE, "narrow", stream=False)
        expect(unknown.status == forbidden.status == 403, f"statuses {unknown.status} and {forbidden.status}")
        expect(unknown.body == forbidden.body, f"{path}: the answers differ")
        expect(unknown.headers.keys() == forbidden.headers.keys(), f"{path}: the headers differ")


async def admin_verbs(scene: Scene) -> None:
    before = len(scene.sound.heads)
    for method, path in (("POST", "/api/pull"), ("DELETE", "/api/delete"), ("POST", "/api/create"), ("POST", "/api/copy")):
        answered(await scene.client.ask(scene.first.url + path, scene.keys["plain"], {"model": PLAIN}, method=method), 403)
    told = [head.split(" ")[1] for head in scene.sound.heads[before:]]
    expect(set(told) <= {"/api/tags", "/api/ps", "/api/version"}, "a backend heard of it")


async def secrets_stay(scene: Scene) -> None:
    """Of everything that has been said so far."""
    for path in CHATS:
        heard = await scene.ask(path, PLAIN, stream=True)
        said = heard.body.decode("latin-1") + str(dict(heard.headers))
        expect(scene.token not in said, "a backend's token came down")
    heads = "".join(head for backend in scene.backends.values() for head in backend.heads)
    expect(scene.token in heads, "the backend's token was not sent")
    expect(not any(key in heads for key in scene.keys.values()), "a key went to a backend")


# ── limits and books ──


async def requests_burst(scene: Scene) -> None:
    both = [scene.first, scene.second] * BURST
    _exactly(20, await asyncio.gather(*(scene.ask(OLLAMA, PLAIN, "requests", stream=False, at=at) for at in both)))


def _exactly(limit: int, heard: list[Heard]) -> None:
    admitted = sum(one.status == 200 for one in heard)
    expect(admitted == limit, f"{admitted} of {len(heard)} admitted, the limit is {limit}")
    late = [one for one in heard if one.status != 200]
    expect(all(one.status == 429 for one in late), f"statuses {sorted({one.status for one in late})} beside 200")
    expect(all(int(one.headers.get("Retry-After", "0")) > 0 for one in late), "a 429 does not say when to come back")


async def slots_burst(scene: Scene) -> None:
    scene.sound.behaviour = fake_backend.pause_after_one_frame
    scene.sound.go_on.clear()
    both = [scene.first, scene.second] * 8
    tasks = [asyncio.create_task(scene.ask(OLLAMA, PLAIN, "slots", stream=True, at=at)) for at in both]
    refused_by_then = len(tasks) - 4
    await until(lambda: sum(task.done() for task in tasks) >= refused_by_then, 5)
    scene.sound.go_on.set()
    _exactly(4, list(await asyncio.gather(*tasks)))
    scene.sound.behaviour = fake_backend.answer_well
    again = await asyncio.gather(*(scene.ask(OLLAMA, PLAIN, "slots", stream=False) for _ in range(4)))
    expect(all(one.status == 200 for one in again), "slots did not come back")


async def tokens_limit(scene: Scene) -> None:
    """Each answer is told as 3 + 4 tokens; at most one request is under way."""
    spent = 3 + len(fake_backend.WORDS)
    heard = [await scene.client.ask(scene.first.url + OLLAMA, scene.keys["tokens"], _short()) for _ in range(BURST)]
    admitted = sum(one.status == 200 for one in heard)
    expect(0 < admitted * spent <= 100 + spent, f"{admitted * spent} tokens on a limit of 100")
    expect(heard[-1].status == 429, f"status {heard[-1].status} beyond the limit")
    expect(int(heard[-1].headers.get("Retry-After", "0")) > 0, "a 429 does not say when to come back")


def _short() -> dict[str, Any]:
    return {**chat(PLAIN, stream=False), "options": {"num_predict": len(fake_backend.WORDS)}}


async def all_or_none(scene: Scene) -> None:
    """Five requests a minute, one at once: those that the one slot refuses must not cost any of the five."""
    scene.sound.behaviour = fake_backend.pause_after_one_frame
    scene.sound.go_on.clear()
    held = asyncio.create_task(scene.ask(OLLAMA, PLAIN, "one slot", stream=True))
    await until(lambda: any(not chat.ended for chat in scene.sound.chats), 3)
    for _ in range(10):
        answered(await scene.ask(OLLAMA, PLAIN, "one slot", stream=False), 429)
    scene.sound.go_on.set()
    answered(await held)
    scene.sound.behaviour = fake_backend.answer_well
    for _ in range(4):
        heard = await scene.ask(OLLAMA, PLAIN, "one slot", stream=False)
        expect(heard.status == 200, "refused requests have cost something")


async def killed(scene: Scene) -> None:
    """Killed at the beginning: its slot comes back when its lease ends."""
    began = time.monotonic()
    while (heard := await scene.ask(OLLAMA, PLAIN, "killed", stream=False)).status == 429:
        expect(time.monotonic() - began < LEASE_S, f"the slot is still taken after {LEASE_S:g} s")
        await asyncio.sleep(0.5)
    answered(heard)


async def kill_the_third(scene: Scene) -> None:
    """With a call under way that has the key's only slot."""
    third = scene.processes[2]
    scene.sound.behaviour = fake_backend.pause_after_one_frame
    scene.sound.go_on.clear()
    url = third.url + OLLAMA
    async with scene.client.asking(url, scene.keys["killed"], chat(PLAIN, stream=True)) as (heard, content):
        await asyncio.wait_for(content.readany(), PIECE_S)
        third.signal(signal.SIGKILL)
        await third.ended(3)
    scene.outcomes[heard.request_id] = "abandoned"


# ── when something is down ──


async def redis_frozen(scene: Scene) -> None:
    if scene.wire is None:
        raise LeftOut("only a Redis at one address, without certificates of its own, can be frozen for the drill alone")
    answered(await scene.ask(OLLAMA, PLAIN, stream=False))
    scene.wire.freeze()
    try:
        wanted = 503 if scene.is_closed_without_redis else 200
        for _ in range(10):
            heard = await scene.ask(OLLAMA, PLAIN, stream=False)
            answered(heard, wanted)
            expect(heard.seconds < 2, f"it took {heard.seconds:.1f} s")
        await _until_redis_is(scene, "degraded")
    finally:
        scene.wire.thaw()
    await _until_redis_is(scene, "ok")
    answered(await scene.ask(OLLAMA, PLAIN, stream=False))


async def _until_redis_is(scene: Scene, state: str) -> None:
    began = time.monotonic()
    for process in (scene.first, scene.second):
        while json.loads(await look(f"{process.url}/readyz") or b"{}").get("redis") != state:
            expect(time.monotonic() - began < REDIS_S, f"Redis is not {state} for the gateway after {REDIS_S:g} s")
            await asyncio.sleep(0.1)


async def drained(scene: Scene) -> None:
    """SIGTERM: the stream under way ends whole, new work is refused, the process ends well."""
    scene.sound.behaviour = fake_backend.pause_after_one_frame
    scene.sound.go_on.clear()
    url = scene.second.url + OLLAMA
    async with scene.client.asking(url, scene.keys["plain"], chat(PLAIN, stream=True)) as (heard, content):
        first = await asyncio.wait_for(content.readany(), PIECE_S)
        scene.second.signal(signal.SIGTERM)
        expect(await scene.second.refuses_work(3), "it takes new work while it ends")
        scene.sound.go_on.set()
        rest = await content.read()
    [asked] = scene.sound.asked(heard.request_id)
    expect(first + rest == as_sent(OLLAMA, asked), "the stream under way did not end whole")
    code = await scene.second.ended(10)
    expect(code == 0, "it does not end" if code is None else f"it ended with {code}")


async def books(scene: Scene) -> None:
    rows = await scene.until_rows_are_there(BOOKS_S)
    counts = {request_id: len(rows.get(request_id, ())) for request_id in scene.client.sent}
    expect(0 not in counts.values(), f"{list(counts.values()).count(0)} of {len(counts)} requests are not in the audit")
    expect(set(counts.values()) == {1}, "a request is in the audit twice")
    for request_id, outcome in scene.outcomes.items():
        found = rows[request_id][0]["outcome"]
        expect(found == outcome, f"told as {found!r} instead of {outcome!r}")


SHEET: tuple[Line, ...] = (
    Line("bytes", "A1", "answers arrive byte for byte, streamed and whole", pass_bytes),
    Line("pieces", "A1", "each piece of a stream comes as soon as it was said", pass_pieces),
    Line("refused", "A2", "a backend refuses connections: the next answers", refused),
    Line("frozen", "A2", "a backend says nothing: the next answers", frozen),
    Line("failing", "A2", "a backend answers 500: the next answers", failing),
    Line("garbage", "A2", "a backend's first frame is garbage: the next answers", garbage),
    Line("dying", "A3", "a backend dies in mid-stream: the end is an error, never a success", dying),
    Line("left", "A5", "a caller leaves: its backend is free within a second", client_gone),
    Line("dialect", "A7", "a backend refuses: told as the caller's clients read it", refusals_in_dialect),
    Line("down", "-", "all backends of a model are down: 503, and when to come back", all_down),
    Line("key", "W1", "no key, a wrong key: 401", wrong_key),
    Line("revoke", "W1", "a revoked key stops within a second, in every process", revoked),
    Line("unknown", "W3", "an unknown model and a forbidden one look the same", unknown_is_forbidden),
    Line("verbs", "W5", "routes that change models are closed to an ordinary key", admin_verbs),
    Line("secrets", "W6", "keys do not go to backends, backends' tokens not to callers", secrets_stay),
    Line("requests", "L1", "a burst on two processes: exactly the limit is admitted", requests_burst),
    Line("slots", "L1", "more at once than allowed: exactly the limit runs", slots_burst),
    Line("tokens", "L2", "tokens a minute: the limit ends it", tokens_limit),
    Line("none", "L3", "what one limit refuses costs nothing of the others", all_or_none),
    Line("redis", "-", "Redis freezes: known keys go on in time, and it is used again", redis_frozen),
    Line("killed", "L4", "a killed process gives its slots back", killed),
    Line("drain", "-", "SIGTERM: what runs ends whole, new work is refused, exit 0", drained),
    Line("books", "L6", "each request of this drill is in the audit, once, told truly", books),
)
BY_NAME: Mapping[str, Line] = {line.name: line for line in SHEET}
