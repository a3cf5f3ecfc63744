"""Bodies that take long to parse take turns: other requests wait for one of them at most, however many one caller sends."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from gateway.core.cancel_scope import CancelScope
from gateway.core.errors import Overloaded
from gateway.proxy.body import LARGEST_WITHOUT_TURN
from gateway.proxy.turns import Turns
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

AT_ONCE = 40


async def pieces(turns: Turns, *callers: str) -> list[str]:
    """The callers of the pieces, in the order in which these ran."""
    done: list[str] = []

    def work(caller: str) -> None:
        done.append(caller)
        time.sleep(0.001)

    async def one(caller: str) -> None:
        with CancelScope() as cancel_scope:
            await turns.run(caller, lambda: work(caller), cancel_scope)

    await asyncio.gather(*map(one, callers))
    return done


def test_a_caller_with_many_pieces_does_not_delay_others() -> None:
    turns = Turns()
    done = asyncio.run(pieces(turns, *"aaaaaaaaaabc"))
    assert sorted(done) == sorted("aaaaaaaaaabc") and set(done[:4]) >= {"b", "c"}


def test_other_tasks_run_between_two_pieces() -> None:
    async def run() -> int:
        turns, others = Turns(), 0

        async def count() -> None:
            nonlocal others
            while True:
                await asyncio.sleep(0)
                others += 1

        counting = asyncio.create_task(count())
        began = others
        await pieces(turns, *"abcdefghij")
        counting.cancel()
        return others - began

    assert asyncio.run(run()) > 10 * 2


@pytest.mark.parametrize("leaves", ["cancelled", "timed out"])
def test_a_caller_that_stops_waiting_leaves_nothing_behind(leaves: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.proxy.turns.LONGEST_WAIT_S", 0.05)

    async def run() -> int:
        turns = Turns()
        await turns._loop_lock.acquire()

        async def one(caller: str) -> None:
            with CancelScope() as cancel_scope:
                await turns.run(caller, lambda: None, cancel_scope)

        waiting = [asyncio.create_task(one(caller)) for caller in "aab"]
        await asyncio.sleep(0)
        if leaves == "cancelled":
            for task in waiting:
                task.cancel()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError if leaves == "cancelled" else Overloaded) for end in ends)
        turns._loop_lock.release()
        await one("a")
        while turns._callers:  # noqa: ASYNC110 # its pause ends by the clock of the loop
            await asyncio.sleep(0.001)
        return len(turns._callers)

    assert asyncio.run(asyncio.wait_for(run(), 20)) == 0


def fragments(size: int) -> bytes:
    """A body of many tiny values takes some hundred times as long as a text of its size."""
    start, end = b'{"model":"llama3.2","stream":false,"messages":[', b"]}"
    return start + b",".join([b"{}"] * ((size - len(start) - len(end)) // 3)) + end


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)


def opened(gateway: RunningGateway, stack: ExitStack, key: str, body: bytes) -> socket.socket:
    """A request that is sent except for its last byte."""
    peer = stack.enter_context(socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), 60))
    peer.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\n")
    peer.sendall(f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
    return peer


def longest_waits(gateway: RunningGateway, until: threading.Event) -> Iterator[float]:
    with gateway.http() as client:
        while not until.is_set():
            began = time.monotonic()
            assert client.get("/healthz").status_code == 200
            yield time.monotonic() - began


def test_a_burst_of_fragmented_bodies_delays_no_other_request(gateway: RunningGateway) -> None:
    """Each takes long; other requests do not wait for all of them."""
    key, body = gateway.key(rpm=1_000_000, tpm=1), fragments(250_000)
    answered, waits = threading.Event(), [0.0]

    def measure() -> None:
        waits.extend(longest_waits(gateway, answered))

    with ExitStack() as stack:
        peers = [opened(gateway, stack, key, body) for _ in range(AT_ONCE)]
        measuring = threading.Thread(target=measure)
        measuring.start()
        began = time.monotonic()
        for peer in peers:
            peer.sendall(body[-1:])
        heads: list[Any] = [peer.recv(12) for peer in peers]
        took = time.monotonic() - began
        answered.set()
        measuring.join()
    # One caller gets a fifth of the time: bodies whose turn does not come are refused with a time to retry.
    assert set(heads) <= {b"HTTP/1.1 429", b"HTTP/1.1 503"} and b"HTTP/1.1 429" in heads
    assert max(waits) < took / 5, (max(waits), took)
    assert gateway.components.in_flight.total == 0


def test_small_and_large_bodies_are_parsed_alike(gateway: RunningGateway) -> None:
    key = gateway.key()
    with gateway.http(key) as client:
        for size in (100, LARGEST_WITHOUT_TURN - 1, LARGEST_WITHOUT_TURN + 1, 200_000):
            body = {"model": "llama3.2", "stream": False, "messages": [{"role": "user", "content": "x" * size}]}
            assert client.post("/api/chat", json=body).json()["message"]["content"].endswith("x" * 10)
            assert client.post("/api/chat", json={**body, "model": 1}).status_code == 400
