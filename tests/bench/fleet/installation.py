"""This gateway as a subject: real processes, with keys from the command line, and stores without a memory of other runs."""

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import asyncpg
import httpx
import redis

from gateway import settings
from gateway.fleet.backends.config import BackendConfig
from gateway.ops.local import stores as local_stores
from gateway.stores import redis_keys
from tests.bench.fleet.scenario import Scenario
from tests.support import fork_server, memory_folder, redis_server
from tests.support.databases import Databases
from tests.support.processes import descendants, operate, serving

TEMPLATE = "with_keys"
# Limits that are counted but never reached, and a queue in which everybody may wait.
SETTINGS = {
    "ARGON2_TIME_COST": "1",
    "ARGON2_MEMORY_COST_KIB": "64",
    "ARGON2_PARALLELISM": "1",
    "DATABASE_POOL_SIZE": "4",
    "DATABASE_POOL_OVERFLOW": "0",
    "DEFAULT_RPM": "1000000000",
    "DEFAULT_TPM": "1000000000000",
    "DEFAULT_CONCURRENT": "1000000",
    "GATEWAY_DRAIN_S": "1",
    "GATEWAY_LOG_LEVEL": "WARNING",
    "QUEUE_WAIT_S": "600",
    "QUEUE_SIZE": "10000",
    "QUEUE_TOKENS": "1000000000",
}
READY_S, ROWS_S, ANSWERS_IN_A_ROW = 20.0, 5.0, 8
COLUMNS = "key_id model backend ttfb_ms estimated_ms backend_ms load_ms prefill_ms decode_ms".split()


@dataclass
class Gateway:
    url: str
    keys: dict[str, str]
    pids: list[int]
    database_url: str
    redis_url: str
    key_ids: dict[str, str]

    def audit_rows(self) -> list[dict[str, Any]]:
        """The rows of all finished calls, by names of keys; columns that this version does not have are missing."""
        deadline = time.monotonic() + ROWS_S
        with redis.Redis.from_url(self.redis_url) as client:
            while any(client.xlen(shared.rows) for shared in redis_keys.BY_SHARD) and time.monotonic() < deadline:
                time.sleep(0.05)
        names = {key_id: name for name, key_id in self.key_ids.items()}
        return [{**row, "key": names.get(row["key_id"], "")} for row in asyncio.run(_rows(self.database_url))]


class Installation:
    """One PostgreSQL with a database that has the keys. Each gateway gets a copy of it, and a Redis of its own."""

    def __init__(self, key_names: Iterable[str]) -> None:
        self._key_names = sorted(key_names)
        self._stack, self._lock = ExitStack(), threading.Lock()
        self._databases: Databases | None = None
        self._copies = 0
        self._key_ids: dict[str, str] = {}
        self.keys: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self) -> None:
        """Starts PostgreSQL and makes the keys, once."""
        with self._lock:
            self._databases = self._databases or self._start()

    @contextmanager
    def gateway(self, found: Scenario, urls: Sequence[str], routing: str, workers: int) -> Iterator[Gateway]:
        with ExitStack() as stack:
            database_url, folder = self._copy(stack)
            _, port = stack.enter_context(redis_server.server(folder))
            redis_url = f"redis://127.0.0.1:{port}"
            names = {
                **known(SETTINGS),
                **known({"ROUTING": routing}),
                "DATABASE_URL": database_url,
                "REDIS_URL": redis_url,
                "OLLAMA_BACKENDS": json.dumps(entries(found, urls, routing)),
                "GATEWAY_WORKERS": str(workers),
            }
            process, url, _ = stack.enter_context(serving(folder, names))
            wait_for_models(url, next(iter(self.keys.values())), {name for box in found.boxes for name in box.models})
            pids = sorted(descendants(process.pid) | {process.pid})
            yield Gateway(url, self.keys, pids, database_url, redis_url, self._key_ids)

    def _copy(self, stack: ExitStack) -> tuple[str, Path]:
        """A new database and a folder, both removed at the end."""
        self.prepare()
        with self._lock:
            assert self._databases
            self._copies += 1
            name = f"run_{self._copies}"
            url = self._databases.create(name, template=TEMPLATE)
        folder = memory_folder.new_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(self._drop, name)
        return url, folder

    def _drop(self, name: str) -> None:
        with self._lock:
            assert self._databases
            self._databases.drop(name)

    def _start(self) -> Databases:
        # It imports the gateway while the stores start.
        fork_server.gateway()
        folder = memory_folder.new_folder()
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stores = self._stack.enter_context(local_stores.stores(folder, durable=False, notify=lambda _: None))
        databases = self._stack.enter_context(Databases(stores.database_url))
        url = databases.create(TEMPLATE)
        names = {**known(SETTINGS), "DATABASE_URL": url, "REDIS_URL": stores.redis_url}
        operate(folder, names, "migrate")
        for name in self._key_names:
            made = json.loads(operate(folder, names, "key", "--name", name, "--json"))
            self.keys[name], self._key_ids[name] = made["key"], made["id"]
        return databases


def declared() -> set[str]:
    return {one.name.upper() for one in settings.declarations()}


def can_route() -> bool:
    """Whether the gateway has other rules than the operator's order."""
    return "ROUTING" in declared()


def known(names: dict[str, str]) -> dict[str, str]:
    """Without settings that this version does not have."""
    return {name: value for name, value in names.items() if name in declared()}


def entries(found: Scenario, urls: Sequence[str], routing: str) -> list[dict[str, Any]]:
    """The backends; with `fast` they are equals, otherwise each is a tier of its own."""
    able = {one.name for one in fields(BackendConfig)}
    listed = []
    for box, url in zip(found.boxes, urls, strict=True):
        more = {"slots": box.slots, **({"tier": 1} if routing == "fast" else {})}
        kept = {name: value for name, value in more.items() if name in able}
        listed.append({"name": box.name, "base_url": url, "kind": "ollama", "max_connections": 1000, **kept})
    return listed


def wait_for_models(url: str, key: str, models: set[str]) -> None:
    """Until every process of the gateway knows them: several connections in a row see them."""
    deadline, seen = time.monotonic() + READY_S, 0
    while seen < ANSWERS_IN_A_ROW:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{url} does not list {', '.join(sorted(models))}")
        with httpx.Client(headers={"Authorization": f"Bearer {key}"}) as client:
            listed = {model["id"].removesuffix(":latest") for model in client.get(f"{url}/v1/models").json().get("data", ())}
        seen = seen + 1 if {name.removesuffix(":latest") for name in models} <= listed else 0
        time.sleep(0 if seen else 0.05)


async def _rows(database_url: str) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(database_url)
    try:
        existing = {row["column_name"] for row in await connection.fetch(EXISTING)}
        columns = ", ".join(name for name in COLUMNS if name in existing)
        return [dict(row) for row in await connection.fetch(f"SELECT {columns} FROM audit WHERE status = 200")]
    finally:
        await connection.close()


EXISTING = "SELECT column_name FROM information_schema.columns WHERE table_name = 'audit'"
