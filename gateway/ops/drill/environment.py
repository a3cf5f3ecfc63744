"""Where the drill runs: its own fake backends, gateways with this installation's configuration in front of them, and keys.

None of the installation's traffic passes here: the gateways listen on unpublished ports of 127.0.0.1, their names in Redis have
a prefix of their own, and so do the keys. What remains afterwards are these keys, revoked, and their rows in the audit, which
are kept for a day.
"""

import asyncio
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

from gateway.audit import reports
from gateway.audit.reports import AuditFilter
from gateway.auth.key import DRILL, SHOW_BACKEND
from gateway.auth.key_store import KeyStore, NewKey
from gateway.core.errors import CommandFailed, StoreUnavailable
from gateway.edge import server
from gateway.limits.quota import Quota
from gateway.ops.drill.agent_answers import request_of
from gateway.ops.drill.client import Client, ClientAnswer, chat, fetch
from gateway.ops.drill.fake_backend import HOST, FakeBackend
from gateway.ops.drill.redis_proxy import RedisProxy, can_be_proxied
from gateway.stores import redis_keys
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisUnavailable, delete_names
from gateway.telemetry import metrics

# Each has its fault and a model of its own name.
NATIVE = "drill-native"
FAULTY = ("drill-refused", "drill-frozen", "drill-failing", "drill-garbage", "drill-dying", "drill-refusing", NATIVE)
SINGLE, PLAIN, HEALTHY = "drill-alone", "drill-plain", "drill-sound"
# Has few slots and a model of its own.
BUSY, BUSY_SLOTS = "drill-busy", 2
FOLDERS = "nz-drill-"
START_S, STOP_S, CLEAN_S = 20.0, 5.0, 10.0
KEY_LIFETIME, ROW_RETENTION = timedelta(minutes=10), timedelta(days=1)
LIMITS: Mapping[str, tuple[Quota, tuple[str, ...]]] = {
    "plain": (Quota(10_000, 10**9, 100), ()),
    "narrow": (Quota(10_000, 10**9, 100), (PLAIN,)),
    "doomed": (Quota(10_000, 10**9, 100), ()),
    "requests": (Quota(20, 10**9, 100), ()),
    "tokens": (Quota(10_000, 100, 100), ()),
    "slots": (Quota(10_000, 10**9, 4), ()),
    "one slot": (Quota(5, 10**9, 1), ()),
    "killed": (Quota(10_000, 10**9, 1), ()),
    "patient": (Quota(10_000, 10**9, 100), ()),
}
# Seconds after which a waiting stream of this key begins.
HEARTBEAT_S = {"patient": 0.2}


@dataclass(frozen=True)
class Installation:
    """What the drill needs to know; its gateways read the rest from their environment variables."""

    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    id_header: str
    is_closed_without_redis: bool


@asynccontextmanager
async def temporary_names(redis_url: str) -> AsyncIterator[None]:
    """Deletes this drill's names in Redis at the end, when nothing of it writes there any more, and those of killed drills."""
    try:
        yield
    finally:
        with suppress(RedisUnavailable):
            await delete_names(redis_url, redis_keys.DRILL_PREFIX, _is_over, CLEAN_S)


def _is_over(name: str) -> bool:
    return name.startswith(f"{redis_keys.PREFIX}:") or redis_keys.drill_age_s(name) > KEY_LIFETIME.total_seconds()


def _sweep_folders() -> None:
    """Of drills that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDERS}*"):
        with suppress(OSError):
            found = folder.lstat()
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > KEY_LIFETIME.total_seconds():
                shutil.rmtree(folder)


class Process:
    """One gateway: a process with this installation's environment variables, some of them changed for the drill."""

    def __init__(self, variables: Mapping[str, str], log: Path) -> None:
        self._variables, self.log = variables, log

    async def start(self) -> None:
        with server.listen(HOST, 0) as listener, self.log.open("ab") as log:
            self.url = f"http://{HOST}:{listener.getsockname()[1]}"
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway", "worker", str(listener.fileno()), str(os.getpid())),
                pass_fds=[listener.fileno()],
                env=self._variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    async def refuses_work(self, seconds: float) -> bool:
        """Whether within so many seconds it reports that it is not ready, or accepts no connection."""
        deadline = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < deadline:
            status = await fetch(f"{self.url}/readyz")
            if status is None or b'"ready":false' in status:
                return True
            await asyncio.sleep(0.05)
        return False

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def ended(self, seconds: float) -> int | None:
        """Its exit status; None while it runs."""
        with suppress(TimeoutError):
            return await asyncio.wait_for(self._process.wait(), seconds)
        return None

    async def stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.signal(number)
            if await self.ended(STOP_S) is not None:
                return


