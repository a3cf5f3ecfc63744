"""Each process publishes itself in Redis once a second, and shares the limits with the processes that are active."""

import time
from typing import Any

import pytest

from gateway.limits.fallback import Share
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

FIRST_ID = "0" * 32


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)


def published(redis: Any) -> tuple[set[bytes], set[bytes]]:
    return set(redis.zrange(redis_keys.PROCESSES, 0, -1)), set(redis.hkeys(redis_keys.PROCESS_STATES))


def test_a_process_is_published_under_both_redis_keys(gateway: RunningGateway, stores: TestStores) -> None:
    with stores.client() as redis:
        until(lambda: [len(names) for names in published(redis)] == [1, 1], 5)
        active, described = published(redis)
    assert active == described
    assert gateway.components.limits.share() == Share(0, 1)


def test_a_process_that_publishes_no_state_is_counted_until_it_expires(gateway: RunningGateway, stores: TestStores) -> None:
    """As one of an earlier version, which beats every 8 seconds and publishes its state apart."""
    limits = gateway.components.limits
    with stores.client() as redis:
        redis.zadd(redis_keys.PROCESSES, {FIRST_ID: (time.time() + 3) * 1000})
        until(lambda: limits.share() == Share(1, 2), 3)
        until(lambda: limits.share() == Share(0, 1), 10)


def test_a_process_that_stops_leaves_at_once(
    gateway: RunningGateway, start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    limits = gateway.components.limits
    other = start_gateway(alpha)
    until(lambda: limits.share().of == 2 and other.components.limits.share().of == 2, 5)
    assert {limits.share().rank, other.components.limits.share().rank} == {0, 1}
    other.stop()
    with stores.client() as redis:
        until(lambda: [len(names) for names in published(redis)] == [1, 1], 2)
    until(lambda: limits.share() == Share(0, 1), 3)
