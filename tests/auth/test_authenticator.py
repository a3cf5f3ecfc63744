"""The keys of requests: cached, checked and counted; without PostgreSQL, without Redis, and under floods of wrong keys."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import asyncpg
import httpx
import pytest
from argon2 import PasswordHasher

from gateway.auth import key_format, verifier
from gateway.auth.authenticator import Authenticator
from gateway.ops.local import stores as local_stores
from tests.auth.key_requests import ask, forged, status
from tests.conftest import StartGateway, TestStores
from tests.support.audit_rows import sql
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import settings_for
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway


def test_a_key_is_accepted_in_each_place(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key, other = gateway.key(), gateway.key()
    with gateway.http() as client:
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-Api-Key": key}, {"Api-Key": key}):
            assert client.get("/api/tags", headers=headers).status_code == 200
        assert client.get("/api/tags", auth=("anybody", key)).status_code == 200
        assert client.get(f"/k/{key}/api/tags").status_code == 200
        assert client.get(f"/k/{key}/api/tags", headers={"x-api-key": other}).status_code == 400
        assert client.get("/api/tags", headers={"Authorization": f"Bearer {key}", "api-key": other}).status_code == 400
        assert client.get("/api/tags", headers={"Authorization": "Bearer"}).status_code == 401
        assert client.get("/api/tags").status_code == 401
        twice = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {other}")]
        assert client.get("/api/tags", headers=twice).json() == {"error": "The request carries two different keys; send one."}


def test_a_placeholder_counts_as_a_failure_only_if_there_is_no_key(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="3")
    key = gateway.key()
    with gateway.http("ollama") as client:
        assert [client.get(f"/k/{key}/v1/models").status_code for _ in range(6)] == [200] * 6
        rejected = client.get("/v1/models")
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (401, "invalid_api_key")
        assert rejected.headers["x-should-retry"] == "false", "Claude Code would try for minutes"
        assert client.get("/k/ollama/v1/models", headers={"x-api-key": "dummy"}).status_code == 401
        assert [client.get("/v1/models").status_code for _ in range(2)] == [401, 429]


@contextmanager
def database_queries(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ids of the secrets that were read from the database."""
    asked: list[str] = []
    real = gateway.components.database.row

    async def row(query: str, *values: object) -> asyncpg.Record | None:
        asked.append(str(values[0]))
        return await real(query, *values)

    with monkeypatch.context() as patch:
        patch.setattr(gateway.components.database, "row", row)
        yield asked


