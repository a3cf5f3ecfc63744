"""Two installations with two workers each share one Redis or cluster and one PostgreSQL: limits are exact over all four."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import pytest

from gateway.auth.key_store import KeyStore, NewKey
from gateway.components import database_of, hasher_of
from gateway.limits.quota import Quota
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from tests.conftest import TestStores
from tests.support.chat_requests import CHATS
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import environment_for, settings_for
from tests.support.processes import descendants, serving
from tests.support.redis_cluster import redis_cluster, url_of
from tests.support.running_gateway import waiting_rows

ROUNDS = int(os.environ.get("BURST_ROUNDS", "3"))
CLIENTS = 100
LONGEST_S = 180.0
# The longest Retry-After that is a guess.
LONGEST_GUESS_S = 2.0


@pytest.fixture(scope="module")
def backend() -> Iterator[FakeBackend]:
    with FakeBackend(models=["llama3.2:latest"], name="alpha", pieces=3, pause_s=0.01) as fake:
        yield fake


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as ports:
        yield url_of(ports)


@pytest.fixture(scope="module")
def redis_url(request: pytest.FixtureRequest, shared_stores: TestStores) -> str:
    found: str = request.getfixturevalue("cluster") if getattr(request, "param", "") == "cluster" else shared_stores.redis_url
    return found


@pytest.fixture(scope="module")
def addresses(
    tmp_path_factory: pytest.TempPathFactory, shared_stores: TestStores, redis_url: str, backend: FakeBackend
) -> Iterator[list[str]]:
    names = environment_for(backend, DATABASE_URL=shared_stores.database_url, REDIS_URL=redis_url, GATEWAY_WORKERS="2")
    # If Redis seems to be away on a busy machine, processes must refuse instead of enforcing their shares.
    names["LIMITS_WITHOUT_REDIS"] = "closed"
    with ExitStack() as stack:
        found = []
        for place in ("one", "two"):
            folder = tmp_path_factory.mktemp(place)
            process, url, _ = stack.enter_context(serving(folder, names))
            assert len(descendants(process.pid)) == 2
            found.append(url)
        yield found


class Operator:
    def __init__(self, stores: TestStores, redis_url: str) -> None:
        self.settings = settings_for(DATABASE_URL=stores.database_url, REDIS_URL=redis_url)
        # The installations with a server and with a cluster share one PostgreSQL.
        self._suffix = f" by {urlsplit(redis_url).scheme}"
        self.key_ids: list[str] = []

    def key(self, name: str, **limits: int) -> str:
        async def make() -> str:
            async with database_of(self.settings) as database:
                key_store = KeyStore(database, hasher_of(self.settings), None)
                return (await key_store.make(NewKey(name + self._suffix, quota=Quota(**limits))))[1]

        found = asyncio.run(make())
        self.key_ids.append(found.split("_")[1])
        return found

    def limit(self, name: str, pattern: str, **limits: int) -> None:
        async def set_limits() -> None:
            async with database_of(self.settings) as database, RedisClient(self.settings.redis_url) as store:
                await KeyStore(database, hasher_of(self.settings), store).limit(name + self._suffix, pattern, limits)

        asyncio.run(set_limits())


@pytest.fixture
def operator(shared_stores: TestStores, redis_url: str) -> Operator:
    return Operator(shared_stores, redis_url)


async def burst(addresses: list[str], key: str, each: int = 4) -> Counter[int]:
    """All clients at once; each sends several requests on its own connections to both installations."""
    statuses: Counter[int] = Counter()
    headers = {"Authorization": f"Bearer {key}"}

    async def client(number: int) -> None:
        async with aiohttp.ClientSession(headers=headers) as session:
            for n in range(each):
                chat = CHATS[(number + n) % 4]
                body = {**chat.body, "max_tokens": 5, "options": {"num_predict": 5}}
                async with session.post(addresses[(number + n) % 2] + chat.path, json=body) as found:
                    await found.read()
                    statuses[found.status] += 1

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return statuses


def most_at_once(backend: FakeBackend, since: float) -> int:
    calls = [call for call in backend.requests if call.method == "POST" and call.started >= since]
    edges = [(call.started, 1) for call in calls] + [(call.last_step, -1) for call in calls]
    running = most = 0
    for _, step in sorted(edges):
        running += step
        most = max(most, running)
    return most


@pytest.mark.parametrize("redis_url", ["server", "cluster"], indirect=True)
@pytest.mark.parametrize("kind", ["of the key", "of a model"])
def test_requests_per_minute_and_at_once_are_exact(
    addresses: list[str], operator: Operator, backend: FakeBackend, kind: str
) -> None:
    answered = 0
    for number in range(ROUNDS):
        name, since = f"{kind} {number}", time.monotonic()
        limits = {"rpm": 50, "concurrent": 5}
        key = operator.key(name, **(limits if kind == "of the key" else {}))
        if kind == "of a model":
            operator.limit(name, "llama*", **limits)
        statuses: Counter[int] = Counter()
        while statuses[200] + statuses[503] < 50 and time.monotonic() - since < 20:
            statuses += asyncio.run(burst(addresses, key))
        statuses += asyncio.run(burst(addresses, key))
        assert 50 - statuses[503] <= statuses[200] <= 50 and set(statuses) <= {200, 429, 503}
        answered += statuses[200]
        assert backend.wait_idle() and most_at_once(backend, since) <= 5
    rows = wait_for_rows(operator)
    assert rows.pop("answered") == answered and rows.pop("refused:rate_limit_exceeded") > 0
    assert set(rows) <= {"refused:limits_unavailable"}


@pytest.mark.parametrize("redis_url", ["server", "cluster"], indirect=True)
def test_a_daily_budget_is_exact(addresses: list[str], operator: Operator, backend: FakeBackend) -> None:
    for number in range(ROUNDS):
        name = f"budget {number}"
        key = operator.key(name, day=300)
        while (statuses := asyncio.run(burst(addresses, key, 1)))[200] or statuses[503]:
            pass
    spent = wait_for_spent(operator)
    assert len(spent) == ROUNDS and all(300 - 20 < tokens <= 300 for tokens in spent)


@pytest.mark.long(seconds=75)
@pytest.mark.parametrize("redis_url", ["server"], indirect=True)
def test_no_minute_exceeds_the_limit_and_retry_after_is_exact(
    addresses: list[str], operator: Operator, backend: FakeBackend
) -> None:
    """Requests for more than a minute: the limit holds within any 60 seconds. Another key waits as Retry-After says."""
    key, since, lost = operator.key("steady", rpm=50), time.monotonic(), 0
    with ThreadPoolExecutor(1) as beside:
        waited = beside.submit(ask_after_retry_after, addresses[1], operator.key("patient", tpm=400))
        while len(starts(backend, since)) + lost < 100:
            assert time.monotonic() < since + LONGEST_S
            lost += asyncio.run(burst(addresses, key, 1))[503]
            # Continuously, but more often when the minute ends.
            time.sleep(1 if len(starts(backend, since)) > 50 or time.monotonic() > since + 55 else 5)
        asyncio.run(burst(addresses, key, 1))
    waited.result()
    began = starts(backend, since)
    assert 100 - lost <= len(began) <= 100
    assert all(later - earlier > 60 for earlier, later in zip(began, began[50:], strict=False))


def starts(backend: FakeBackend, since: float) -> list[float]:
    calls = backend.calls(CHATS[0].path) + backend.calls(CHATS[2].path)
    return sorted(call.started for call in calls if call.started >= since)


def ask_after_retry_after(address: str, key: str) -> None:
    """Before the time in Retry-After requests are refused, afterwards they pass; on a path that no other test counts."""
    with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
        sent, wait = time.monotonic(), retry_after(client)
        while wait <= LONGEST_GUESS_S:
            time.sleep(wait)
            sent, wait = time.monotonic(), retry_after(client)
        received, deadline = time.monotonic(), time.monotonic() + LONGEST_S
        assert wait < 60
        time.sleep(max(0.0, wait - 2))
        while rest := retry_after(client):
            # Retry-After is always below a minute; a longer wait is given in two parts.
            assert rest <= max(LONGEST_GUESS_S, received + wait - time.monotonic() + 1) and time.monotonic() < deadline
            time.sleep(min(rest, 0.5))
        assert time.monotonic() >= sent + wait


def retry_after(client: httpx.Client) -> float:
    """Seconds to wait; 0 if the request passes. Without Redis this is a guess."""
    body = {"model": "llama3.2", "prompt": "Say hi", "stream": False, "options": {"num_predict": 300}}
    found = client.post("/api/generate", json=body)
    assert found.status_code in (200, 429, 503)
    return 0.0 if found.status_code == 200 else float(found.headers["retry-after-ms"]) / 1000


async def _rows(operator: Operator, query: str) -> list[Any]:
    async with database_of(operator.settings) as database, database.connection() as connection:
        return list(await connection.fetch(query, operator.key_ids))


def settled(operator: Operator) -> None:
    async def wait() -> None:
        async with RedisClient(operator.settings.redis_url) as store:
            for _ in range(300):
                with suppress(RedisUnavailable):
                    if not await waiting_rows(store):
                        return
                await asyncio.sleep(0.05)
        raise AssertionError("the audit was not written")

    asyncio.run(wait())


def wait_for_rows(operator: Operator) -> dict[str, int]:
    settled(operator)
    query = "SELECT outcome, count(*) FROM audit WHERE key_id = ANY($1) GROUP BY 1"
    return {row[0]: row[1] for row in asyncio.run(_rows(operator, query))}


def wait_for_spent(operator: Operator) -> list[int]:
    settled(operator)
    query = "SELECT sum(prompt_tokens + completion_tokens)::bigint FROM audit WHERE key_id = ANY($1) GROUP BY key_id"
    return [row[0] for row in asyncio.run(_rows(operator, query))]
