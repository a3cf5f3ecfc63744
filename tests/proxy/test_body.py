"""Request bodies: what is held of unfinished ones is bounded for each key and for all, and released on every path."""

import asyncio
import gc
import json
import socket
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from gateway.audit.record import Record
from gateway.auth.key import ADMIN, ADMIN_MODELS
from gateway.core.cancel_scope import CancelScope
from gateway.core.errors import BodiesUnfinished, BodyTooLarge, GatewayError, Overloaded, ShuttingDown
from gateway.proxy.body import Bodies, check_head
from tests.conftest import StartGateway
from tests.support.chat_requests import MESSAGES, MODEL
from tests.support.fake_backend.backend import FakeBackend
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

LARGEST = 50_000
# One key may hold four of the largest, all keys sixteen.
BODY = json.dumps({"model": MODEL, "messages": MESSAGES, "stream": False}).encode().ljust(LARGEST)
BEGUN = LARGEST - 1000


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> RunningGateway:
    for name in ("BYTES_PER_KEY", "BYTES_IN_ALL"):
        monkeypatch.setattr(f"gateway.proxy.body.{name}", 0)
    return start_gateway(alpha, MAX_REQUEST_BODY_BYTES=str(LARGEST))


def used(gateway: RunningGateway) -> int:
    return gateway.components.bodies.unfinished.used


def test_blanks_around_a_content_length_are_ignored() -> None:
    for value in (b"47 ", b"47\t", b" 47"):
        check_head({"headers": [(b"content-length", value)]}, 47)
        with pytest.raises(BodyTooLarge):
            check_head({"headers": [(b"content-length", value)]}, 46)


class Sender:
    """A client that sends the body of a request as slowly as it likes."""

    def __init__(self, gateway: RunningGateway, key: str, route: str = "POST /api/chat", framing: str = "") -> None:
        self._socket = socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])), timeout=10)
        framing = framing or f"Content-Length: {LARGEST}"
        self.send(f"{route} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n{framing}\r\n\r\n".encode())

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[int, dict[bytes, bytes], Any, bool]:
        """Status, headers and JSON of the answer, and whether the connection ended with it."""
        received = b""
        while b"\r\n\r\n" not in received:
            received += self._receive()
        head, _, body = received.partition(b"\r\n\r\n")
        lines = [line.partition(b": ") for line in head.split(b"\r\n")]
        headers = {name: value for name, _, value in lines}
        while len(body) < int(headers[b"content-length"]):
            body += self._receive()
        ends = headers.get(b"connection") == b"close" and self._socket.recv(1) == b""
        return int(head[9:12]), headers, json.loads(body), ends

    def _receive(self) -> bytes:
        piece = self._socket.recv(65_536)
        assert piece, "the connection ended without an answer"
        return piece

    def close(self) -> None:
        self._socket.close()


@contextmanager
def senders(gateway: RunningGateway) -> Iterator[Callable[..., Sender]]:
    """Each has sent the beginning of a body, which the gateway holds or has refused."""
    with ExitStack() as stack:

        def begin(key: str, *, is_kept: bool = True) -> Sender:
            before = used(gateway)
            sender = Sender(gateway, key)
            stack.callback(sender.close)
            sender.send(BODY[:BEGUN])
            if is_kept:
                until(lambda: used(gateway) == before + BEGUN, 10)
            return sender

        yield begin


def test_what_one_key_holds_is_bounded_and_does_not_affect_others(gateway: RunningGateway) -> None:
    key, other = gateway.key(), gateway.key()
    with senders(gateway) as begin:
        first, *_ = [begin(key) for _ in range(4)]
        status, headers, error_body, ends = begin(key, is_kept=False).answer()
        assert (status, headers[b"retry-after"], ends) == (429, b"1", True) and "exceed the memory limit" in error_body["error"]
        # A body in one piece is not counted, and other keys have their own bound.
        with gateway.http(key) as client:
            assert client.post("/api/chat", content=BODY.rstrip()).status_code == 200
        for sender in (begin(other), first):
            sender.send(BODY[BEGUN:])
            assert sender.answer()[0] == 200
        until(lambda: used(gateway) == 3 * BEGUN, 10)
        begin(key)
    until(lambda: used(gateway) == 0, 10)
    assert gateway.components.bodies.unfinished._of == {}
    assert "refused:bodies_unfinished" in {row["outcome"] for row in gateway.audit_rows()}


def test_what_all_keys_hold_is_bounded_and_a_key_that_holds_little_is_served(gateway: RunningGateway) -> None:
    with senders(gateway) as begin:
        for _ in range(3):
            key = gateway.key()
            for _ in range(4):
                begin(key)
        key = gateway.key()
        for _ in range(2):
            begin(key)
        status, headers, error_body, ends = begin(key, is_kept=False).answer()
        assert (status, headers[b"retry-after"], ends) == (503, b"1", True) and "is overloaded" in error_body["error"]
        little = begin(gateway.key())
        little.send(BODY[BEGUN:])
        assert little.answer()[0] == 200
    until(lambda: used(gateway) == 0, 10)


