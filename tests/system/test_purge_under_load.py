"""Old rows are purged while requests run, without slowing them noticeably."""

import asyncio
import os
import random
import statistics
import threading
import time
from typing import Self

import asyncpg
import httpx
import pytest

from gateway.audit import hash_chain, retention
from gateway.stores.postgres import Database
from tests.conftest import StartGateway, TestStores
from tests.support.audit_rows import DAY
from tests.support.chat_requests import CHATS
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

# For a large test by hand: PURGED_ROWS=1000000.
ROWS = int(os.environ.get("PURGED_ROWS", "24000"))
ROWS_OF_CHAIN = ROWS // 4
IN_BATCH = 40
# In days, each of a third of the rows: they are purged one after the other, so that other load does not slow all three.
AGES = (500, 450, 400)
FILL = """
WITH made AS (
    SELECT gen_random_uuid() AS id, now() - ($3::int[])[1 + n * 3 / $1] * interval '1 day' + n * interval '20 ms' AS at,
           n / $2 + 1 AS batch, n
    FROM generate_series(0, $1 - 1) AS n)
INSERT INTO audit SELECT id, at, batch, 'r' || n, 'k' || n % 20, '192.0.2.7', 'curl/8', 'openai', 'POST', '/api/chat',
    'llama3.2', 'llama3.2:latest', 'alpha', '[]', 200, 'answered', '', true, 3, 4, 'reported', 100, 200, 0, 12.5, 99.5 FROM made
"""
CHAIN = """
WITH RECURSIVE sums AS (
    SELECT batch, min(at)::date AS day, count(*)::int AS rows,
           string_agg(audit_hash(a), ''::bytea ORDER BY audit_hash(a)) AS hashes
    FROM audit a GROUP BY batch),
chain AS (
    SELECT batch, day, rows, decode(repeat('00', 32), 'hex') AS previous,
           sha256(decode(repeat('00', 32), 'hex') || hashes) AS digest FROM sums WHERE batch = 1
    UNION ALL
    SELECT s.batch, s.day, s.rows, c.digest, sha256(c.digest || s.hashes) FROM chain c JOIN sums s ON s.batch = c.batch + 1)
INSERT INTO audit_batches (id, day, rows, previous, digest)
SELECT batch, day, rows, previous, digest FROM chain
"""


async def fill(url: str, rows: int) -> None:
    connection = await asyncpg.connect(url)
    try:
        for months in range(AGES[0] // 28, 11, -1):
            await connection.execute("SELECT audit_make_partition(now() - $1 * interval '1 month')", months)
        await connection.execute(FILL, rows, IN_BATCH, AGES)
        await connection.execute(CHAIN)
        # One key's rows are kept longer, so that no month can be dropped as a whole.
        await connection.execute("INSERT INTO keys (id, name, audit_retention) VALUES ('k1', 'kept', interval '9999 days')")
        await connection.execute("VACUUM ANALYZE audit")
    finally:
        await connection.close()


class Requests:
    """Sends requests one after the other and measures them."""

    def __init__(self, gateway: RunningGateway) -> None:
        self._gateway, self._key = gateway, gateway.key()
        self.times: list[float] = []
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        with self._gateway.http(self._key) as client:
            while not self._stopping.is_set():
                self._one(client)

    def _one(self, client: httpx.Client) -> None:
        began = time.perf_counter()
        assert client.post(CHATS[0].path, json=CHATS[0].body).status_code == 200
        self.times.append(time.perf_counter() - began)
        time.sleep(0.005 + random.random() * 0.005)

    def p99_of(self, seconds: float) -> float:
        first = len(self.times)
        time.sleep(seconds)
        return p99(self.times[first:])


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


@pytest.mark.long(seconds=12)
@pytest.mark.timeout(900)
def test_a_purge_hardly_slows_requests(start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores) -> None:
    asyncio.run(fill(stores.database_url, ROWS))
    gateway = start_gateway(alpha)

    async def purge(days: int) -> int:
        async with Database(stores.database_url, size=1) as database:
            return (await retention.apply(database, days * DAY)).rows

    went, meanwhile = 0, []
    with Requests(gateway) as requests:
        before = [requests.p99_of(2.0) for _ in range(2)]
        for age in AGES:
            first = len(requests.times)
            went += asyncio.run(purge(age - 10))
            meanwhile.append(p99(requests.times[first:]))
        after = requests.p99_of(2.0)
    print(f"p99 in ms before {in_ms(before)}, meanwhile {in_ms(meanwhile)}, after {in_ms([after])}")
    assert went == ROWS - ROWS // 20
    assert min(meanwhile) < 2 * max(*before, after, 0.01)


def in_ms(times: list[float]) -> list[float]:
    return [round(1000 * seconds, 2) for seconds in times]


def test_the_hash_chain_of_the_remaining_rows_is_intact(stores: TestStores) -> None:
    async def story() -> tuple[int, int]:
        await fill(stores.database_url, ROWS_OF_CHAIN)
        async with Database(stores.database_url, size=1) as database:
            await retention.apply(database, 365 * DAY)
            found = await hash_chain.verify(database, print)
            return found.rows, found.count

    assert asyncio.run(story()) == (ROWS_OF_CHAIN // 20, 0)
