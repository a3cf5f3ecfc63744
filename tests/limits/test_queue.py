"""Calls wait for a slot in the order of arrival, for a bounded time, in a bounded queue, and only while the client does."""

import threading
import time
from collections.abc import Iterator

import pytest

from gateway.audit import abandoned
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.limits.test_limiter import ask
from tests.support.chat_requests import CHATS, send
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Hold, Received, Step
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway


@pytest.fixture
def hold(alpha: FakeBackend) -> Iterator[list[threading.Event]]:
    """One event for each call, in the order in which they reach the backend."""
    events: list[threading.Event] = []

    def script(request: Received) -> list[Step]:
        events.append(threading.Event())
        return [Hold(events[-1]), *alpha.healthy(request)]

    for chat in CHATS:
        alpha.play(chat.path, script)
    yield events
    alpha.play(CHATS[0].path, None)
    for event in events:
        event.set()


def release(hold: list[threading.Event]) -> None:
    hold[-1].set()


def ask_in_background(gateway: RunningGateway, key: str, done: list[tuple[str, int]], name: str) -> threading.Thread:
    def run() -> None:
        with gateway.http(key, headers={"X-Request-ID": name}) as client:
            done.append((name, ask(client, CHATS[0]).status_code))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def occupy(
    gateway: RunningGateway, key: str, done: list[tuple[str, int]], name: str, hold: list[threading.Event]
) -> threading.Thread:
    """A call that holds the key's slot, at the backend."""
    thread = ask_in_background(gateway, key, done, name)
    until(lambda: len(hold) == 1)
    return thread


def wait_for_queue_of(gateway: RunningGateway, many: int) -> None:
    until(lambda: gateway.components.limits.waiting == many)


def test_waiting_calls_are_admitted_in_the_order_of_arrival(
    start_gateway: StartGateway, alpha: FakeBackend, hold: list[threading.Event]
) -> None:
    one, other = (start_gateway(alpha, MAX_QUEUE_WAIT_S="10") for _ in range(2))
    key = one.key(concurrent=1)
    done: list[tuple[str, int]] = []
    threads = [occupy(one, key, done, "first", hold)]
    for number in range(6):
        gateway = (one, other)[number % 2]
        threads.append(ask_in_background(gateway, key, done, f"waiter {number}".replace(" ", "-")))
        wait_for_queue_of(gateway, number // 2 + 1)
    for number in range(7):
        until(lambda: len(hold) == number + 1)  # noqa: B023
        hold[number].set()
    for thread in threads:
        thread.join()
    assert [status for _, status in done] == [200] * 7
    arrived = [call.header("x-request-id") for call in alpha.calls(CHATS[0].path)]
    assert arrived == ["first", *(f"waiter-{number}" for number in range(6))]
    waited = {row["request_id"]: row["queue_ms"] for row in one.audit_rows()}
    assert waited["first"] < 50 < waited["waiter-5"]


def test_a_call_that_waited_too_long_is_refused(
    start_gateway: StartGateway, alpha: FakeBackend, hold: list[threading.Event]
) -> None:
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="0.5")
    key = gateway.key(concurrent=1)
    done: list[tuple[str, int]] = []
    running = occupy(gateway, key, done, "first", hold)
    began = time.monotonic()
    with gateway.http(key) as client:
        assert ask(client, CHATS[0]).status_code == 429
    assert time.monotonic() - began >= 0.5
    hold[0].set()
    running.join()
    with gateway.http(key) as client:
        threading.Timer(0.2, release, [hold]).start()
        assert ask(client, CHATS[0]).status_code == 200


def test_calls_wait_only_for_the_limit_of_concurrent_calls(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="30")
    with gateway.http(gateway.key(rpm=1)) as client:
        began = time.monotonic()
        assert [ask(client, CHATS[0]).status_code for _ in range(3)] == [200, 429, 429]
        assert time.monotonic() - began < 10


def test_a_client_that_leaves_is_removed_from_the_queue(
    start_gateway: StartGateway, alpha: FakeBackend, hold: list[threading.Event], stores: TestStores
) -> None:
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="30")
    key = gateway.key(concurrent=1)
    done: list[tuple[str, int]] = []
    running = occupy(gateway, key, done, "first", hold)
    impatient = send(gateway, key, CHATS[0])
    wait_for_queue_of(gateway, 1)
    patient = ask_in_background(gateway, key, done, "patient")
    wait_for_queue_of(gateway, 2)
    impatient.close()
    wait_for_queue_of(gateway, 1)
    hold[0].set()
    until(lambda: len(hold) == 2)
    hold[1].set()
    running.join()
    patient.join()
    assert done == [("first", 200), ("patient", 200)]
    assert sorted(row["outcome"] for row in gateway.audit_rows()) == ["answered", "answered", "client_gone"]
    with stores.client() as redis:
        assert list(redis.scan_iter("nz:*:q:*")) == []


