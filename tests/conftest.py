"""Real stores for the tests: one private PostgreSQL and Redis per worker, a new database and an empty Redis for each test."""

import asyncio
import functools
import gc
import importlib.metadata
import itertools
import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import hypothesis
import pytest
import redis
import uvicorn.server

from gateway.components import database_of
from gateway.ops.local import stores as local_stores
from gateway.stores import migrations
from tests.support import memory_folder, redis_server
from tests.support.databases import Databases
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import settings_for
from tests.support.running_gateway import RunningGateway

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# A machine may be busy: nothing fails because it took long.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
_numbers = itertools.count()
MOST_WORKERS = 16
# Otherwise each HTTP client of the tests would read the system's certificates again: 60 ms each, and none uses TLS.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]
# Otherwise each connection to Redis would read the version of its library from the installed files.
importlib.metadata.version = functools.cache(importlib.metadata.version)
# Otherwise each gateway and echo server would take 0.2 s to stop: uvicorn checks ten times a second whether it should.
vars(uvicorn.server)["asyncio"] = SimpleNamespace(**{**vars(asyncio), "sleep": lambda seconds: asyncio.sleep(seconds / 10)})


def pytest_xdist_auto_num_workers() -> int:
    """Three workers for two processors: tests often wait, but with more workers they would delay each other."""
    processors = os.cpu_count() or 1
    return min(processors + (processors + 1) // 2, MOST_WORKERS)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """The garbage collector ignores the objects made at collection, which all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests first, so that at the end no worker runs one while the others are idle."""
    longest: dict[Path, float] = {}
    for item in items:
        longest[item.path] = max(longest.get(item.path, 0.0), _seconds_of(item))
    items.sort(key=lambda item: (longest[item.path], _seconds_of(item)), reverse=True)


def _seconds_of(item: pytest.Item) -> float:
    marked = item.get_closest_marker("long")
    return float(marked.kwargs["seconds"]) if marked else 0.0


@dataclass(frozen=True)
class TestStores:
    __test__ = False

    database_url: str
    redis_url: str

    def client(self) -> "redis.Redis":
        return redis.Redis.from_url(self.redis_url)

    def billed_today(self, kind: str = "b") -> int:
        """The tokens that Redis counts for today's budgets of all keys; with "s" the milliseconds of backends."""
        day = f"d{int(datetime.now(UTC).timestamp()) // 86_400}"
        with self.client() as client:
            counted: Any = [client.hget(name, day) for name in client.scan_iter(f"nz:*:{kind}:*")]
        return sum(int(count or 0) for count in counted)


@pytest.fixture(scope="session")
def servers() -> Iterator[local_stores.Stores]:
    folder = memory_folder.new_folder()
    try:
        with local_stores.stores(folder, durable=False) as stores:
            yield stores
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def databases(servers: local_stores.Stores) -> Iterator[Databases]:
    with Databases(servers.database_url) as found:
        yield found


@pytest.fixture(scope="session")
def template(databases: Databases) -> str:
    """The name of the migrated database that the tests' databases are copied from."""
    url = databases.create("migrated")

    async def migrate() -> None:
        async with database_of(settings_for(DATABASE_URL=url)) as database:
            await migrations.migrate(database, lambda _: None)

    asyncio.run(migrate())
    return "migrated"


@pytest.fixture
def empty_database(databases: Databases) -> str:
    return databases.create(f"empty_{next(_numbers)}")


@contextmanager
def _migrated(databases: Databases, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    url = databases.create(name, template=template)
    assert urlsplit(url).path == f"/{name}"
    try:
        yield url
    finally:
        databases.drop(name)


@pytest.fixture
def stores(servers: local_stores.Stores, databases: Databases, template: str) -> Iterator[TestStores]:
    with _migrated(databases, template) as url:
        found = TestStores(url, servers.redis_url)
        with found.client() as client:
            client.flushall()
        yield found


@pytest.fixture(scope="module")
def shared_stores(databases: Databases, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestStores]:
    """For tests of one module that leave nothing which others of them could see."""
    with _migrated(databases, template) as url, redis_server.server(tmp_path_factory.mktemp("redis")) as (_, port):
        yield TestStores(url, f"redis://127.0.0.1:{port}")


StartGateway = Callable[..., RunningGateway]


@pytest.fixture
def start_gateway(stores: TestStores, request: pytest.FixtureRequest) -> Iterator[StartGateway]:
    """`start_gateway(backend, …, NAME="value")`: a gateway in this process in front of these backends, in this order."""
    with _starting(stores, request) as start:
        yield start


@pytest.fixture(scope="module")
def start_shared_gateway(shared_stores: TestStores, request: pytest.FixtureRequest) -> Iterator[StartGateway]:
    with _starting(shared_stores, request) as start:
        yield start


@contextmanager
def _starting(stores: TestStores, request: pytest.FixtureRequest) -> Iterator[StartGateway]:
    """Tests with the mark `usual_slots` have as many slots at their backends as an installation without settings has."""
    slots = {"OLLAMA_SLOTS": "0"} if request.node.get_closest_marker("usual_slots") else {}
    with ExitStack() as stack:

        def start(*backends: object, **names: str) -> RunningGateway:
            urls = {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url}
            return stack.enter_context(RunningGateway(settings_for(*backends, **{**urls, **slots, **names})))

        yield start


@pytest.fixture
def alpha() -> Iterator[FakeBackend]:
    """The first backend of most tests."""
    with FakeBackend(models=["llama3.2:latest"], name="alpha") as backend:
        yield backend


@pytest.fixture
def beta() -> Iterator[FakeBackend]:
    """The second, with the same model."""
    with FakeBackend(models=["llama3.2:latest"], name="beta") as backend:
        yield backend


@pytest.fixture(scope="session")
def take_browser() -> Iterator[Callable[[], AbstractContextManager["Browser"]]]:
    from tests.support.browser import shared_chromium

    with shared_chromium() as found:
        yield found


@pytest.fixture
def browser(take_browser: Callable[[], AbstractContextManager["Browser"]]) -> Iterator["Browser"]:
    """Must be the last fixture of a test: its event loop prevents later fixtures from running their own."""
    with take_browser() as found:
        yield found
