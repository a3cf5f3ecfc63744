"""Background tasks survive any failure, failures are visible, and each task is ended by its owner."""

import ast
import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from gateway.core.background import KeptTask, TaskGroup
from tests.conftest import StartGateway
from tests.stores.test_database_errors import readiness
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Forever
from tests.support.processes import until

# Functions whose tasks end by themselves or with their caller; all others run for ever, as a KeptTask.
ONCE = {
    ("proxy/passthrough.py", "cancelling_on_disconnect"),
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


def functions_that_create_tasks() -> Iterator[tuple[str, str]]:
    for path in {*Path("gateway").rglob("*.py")} - {*Path("gateway/ops/drill").glob("*.py")}:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
                if any(isinstance(call, ast.Attribute) and call.attr == "create_task" for call in calls):
                    yield path.relative_to("gateway").as_posix(), function.name


def test_every_endless_task_is_a_kept_task() -> None:
    found = set(functions_that_create_tasks())
    assert found - ONCE == set(), "a plain task ends with the first error: use gateway.core.background.KeptTask"
    assert ("core/background.py", "start") in found


def test_failing_work_restarts_and_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
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
    logged = [(record.getMessage(), record.exc_info is not None) for record in caplog.records]
    again, ended = "the task 'counting' failed; restarting", "the task 'cancelled' ended unexpectedly"
    assert logged == [(again, True), (again, True), (ended, False)]


def test_a_group_logs_failures_and_its_owner_ends_the_rest(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_stopped_gateway_leaves_no_task(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    """Not even of requests to a backend that does not answer, such as polls of its models."""
    gateway = start_gateway(alpha)
    for path in ("/api/tags", "/api/ps"):
        alpha.play(path, [Forever()])
    discovery, load = gateway.components.discovery, gateway.components.load

    async def begin() -> None:
        await discovery.refresh(enough_s=0.01)
        load.look_soon("alpha")
        await load.running()

    gateway.call(begin())
    assert len(discovery._polls) and len(load._tasks)
    gateway.stop()
    assert not len(discovery._polls) and not len(load._tasks) and not len(discovery._loads)


def test_readiness_lists_every_kept_task(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)

    async def names() -> set[str]:
        found: Callable[[Any], str] = lambda task: task.get_coro().__qualname__  # noqa: E731
        return {task.get_name() for task in asyncio.all_tasks() if found(task) == KeptTask._keep_going.__qualname__}

    listed = {kept.name for kept in gateway.components.background()}
    assert gateway.call(names()) <= listed and {"last use of keys", "audit writer", "drains", "retention"} <= listed
    [kept] = [one for one in gateway.components.background() if one.name == "drains"]
    assert kept._task is not None
    gateway.loop.call_soon_threadsafe(kept._task.cancel)
    with gateway.http() as client:
        until(lambda: readiness(client) == (200, "ok", "drains: dead"), 2)
