"""Workers are killed, stores restarted, frozen and stopped, under load: every answer has its row, limits hold by shares."""

import asyncio
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import redis

from gateway.auth import key_format
from gateway.auth.key_store import KeyStore, NewKey
from gateway.components import database_of, hasher_of
from gateway.limits.fallback import Share
from gateway.limits.quota import Quota
from gateway.stores import redis_keys
from tests.support.chat_requests import CHATS
from tests.support.durable_stores import DurableStores, durable_stores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import environment_for, settings_for
from tests.support.processes import descendants, serving, until
from tests.support.random_clients import RandomClients
from tests.support.running_gateway import RunningGateway

# For longer runs: OUTAGE_S=60 FREEZE_S=30 DRAINS=20.
OUTAGE_S = float(os.environ.get("OUTAGE_S", "5"))
FREEZE_S = float(os.environ.get("FREEZE_S", "5"))
DRAINS = int(os.environ.get("DRAINS", "5"))
LEASE_ENDS_S = 45.0


@pytest.fixture(scope="module")
def shared() -> Iterator[DurableStores]:
    with durable_stores() as found:
        yield found


@pytest.fixture
def stores(shared: DurableStores) -> DurableStores:
    """The same servers for all tests of this file, emptied."""
    with redis.Redis.from_url(shared.redis_url) as client:
        client.flushall()
    sql(shared, "TRUNCATE audit, audit_batches, audit_anchor, keys CASCADE")
    return shared


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend(models=["llama3.2:latest"], name="alpha", pieces=4, pause_s=0.01) as fake:
        yield fake


def names_for(stores: DurableStores, backend: FakeBackend, **names: str) -> dict[str, str]:
    return environment_for(backend, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url, **names)


def new_key(stores: DurableStores, **limits: int) -> str:
    settings = settings_for(DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)

    async def make() -> str:
        async with database_of(settings) as database:
            key_store = KeyStore(database, hasher_of(settings), None)
            return (await key_store.make(NewKey(f"key {time.time()}", quota=Quota(**limits))))[1]

    return asyncio.run(make())


def sql(stores: DurableStores, query: str) -> list[Any]:
    async def run() -> list[Any]:
        connection = await asyncpg.connect(stores.database_url)
        try:
            return list(await connection.fetch(query))
        finally:
            await connection.close()

    return asyncio.run(run())


class Load:
    """Clients that read whole answers, in a thread, until the end of the context."""

    def __init__(self, key: str, urls: list[str], at_once: int = 20) -> None:
        self.clients = RandomClients(key, random.Random(3), ["reads"])
        self._urls, self._at_once = urls, at_once
        self._stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> RandomClients:
        self._thread.start()
        return self.clients

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join(120)

    async def _run(self) -> None:
        await asyncio.gather(*(self._one(number) for number in range(self._at_once)))

    async def _one(self, number: int) -> None:
        while not self._stopping:
            await self.clients.ask(self._urls[number % len(self._urls)])
            await asyncio.sleep(0.005)


def backlog(stores: DurableStores) -> int:
    with redis.Redis.from_url(stores.redis_url) as client:
        return sum(int(client.xlen(shared.rows)) + int(client.hlen(shared.calls)) for shared in redis_keys.BY_SHARD)


@pytest.mark.long(seconds=40)
def test_kills_and_restarts_lose_no_row_and_duplicate_none(stores: DurableStores, backend: FakeBackend, tmp_path: Path) -> None:
    names = names_for(stores, backend, GATEWAY_WORKERS="3")
    with serving(tmp_path, names) as (process, url, _):
        with Load(new_key(stores), [url]) as clients:
            for number in range(5):
                time.sleep(1.0)
                os.kill(random.choice(sorted(descendants(process.pid))), signal.SIGKILL)
                if number in (1, 3):
                    stores.restart(stores.redis)
            stores.restart(stores.postgres, OUTAGE_S)
            time.sleep(2)
        until(lambda: backlog(stores) == 0, LEASE_ENDS_S)
        time.sleep(1)
        rows = sql(stores, "SELECT request_id, outcome, id FROM audit")
    by_request = Counter(row["request_id"] for row in rows)
    outcomes = {row["request_id"]: row["outcome"] for row in rows}
    assert max(by_request.values()) == 1 and len({row["id"] for row in rows}) == len(rows)
    answered = {name for name, outcome in outcomes.items() if outcome == "answered"}
    assert clients.whole <= answered and len(clients.whole) > 200
    reached = {call.header("x-request-id") for chat in CHATS for call in backend.calls(chat.path)}
    assert reached <= set(outcomes), "a call that reached a backend has no row"
    abandoned = {name for name, outcome in outcomes.items() if outcome == "abandoned"}
    assert abandoned and not abandoned & clients.whole


