"""The slot of a key is free while its call waits for a backend, whatever Redis has lost or missed meanwhile."""

import pytest

from gateway.components import Components
from gateway.dialects.tokens import Need
from gateway.limits.admission import Admission, Settlement, Ticket
from gateway.limits.quota import CounterSet
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
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
