"""Background tasks outlive whatever they meet, and what fails is seen; PostgreSQL that only reads is a store that is away."""

import ast
import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import hiredis
import pytest

from gateway.auth import authenticator
from gateway.auth.key import ADMIN
from gateway.components import database_of
from gateway.core.background import KeptTask, TaskGroup
from gateway.core.errors import ReadOnly, StoreRefused, StoreUnavailable
from gateway.stores.redis_connection import Replies
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import WAYS
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Forever
from tests.support.gateway_settings import settings_for
from tests.support.processes import until

# Those that end with what they were begun for; all others run for ever, and are Kept.
ONCE = {
    ("proxy/passthrough.py", "watching"),
    ("auth/authenticator.py", "_check_once"),
    ("limits/limiter.py", "_seed_once"),
    ("edge/server.py", "begin_drain"),
    ("core/background.py", "start"),
    ("ops/cli/serve.py", "_serve_one"),
    ("auth/verifier.py", "is_right"),
    ("edge/workers.py", "run"),
    ("edge/workers.py", "_sleep"),
    ("edge/workers.py", "_wait_for"),
}


def functions_that_begin_tasks() -> Iterator[tuple[str, str]]:
    for path in {*Path("gateway").rglob("*.py")} - {*Path("gateway/ops/drill").glob("*.py")}:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
                if any(isinstance(call, ast.Attribute) and call.attr == "create_task" for call in calls):
                    yield path.relative_to("gateway").as_posix(), function.name


def test_every_task_that_never_ends_is_kept() -> None:
    found = set(functions_that_begin_tasks())
    assert found - ONCE == set(), "a task of its own dies of the first error: use gateway.core.background.KeptTask"
    assert ("core/background.py", "start") in found


def test_what_fails_begins_again_and_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("gateway.core.background.AGAIN_S", 0.001)
    begun: list[int] = []

    async def work() -> None:
        begun.append(1)
        if len(begun) < 5:
            raise asyncpg.ReadOnlySQLTransactionError
        if len(begun) < 7:
            raise ZeroDivisionError
        await asyncio.Event().wait()

    async def run() -> list[str]:
        kept = KeptTask(work, "counting")
        states = [kept.state]
        kept.start()
        while len(begun) < 7:  # noqa: ASYNC110 # the work under test must not know who waits
            await asyncio.sleep(0.001)
        states.append(kept.state)
        monkeypatch.setattr("gateway.core.background.FAILING_S", 0.0)
        states.append(kept.state)
        await kept.end()
        cancelled = KeptTask(work, "cancelled")
        cancelled.start()
        assert cancelled._task is not None
        cancelled._task.cancel()
        await asyncio.sleep(0.01)
        return [*states, kept.state, cancelled.state]

    with caplog.at_level(logging.ERROR, "gateway.tasks"):
        assert asyncio.run(run()) == ["ok", "ZeroDivisionError", "ok", "ok", "dead"]
    told = [(record.getMessage(), record.exc_info is not None) for record in caplog.records]
    again, ended = "the task 'counting' failed and begins again", "the task 'cancelled' has ended and nobody ended it"
    assert told == [(again, True), (again, True), (ended, False)]


def test_what_ends_by_itself_is_ended_with_its_owner_and_heard_of_when_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> None:
        raise ZeroDivisionError

    async def waits() -> None:
        await asyncio.Event().wait()

    async def run() -> tuple[bool, int]:
        group = TaskGroup("once")
        failed, waiting = group.start(fails()), group.start(waits())
        await asyncio.wait([failed])
        await group.end()
        return waiting.cancelled(), len(group)

    with caplog.at_level(logging.ERROR, "gateway.tasks"):
        assert asyncio.run(run()) == (True, 0)
    assert [record.getMessage() for record in caplog.records] == ["the task 'once' failed"]


