"""What calls cost is shared by all processes, kept over restarts, and written again after Redis has lost it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gateway.components import connections_of
from gateway.dialects.dialect import Usage
from gateway.fleet import cost_store
from gateway.fleet.cost_means import SERVICE
from gateway.fleet.cost_store import CostStore
from gateway.fleet.costs import Costs
from gateway.fleet.observation import Observation
from gateway.settings import Settings
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from tests.conftest import TestStores
from tests.support.gateway_settings import settings_for

NOWHERE = "redis://127.0.0.1:1"


def call(decode_tps: float) -> Observation:
    return Observation(1 + 100 / decode_tps, None, 1000, 100, Usage(1000, 100, 0, None, 1.0, 100 / decode_tps), size=7)


class Process:
    """Shares only when the test says so."""

    def __init__(self, store: CostStore) -> None:
        self.store = store
        self.share = store.share

    @property
    def costs(self) -> Costs:
        return self.store.costs

    def note(self, *rates: float, model: str = "m") -> None:
        for rate in rates:
            self.costs.note("a", model, call(rate))

    def decode_tps(self, model: str = "m") -> float:
        found = self.costs.rates("a", model)
        assert found.is_learned
        return found.decode_tps

    def weight(self, model: str = "m") -> float:
        return next(entry for key, entry in self.costs.entries() if key == ("a", model)).known.weights[SERVICE]


@asynccontextmanager
async def process(settings: Settings) -> AsyncIterator[Process]:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(RedisClient(settings.redis_url))
        connections = await stack.enter_async_context(connections_of(settings, client))
        yield Process(await stack.enter_async_context(CostStore(connections, Costs())))


@pytest.fixture(autouse=True)
def _without_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_store, "EVERY_S", 3600.0)


@pytest.fixture
def run(stores: TestStores) -> Callable[[Callable[..., Awaitable[None]], int], None]:
    """Runs the work with so many processes."""

    def runs(work: Callable[..., Awaitable[None]], count: int) -> None:
        async def go() -> None:
            settings = settings_for(DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)
            async with AsyncExitStack() as stack:
                await work(*[await stack.enter_async_context(process(settings)) for _ in range(count)])

        asyncio.run(go())

    return runs


Run = Callable[[Callable[..., Awaitable[None]], int], None]


def test_what_one_process_observes_the_others_know(run: Run) -> None:
    async def work(one: Process, other: Process) -> None:
        one.note(50.0, 50.0)
        await one.share()
        await other.share()
        assert other.decode_tps() == pytest.approx(50)
        assert [row.size for row in other.costs.learned()] == [7]

    run(work, 2)


def test_processes_that_share_at_the_same_time_lose_nothing(run: Run) -> None:
    async def work(*processes: Process) -> None:
        expected = 0.0
        for _ in range(5):
            for number, one in enumerate(processes):
                one.note(*[50.0] * (number + 1))
                for _ in range(number + 1):
                    expected = expected * 0.5 ** (1 / 20) + 1
            await asyncio.gather(*(one.share() for one in processes))
        await asyncio.gather(*(one.share() for one in processes))
        for one in processes:
            assert one.weight() == pytest.approx(expected)
            assert one.decode_tps() == pytest.approx(50)

    run(work, 4)


def test_what_is_observed_while_it_is_shared_is_kept(run: Run) -> None:
    async def work(one: Process, other: Process) -> None:
        one.note(50.0)
        sharing = asyncio.ensure_future(one.share())
        await asyncio.sleep(0)
        one.note(50.0, model="n")
        one.note(50.0)
        await sharing
        assert one.weight() == pytest.approx(1 + 0.5 ** (1 / 20)) and one.weight("n") == 1
        await one.share()
        await other.share()
        assert other.weight() == pytest.approx(1 + 0.5 ** (1 / 20)) and other.weight("n") == 1

    run(work, 2)


def test_a_restart_keeps_it(run: Run) -> None:
    async def before(one: Process) -> None:
        one.note(50.0)  # is shared when it stops

    async def after(one: Process) -> None:
        assert one.decode_tps() == pytest.approx(50)

    run(before, 1)
    run(after, 1)


def test_after_redis_has_lost_its_data_the_processes_write_theirs_again_once(run: Run, stores: TestStores) -> None:
    async def work(one: Process, other: Process, third: Process) -> None:
        one.note(*[50.0] * 10)
        one.note(20.0, model="n")
        await one.share()
        await other.share()
        weight = other.weight()
        with stores.client() as redis:
            redis.flushall()
        other.note(50.0)
        for each in (other, one, third, other):
            await each.share()
        assert one.weight() == third.weight() == pytest.approx(weight * 0.5 ** (1 / 20) + 1)
        assert third.decode_tps() == pytest.approx(50) and third.decode_tps("n") == pytest.approx(20)
        assert third.weight("n") == 1

    run(work, 3)


def test_what_was_deleted_stays_deleted(run: Run, stores: TestStores) -> None:
    async def work(one: Process, other: Process) -> None:
        one.note(50.0)
        one.note(50.0, model="n")
        await one.share()
        await other.share()
        with stores.client() as redis:
            redis.hdel(redis_keys.COSTS, "a m")
        await one.share()
        await other.share()
        assert [row.model for row in one.costs.learned()] == [row.model for row in other.costs.learned()] == ["n"]

    run(work, 2)


def test_what_is_old_or_too_much_is_deleted(run: Run, stores: TestStores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_store, "MOST_ENTRIES", 3)

    async def work(one: Process) -> None:
        with stores.client() as redis:
            redis.hset(redis_keys.COSTS, "a ancient", "7 1000 0.0 1.0")
            for number in range(5):
                one.note(50.0, model=f"m{number}")
            await one.share()
            assert {field for field in redis.hkeys(redis_keys.COSTS) if field != b"epoch"} == {b"a m2", b"a m3", b"a m4"}

    run(work, 1)


@pytest.mark.parametrize("text", ["", "x y", "1", "nan nan", "5 5 1e400 7", "[]", "0 0 " + "7 " * 100])
def test_redis_may_hold_anything(run: Run, stores: TestStores, text: str) -> None:
    async def work(one: Process, other: Process) -> None:
        with stores.client() as redis:
            redis.hset(redis_keys.COSTS, mapping={"a m": text, "a x": text, "nonsense": text, b"\xff \xfe": text})
        await other.share()
        assert all(row.decode_tps is None or row.decode_tps > 0 for row in other.costs.learned())
        one.note(50.0)
        await one.share()
        await one.share()
        assert one.costs.rates("a", "m").decode_tps > 0

    run(work, 2)


def test_without_redis_a_process_uses_its_own_and_adds_it_later(run: Run) -> None:
    async def work(one: Process) -> None:
        async with process(settings_for(REDIS_URL=NOWHERE)) as alone:
            alone.note(50.0, 50.0)
            with pytest.raises(RedisUnavailable):
                await alone.share()
            assert alone.decode_tps() == pytest.approx(50)
            alone.note(50.0)
            alone.store._connections = one.store._connections
            await alone.share()
        await one.share()
        assert one.weight() == pytest.approx(1 + 0.5 ** (1 / 20) + 0.5 ** (2 / 20))

    run(work, 1)


def test_a_command_can_read_it(run: Run, stores: TestStores) -> None:
    async def work(one: Process) -> None:
        one.note(50.0)
        await one.share()
        async with RedisClient(stores.redis_url) as client:
            found: Any = (await cost_store.read(client)).learned()
        assert found == one.costs.learned() and found[0].decode_tps == pytest.approx(50)
        assert one.costs.rates("a", "m").origins[2] == "learned"

    run(work, 1)
