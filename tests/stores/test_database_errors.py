"""A database that takes no writes, or fails for reasons of its own, counts as unavailable; other errors stay what they are."""

import asyncio
from typing import Any

import asyncpg
import pytest

from gateway.auth import authenticator
from gateway.auth.key import ADMIN
from gateway.components import database_of
from gateway.core.errors import ReadOnly, StoreRefused, StoreUnavailable
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import settings_for
from tests.support.processes import until


def run_sql(url: str, *statements: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(url)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    asyncio.run(run())


OTHERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def become_standby(url: str) -> None:
    """As after a failover: new connections find a read-only server."""
    name = url.split("/")[3].partition("?")[0]
    run_sql(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on", OTHERS)


def become_primary(url: str) -> None:
    """Existing sessions stay read-only."""
    name = url.split("/")[3].partition("?")[0]
    run_sql(url, "SET default_transaction_read_only = off", f"ALTER DATABASE {name} RESET default_transaction_read_only")


def readiness(client: Any) -> tuple[int, str, str]:
    got = client.get("/readyz")
    return got.status_code, got.json()["database"], got.json()["tasks"]


@pytest.mark.parametrize("servers_in_the_address", [1, 2])
def test_a_read_only_database_is_a_degraded_mode(
    start_gateway: StartGateway,
    stores: TestStores,
    alpha: FakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    servers_in_the_address: int,
) -> None:
    monkeypatch.setattr(authenticator, "WRITE_USES_EVERY_S", 0.1)
    url = stores.database_url
    if servers_in_the_address == 2:
        host = url.partition("host=")[2].partition("&")[0]
        object.__setattr__(stores, "database_url", url.replace(f"host={host}", f"host={host},{host}"))
    gateway = start_gateway(alpha)
    known, unknown, ops = gateway.key(), gateway.key(), gateway.key(name="ops", flags=(ADMIN,))
    assert CHATS[0].ask(gateway, known) == "alpha heard: Say hi"
    with gateway.http(ops) as admin:
        assert readiness(admin) == (200, "ok", "ok")
        become_standby(url)
        until(lambda: readiness(admin) == (200, "degraded: takes no writes", "ok"), 5)
        for method, path, body in CHANGES:
            refused = admin.request(method, path.replace("{id}", known.split("_")[1]), json=body)
            assert (refused.status_code, "read-only" in refused.json()["error"]) == (503, True), (method, path)
        assert [CHATS[0].ask(gateway, key) for key in (known, unknown)] == ["alpha heard: Say hi"] * 2
        asyncio.run(asyncio.sleep(0.5))
        assert readiness(admin)[2] == "ok"
        become_primary(url)
        until(lambda: readiness(admin) == (200, "ok", "ok"), 5)
        assert admin.post("/admin/v1/keys", json={"name": "again"}).status_code == 201
        until(lambda: admin.get("/admin/v1/keys").json()[-1]["last_used_at"] is not None, 5)
    rows = gateway.audit_rows()
    assert [row["route"] for row in rows].count("/api/chat") == 3
    logged = [record for record in gateway.logged.records if record.name == "gateway.database"]
    assert [record.getMessage().partition(":")[0] for record in logged if "writes" in record.getMessage()] == [
        "PostgreSQL takes no writes",
        "PostgreSQL takes writes again",
    ]
    assert not [record for record in gateway.logged.records if record.exc_info]


CHANGES: list[tuple[str, str, Any]] = [
    ("POST", "/admin/v1/keys", {"name": "new"}),
    ("PATCH", "/admin/v1/keys/{id}", {"rpm": 1}),
    ("POST", "/admin/v1/keys/{id}/rotate", {}),
    ("DELETE", "/admin/v1/keys/{id}", None),
    ("POST", "/admin/v1/backends/alpha/drain", None),
]


def test_errors_of_the_server_mean_that_the_store_is_unavailable(stores: TestStores) -> None:
    """A real server raises each of them; errors of the data itself stay as they are."""
    expected: dict[str, type[Exception]] = dict.fromkeys(["57P01", "57P03", "53300", "53100", "58030"], StoreUnavailable)
    expected |= dict.fromkeys(["40001", "40P01", "55P03", "42501", "42P01", "42703", "0A000", "26000"], StoreRefused)
    expected |= {"25006": ReadOnly, "22003": asyncpg.NumericValueOutOfRangeError, "P0001": asyncpg.RaiseError}

    async def raised(code: str) -> type[BaseException]:
        async with database_of(settings_for(DATABASE_URL=stores.database_url)) as database:
            try:
                async with database.connection() as connection:
                    await connection.execute(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$")
            except Exception as wrong:  # noqa: BLE001 # compared below
                return type(wrong)
        raise AssertionError(code)

    async def run() -> dict[str, type[BaseException]]:
        return {code: await raised(code) for code in expected}

    assert asyncio.run(run()) == expected