def test_a_wrong_key_costs_one_database_query_and_a_malformed_one_none(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = start_gateway(alpha), start_gateway(alpha)
    unknown, wrong = forged("abcdefgh"), forged(one.key().split("_")[1])
    with database_queries(one, monkeypatch) as asked, database_queries(two, monkeypatch) as asked_by_two:
        for key in (unknown, wrong, "garbage", unknown[:-1] + "!", "nz_a_b", "sk-1234"):
            assert {status(one, key) for _ in range(5)} == {401}
        assert asked == [unknown.split("_")[1], wrong.split("_")[1]]
        assert {status(two, key) for key in (unknown, wrong)} == {401}
        assert asked_by_two == [], "what one gateway found out, the others know"


def test_a_valid_key_costs_one_database_query(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = start_gateway(alpha), start_gateway(alpha)
    key = one.key()
    with database_queries(one, monkeypatch) as asked, database_queries(two, monkeypatch) as asked_by_two:
        assert {status(gateway, key) for gateway in (one, two) for _ in range(5)} == {200}
    assert (len(asked), asked_by_two) == (1, [])


@pytest.mark.parametrize("key_of", [lambda _: "garbage", forged], ids=["garbage", "of a right form"])
def test_failures_are_limited_before_any_work(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch, key_of: Callable[[str], str]
) -> None:
    gateway = start_gateway(alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="3", GATEWAY_TRUSTED_PROXIES="127.0.0.1")
    good, new = gateway.key(), gateway.key()
    assert status(gateway, good) == 200
    assert [status(gateway, key_of("abcdefgh")) for _ in range(3)] == [401] * 3
    with database_queries(gateway, monkeypatch) as asked:
        refused = ask(gateway, key_of("abcdefgh"))
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        assert status(gateway, new) == 429, "a key not seen before costs argon2"
    assert asked == []
    assert status(gateway, good) == 200, "a key already known goes on"
    elsewhere = {"Authorization": f"Bearer {new}", "X-Forwarded-For": "192.0.2.7"}
    assert httpx.get(f"{gateway.url}/api/tags", headers=elsewhere).status_code == 200


def test_all_processes_count_failures_together(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    one, two = (start_gateway(alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="3") for _ in range(2))
    assert [status(gateway, "garbage") for gateway in (one, two, one)] == [401] * 3
    assert [status(gateway, "garbage") for gateway in (two, two)] == [401, 429]


def test_requests_without_a_key_are_not_counted_as_failures(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="2")
    assert [status(gateway, "") for _ in range(6)] == [401] * 6


def test_an_unknown_id_takes_as_long_as_a_wrong_secret(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, ARGON2_MEMORY_COST_KIB="16384", ARGON2_TIME_COST="2")
    known = gateway.key().split("_")[1]
    took: dict[str, list[float]] = {known: [], "unknown": []}
    with gateway.http() as client:
        for _ in range(15):
            for name, times in took.items():
                key = forged(known if name == known else key_format.mint().secret_id)
                began = time.perf_counter()
                assert client.get("/api/tags", headers={"x-api-key": key}).status_code == 401
                times.append(time.perf_counter() - began)
    # Other work on the machine only ever adds: the fastest of each are the ones to compare.
    wrong, unknown = (min(times) for times in took.values())
    assert min(wrong, unknown) > 0.008, "argon2 has not run"
    assert 0.6 < unknown / wrong < 1.7


def test_every_wrong_key_gets_the_same_answer(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    revoked, expired = gateway.key(name="gone"), gateway.key(lifetime=timedelta())
    gateway.call(gateway.key_store().revoke("gone"))
    keys = [forged(revoked.split("_")[1]), forged("abcdefgh"), "garbage", revoked, expired]
    answers = [ask(gateway, key) for key in keys]
    assert {answer.status_code for answer in answers} == {401} and len({answer.content for answer in answers}) == 1


@contextmanager
def database_closed(stores: TestStores, servers: local_stores.Stores) -> Iterator[None]:
    """The test's database refuses connections and ends those that are open."""
    name = stores.database_url.rpartition("/test_")[2].partition("?")[0]
    database = f"test_{name}"
    out = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    sql(servers.database_url, f"ALTER DATABASE {database} ALLOW_CONNECTIONS false", out)
    try:
        yield
    finally:
        sql(servers.database_url, f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")


def test_without_postgresql_cached_keys_work_and_others_get_503(
    start_gateway: StartGateway, stores: TestStores, servers: local_stores.Stores, alpha: FakeBackend
) -> None:
    gateway = start_gateway(alpha, REDIS_KEY_CACHE_TTL_S="1")
    known, unknown = gateway.key(), gateway.key()
    assert status(gateway, known) == 200
    assert httpx.get(f"{gateway.url}/readyz").json()["database"] == "ok"
    with database_closed(stores, servers):
        time.sleep(1.2)  # Longer than the cache (and than readyz remembers), so that the database is asked again.
        assert [status(gateway, known) for _ in range(3)] == [200] * 3
        for key in (unknown, forged("abcdefgh")):
            assert status(gateway, key) == 503
        assert status(gateway, "garbage") == 401
        with gateway.http() as client:
            assert client.get("/readyz").json()["database"] == "degraded"
    until(lambda: status(gateway, unknown) == 200, 5)
    assert status(gateway, known) == 200


def test_without_postgresql_the_answer_has_retry_after(
    start_gateway: StartGateway, stores: TestStores, servers: local_stores.Stores, alpha: FakeBackend
) -> None:
    gateway = start_gateway(alpha)
    with database_closed(stores, servers):
        assert int(ask(gateway, forged("abcdefgh")).headers.get("Retry-After", 0)) >= 1


@pytest.fixture
def without_redis(stores: TestStores, alpha: FakeBackend) -> Iterator[RunningGateway]:
    names = {"REDIS_URL": "unix:///nowhere/redis.sock", "REDIS_KEY_CACHE_TTL_S": "1"}
    with RunningGateway(settings_for(alpha, DATABASE_URL=stores.database_url, **names)) as gateway:
        yield gateway


def test_without_redis_keys_work_and_a_revoked_one_stops_after_the_cache_time(without_redis: RunningGateway) -> None:
    key, other = without_redis.key(name="mine"), without_redis.key()
    assert [status(without_redis, each) for each in (key, other, key, "garbage")] == [200, 200, 200, 401]
    _, at_once = without_redis.call(without_redis.key_store().revoke("mine"))
    revoked = time.monotonic()
    assert not at_once
    until(lambda: status(without_redis, key) == 401, 2)
    assert time.monotonic() - revoked < 1.5
    assert status(without_redis, other) == 200


def test_without_redis_a_rotated_key_stops_after_the_cache_time(without_redis: RunningGateway) -> None:
    old = without_redis.key(name="mine")
    assert status(without_redis, old) == 200
    _, new = without_redis.call(without_redis.key_store().rotate("mine", timedelta()))
    assert status(without_redis, new) == 200
    until(lambda: status(without_redis, old) == 401, 2)


def test_without_redis_failures_are_limited(stores: TestStores, alpha: FakeBackend) -> None:
    names = {"REDIS_URL": "unix:///nowhere/redis.sock", "AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN": "2"}
    with RunningGateway(settings_for(alpha, DATABASE_URL=stores.database_url, **names)) as gateway:
        assert [status(gateway, "garbage") for _ in range(3)] == [401, 401, 429]


def authenticator_of(gateway: RunningGateway) -> Authenticator:
    owners = [getattr(kept._work, "__self__", None) for kept in gateway.components.background()]
    [found] = [owner for owner in owners if isinstance(owner, Authenticator)]
    return found


@pytest.mark.parametrize("forge", ["unknown ids", "one id that exists"])
def test_wrong_keys_from_many_addresses_do_not_delay_valid_keys(
    start_gateway: StartGateway, alpha: FakeBackend, forge: str
) -> None:
    """A valid key that is not in the cache is among the next to be verified, however many wrong keys are queued."""
    gateway = start_gateway(alpha)
    authenticator = authenticator_of(gateway)
    attacked = gateway.key().split("_")[1]
    good = [gateway.key() for _ in range(4)]
    hasher = use_gated_hasher(authenticator)

    async def run() -> tuple[list[int], Counter[str]]:
        wrong = [forged(key_format.mint().secret_id if forge == "unknown ids" else attacked) for _ in range(200)]
        flood = [asyncio.create_task(authenticator.key_for(key, f"192.0.2.{number}")) for number, key in enumerate(wrong)]
        under_way = authenticator._verifier._in_progress
        await wait_until(lambda: hasher.runs and sum(task.done() for task in flood) > 150)
        coming = [asyncio.create_task(authenticator.key_for(key, "127.0.0.1")) for key in good]
        await wait_until(lambda: all(f"id {key.split('_')[1]}" in under_way for key in good))
        before = len(hasher.runs)
        hasher.gate.set()
        await asyncio.gather(*coming)
        ends = await asyncio.gather(*flood, return_exceptions=True)
        return [hasher.runs.index(key) - before for key in good], Counter(type(end).__name__ for end in ends)

    turns, ends = gateway.call(run())
    assert max(turns) < 2 * len(good)
    assert set(ends) == {"WrongKey", "Overloaded"}


class GatedHasher:
    """argon2 whose runs are counted, and wait until the gate is open."""

    def __init__(self, hasher: PasswordHasher) -> None:
        self._hasher, self.gate = hasher, threading.Event()
        self.runs: list[str] = []

    def verify(self, stored: str, whole: str) -> bool:
        self.runs.append(whole)
        assert self.gate.wait(30)
        return self._hasher.verify(stored, whole)


def use_gated_hasher(authenticator: Authenticator) -> GatedHasher:
    verifier = authenticator._verifier
    hasher = verifier._hasher = GatedHasher(verifier._hasher)  # type: ignore[assignment]
    return hasher


async def wait_until(done: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not done():  # noqa: ASYNC110 what is waited for sets no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("exists", [True, False], ids=["an id that exists", "an unknown id"])
def test_one_address_does_not_lock_out_the_holder_of_a_key(
    start_gateway: StartGateway, alpha: FakeBackend, exists: bool
) -> None:
    """It may try one key at a time per id, whether the id exists or not; all attempts count as wrong."""
    gateway = start_gateway(alpha)
    key, authenticator = gateway.key(), authenticator_of(gateway)
    attacked = key.split("_")[1] if exists else "abcdefgh"
    hasher = use_gated_hasher(authenticator)

    async def run() -> tuple[str, Counter[str]]:
        wrong = [authenticator.key_for(forged(attacked), f"2001:db8:0:{number:x}::1") for number in range(40)]
        flood = [asyncio.create_task(one) for one in wrong]
        await wait_until(lambda: hasher.runs and sum(task.done() for task in flood) >= 24)
        holder = asyncio.create_task(authenticator.key_for(key, "192.0.2.1"))
        await wait_until(lambda: holder.done() or authenticator._uncached == 2)
        hasher.gate.set()
        ends = await asyncio.gather(*flood, return_exceptions=True)
        return (await holder).id, Counter(type(end).__name__ for end in ends)

    key_id, ends = gateway.call(run())
    assert key_id and ends == {"WrongKey": 1, "Overloaded": 39}
    assert len(hasher.runs) == 2
    assert authenticator._failures._counts["2001:db8::"][0] == 40
    assert authenticator._attempts == set()


@pytest.mark.parametrize("flooded", [2, 12])
def test_a_flood_of_some_ids_does_not_lock_out_other_ids(start_gateway: StartGateway, alpha: FakeBackend, flooded: int) -> None:
    """Wrong keys with known ids, each from an address of its own: a key with another id waits for at most one of each id."""
    gateway = start_gateway(alpha)
    attacked, holders = ([gateway.key() for _ in range(count)] for count in (flooded, 3))
    authenticator = authenticator_of(gateway)
    hasher = use_gated_hasher(authenticator)

    async def run() -> Counter[str]:
        ids = [key.split("_")[1] for key in attacked for _ in range(verifier.MOST_OF_ONE_ID + 8)]
        wrong = [authenticator.key_for(forged(one), f"2001:db8:{number:x}::1") for number, one in enumerate(ids)]
        flood = [asyncio.create_task(one) for one in wrong]
        # All that are not turned away wait: two of them in the threads.
        left = min(flooded * verifier.MOST_OF_ONE_ID, verifier.MOST_QUEUED + flooded)
        await wait_until(lambda: len(hasher.runs) == 2 and sum(task.done() for task in flood) == len(flood) - left)
        coming = [asyncio.create_task(authenticator.key_for(key, "192.0.2.1")) for key in holders]
        lanes = [f"id {key.split('_')[1]}" for key in holders]
        under_way = authenticator._verifier._in_progress
        await wait_until(lambda: all(lane in under_way for lane in lanes) or any(task.done() for task in coming))
        hasher.gate.set()
        assert len({found.id for found in await asyncio.gather(*coming)}) == len(holders)
        ends = await asyncio.gather(*flood, return_exceptions=True)
        return Counter(type(end).__name__ for end in ends)

    assert set(gateway.call(run())) == {"WrongKey", "Overloaded"}
    assert max(hasher.runs.index(key) for key in holders) < flooded + len(holders)


def test_a_valid_key_on_many_connections_at_once_is_verified_once(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key, authenticator = gateway.key(), authenticator_of(gateway)
    hasher = use_gated_hasher(authenticator)

    async def run() -> set[str]:
        asked = [asyncio.create_task(authenticator.key_for(key, "192.0.2.1")) for _ in range(40)]
        await wait_until(lambda: hasher.runs)
        asked += [asyncio.create_task(authenticator.key_for(key, "192.0.2.1")) for _ in range(40)]
        hasher.gate.set()
        return {found.id for found in await asyncio.gather(*asked)}

    assert len(gateway.call(run())) == 1
    assert (hasher.runs, authenticator._failures._counts) == ([key], {})


def test_a_changed_key_is_not_verified_again_and_needs_the_database(
    start_gateway: StartGateway, stores: TestStores, servers: local_stores.Stores, alpha: FakeBackend
) -> None:
    gateway = start_gateway(alpha)
    key, authenticator = gateway.key(name="mine"), authenticator_of(gateway)
    hasher = use_gated_hasher(authenticator)
    hasher.gate.set()
    assert status(gateway, key) == 200

    def change(rpm: int) -> None:
        before = authenticator._generation
        gateway.call(gateway.key_store().limit("mine", "", {"rpm": rpm}))
        until(lambda: authenticator._generation > before, 5)

    change(7)
    assert ask(gateway, key).headers["x-ratelimit-limit-requests"] == "7"
    change(8)
    with database_closed(stores, servers):
        assert status(gateway, key) == 503, "it may have been revoked"
    until(lambda: ask(gateway, key).headers.get("x-ratelimit-limit-requests") == "8", 5)
    assert hasher.runs == [key]
