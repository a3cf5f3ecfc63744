"""Real stores for every test: one private PostgreSQL and Redis a run, a fresh database and an empty Redis for each test."""

import asyncio
import functools
import itertools
import shutil
import ssl
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import redis
from playwright.sync_api import Browser

from gateway import app, local
from tests.browser import chromium
from tests.played import PlayedBackend
from tests.running import RunningGateway
from tests.settings_of import settings_for

_numbers = itertools.count()
# Each HTTP client of the tests would read the system's certificates anew, 60 ms each, and none of them speaks TLS.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]


@dataclass(frozen=True)
class TestStores:
    __test__ = False

    database_url: str
    redis_url: str

    def client(self) -> "redis.Redis":
        return redis.Redis.from_url(self.redis_url)


def _sql(url: str, *statements: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())


@pytest.fixture(scope="session")
def servers() -> Iterator[local.Stores]:
    folder = Path(tempfile.mkdtemp(prefix="nz-"))
    folder.chmod(0o711)
    try:
        with local.stores(folder, durable=False) as stores:
            yield stores
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def template(servers: local.Stores) -> str:
    """A migrated database that the tests' own are copied from."""
    _sql(servers.database_url, "CREATE DATABASE migrated")
    url = servers.database_url.replace("/gateway?", "/migrated?")

    async def migrate() -> None:
        async with app.database_of(settings_for(DATABASE_URL=url)) as database:
            await database.migrate(lambda _: None)

    asyncio.run(migrate())
    return "migrated"


@pytest.fixture
def empty_database(servers: local.Stores) -> str:
    name = f"empty_{next(_numbers)}"
    _sql(servers.database_url, f"CREATE DATABASE {name}")
    return servers.database_url.replace("/gateway?", f"/{name}?")


@pytest.fixture
def stores(servers: local.Stores, template: str) -> Iterator[TestStores]:
    name = f"test_{next(_numbers)}"
    _sql(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template}")
    url = servers.database_url.replace("/gateway?", f"/{name}?")
    assert urlsplit(url).path == f"/{name}"
    found = TestStores(url, servers.redis_url)
    with found.client() as client:
        client.flushall()
    yield found
    _sql(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)")


StartGateway = Callable[..., RunningGateway]


@pytest.fixture
def start_gateway(stores: TestStores) -> Iterator[StartGateway]:
    """`start_gateway(backend, …, NAME="value")`: a gateway in this process before these played backends, in this order."""
    with ExitStack() as stack:

        def start(*backends: object, **names: str) -> RunningGateway:
            settings = settings_for(*backends, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url, **names)
            return stack.enter_context(RunningGateway(settings))

        yield start


@pytest.fixture
def alpha() -> Iterator[PlayedBackend]:
    """The first backend of most stories."""
    with PlayedBackend(models=["llama3.2:latest"], name="alpha") as backend:
        yield backend


@pytest.fixture
def beta() -> Iterator[PlayedBackend]:
    """The second, with the same model."""
    with PlayedBackend(models=["llama3.2:latest"], name="beta") as backend:
        yield backend


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Named last by the tests: its own loop is in the way of fixtures that run one."""
    with chromium() as found:
        yield found