@pytest.mark.long(seconds=15)
def test_a_frozen_redis_delays_no_request_and_limits_hold_by_shares(stores: DurableStores, backend: FakeBackend) -> None:
    settings = settings_for(backend, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)
    with RunningGateway(settings) as gateway:
        limited, free = gateway.key(rpm=30), gateway.key()
        with Load(gateway.key(), [gateway.url], at_once=8) as clients:
            assert asked(gateway, free) == {200: 60}
            time.sleep(FREEZE_S)
            before = clients.took_s.copy()
            with stores.frozen(stores.redis):
                statuses = asked(gateway, limited)
                time.sleep(FREEZE_S)
            meanwhile = clients.took_s[len(before) :]
            until(lambda: gateway.components.limits.is_usable and gateway.components.store.up, 10)
        assert statuses == {200: 30, 429: 30}
        # Other work on the machine delays both.
        assert nearly_slowest(meanwhile) < max(nearly_slowest(before) + 0.1, 2 * nearly_slowest(before))
        assert clients.ends["429"] == 0 and set(clients.ends) <= {"200", "complete"}
        rows = gateway.audit_rows()
        assert len(rows) == clients.sent + 120 == len({row["id"] for row in rows})
        messages = [record.getMessage() for record in gateway.logged.records if record.name == "gateway.store"]
        # On a busy machine Redis may be unavailable more than once.
        states = [message.partition(":")[0] for message in messages]
        assert states == ["Redis answers", *["Redis is unreachable", "Redis answers"] * (len(states) // 2)] and len(states) >= 3


def nearly_slowest(took_s: list[float]) -> float:
    """Near the maximum; in a long run the maximum itself."""
    return sorted(took_s)[-1 if FREEZE_S >= 30 else -1 - len(took_s) // 100]


def asked(gateway: RunningGateway, key: str) -> Counter[int]:
    return Counter(ask(gateway, key) for _ in range(60))


def ask(gateway: RunningGateway, key: str) -> int:
    with gateway.http(key) as client:
        return client.post(CHATS[0].path, json=CHATS[0].body).status_code


def test_limits_closed_without_redis_refuse_requests(stores: DurableStores, backend: FakeBackend) -> None:
    names = {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url, "LIMITS_WITHOUT_REDIS": "closed"}
    with RunningGateway(settings_for(backend, **names)) as gateway:
        key = gateway.key()
        assert ask(gateway, key) == 200
        with stores.frozen(stores.redis), gateway.http(key) as client:
            refused = client.post(CHATS[0].path, json=CHATS[0].body)
            assert refused.status_code == 503 and refused.headers["retry-after"]
        until(lambda: ask(gateway, key) == 200, 10)


def test_a_locally_refused_request_holds_nothing_if_redis_admits_it(stores: DurableStores, backend: FakeBackend) -> None:
    """A frozen Redis still runs the commands that it has received, although nobody waits for them any more."""
    names = {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url}
    with RunningGateway(settings_for(backend, **names)) as gateway:
        key = gateway.key(tpm=2000, concurrent=3)
        assert ask(gateway, key) == 200
        large = {**CHATS[0].body, "options": {"num_predict": 1500}}
        with gateway.http(key) as client:
            gateway.components.limits.share = lambda: Share(0, 4)
            with stores.frozen(stores.redis):
                refused = client.post(CHATS[0].path, json=large)
            # At least a second, however short the calls are: a client that retries at once meets the same process and share.
            assert refused.status_code == 429 and float(refused.headers["retry-after-ms"]) >= 1000
            until(lambda: gateway.components.limits.is_usable and not gateway.components.settler.backlog, 10)
            until(lambda: not held(stores), 5)
            assert client.post(CHATS[0].path, json=large).status_code == 200
        assert [row["outcome"] for row in gateway.audit_rows()] == ["answered", "refused:rate_limit_exceeded", "answered"]


def held(stores: DurableStores) -> list[bytes]:
    with redis.Redis.from_url(stores.redis_url) as client:
        return [name for kind in ("c", "v") for name in client.scan_iter(f"nz:*:{kind}:*")]


def test_a_redis_out_of_memory_is_relieved_by_the_audit_writer(stores: DurableStores, backend: FakeBackend) -> None:
    names = {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url}
    with RunningGateway(settings_for(backend, **names)) as gateway, redis.Redis.from_url(stores.redis_url) as client:
        key = gateway.key()
        assert ask(gateway, key) == 200
        gateway.audit_rows()
        client.set("nz:audit:writer", "somebody else", px=60_000)
        assert [ask(gateway, key) for _ in range(10)] == [200] * 10
        client.config_set("maxmemory", 1_000_000)
        try:
            assert ask(gateway, key) == 200
            client.delete("nz:audit:writer")
            until(lambda: not any(client.xlen(shared.rows) for shared in redis_keys.BY_SHARD), 15)
        finally:
            client.config_set("maxmemory", 0)
        until(lambda: gateway.components.limits.is_usable and not gateway.components.settler.backlog, 10)
        assert len(gateway.audit_rows()) == 12
        refusals = [record for record in gateway.logged.records if record.getMessage().startswith("Redis refuses")]
        assert len(refusals) <= 2


def test_wrong_keys_are_counted_while_redis_is_frozen(stores: DurableStores, backend: FakeBackend) -> None:
    names = {"AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN": "10", "REDIS_URL": stores.redis_url}
    with RunningGateway(settings_for(backend, DATABASE_URL=stores.database_url, **names)) as gateway:
        with stores.frozen(stores.redis):
            statuses = wrong_at_once(gateway, "not a key") + wrong_at_once(gateway, key_format.mint().whole)
        assert statuses == {b"401": 10, b"429": 30}


def wrong_at_once(gateway: RunningGateway, key: str) -> Counter[bytes]:
    address = ("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    with ExitStack() as open_:
        clients = [open_.enter_context(socket.create_connection(address)) for _ in range(20)]
        for client in clients:
            head = f"GET /api/tags HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n"
            client.sendall(head.encode())
        return Counter(client.recv(12)[-3:] for client in clients)


def test_rows_go_to_the_database_while_redis_is_frozen(stores: DurableStores, backend: FakeBackend) -> None:
    settings = settings_for(backend, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)
    with RunningGateway(settings) as gateway:
        key = gateway.key()
        ask(gateway, key)
        with stores.frozen(stores.redis):
            for _ in range(20):
                assert ask(gateway, key) == 200
            until(lambda: sql(stores, "SELECT count(*) FROM audit")[0][0] >= 20, 10)
        assert len(gateway.audit_rows()) == 21


def test_without_both_stores_the_newest_rows_are_kept_and_a_loss_is_logged(stores: DurableStores, backend: FakeBackend) -> None:
    names = {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url, "AUDIT_BUFFER_SIZE": "5"}
    with RunningGateway(settings_for(backend, **names)) as gateway:
        key = gateway.key()
        ask(gateway, key)
        assert len(gateway.audit_rows()) == 1
        stores.postgres.stop()
        try:
            with stores.frozen(stores.redis):
                assert [ask(gateway, key) for _ in range(12)] == [200] * 12
                gateway.wait_idle()
                until(lambda: gateway.components.settler.dropped >= 7, 5)
        finally:
            stores.start(stores.postgres)
        until(lambda: gateway.components.limits.is_usable, 10)
        rows = gateway.audit_rows()
        assert 4 <= len(rows) <= 7 and gateway.components.settler.dropped in (7, 8)
        messages = [record.getMessage() for record in gateway.logged.records if record.name == "gateway.audit"]
        assert sum("dropping the oldest audit rows" in message for message in messages) == 1


@pytest.mark.long(seconds=20)
def test_sigterm_under_load_writes_a_row_for_every_answer(stores: DurableStores, backend: FakeBackend, tmp_path: Path) -> None:
    key = new_key(stores)
    whole: set[str] = set()
    cut = 0
    for number in range(DRAINS):
        folder = tmp_path / str(number)
        folder.mkdir()
        with serving(folder, names_for(stores, backend, GATEWAY_DRAIN_S="0.3" if number % 2 else "5")) as (process, url, _):
            with Load(key, [url], at_once=10) as clients:
                time.sleep(0.7)
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0
            whole |= clients.whole
            cut += clients.ends["cut"]
    with serving(tmp_path, names_for(stores, backend)):
        until(lambda: backlog(stores) == 0, LEASE_ENDS_S)
        time.sleep(1)
    rows = sql(stores, "SELECT request_id, outcome FROM audit")
    assert len({row["request_id"] for row in rows}) == len(rows)
    assert {row["outcome"] for row in rows} <= {"answered", "shutdown", "refused:shutting_down"}
    assert whole == {row["request_id"] for row in rows if row["outcome"] == "answered"} and cut == 0
    reached = {call.header("x-request-id") for chat in CHATS for call in backend.calls(chat.path)}
    assert reached <= {row["request_id"] for row in rows}
