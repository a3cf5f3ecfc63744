"""A broken or hostile backend affects no other calls: they are answered, and its own calls end in time."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

import httpx
import pytest

from gateway.dialects.openai import OpenAI, ServerSentEvents
from gateway.proxy.relay import READ_IN_A_TURN
from tests.conftest import StartGateway
from tests.support import hostile_backend
from tests.support.chat_requests import MESSAGES, MODEL
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Forever, Head, Piece, Step, answer, stream
from tests.support.processes import until
from tests.support.project import PROJECT
from tests.support.running_gateway import RunningGateway

# The longest that other calls may wait while many are in progress: a tenth of what it once was.
LONGEST_DELAY_S = 0.3
TICK_S = 0.005
AT_ONCE = 20


@pytest.fixture(scope="module")
def hostile_url() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.support.hostile_backend"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


class LoopDelays:
    """`with LoopDelays(gateway) as delays:` — the longest time that the gateway's event loop computed without a break.

    Measured in processor time, which does not depend on the load of the machine.
    """

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway = gateway
        self.longest_s = 0.0

    def __enter__(self) -> Self:
        self._watching = asyncio.run_coroutine_threadsafe(self._watch(), self._gateway.loop)
        return self

    def __exit__(self, *_: object) -> None:
        self._watching.cancel()

    async def _watch(self) -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(TICK_S)
            self.longest_s = max(self.longest_s, time.thread_time() - began)


def call(gateway: RunningGateway, key: str, name: str, native: bool, streamed: bool, ends: dict[str, str]) -> None:
    """Records how the call ends: with an answer, an error, or an error within a started answer; anything else is unexpected."""
    body = {"model": hostile_backend.MODEL, "messages": [{"role": "user", "content": name}], "stream": streamed}
    what = f"{name}, {'native' if native else 'openai'}, {'stream' if streamed else 'whole'}"
    ends[what] = "nothing"
    try:
        with gateway.http(key) as client:
            got = client.post("/api/chat" if native else "/v1/chat/completions", json=body)
    except httpx.HTTPError as wrong:
        ends[what] = type(wrong).__name__
        return
    if got.status_code == 200:
        has_ended = b'"done":true' in got.content or b"[DONE]" in got.content or b'"finish_reason":"stop"' in got.content
        ends[what] = "answered" if has_ended else "failed" if b'"error"' in got.content[-500:] else "no end"
    else:
        ends[what] = "failed" if got.status_code in (400, 502, 503, 504) and got.json()["error"] else str(got.status_code)


def in_groups(gateway: RunningGateway, key: str, ends: dict[str, str]) -> Iterator[tuple[str, list[threading.Thread]]]:
    """Each behaviour whole and streamed, alternating between the dialects; several at once, as they mostly wait."""
    names = list(hostile_backend.BEHAVIOURS)
    for start in range(0, len(names), AT_ONCE):
        group = names[start : start + AT_ONCE]
        kinds = [(name, (start + number) % 2 == 0, streamed) for number, name in enumerate(group) for streamed in (False, True)]
        calls = [
            threading.Thread(target=call, args=(gateway, key, name, native ^ streamed, streamed, ends))
            for name, native, streamed in kinds
        ]
        yield ", ".join(group), calls


def test_other_calls_are_answered_whatever_a_backend_does(
    start_gateway: StartGateway, alpha: FakeBackend, hostile_url: str
) -> None:
    waits = {"read_timeout_s": 0.6, "idle_timeout_s": 0.4, "total_timeout_s": 0.8}
    gateway = start_gateway(alpha, {"name": "hostile", "base_url": hostile_url, **waits})
    key = gateway.key()
    ends: dict[str, str] = {}
    slow: dict[str, float] = {}
    with gateway.http(key) as client:
        for name, calls in in_groups(gateway, key, ends):
            with LoopDelays(gateway) as delays:
                for thread in calls:
                    thread.start()
                while any(thread.is_alive() for thread in calls):
                    got = client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES, "stream": False})
                    assert got.status_code == 200 and got.json()["message"]["content"] == "alpha heard: Say hi"
                    time.sleep(0.02)
            slow[name] = delays.longest_s
    assert {name: seconds for name, seconds in slow.items() if seconds > LONGEST_DELAY_S} == {}
    # A client that has no processor time to read a frame of megabytes is disconnected as stalled.
    cut = {what for what, end in ends.items() if end == "RemoteProtocolError"}
    assert len(cut) <= sum(line["detail"] == "stalled" for line in gateway.request_lines())
    assert {what: end for what, end in ends.items() if end not in ("answered", "failed") and what not in cut} == {}
    assert len(ends) == 2 * len(hostile_backend.BEHAVIOURS) >= 2 * 42
    assert gateway.components.backends["alpha"].breaker.state == "closed"
    backend = gateway.components.backends["hostile"]
    assert (backend.in_flight, backend.unframed.used, gateway.components.held_answers.used) == (0, 0, 0)


def test_removing_unrequested_token_counts_lets_other_calls_run(
    start_gateway: StartGateway, alpha: FakeBackend, hostile_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sizes = OpenAI.without_usage, []

    def read_and_note(dialect: OpenAI, frames: bytes) -> bytes:
        if frames.count(b'"usage"') > 10:
            sizes.append(len(frames))
        return read(dialect, frames)

    monkeypatch.setattr(OpenAI, "without_usage", read_and_note)
    waits = {"idle_timeout_s": 5, "total_timeout_s": 1.0}
    gateway = start_gateway(alpha, {"name": "hostile", "base_url": hostile_url, **waits})
    key, ends = gateway.key(), dict[str, str]()
    calls = [threading.Thread(target=call, args=(gateway, key, name, False, True, ends)) for name in hostile_backend.COUNTS]
    with LoopDelays(gateway) as delays:
        for thread in calls:
            thread.start()
        for thread in calls:
            thread.join()
    assert len(ends) == 5 and set(ends.values()) == {"failed"}
    assert 0 < max(sizes) <= READ_IN_A_TURN
    assert delays.longest_s < LONGEST_DELAY_S


def test_a_repeated_end_marker_is_searched_for_once(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sizes = ServerSentEvents.payloads, []

    def read_and_note(framing: ServerSentEvents, data: bytes) -> list[bytes]:
        sizes.append(len(data))
        return read(framing, data)

    monkeypatch.setattr(ServerSentEvents, "payloads", read_and_note)
    gateway = start_gateway(alpha)
    frames = [hostile_backend.FRAME[False], *[hostile_backend.END[False] * 2000] * 80]
    alpha.play("/v1/chat/completions", stream(frames))
    with gateway.http(gateway.key()) as client:
        got = client.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES, "stream": True})
    assert b"".join(frames).startswith(got.content) and hostile_backend.END[False] in got.content
    assert gateway.request_lines()[0]["outcome"] == "answered"
    assert sum(sizes) < len(b"".join(frames)) / 4


def test_endless_lines_of_many_streams_stay_within_the_bound_of_a_backend(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.fleet.backends.backend.MOST_UNFRAMED", 400_000)
    gateway = start_gateway(alpha)
    beginning: list[Step] = [Head(200, [("Content-Type", "application/x-ndjson")], chunked=True), *[Piece(b"x" * 30_000)] * 5]
    alpha.play("/api/chat", [*beginning, Forever()])
    key, statuses = gateway.key(), []

    def ask() -> None:
        with gateway.http(key) as client:
            statuses.append(client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    backend = gateway.components.backends["alpha"]
    until(lambda: backend.unframed.used == 300_000)
    assert not statuses
    ask()
    assert statuses == [502] and backend.breaker._failures == 1
    assert backend.unframed.used == 300_000
    alpha.stop()
    for thread in threads:
        thread.join()
    assert backend.unframed.used == 0 and gateway.request_lines()[0]["attempts"][0]["fault"] == "endless_frames"


def test_large_embeddings_are_passed_on_and_counted(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    vectors = [[0.0123456 + n / 1000 for n in range(1000)]] * 30
    data = [{"object": "embedding", "embedding": vector, "index": n} for n, vector in enumerate(vectors)]
    counts = {"prompt_tokens": 4321, "total_tokens": 4321}
    sent = [
        ("/v1/embeddings", {"object": "list", "data": data, "model": "m", "usage": counts}),
        ("/v1/embeddings", {"model": "m", "object": "list", "usage": counts, "data": data}),
        ("/api/embed", {"model": "m", "embeddings": vectors, "total_duration": 1, "prompt_eval_count": 4321}),
    ]
    with gateway.http(gateway.key()) as client:
        for path, body in sent:
            alpha.play(path, answer(200, body))
            got = client.post(path, json={"model": MODEL, "input": "x"})
            assert got.status_code == 200 and got.json() == body
    rows = [(row["prompt_tokens"], row["completion_tokens"], row["tokens_from"]) for row in gateway.audit_rows()]
    assert rows == [(4321, 0, "reported")] * 3


ODD_ENTRIES: dict[str, object] = {
    "deep": {"name": "deep", "details": json.loads("[" * 300 + "]" * 300)},
    "long": {"name": "x" * 10_000, "model": "y"},
    "number": {"name": 5},
    "list": ["name"],
    "long model": {"name": "z", "model": "m" * 10_000},
}


def test_odd_entries_of_a_list_of_models_are_left_out(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway, shown = start_gateway(alpha), {}
    with gateway.http(gateway.key()) as client:
        for odd, entry in ODD_ENTRIES.items():
            fine = f"beside-{odd.replace(' ', '-')}:latest"
            alpha.play("/api/tags", answer(200, {"models": [entry, {"name": fine, "model": fine}]}))
            gateway.call(gateway.components.discovery.refresh())
            shown[fine] = [model["name"] for model in client.get("/api/tags").json()["models"]]
    assert shown == {fine: [fine] for fine in shown} and len(shown) == len(ODD_ENTRIES)


def test_a_list_of_too_many_values_is_rejected(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    alpha.play("/api/tags", answer(200, b'{"models":[' + b"[]," * 200_000 + b"{}]}"))
    gateway.call(gateway.components.discovery.refresh())
    [snapshot] = gateway.components.discovery.catalog.snapshots
    assert snapshot.error.startswith("bad_list") and len(snapshot.models) == 1
