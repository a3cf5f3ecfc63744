"""The parts without I/O: names and allow-lists, the breaker, the guard, the client's address, framing."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.cancel_scope import CancelScope
from gateway.dialects.model_names import AllowList, canonical
from gateway.dialects.ollama import Ndjson
from gateway.dialects.openai import ServerSentEvents
from gateway.edge.client_address import TrustedProxies
from gateway.fleet.backends.circuit_breaker import FAILURES_UNTIL_OPEN, FIRST_PAUSE_S, LONGEST_PAUSE_S, CircuitBreaker
from gateway.fleet.backends.frame_buffer import FrameBuffer, UnfinishedFrames

ONE_MODEL = (
    "llama3.2 llama3.2:latest LLAMA3.2:Latest library/llama3.2 registry.ollama.ai/library/llama3.2:latest "
    "https://registry.ollama.ai/library/llama3.2 llama3.2:local llama3.2:latest:local"
).split()


@pytest.mark.parametrize("spelling", [*ONE_MODEL, "  llama3.2  "])
def test_all_spellings_of_a_model_are_one(spelling: str) -> None:
    assert canonical(spelling) == ("llama3.2:latest", False)


def test_tags_namespaces_and_hosts_count() -> None:
    different = ["llama3.2:3b", "me/llama3.2", "hf.co/me/llama3.2", "host:5000/ns/m", "llama3.2:cloud", "gpt-oss:120b-cloud"]
    assert len({canonical(name).canonical for name in [*different, "llama3.2"]}) == len(different) + 1
    assert canonical("host:5000/ns/m").canonical == "host:5000/ns/m:latest"


@pytest.mark.parametrize(
    ("name", "cloud"), [("a:cloud", True), ("a:CLOUD", True), ("a:7b-cloud", True), ("foo-cloud", False), ("a:latest", False)]
)
def test_cloud_names(name: str, cloud: bool) -> None:
    assert canonical(name).cloud is cloud


@pytest.mark.parametrize(
    ("patterns", "name", "cloud", "allowed"),
    [
        ((), "a:latest", False, True),
        ((), "a:cloud", True, False),
        (("a",), "a:latest", False, True),
        (("A:Latest",), "a:latest", False, True),
        (("a",), "a:7b", False, False),
        (("a*",), "abc:7b", False, True),
        (("*:7b",), "abc:7b", False, True),
        (("b*", "a"), "a:latest", False, True),
        (("*",), "a:cloud", True, False),
        (("*:cloud",), "a:cloud", True, True),
        (("a:cloud",), "a:cloud", True, True),
        (("a*",), "a:7b-cloud", True, False),
        (("hf.co/me/*",), "hf.co/me/m:q4", False, True),
        (("a.c",), "abc:latest", False, False),
        (("[ab]",), "a:latest", False, True),
    ],
)
def test_allow_lists(patterns: tuple[str, ...], name: str, cloud: bool, allowed: bool) -> None:
    assert AllowList(patterns).allows(name, cloud=cloud) is allowed


@given(st.text(max_size=60))
def test_canonical_is_stable(name: str) -> None:
    once = canonical(name)
    if not once.cloud:
        assert canonical(once.canonical).canonical == once.canonical or "://" in name or ":local" in name.lower()


def test_the_breaker_opens_probes_and_closes() -> None:
    now = [0.0]
    breaker = CircuitBreaker(lambda: now[0])
    for _ in range(FAILURES_UNTIL_OPEN):
        assert breaker.lets_pass
        breaker.attempt()
        breaker.failed()
    assert breaker.state == "open" and not breaker.lets_pass
    now[0] += FIRST_PAUSE_S
    assert breaker.state == "half-open" and breaker.lets_pass
    breaker.attempt()
    assert not breaker.lets_pass, "one probe at a time"
    breaker.abandoned()
    assert breaker.lets_pass, "a probe whose client left says nothing"
    breaker.attempt()
    breaker.failed()
    assert breaker.state == "open"
    now[0] += FIRST_PAUSE_S
    assert breaker.state == "open", "the pause has grown"
    now[0] += LONGEST_PAUSE_S
    breaker.attempt()
    breaker.succeeded()
    assert breaker.state == "closed" and breaker.lets_pass


class Reason(Exception):
    pass


class Other(Exception):
    pass


async def _deadlines() -> None:
    with pytest.raises(Reason), CancelScope() as guard:
        guard.within(0.01, Reason)
        await asyncio.sleep(5)
    with CancelScope() as guard:
        guard.within(0.01, Reason)
        guard.within(5, Reason)
        await asyncio.sleep(0.05)
        guard.without_deadline()
    with pytest.raises(Reason), CancelScope() as guard:
        guard.within(5, Other)
        guard.within(0.01, Reason)
        await asyncio.sleep(5)


async def _nesting() -> None:
    with pytest.raises(Other), CancelScope() as outer:
        outer.within(0.01, Other)
        with CancelScope() as inner:
            inner.within(5, Reason)
            await asyncio.sleep(5)
    with CancelScope() as outer:
        outer.within(5, Other)
        with pytest.raises(Reason), CancelScope() as inner:
            inner.within(0.01, Reason)
            await asyncio.sleep(5)
        await asyncio.sleep(0)


async def _cancelled_from_outside() -> None:
    async def work() -> None:
        with CancelScope() as guard:
            guard.within(5, Reason)
            await asyncio.sleep(5)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("story", [_deadlines, _nesting, _cancelled_from_outside])
def test_guards(story: Callable[[], object]) -> None:
    asyncio.run(story())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("198.51.100.1", "203.0.113.9", "198.51.100.1"),
        ("10.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "6.6.6.6, 203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "6.6.6.6, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
        ("10.0.0.1", "203.0.113.9:4711", "203.0.113.9"),
        ("10.0.0.1", "[2001:db8::1]:4711", "2001:db8::1"),
        ("10.0.0.1", "6.6.6.6, nonsense", "10.0.0.1"),
        ("10.0.0.1", "nonsense, 203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("::ffff:10.0.0.1", "203.0.113.9", "203.0.113.9"),
    ],
)
def test_the_clients_address(peer: str, forwarded: str, client: str) -> None:
    scope = {"client": (peer, 1), "headers": [(b"x-forwarded-for", forwarded.encode())]}
    assert TrustedProxies(["10.0.0.0/8"]).client_of(scope) == client


def test_host_names_of_proxies_are_resolved() -> None:
    async def story() -> str:
        async with TrustedProxies(["localhost", "no-such-host.invalid"]) as proxies:
            for _ in range(200):
                if proxies._resolved:
                    break
                await asyncio.sleep(0.01)
            scope = {"client": ("127.0.0.1", 1), "headers": [(b"x-forwarded-for", b"203.0.113.9")]}
            return proxies.client_of(scope)

    assert asyncio.run(story()) == "203.0.113.9"


@pytest.mark.parametrize(
    ("data", "end", "payloads"),
    [
        (b"data: 1\n\ndata: 2", 9, [b"1"]),
        (b"data: 1\r\n\r\ndata: 2\r\n", 11, [b"1"]),
        (b"data:1\r\rdata:2\r", 8, [b"1"]),
        (b"data: 1\n\rdata: 2\n\r", 9, [b"1"]),
        (b"data: 1\r\n\r\ndata: 2\r\n\r", 11, [b"1"]),
        (b"data: 1\r\r\ndata: 2", 10, [b"1"]),
        (b"data: 1\n\n\ndata: 2\n: x\n\n", 23, [b"1", b"2"]),
        (b": ping\n\n", 8, []),
        (b"event: x\ndata: 1\ndata: 2\n\n", 26, [b"1\n2"]),
        (b"data: half", 0, []),
    ],
)
def test_server_sent_events(data: bytes, end: int, payloads: list[bytes]) -> None:
    framing = ServerSentEvents()
    assert framing.end_of_frames(data) == end and framing.payloads(data[:end]) == payloads


def test_an_end_of_an_event_may_be_cut_anywhere() -> None:
    sent = b'data: {"a":1}\n\rdata: 2\r\n\r\ndata: 3\n\r\ndata: 4\r\rdata: 5\n\n'
    for cut in range(len(sent)):
        buffer = FrameBuffer(ServerSentEvents(), UnfinishedFrames(1))
        frames = [buffer.add(sent[:cut]), *(buffer.add(sent[at : at + 1]) for at in range(cut, len(sent)))]
        assert b"".join(frames) == sent and not buffer.rest
        read = [payload for frame in frames for payload in ServerSentEvents().payloads(frame)]
        assert read == [b'{"a":1}', b"2", b"3", b"4", b"5"]


def test_ndjson() -> None:
    assert Ndjson().end_of_frames(b'{"a":1}\n{"b"') == 8
    assert Ndjson().payloads(b'{"a":1}\n\n{"b":2}\n') == [b'{"a":1}', b'{"b":2}']
