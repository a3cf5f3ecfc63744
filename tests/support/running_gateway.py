"""A gateway that serves on a real port, in a thread of the test process."""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from gateway import app
from gateway.auth.key import ADMIN_MODELS
from gateway.auth.key_store import KeyStore, NewKey
from gateway.components import Components, hasher_of
from gateway.edge import server
from gateway.limits.quota import NAMES as LIMITS
from gateway.limits.quota import Quota
from gateway.settings import Settings
from gateway.stores import redis_client, redis_keys
from gateway.stores.redis_client import RedisClient, RedisUnavailable

Result = TypeVar("Result")
START_S = 20.0
LISTS_S = 2.0
REDIS_S = 5.0
_names = itertools.count()


async def waiting_rows(store: RedisClient) -> int:
    """The number of audit rows in Redis that have not been moved to PostgreSQL yet."""

    def fill(pipe: Any) -> None:
        for shared in redis_keys.BY_SHARD:
            pipe.xlen(shared.rows)

    return sum(await store.pipeline(fill))


async def _is_reachable(redis_url: str) -> bool:
    client = redis_client.connect(redis_url, deadline_s=redis_client.CONNECT_DEADLINE_S)
    try:
        async with client:
            return bool(await client.ping())
    except redis_client.FAILURES:
        return False


class LogRecords(logging.Handler):
    """Collects all log records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class RunningGateway:
    components: Components
    loop: asyncio.AbstractEventLoop

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self.logged = LogRecords()
        self._clients: list[Any] = []
        self._renewed = datetime.fromtimestamp(0, UTC)

    def __enter__(self) -> Self:
        root = logging.getLogger()
        root.addHandler(self.logged)
        root.setLevel(logging.INFO)
        self._listener = server.listen(self.settings.gateway_bind_host, self.settings.gateway_bind_port)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread.start()
        assert self._ready.wait(START_S), "the gateway did not start"
        if self._failure is not None:
            raise self._failure
        self.call(self._wait_for_first_answers())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for client in self._clients:
            client._client.close()
        self.stop()
        logging.getLogger().removeHandler(self.logged)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.server.begin_drain)
            self._thread.join(30)
            assert not self._thread.is_alive(), "the gateway did not stop"
        self._listener.close()

    def _run(self) -> None:
        try:
            server.run(self._serve())
        except BaseException as failure:  # noqa: BLE001 raised in the test's thread
            self._failure = failure
            self._ready.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        async with app.build(self.settings) as (application, components):
            self.components = components
            parts = application, components.in_flight, components.scope_timer
            self.server = server.Server(*parts, drain_s=self.settings.gateway_drain_s, on_ready=self._ready.set)
            await self.server.serve([self._listener])

    async def _wait_for_first_answers(self) -> None:
        """On a busy machine backends and Redis can answer later than the gateway's start waits for them."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.components.discovery.has_asked_all.wait(), LISTS_S)
        store = self.components.store
        if not store.up and await _is_reachable(self.settings.redis_url):
            with suppress(TimeoutError):
                async with asyncio.timeout(REDIS_S):
                    while not store.up and not store.refusal:  # noqa: ASYNC110 the store announces neither
                        await asyncio.sleep(0.01)

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine in the gateway's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def key_store(self) -> KeyStore:
        return KeyStore(self.components.database, hasher_of(self.settings), self.components.store)

    def key(self, *models: str, name: str = "", flags: tuple[str, ...] = (), **more: Any) -> str:
        """A new key for these models, or for all; limits are given by their names."""
        quota = Quota(**{limit: more.pop(limit) for limit in LIMITS if limit in more})
        return self.call(self.key_store().make(NewKey(name or f"key {next(_names)}", models, quota, flags=flags, **more)))[1]

    def admin_key(self) -> str:
        return self.key(flags=(ADMIN_MODELS,))

    def http(self, key: str = "", **options: Any) -> httpx.Client:
        headers = ({"Authorization": f"Bearer {key}"} if key else {}) | options.pop("headers", {})
        return httpx.Client(base_url=self.url, headers=headers, timeout=20, **options)

    # The official clients take most of the time to import, and many tests need none of them.
    def openai(self, key: str, **options: Any) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 20, **options})

    def anthropic(self, key: str, **options: Any) -> Any:
        from anthropic import Anthropic

        return Anthropic(base_url=self.url, api_key=key, **{"max_retries": 0, "timeout": 20, **options})

    def ollama(self, key: str) -> Any:
        from ollama import Client

        client = Client(host=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=20)
        self._clients.append(client)
        return client

    def wait_idle(self, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while self.components.in_flight.total and time.monotonic() < deadline:
            time.sleep(0.002)
        assert not self.components.in_flight.total, "requests are still in flight"

    def renew(self) -> None:
        """For the next test: it shows neither rows nor lines of earlier requests, and takes no backend for broken."""
        self.wait_idle()
        self.logged.records.clear()
        self._renewed = datetime.now(UTC)
        for backend in self.components.backends.values():
            backend.breaker.succeeded()

    def audit_rows(self) -> list[dict[str, Any]]:
        """All audit rows, oldest first, once they have arrived in PostgreSQL."""
        self.wait_idle()

        async def settled() -> list[dict[str, Any]]:
            for _ in range(500):
                with suppress(RedisUnavailable):
                    if not self.components.settler.backlog and not await waiting_rows(self.components.store):
                        break
                await asyncio.sleep(0.02)
            async with self.components.database.connection() as connection:
                query = "SELECT * FROM audit WHERE at >= $1 ORDER BY at, id"
                return [dict(row) for row in await connection.fetch(query, self._renewed)]

        return self.call(settled())

    def request_lines(self) -> list[dict[str, Any]]:
        """The logged fields of each finished request. A client can have its whole answer a moment before they are logged."""
        self.wait_idle()
        return [record.fields for record in self.logged.records if record.name == "gateway.request"]  # type: ignore[attr-defined]
