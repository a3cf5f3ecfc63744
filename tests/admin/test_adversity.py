"""What operators see when stores are slow, refuse to write or go away, and when a key is written where none belongs."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import redis

from gateway import components
from gateway.auth.key import ADMIN, Key
from gateway.core.errors import StoreUnavailable
from tests.conftest import StartGateway, TestStores
from tests.support import redis_server
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import settings_for
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": False}


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, GATEWAY_DRAIN_S="20")


@pytest.fixture
def admin(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with gateway.http(gateway.key(name="ops", flags=(ADMIN,))) as client:
        client.base_url = httpx.URL(f"{gateway.url}/admin/v1")
        yield client


def fetch(url: str, query: str) -> list[Any]:
    async def run() -> list[Any]:
        connection = await asyncpg.connect(url)
        try:
            return list(await connection.fetch(query))
        finally:
            await connection.close()

    return asyncio.run(run())


def test_a_redis_that_refuses_writes_counts_as_down(
    stores: TestStores, alpha: FakeBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a replica that nobody made primary: it answers PING and refuses to write."""
    with redis_server.server(tmp_path) as (_, port), redis.Redis(port=port) as other:
        settings = settings_for(alpha, DATABASE_URL=stores.database_url, REDIS_URL=f"redis://127.0.0.1:{port}")
        with RunningGateway(settings) as gateway, gateway.http(gateway.key()) as client:
            assert client.post("/api/chat", json=CHAT).status_code == 200
            caplog.clear()
            other.execute_command("REPLICAOF", "127.0.0.1", "1")
            answers = [client.post("/api/chat", json=CHAT).status_code for _ in range(40)]
            until(lambda: not gateway.components.store.up, 5)
            for _ in range(20):
                assert not gateway.components.store.up
                answers.append(client.post("/api/chat", json=CHAT).status_code)
                time.sleep(0.05)
            assert set(answers) == {200}
            counted = "SELECT status, outcome, count(*) FROM audit GROUP BY 1, 2"
            until(lambda: sum(row[2] for row in fetch(stores.database_url, counted)) >= len(answers), 10)
            messages = [record.getMessage() for record in caplog.records if "Redis is unreachable" in record.getMessage()]
            assert len(messages) == 1
            assert not [record for record in caplog.records if record.exc_info]
            other.execute_command("REPLICAOF", "NO", "ONE")
            until(lambda: gateway.components.store.up, 5)
            until(lambda: [tuple(row) for row in fetch(stores.database_url, counted)] == [(200, "answered", 61)], 10)


def test_a_slow_report_delays_no_request(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an operator sums over takes as long as it takes; whose key must be looked up does not wait for it."""

    async def meanwhile() -> tuple[httpx.Response, httpx.Response]:
        connection = await asyncpg.connect(stores.database_url)
        try:
            async with connection.transaction():
                await connection.execute("LOCK TABLE audit IN ACCESS EXCLUSIVE MODE")
                slow = await asyncio.to_thread(admin.get, "/admin/v1/audit")
                with gateway.http(stranger) as client:
                    return slow, await asyncio.to_thread(client.post, "/api/chat", json=CHAT)
        finally:
            await connection.close()

    monkeypatch.setattr(components, "REPORT_DEADLINE_S", 0.5)
    gateway = start_gateway(alpha)
    stranger, ops = gateway.key(), gateway.key(flags=(ADMIN,))
    with gateway.http(ops) as admin:
        slow, answer = asyncio.run(meanwhile())
        assert (slow.status_code, slow.json()["error"].startswith("PostgreSQL takes too long for this")) == (503, True)
        assert answer.status_code == 200 and gateway.components.database.up and gateway.components.reports.up
        assert admin.get("/admin/v1/audit").status_code == 200


def test_watchers_do_not_delay_the_shutdown(gateway: RunningGateway, admin: httpx.Client) -> None:
    with admin.stream("GET", "/events") as events:
        pieces = events.iter_raw()
        next(pieces)
        began = time.monotonic()
        gateway.loop.call_soon_threadsafe(gateway.server.begin_drain)
        assert all(piece.startswith(b"data: ") for piece in pieces)
        assert time.monotonic() - began < 10


def test_a_head_request_for_the_events_ends(admin: httpx.Client) -> None:
    head = admin.head("/events", timeout=5)
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream")


def test_events_end_when_the_key_cannot_be_checked(
    gateway: RunningGateway, admin: httpx.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> Key:
        raise StoreUnavailable

    with admin.stream("GET", "/events") as events:
        pieces = events.iter_raw()
        next(pieces)
        monkeypatch.setattr("gateway.proxy.access.Access.key_of", away)
        assert all(piece.startswith(b"data: ") for piece in pieces)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_key_in_the_wrong_field_is_stored_nowhere(
    gateway: RunningGateway, admin: httpx.Client, stores: TestStores, caplog: pytest.LogCaptureFixture
) -> None:
    whole = gateway.key(name="leaky")
    refused = [
        admin.post("/keys", json={"name": whole}),
        admin.post("/keys", json={"name": f"the key {whole} of ours"}),
        admin.delete(f"/keys/{whole}"),
        admin.post(f"/keys/{whole}/rotate", json={}),
        admin.get("/audit", params={"key": whole}),
    ]
    assert [answer.status_code for answer in refused] == [400, 400, 404, 404, 404]
    assert not [answer.text for answer in refused if whole in answer.text]
    gateway.wait_idle()
    # Who only looked is in no row.
    until(lambda: len(fetch(stores.database_url, "SELECT FROM audit WHERE outcome <> ''")) >= len(refused) - 1, 15)
    assert whole not in str(fetch(stores.database_url, "SELECT * FROM audit"))
    ours = [vars(record) for record in caplog.records if record.name.startswith("gateway")]
    assert ours and whole not in str(ours)


@pytest.mark.parametrize("models", ["", False, 0, {}, "llama3*"])
def test_an_invalid_list_of_models_does_not_allow_every_model(admin: httpx.Client, models: object) -> None:
    answer = admin.post("/keys", json={"name": "odd", "models": models})
    assert (answer.status_code, "'models'" in answer.json()["error"]) == (400, True)
