"""Calls that wait for backends: who waits, in which order, how long, and what is left of those who leave."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import aiohttp
import httpx
import pytest
from anthropic import InternalServerError as AnthropicError
from ollama import ResponseError
from openai import InternalServerError as OpenaiError

from gateway.auth.key import BATCH, SUB_USERS
from gateway.fleet.queue import TICK_S
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support import fleet_board
from tests.support.chat_requests import CHATS, MESSAGES, MODEL, send
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Hold, Received, Step
from tests.support.gateway_settings import entry_of
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

CHAT = "/api/chat"
BODY = {"model": MODEL, "messages": MESSAGES, "stream": False}


class Held:
    """Each call waits at the backend until the test lets it go, in the order in which they come."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend
        self.names: list[str] = []
        self._events: list[threading.Event] = []
        for chat in CHATS:
            backend.play(chat.path, self._script)

    def _script(self, request: Received) -> list[Step]:
        self._events.append(threading.Event())
        self.names.append(request.header("x-request-id") or "")
        return [Hold(self._events[-1]), *self._backend.healthy(request)]

    def has(self, many: int) -> None:
        until(lambda: len(self.names) == many)

    def let_go(self, number: int) -> None:
        self._events[number].set()

    def end(self) -> None:
        for chat in CHATS:
            self._backend.play(chat.path, None)
        for event in self._events:
            event.set()


@pytest.fixture
def held(alpha: FakeBackend) -> Iterator[Held]:
    found = Held(alpha)
    yield found
    found.end()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as found:
        yield found


Ask = Callable[..., "Future[httpx.Response]"]


@pytest.fixture
def ask(pool: ThreadPoolExecutor) -> Ask:
    """Asks in a thread: the gateway, the key, the request's id, and headers."""

    def start(gateway: RunningGateway, key: str, name: str, model: str = MODEL, **headers: str) -> "Future[httpx.Response]":
        def run() -> httpx.Response:
            with gateway.http(key, headers={"X-Request-ID": name, **headers}) as client:
                return client.post(CHAT, json={**BODY, "model": model})

        return pool.submit(run)

    return start


def waiting(gateway: RunningGateway) -> int:
    return gateway.components.placing.queue.length


def wait_for_queue_of(gateway: RunningGateway, many: int) -> None:
    until(lambda: waiting(gateway) == many, 20)


def left(stores: TestStores) -> set[str]:
    with stores.client() as client:
        return fleet_board.left(client, redis_keys.FLEET)


@pytest.fixture(autouse=True)
def nothing_is_left(stores: TestStores) -> Iterator[None]:
    yield
    until(lambda: not left(stores))


def test_a_call_that_waits_leaves_the_slot_of_its_key_to_others(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, held: Held, ask: Ask
) -> None:
    beta.healthy.models = ["other:latest"]
    gateway = start_gateway(entry_of(alpha, slots=1), entry_of(beta, slots=1))
    strict = gateway.key(concurrent=1)
    runs = ask(gateway, gateway.key(), "of-another-key")
    held.has(1)
    waits = []
    for number in range(2):
        waits.append(ask(gateway, strict, f"waits-{number}"))
        wait_for_queue_of(gateway, number + 1)
    assert ask(gateway, strict, "elsewhere", "other").result().status_code == 200
    held.let_go(0)
    held.has(2)
    time.sleep(0.3)
    assert len(held.names) == 2, "one of this key at once"
    held.let_go(1)
    held.has(3)
    held.let_go(2)
    assert [each.result().status_code for each in (runs, *waits)] == [200, 200, 200]
    assert set(held.names) == {"of-another-key", "waits-0", "waits-1"}


