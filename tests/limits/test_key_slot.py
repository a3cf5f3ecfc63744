"""The slot of a key is free while its call waits for a backend, whatever Redis has lost or missed meanwhile."""

from typing import Any

import pytest

from gateway.components import Components
from gateway.dialects.tokens import Need
from gateway.limits.admission import Admission, Settlement, Ticket
from gateway.limits.fallback import Share
from gateway.limits.quota import CounterSet
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisUnavailable
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

KEY = CounterSet("k", -1, 1000, 1, -1, -1)


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)


def ticket(name: str) -> Ticket:
    return Ticket(name, (KEY,), "m", Need(10, 10), b"info")


def connection(components: Components) -> object:
    return components.limits._connections.for_shard(redis_keys.shard_of(KEY.name))


async def slots_and_reserved(components: Components) -> tuple[int, int]:
    _, (usage,) = await components.limits.preview(ticket("another"))
    return usage.concurrent, usage.tpm


async def settle(components: Components, admission: Admission) -> None:
    await components.limits.settle(Settlement(admission, 0, -1, b"", id=admission.id, key_id=KEY.name))


def test_others_may_have_the_slot_of_a_call_that_waits(gateway: RunningGateway) -> None:
    components = gateway.components

    async def test() -> None:
        one = await components.limits.admit(ticket("one"))
        slot = components.limits.key_slot(one)
        slot.give_up()
        assert await slots_and_reserved(components) == (0, 20), "what it has reserved stays"
        other = await components.limits.admit(ticket("other"))
        assert not await slot.take_again()
        await components.limits.leases.renew()
        assert await slots_and_reserved(components) == (1, 40)
        await settle(components, other)
        assert await slot.take_again()
        await components.limits.leases.renew()
        assert await slots_and_reserved(components) == (1, 20)
        await settle(components, one)
        assert await slots_and_reserved(components) == (0, 0)

    gateway.call(test())


def test_a_call_that_waits_gets_no_slot_because_redis_has_lost_it(gateway: RunningGateway, stores: TestStores) -> None:
    components = gateway.components

    async def test() -> None:
        one = await components.limits.admit(ticket("one"))
        slot = components.limits.key_slot(one)
        slot.give_up()
        with stores.client() as client:
            client.flushall()
        await components.limits.leases.renew()
        assert (await slots_and_reserved(components))[0] == 0
        assert await slot.take_again()
        assert (await slots_and_reserved(components))[0] == 1
        await settle(components, one)

    gateway.call(test())


def test_a_slot_that_was_taken_again_without_redis_is_counted_when_redis_is_back(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = gateway.components

    async def test() -> None:
        one = await components.limits.admit(ticket("one"))
        slot = components.limits.key_slot(one)
        slot.give_up()
        assert (await slots_and_reserved(components))[0] == 0
        monkeypatch.setattr(connection(components), "_takes_writes", False)
        assert await slot.take_again()
        monkeypatch.undo()
        await components.limits.leases.renew()
        assert (await slots_and_reserved(components))[0] == 1
        await settle(components, one)
        assert (await slots_and_reserved(components))[0] == 0

    gateway.call(test())


def test_a_call_that_redis_has_admitted_unheard_is_admitted_when_it_asks_again(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="2")
    components, limits = gateway.components, gateway.components.limits
    reply, lost = limits._reply, list[str]()

    async def lost_once(ticket: Ticket, may_wait: bool, lease_ms: int) -> list[Any]:
        found = await reply(ticket, may_wait, lease_ms)
        if not lost:
            lost.append(ticket.id)
            raise RedisUnavailable
        return found

    async def test() -> None:
        monkeypatch.setattr(limits, "share", lambda: Share(1, 2))
        monkeypatch.setattr(limits, "_reply", lost_once)
        one = await limits.admit(ticket("one"))
        assert (one.how, one.reserved) == ("admitted", 20)
        assert await slots_and_reserved(components) == (1, 20)
        await settle(components, one)
        assert await slots_and_reserved(components) == (0, 0)

    gateway.call(test())


def test_a_call_that_is_refused_in_the_end_holds_nothing_that_redis_gave_it_unheard(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Redis is frozen it still runs what it has received."""
    gateway = start_gateway(alpha, MAX_QUEUE_WAIT_S="0.6")
    limits, key = gateway.components.limits, gateway.key(concurrent=1, tpm=1000)
    reply = limits._reply

    async def lost(ticket: Ticket, may_wait: bool, lease_ms: int) -> list[Any]:
        await reply(ticket, may_wait, lease_ms)
        raise RedisUnavailable

    monkeypatch.setattr(limits, "share", lambda: Share(1, 2))
    monkeypatch.setattr(limits, "_reply", lost)
    with gateway.http(key) as client:
        assert client.post(CHATS[0].path, json=CHATS[0].body).status_code == 429
    gateway.audit_rows()
    with stores.client() as redis:
        assert not [name for kind in "cv" for name in redis.scan_iter(f"nz:*:{kind}:*")]