class Environment:
    """`async with Environment(...) as environment:`; `first` and `second` are gateways that share one Redis."""

    def __init__(self, installation: Installation, database: Database, key_store: KeyStore, *, with_third: bool) -> None:
        self._installation, self._database, self.key_store = installation, database, key_store
        self._with_third = with_third
        self.client = Client(installation.id_header)
        self.backends = {name: FakeBackend(name, name, is_native=name == NATIVE) for name in (*FAULTY, SINGLE, BUSY)}
        self.healthy = self.backends[HEALTHY] = FakeBackend(HEALTHY, PLAIN, *FAULTY)
        self.redis_proxy = RedisProxy(installation.redis_url) if can_be_proxied(installation.redis_url) else None
        self.is_closed_without_redis = installation.is_closed_without_redis
        self.token = secrets.token_urlsafe(24)
        self.keys: dict[str, str] = {}
        self.key_ids: dict[str, str] = {}
        # The outcomes that the audit must have for some requests, by their ids.
        self.outcomes: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            _sweep_folders()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=FOLDERS)))
            for backend in self.backends.values():
                await stack.enter_async_context(backend)
            await stack.enter_async_context(self.client)
            if self.redis_proxy is not None:
                await stack.enter_async_context(self.redis_proxy)
            stack.push_async_callback(self._end_keys)
            await self._make_keys()
            count = 3 if self._with_third else 2
            self.processes = [Process(self._variables(folder), folder / f"{number}.log") for number in range(count)]
            for process in self.processes:
                await process.start()
                stack.push_async_callback(process.stop)
            self.first, self.second = self.processes[:2]
            await asyncio.gather(*map(self._ready, self.processes))
            for name in ("drill-refused", SINGLE):
                await self.backends[name].close()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _variables(self, folder: Path) -> dict[str, str]:
        changed = {
            "DATABASE_URL": self._installation.database_url,
            "REDIS_URL": self.redis_proxy.url if self.redis_proxy else self._installation.redis_url,
            "OLLAMA_BACKENDS": json.dumps([self._config(backend) for backend in self.backends.values()]),
            "GATEWAY_LOG_LEVEL": "WARNING",
            "GATEWAY_LOG_FORMAT": "console",
            "GATEWAY_DRAIN_S": "10",
            "MODEL_DISCOVERY_REFRESH_S": "60",
            "MODEL_DISCOVERY_CACHE_TTL_S": "600",
            "MAX_QUEUE_WAIT_S": "0",
            "QUEUE_WAIT_S": "30",
            "QUEUE_SIZE": "100",
            "ROUTING_SPILL_S": "never",
            "AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN": "1000",
            "DATABASE_POOL_SIZE": "2",
            "DATABASE_POOL_OVERFLOW": "2",
            metrics.FOLDER_VARIABLE: str(folder),
        }
        empty = dict.fromkeys(("DATABASE_URL_FILE", "REDIS_URL_FILE", "OLLAMA_BACKENDS_FILE"), "")
        return {**os.environ, **changed, **empty}

    def _config(self, backend: FakeBackend) -> dict[str, Any]:
        waits = {"connect_timeout_s": 1, "read_timeout_s": 2, "idle_timeout_s": 30, "total_timeout_s": 60}
        slots = BUSY_SLOTS if backend.name == BUSY else 10_000
        # With any ROUTING the healthy one comes last.
        tier = 2 if backend is self.healthy else 1
        named = {"name": backend.name, "base_url": backend.url, "kind": "ollama", "max_connections": 32}
        return {**named, **waits, "auth_token": self.token, "slots": slots, "tier": tier}

    async def _make_keys(self) -> None:
        """Concurrently, because hashing is slow on purpose."""
        mark = secrets.token_hex(4)

        async def make(name: str, quota: Quota, models: Sequence[str]) -> None:
            wanted = NewKey(
                f"drill {mark} {name}",
                tuple(models),
                quota,
                flags=(DRILL, SHOW_BACKEND),
                lifetime=KEY_LIFETIME,
                heartbeat_after_s=HEARTBEAT_S.get(name),
                audit_retention=ROW_RETENTION,
            )
            self.key_ids[name], self.keys[name] = await self.key_store.make(wanted)

        await asyncio.gather(*(make(name, quota, models) for name, (quota, models) in LIMITS.items()))

    async def _end_keys(self) -> None:
        for key_id in self.key_ids.values():
            with suppress(CommandFailed, StoreUnavailable):
                await self.key_store.revoke(key_id)
        with suppress(StoreUnavailable):
            await self.key_store.drop_drill_keys(2 * ROW_RETENTION)

    async def _ready(self, process: Process) -> None:
        """Waits until it serves. Raises CommandFailed with the end of its log."""
        wanted = {*FAULTY, SINGLE, BUSY, PLAIN}
        key = self.keys["plain"]

        async def knows_all() -> bool:
            try:
                answer = await self.client.ask(f"{process.url}/v1/models", key, method="GET")
                return {entry["id"].removesuffix(":latest") for entry in json.loads(answer.body)["data"]} >= wanted
            except (OSError, ValueError, KeyError):
                # It never arrived, or this was not an answer yet.
                self.client.sent.pop()
                return False

        deadline = asyncio.get_running_loop().time() + START_S
        while not await knows_all():
            if asyncio.get_running_loop().time() > deadline or await process.ended(0.1) is not None:
                last = " / ".join(process.log.read_text(errors="replace").strip().splitlines()[-3:])
                raise CommandFailed(f"the drill's gateway does not start: {last or 'its log is empty'}; see `make doctor`")

    async def ask(self, path: str, model: str, key: str = "plain", *, stream: bool, at: Process | None = None) -> ClientAnswer:
        url = (at or self.first).url + path
        return await self.client.ask(url, self.keys[key], request_of(path, chat(model, stream=stream)))

    async def rows(self) -> dict[str, list[dict[str, Any]]]:
        """The audit's rows of the drill's keys, by request id."""
        found: dict[str, list[dict[str, Any]]] = {}
        for key_id in self.key_ids.values():
            for row in await reports.requests(self._database, AuditFilter(key_id=key_id, limit=1000)):
                found.setdefault(row["request_id"], []).append(row)
        return found

    async def until_rows_are_there(self, seconds: float) -> dict[str, list[dict[str, Any]]]:
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            found = await self.rows()
            if set(self.client.sent) <= found.keys() or asyncio.get_running_loop().time() > deadline:
                return found
            await asyncio.sleep(0.3)