def test_answers_have_their_first_place_in_the_queue_and_how_long_they_waited(
    start_gateway: StartGateway, alpha: FakeBackend, held: Held, ask: Ask
) -> None:
    gateway, other = (start_gateway(entry_of(alpha, slots=1)) for _ in range(2))
    key = gateway.key()
    calls = [ask(gateway, key, "runs")]
    held.has(1)
    for number, each in enumerate((gateway, other, gateway)):
        calls.append(ask(each, key, f"waits-{number}"))
        until(lambda: waiting(gateway) + waiting(other) == number + 1)  # noqa: B023
    time.sleep(0.2)
    for number in range(4):
        held.has(number + 1)
        held.let_go(number)
    answers = [call.result() for call in calls]
    assert [answer.headers["x-queue-position"] for answer in answers] == ["0", "1", "2", "3"]
    waited_ms = [int(answer.headers["x-queue-wait-ms"]) for answer in answers]
    assert waited_ms[0] == 0 and all(200 <= waited < 10_000 for waited in waited_ms[1:])
    rows = {row["request_id"]: row for row in gateway.audit_rows()}
    assert [rows[f"waits-{number}"]["queue_ms"] // 1 for number in range(3)] == pytest.approx(waited_ms[1:], abs=2)
    assert held.names == ["runs", "waits-0", "waits-1", "waits-2"]


def test_a_thousand_clients_that_leave_leave_nothing(
    start_gateway: StartGateway, alpha: FakeBackend, held: Held, ask: Ask, stores: TestStores
) -> None:
    gateways = [start_gateway(entry_of(alpha, slots=1), QUEUE_SIZE="1000") for _ in range(3)]
    key = gateways[0].key()
    runs = ask(gateways[0], key, "runs")
    held.has(1)
    for number in range(5):
        with ExitStack() as clients:
            for n in range(200):
                clients.enter_context(send(gateways[n % 3], key, CHATS[(n + number) % 4]))
            until(lambda: sum(map(waiting, gateways)) == 200, 20)
        until(lambda: not sum(map(waiting, gateways)), 20)
    assert left(stores) <= {f"calls:{gateway.components.placing.queue.board.process}" for gateway in gateways} | {
        name for name in left(stores) if name.startswith("ends:")
    }
    held.let_go(0)
    assert runs.result().status_code == 200
    later = ask(gateways[1], key, "later")
    held.has(2)
    held.let_go(1)
    assert later.result().status_code == 200
    rows = Counter(row["outcome"] for row in gateways[0].audit_rows())
    assert rows == {"client_gone": 1000, "answered": 2}


def test_batches_yield_to_others(start_gateway: StartGateway, alpha: FakeBackend, held: Held, ask: Ask) -> None:
    gateway = start_gateway(entry_of(alpha, slots=1))
    key, batch = gateway.key(), gateway.key(flags=(BATCH,))
    calls = [ask(gateway, key, "runs")]
    held.has(1)
    for number, (its_key, name, headers) in enumerate(
        [(batch, "batch-key", {}), (key, "batch-header", {"X-Gateway-Class": "batch"}), (key, "person", {})]
    ):
        calls.append(ask(gateway, its_key, name, **headers))
        wait_for_queue_of(gateway, number + 1)
    for number in range(4):
        held.has(number + 1)
        held.let_go(number)
    assert [call.result().status_code for call in calls] == [200] * 4
    assert held.names[:2] == ["runs", "person"]
    wrong = ask(gateway, batch, "wrong", **{"X-Gateway-Class": "urgent"}).result()
    assert wrong.status_code == 400 and "X-Gateway-Class" in wrong.json()["error"]


Client = Callable[[RunningGateway, str, int], object]


def openai_call(gateway: RunningGateway, key: str, retries: int) -> object:
    with gateway.openai(key, max_retries=retries) as client:
        return client.chat.completions.create(model=MODEL, messages=MESSAGES)


def anthropic_call(gateway: RunningGateway, key: str, retries: int) -> object:
    with gateway.anthropic(key, max_retries=retries) as client:
        return client.messages.create(model=MODEL, max_tokens=20, messages=MESSAGES)


def ollama_call(gateway: RunningGateway, key: str, retries: int) -> object:
    return gateway.ollama(key).chat(MODEL, MESSAGES)


CLIENTS: dict[str, tuple[Client, type[Exception]]] = {
    "openai": (openai_call, OpenaiError),
    "anthropic": (anthropic_call, AnthropicError),
    "ollama": (ollama_call, ResponseError),
}


def test_official_clients_get_the_errors_of_the_queue(
    start_gateway: StartGateway, alpha: FakeBackend, held: Held, ask: Ask, pool: ThreadPoolExecutor
) -> None:
    gateway = start_gateway(entry_of(alpha, slots=1), QUEUE_SIZE="3", QUEUE_WAIT_S="1.5")
    key = gateway.key()
    runs = ask(gateway, key, "runs")
    held.has(1)
    waits = [pool.submit(call, gateway, key, 0) for call, _ in CLIENTS.values()]
    wait_for_queue_of(gateway, 3)
    for call, error in CLIENTS.values():
        with pytest.raises(error, match="As many requests wait for this model as may wait") as full:
            call(gateway, key, 0)
        assert status_of(full.value) == 503
    for wait, (_, error) in zip(waits, CLIENTS.values(), strict=True):
        with pytest.raises(error, match="became free in the time that a request may wait") as late:
            wait.result()
        assert status_of(late.value) == 503
    held.let_go(0)
    assert runs.result().status_code == 200
    outcomes = Counter(row["outcome"] for row in gateway.audit_rows())
    assert outcomes == {"answered": 1, "refused:queue_full": 3, "refused:queue_timeout": 3}


def status_of(error: Any) -> int:
    return int(error.status_code)


def test_who_comes_again_after_the_time_that_a_full_queue_names_finds_space(
    start_gateway: StartGateway, alpha: FakeBackend, ask: Ask, pool: ThreadPoolExecutor
) -> None:
    alpha.healthy.pieces, alpha.healthy.pause_s = 3, 0.1
    gateway = start_gateway(entry_of(alpha, slots=1), QUEUE_SIZE="3")
    key = gateway.key()
    for number in range(3):
        assert ask(gateway, key, f"learns-{number}").result().status_code == 200
    others = [ask(gateway, gateway.key(), f"other-{number}") for number in range(4)]
    wait_for_queue_of(gateway, 3)
    refused = ask(gateway, key, "refused").result()
    assert refused.json()["error"].startswith("As many requests wait")
    wait_s = float(refused.headers["retry-after"])
    assert 0.5 < wait_s < 5
    # Ollama's client does not try again by itself; the others do after this time.
    again = [pool.submit(call, gateway, key, 1) for name, (call, _) in CLIENTS.items() if name != "ollama"]
    time.sleep(wait_s)
    assert ollama_call(gateway, key, 0) and all(each.result() for each in again)
    assert [each.result().status_code for each in others] == [200] * 4


class Backlog:
    """Clients of several keys that always have calls in the queue, through several gateways."""

    def __init__(self, gateways: list[RunningGateway]) -> None:
        self._urls = itertools.cycle([gateway.url + CHAT for gateway in gateways])
        self._numbers = itertools.count()
        self.is_over = False

    async def run(self, clients: dict[str, tuple[str, int]], enough: Callable[[], bool]) -> None:
        """`clients`: by name the key and how many calls it has at once; a name may end with a user's."""
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session, asyncio.TaskGroup() as group:
            for name, (key, many) in clients.items():
                for _ in range(many):
                    group.create_task(self._ask_always(session, name, key))
            while not enough():  # noqa: ASYNC110 the backend announces nothing
                await asyncio.sleep(0.02)
            self.is_over = True

    async def _ask_always(self, session: aiohttp.ClientSession, name: str, key: str) -> None:
        while not self.is_over:
            headers = {"Authorization": f"Bearer {key}", "X-Request-ID": f"{name}.{next(self._numbers)}"}
            headers["X-OpenWebUI-User-Id"] = name
            async with session.post(next(self._urls), json=BODY, headers=headers) as answer:
                await answer.read()
                assert answer.status == 200


def test_shares_of_three_processes_are_within_the_bound(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    """In calls, which all cost the same: see docs/fleet.md."""
    slots, calls = 2, 200
    alpha.healthy.pieces, alpha.healthy.pause_s = 3, 0.005
    gateways = [start_gateway(entry_of(alpha, slots=slots)) for _ in range(3)]
    triple, shared = gateways[0].key(weight=3.0), gateways[0].key(flags=(SUB_USERS,))
    clients = {
        "light": (gateways[0].key(), 4),
        "heavy": (gateways[0].key(), 30),
        "triple": (triple, 9),
        "ann": (shared, 12),
        "ben": (shared, 4),
    }
    backlog = Backlog(gateways)
    asyncio.run(backlog.run(clients, lambda: len(alpha.calls(CHAT)) >= calls))
    order = [
        (call.header("x-request-id") or "").partition(".")[0] for call in sorted(alpha.calls(CHAT), key=lambda one: one.started)
    ]
    # Until all have calls in the queue, who comes first is served first.
    served = Counter(order[sum(many for _, many in clients.values()) : calls])
    bound = 2 + 4 * slots
    shares = [served["light"], served["heavy"], served["triple"] / 3, served["ann"] + served["ben"]]
    assert max(shares) - min(shares) <= bound, served
    assert abs(served["ann"] - served["ben"]) <= bound, served


def test_backends_come_and_go_while_a_call_waits(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, held: Held, ask: Ask
) -> None:
    beta.healthy.models = []
    often = {"MODEL_DISCOVERY_REFRESH_S": "0.3", "MODEL_DISCOVERY_CACHE_TTL_S": "1"}
    gateway = start_gateway(entry_of(alpha, slots=1), entry_of(beta, slots=1), **often)
    key = gateway.key()
    runs = ask(gateway, key, "runs")
    held.has(1)
    waits = ask(gateway, key, "waits")
    wait_for_queue_of(gateway, 1)
    time.sleep(1.2)
    assert waiting(gateway) == 1, "what is known of backends is renewed"
    beta.healthy.models = [MODEL]
    assert waits.result(TICK_S * 5).json()["message"]["content"].startswith("beta")
    beta.healthy.models = []
    until(lambda: len(gateway.components.catalog().models[f"{MODEL}:latest"].offers) == 1)
    waits = ask(gateway, key, "waits for one that dies")
    wait_for_queue_of(gateway, 1)
    alpha.stop()
    assert [each.result(10).status_code for each in (runs, waits)] == [503, 503]


@pytest.mark.parametrize(("drain_s", "status"), [("0.5", 503), ("10", 200)])
def test_a_process_that_ends_lets_waiting_calls_finish_or_ends_them_in_time(
    start_gateway: StartGateway, alpha: FakeBackend, held: Held, ask: Ask, drain_s: str, status: int
) -> None:
    gateway, other = (start_gateway(entry_of(alpha, slots=1), GATEWAY_DRAIN_S=drain_s) for _ in range(2))
    key = gateway.key()
    runs = ask(other, key, "runs")
    held.has(1)
    waits = ask(gateway, key, "waits")
    wait_for_queue_of(gateway, 1)
    began = time.monotonic()
    gateway.loop.call_soon_threadsafe(gateway.server.begin_drain)
    if status == 200:
        held.let_go(0)
        held.has(2)
        held.let_go(1)
    assert waits.result(15).status_code == status and time.monotonic() - began < 5
    held.end()
    assert runs.result().status_code == 200