def test_the_queue_of_a_key_is_bounded(
    start_gateway: StartGateway, alpha: FakeBackend, hold: list[threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.limits.queue.WAITING_PER_KEY", 3)
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="20")
    key = gateway.key(concurrent=1)
    done: list[tuple[str, int]] = []
    threads = [ask_in_background(gateway, key, done, f"n{number}") for number in range(8)]
    until(lambda: len(done) == 4)
    assert {status for _, status in done} == {429}
    for number in range(4):
        until(lambda: len(hold) == number + 1)  # noqa: B023
        hold[number].set()
    for thread in threads:
        thread.join()
    assert sorted(status for _, status in done) == [200] * 4 + [429] * 4


def test_a_call_that_waits_for_one_model_does_not_delay_other_models(
    start_gateway: StartGateway, alpha: FakeBackend, hold: list[threading.Event]
) -> None:
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="3")
    alpha.healthy.models = [*alpha.healthy.models, "other:latest"]
    gateway.call(gateway.components.discovery.refresh())
    key = gateway.key(name="mine", concurrent=2)
    gateway.call(gateway.key_store().limit("mine", "llama3.2", {"concurrent": 1}))
    done: list[tuple[str, int]] = []
    threads = [occupy(gateway, key, done, "runs", hold)]
    threads.append(ask_in_background(gateway, key, done, "waits"))
    wait_for_queue_of(gateway, 1)
    began = time.monotonic()
    other = threading.Thread(target=lambda: other_model(gateway, key, done))
    other.start()
    until(lambda: len(hold) == 2)
    assert time.monotonic() - began < 1
    hold[1].set()
    other.join()
    until(lambda: ("waits", 429) in done)
    hold[0].set()
    for thread in threads:
        thread.join()
    assert sorted(done) == [("other", 200), ("runs", 200), ("waits", 429)]
    (refused,) = [row for row in gateway.audit_rows() if row["status"] == 429]
    assert 2500 < refused["queue_ms"] < 6000


def other_model(gateway: RunningGateway, key: str, done: list[tuple[str, int]]) -> None:
    with gateway.http(key) as client:
        done.append(("other", ask(client, CHATS[0], model="other").status_code))


def test_a_freed_slot_is_announced_while_a_call_waits(
    start_gateway: StartGateway, alpha: FakeBackend, hold: list[threading.Event], stores: TestStores
) -> None:
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="10")
    key = gateway.key(concurrent=1)
    done: list[tuple[str, int]] = []
    with stores.client() as redis, redis.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(redis_keys.SLOT_FREED)
        threads = [occupy(gateway, key, done, "runs", hold)]
        threads.append(ask_in_background(gateway, key, done, "waits"))
        wait_for_queue_of(gateway, 1)
        hold[0].set()
        until(lambda: len(hold) == 2)
        hold[1].set()
        for thread in threads:
            thread.join()
        messages = [message["data"] for _ in range(20) if (message := channel.get_message(timeout=0.05))]
    assert messages == [redis_keys.queue(key.split("_")[1])]


def test_the_audit_has_a_call_whose_process_died_while_it_waited(
    start_gateway: StartGateway, alpha: FakeBackend, hold: list[threading.Event]
) -> None:
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="30")
    key = gateway.key(concurrent=1, tpm=100_000)
    done: list[tuple[str, int]] = []
    threads = [occupy(gateway, key, done, "runs", hold)]
    threads.append(ask_in_background(gateway, key, done, "waits"))
    wait_for_queue_of(gateway, 1)
    # As if the lease of both calls had ended.
    assert gateway.call(abandoned.settle_expired(gateway.components.limits, -30_000, 10)) == 2
    until(lambda: len(abandoned_rows(gateway)) == 2)
    assert abandoned_rows(gateway) == {"runs": True, "waits": False}
    hold[0].set()
    until(lambda: len(hold) == 2)
    hold[1].set()
    for thread in threads:
        thread.join()


def abandoned_rows(gateway: RunningGateway) -> dict[str, bool]:
    """By request, whether its prompt counts."""

    async def read() -> dict[str, bool]:
        async with gateway.components.database.connection() as connection:
            found = await connection.fetch("SELECT request_id, prompt_tokens FROM audit WHERE outcome = 'abandoned'")
            return {row["request_id"]: row["prompt_tokens"] > 0 for row in found}

    return gateway.call(read())


def test_nothing_is_left_of_calls_that_have_waited(
    start_gateway: StartGateway, alpha: FakeBackend, hold: list[threading.Event], stores: TestStores
) -> None:
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="1")
    key = gateway.key(concurrent=1, day_seconds=100)
    done: list[tuple[str, int]] = []
    threads = [occupy(gateway, key, done, "runs", hold)]
    impatient = send(gateway, key, CHATS[0])
    wait_for_queue_of(gateway, 1)
    impatient.close()
    wait_for_queue_of(gateway, 0)
    threads.append(ask_in_background(gateway, key, done, "too late"))
    until(lambda: done == [("too late", 429)])
    threads.append(ask_in_background(gateway, key, done, "in time"))
    wait_for_queue_of(gateway, 1)
    hold[0].set()
    until(lambda: len(hold) == 2)
    hold[1].set()
    for thread in threads:
        thread.join()
    assert sorted(row["outcome"] for row in gateway.audit_rows()) == [
        "answered",
        "answered",
        "client_gone",
        "refused:rate_limit_exceeded",
    ]
    with stores.client() as redis:
        of_shards = [(redis.hlen(shard.calls), redis.zcard(shard.leases)) for shard in redis_keys.BY_SHARD]
        assert set(of_shards) == {(0, 0)} and not list(redis.scan_iter("nz:*:[qvc]:*"))
        (seconds,) = list(redis.scan_iter("nz:*:s:*"))
        assert int(redis.hget(seconds, "r") or 0) == 0