CHUNKED = "Transfer-Encoding: chunked"
CHUNK = b"%x\r\n%b\r\n" % (BEGUN, BODY[:BEGUN])
# How a body may end, with the status of the answer.
ENDS: dict[str, tuple[int, bytes]] = {
    "too large": (413, CHUNK),
    "no HTTP": (400, b"no chunk\r\n"),
    "no JSON": (400, b"1\r\n}\r\n0\r\n\r\n"),
    "whole": (200, b"1\r\n \r\n0\r\n\r\n"),
}


@pytest.mark.parametrize("route", ["POST /api/chat", "POST /v1/chat/completions", "POST /api/pull"])
def test_memory_is_released_however_a_body_ends(gateway: RunningGateway, route: str) -> None:
    key = gateway.key(flags=(ADMIN_MODELS,))
    for name, (status, rest) in ENDS.items():
        sender = Sender(gateway, key, route, CHUNKED)
        sender.send(CHUNK)
        until(lambda: used(gateway) == BEGUN, 10)
        sender.send(rest)
        if name != "whole" or "pull" not in route:
            assert sender.answer()[0] == status, (name, route)
        sender.close()
        until(lambda: used(gateway) == 0, 10)
    gateway.wait_idle()
    assert gateway.components.bodies.unfinished._of == {}


def test_memory_is_released_when_a_body_is_too_slow_the_client_leaves_or_the_process_ends(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = gateway.key(flags=(ADMIN, ADMIN_MODELS))
    for route in ("POST /api/chat", "POST /api/pull", "POST /admin/v1/keys"):
        sender = Sender(gateway, key, route)
        sender.send(BODY[:BEGUN])
        until(lambda: used(gateway) == BEGUN, 10)
        sender.close()
        until(lambda: used(gateway) == 0, 10)

    async def end_all() -> None:
        gateway.components.scope_timer.end_all(ShuttingDown)

    sender = Sender(gateway, key)
    sender.send(BODY[:BEGUN])
    until(lambda: used(gateway) == BEGUN, 10)
    gateway.call(end_all())
    assert sender.answer()[0] == 503 and used(gateway) == 0
    monkeypatch.setattr("gateway.proxy.body.BODY_DEADLINE_S", 0.2)
    slow = Sender(gateway, key)
    slow.send(BODY[:BEGUN])
    assert slow.answer()[0] == 408 and used(gateway) == 0
    for each in (sender, slow):
        each.close()


def test_a_refused_body_beyond_the_rate_limit_ends_its_connection_too(gateway: RunningGateway) -> None:
    key = gateway.key(rpm=1)
    for status in (413, 429):
        sender = Sender(gateway, key, framing=f"Content-Length: {LARGEST + 1}")
        found = sender.answer()
        assert (found[0], found[-1]) == (status, True)
        sender.close()


def held_by(error: BaseException) -> int:
    """Bytes of bodies in the frames of an error's traceback, which may live longer than the bodies should."""
    held = 0
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            parts = (
                value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else [value]
            )
            held += sum(len(part) for part in parts if isinstance(part, bytes | bytearray))
    return held


@pytest.mark.parametrize(
    ("most", "most_of_a_key", "kind"),
    [(10**6, 10**6, BodyTooLarge), (10**6, BEGUN // 2, BodiesUnfinished), (BEGUN, 10**6, Overloaded)],
)
def test_a_refused_body_leaves_nothing_in_memory(most: int, most_of_a_key: int, kind: type[GatewayError]) -> None:
    bodies = Bodies(LARGEST, LARGEST)
    bodies.unfinished.most, bodies.unfinished.most_of_a_key = most, most_of_a_key

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b" " * (BEGUN // 3), "more_body": True}

    async def run() -> None:
        with CancelScope() as cancel_scope:
            await bodies.read({"headers": []}, receive, Record("id", "id", "POST"), cancel_scope)

    with pytest.raises(kind) as refused:
        asyncio.run(run())
    assert refused.value.leaves_body and held_by(refused.value) == 0
    assert (bodies.unfinished.used, bodies.unfinished._of) == (0, {})


def test_memory_of_a_cancelled_call_does_not_wait_for_the_garbage_collector() -> None:
    ended: list[weakref.ref[object]] = []

    async def block() -> None:
        held = asyncio.Event()
        with CancelScope() as cancel_scope:
            ended.append(weakref.ref(held))
            cancel_scope.interrupt(ShuttingDown())
            await asyncio.sleep(60)

    async def run() -> object:
        with suppress(ShuttingDown):
            await block()
        # The step in which it is cancelled refers to the error until it ends.
        await asyncio.sleep(0)
        return ended[0]()

    gc.disable()
    try:
        assert asyncio.run(run()) is None
    finally:
        gc.enable()


def test_a_body_in_one_piece_is_never_counted_as_unfinished() -> None:
    bodies, record = Bodies(LARGEST, LARGEST), Record("id", "id", "POST")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def run() -> bytes:
        with CancelScope() as cancel_scope:
            return await bodies.read({"headers": []}, receive, record, cancel_scope)

    # Not even for a moment: there is no counter.
    bodies.unfinished = None  # type: ignore[assignment]
    assert asyncio.run(run()) is BODY