def test_a_gateway_that_ends_leaves_no_task(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    """Also of what it asks of a backend that does not answer: here while it ends its polls and its look at what runs."""
    gateway = start_gateway(alpha)
    for path in ("/api/tags", "/api/ps"):
        alpha.play(path, [Forever()])
    discovery, running = gateway.components.discovery, gateway.components.running

    async def begin() -> None:
        await discovery.refresh(enough_s=0.01)
        await running.now()

    gateway.call(begin())
    assert len(discovery._polls) and len(running._tasks)
    gateway.stop()
    assert not len(discovery._polls) and not len(running._tasks) and not len(discovery._loads)


def test_nonsense_from_redis_ends_its_connection_and_not_the_line() -> None:
    async def run() -> BaseException | None:
        replies = Replies(lambda _: None)
        replies.connection_lost(hiredis.ProtocolError("nonsense"))
        return replies.ended.exception()

    assert isinstance(asyncio.run(run()), ConnectionError)


def run_sql(url: str, *statements: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(url)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    asyncio.run(run())


OTHERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"


def become_standby(url: str) -> None:
    """As after a failover: who connects now finds a server that only reads."""
    name = url.split("/")[3].partition("?")[0]
    run_sql(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on", OTHERS)


def become_primary(url: str) -> None:
    """Sessions that are there stay as they began."""
    name = url.split("/")[3].partition("?")[0]
    run_sql(url, "SET default_transaction_read_only = off", f"ALTER DATABASE {name} RESET default_transaction_read_only")


def states_of(client: Any) -> tuple[int, str, str]:
    got = client.get("/readyz")
    return got.status_code, got.json()["database"], got.json()["tasks"]


@pytest.mark.parametrize("servers_in_the_address", [1, 2])
def test_a_database_that_only_reads(
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
    assert WAYS[0].ask(gateway, known) == "alpha heard: Say hi"
    with gateway.http(ops) as admin:
        assert states_of(admin) == (200, "ok", "ok")
        become_standby(url)
        until(lambda: states_of(admin) == (200, "degraded: takes no writes", "ok"), 5)
        for method, path, body in CHANGES:
            refused = admin.request(method, path.replace("{id}", known.split("_")[1]), json=body)
            assert (refused.status_code, "read-only" in refused.json()["error"]) == (503, True), (method, path)
        assert [WAYS[0].ask(gateway, key) for key in (known, unknown)] == ["alpha heard: Say hi"] * 2
        asyncio.run(asyncio.sleep(0.5))
        assert states_of(admin)[2] == "ok"
        become_primary(url)
        until(lambda: states_of(admin) == (200, "ok", "ok"), 5)
        assert admin.post("/admin/v1/keys", json={"name": "again"}).status_code == 201
        until(lambda: admin.get("/admin/v1/keys").json()[-1]["last_used_at"] is not None, 5)
    rows = gateway.audit_rows()
    assert [row["route"] for row in rows].count("/api/chat") == 3
    told = [record for record in gateway.logged.records if record.name == "gateway.database"]
    assert [record.getMessage().partition(":")[0] for record in told if "writes" in record.getMessage()] == [
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


def test_what_is_not_the_askers_fault_is_the_stores(stores: TestStores) -> None:
    """A real server raises each; the rest (what was written is wrong) stays what it is."""
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


def test_health_knows_all_tasks_of_a_gateway(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)

    async def running() -> set[str]:
        found: Callable[[Any], str] = lambda task: task.get_coro().__qualname__  # noqa: E731
        return {task.get_name() for task in asyncio.all_tasks() if found(task) == "Kept._keep_going"}

    listed = {kept.name for kept in gateway.components.background()}
    assert gateway.call(running()) <= listed and {"last use of keys", "audit writer", "drains", "retention"} <= listed
    [kept] = [one for one in gateway.components.background() if one.name == "drains"]
    assert kept._task is not None
    gateway.loop.call_soon_threadsafe(kept._task.cancel)
    with gateway.http() as client:
        until(lambda: states_of(client) == (200, "ok", "drains: dead"), 2)
