"""What is killed: machines, two gateways with several processes each, and their PostgreSQL and Redis, which they share."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import redis

from gateway import settings
from gateway.auth.key import BATCH, SUB_USERS
from gateway.auth.key_store import KeyStore, NewKey
from gateway.components import database_of, hasher_of
from gateway.limits.quota import Quota
from gateway.settings import Settings
from gateway.stores import redis_keys
from tests.bench.fleet.scenario import BoxConfig
from tests.support import fleet_board
from tests.support.durable_stores import DurableStores, durable_stores
from tests.support.gateway_settings import environment_for
from tests.support.processes import answers, descendants, environment, free_port, is_alive, until
from tests.support.project import PROJECT

MODELS = {"qwen3:32b": 20.0, "gemma3:12b": 9.0, "llama3.2": 3.0, "embed": 1.0}
SMALL = {name: size for name, size in MODELS.items() if size < 12}
BOXES = (
    BoxConfig("big", MODELS, vram=24, slots=2, prefill=2500, decode=60, disk=2),
    BoxConfig("mid", MODELS, vram=24, slots=3, prefill=2000, decode=50, disk=2),
    BoxConfig("old", SMALL, vram=12, slots=1, prefill=900, decode=40, disk=1),
)
QUEUE_WAIT_S = 15
LOADED_EVERY_S = 1.0
SETTINGS = {
    "GATEWAY_WORKERS": "2",
    "GATEWAY_DRAIN_S": "3",
    "GATEWAY_LOG_LEVEL": "INFO",
    "ROUTING": "fast",
    "QUEUE_WAIT_S": str(QUEUE_WAIT_S),
    "QUEUE_SIZE": "30",
    "MAX_QUEUE_WAIT_S": "3",
    "OLLAMA_SLOTS": "0",
    "OLLAMA_CONNECT_TIMEOUT_S": "2",
    "OLLAMA_READ_TIMEOUT_S": "20",
    "MODEL_DISCOVERY_REFRESH_S": "5",
    "LOADED_MODELS_REFRESH_S": str(LOADED_EVERY_S),
}
KEYS = {
    "one": NewKey("one", quota=Quota(concurrent=1)),
    "three": NewKey("three", quota=Quota(concurrent=3)),
    "heavy": NewKey("heavy", weight=3.0),
    "people": NewKey("people", quota=Quota(concurrent=6), flags=(SUB_USERS,)),
    "batch": NewKey("batch", flags=(BATCH,)),
    "alive": NewKey("alive", heartbeat_after_s=0.5),
}


@dataclass
class Box:
    config: BoxConfig
    log: Path
    speed: float
    port: int = 0
    process: "subprocess.Popen[bytes] | None" = None
    killed_at: list[float] = field(default_factory=list)

    def begin(self) -> None:
        self.port = self.port or free_port()
        words = [json.dumps(asdict(self.config)), str(self.log), str(self.port), "--speed", str(self.speed)]
        command = [sys.executable, "-m", "tests.bench.fleet.chaos.box", *words]
        self.process = subprocess.Popen(command, cwd=PROJECT, env=environment({}), stdout=subprocess.PIPE)

    def wait_ready(self) -> None:
        assert self.process and self.process.stdout
        assert self.process.stdout.readline(), f"the machine {self.config.name} did not start"

    def start(self) -> None:
        self.begin()
        self.wait_ready()

    def kill(self) -> None:
        if self.process is not None:
            self.killed_at.append(time.time())
            self.process.kill()
            self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()

    @property
    def entry(self) -> dict[str, Any]:
        place = {"name": self.config.name, "base_url": f"http://127.0.0.1:{self.port}", "kind": "ollama"}
        return {**place, "max_connections": 100, "slots": self.config.slots, "tier": 1}

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def calls(self) -> int:
        """How many calls it has begun and not ended, since it was last started."""
        last = max(self.killed_at, default=0.0)
        kinds = [line["kind"] for line in self.lines() if line["at"] >= last]
        return kinds.count("begins") - kinds.count("ends")


@dataclass
class Gateway:
    """One of the two, each with workers."""

    folder: Path
    names: dict[str, str]
    url: str = ""
    process: "subprocess.Popen[bytes] | None" = None
    stopped: set[int] = field(default_factory=set)

    def begin(self) -> None:
        port = free_port()
        names = {**self.names, "GATEWAY_BIND_HOST": "127.0.0.1", "GATEWAY_BIND_PORT": str(port)}
        command = [sys.executable, "-m", "gateway", "serve"]
        with (self.folder / f"gateway-{port}.log").open("wb") as out:
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment(names), stdout=out, stderr=out)
        self.url = f"http://127.0.0.1:{port}"

    def wait_ready(self) -> None:
        until(lambda: answers(f"{self.url}/healthz"), 60)

    def start(self) -> None:
        self.begin()
        self.wait_ready()

    def outages(self) -> list[tuple[float, float]]:
        """When its processes could not reach Redis, by their logs: a busy machine may make it late, too."""
        found = []
        for log in self.folder.glob("*.log"):
            began = 0.0
            for line in log.read_text().splitlines():
                with suppress(ValueError, KeyError):
                    fields = json.loads(line)
                    if fields["logger"] == "gateway.store" and fields["message"].startswith("Redis"):
                        at = datetime.fromisoformat(fields["time"]).timestamp()
                        if "unreachable" in fields["message"]:
                            began = began or at
                        elif began:
                            found.append((began, at))
                            began = 0.0
        return found

    def workers(self) -> list[int]:
        return sorted(descendants(self.process.pid)) if self.process else []

    def end(self, number: signal.Signals) -> None:
        """Ends all of it; when it was killed, its workers end soon after."""
        assert self.process
        pids = self.workers()
        self.process.send_signal(number)
        self.process.wait(60)
        until(lambda: not any(map(is_alive, pids)), 60)

    def wake(self) -> None:
        for pid in list(self.stopped):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self.stopped.discard(pid)


@dataclass
class Fleet:
    stores: DurableStores
    boxes: list[Box]
    gateways: list[Gateway]
    keys: dict[str, str]

    def urls(self) -> list[str]:
        return [gateway.url for gateway in self.gateways]

    def redis(self) -> "redis.Redis":
        return redis.Redis.from_url(self.stores.redis_url)

    def board(self) -> set[str]:
        """What is left on the board of calls that should have ended."""
        with self.redis() as client:
            return fleet_board.left(client, redis_keys.FLEET)

    def keys_and_rows(self) -> set[str]:
        """What is left in Redis of calls that should have been settled."""
        with self.redis() as client:
            of_keys = {name.decode(): held(client, name) for kind in "cvq" for name in client.scan_iter(f"nz:*:{kind}:*")}
            found = {f"{name} {value}" for name, value in of_keys.items() if value}
            found |= {shard.calls.decode() for shard in redis_keys.BY_SHARD if client.hlen(shard.calls)}
            found |= {shard.leases.decode() for shard in redis_keys.BY_SHARD if client.zcard(shard.leases)}
        return found | self.rows_in_redis()

    def rows_in_redis(self) -> set[str]:
        with self.redis() as client:
            return {shard.rows.decode() for shard in redis_keys.BY_SHARD if client.xlen(shard.rows)}

    def in_flight(self) -> dict[str, int]:
        """The calls that the machines have, and that the gateways say they have."""
        found = {box.config.name: box.calls() for box in self.boxes}
        with self.redis() as client:
            for text in client.hgetall(redis_keys.PROCESS_STATES).values():
                state = json.loads(text)
                if time.time() - state["at"] < 5:
                    for name, backend in state["backends"].items():
                        found[f"to {name}"] = found.get(f"to {name}", 0) + backend["in_flight"]
        return {name: many for name, many in found.items() if many}

    def rows(self) -> list[dict[str, Any]]:
        async def read() -> list[dict[str, Any]]:
            connection = await asyncpg.connect(self.stores.database_url)
            try:
                query = "SELECT id, request_id, outcome, status, key_id, backend, detail, attempts FROM audit"
                return [dict(row) for row in await connection.fetch(query)]
            finally:
                await connection.close()

        return asyncio.run(read())


def held(client: "redis.Redis", name: bytes) -> Any:
    """What Redis has of a key's slots and reserve; of its queue, who is in it still."""
    if b":v:" in name:
        return client.get(name)
    return client.zrangebyscore(name, time.time() * 1000 if b":q:" in name else "-inf", "+inf", withscores=True)


async def made_keys(found: Settings) -> dict[str, str]:
    async with database_of(found) as database:
        key_store = KeyStore(database, hasher_of(found), None)
        return {name: (await key_store.make(wanted))[1] for name, wanted in KEYS.items()}


@contextmanager
def fleet(folder: Path, speed: float) -> Iterator[Fleet]:
    with ExitStack() as stack:
        stores = stack.enter_context(durable_stores())
        boxes = [Box(config, folder / f"{config.name}.jsonl", speed) for config in BOXES]
        for box in boxes:
            stack.callback(box.kill)
            box.begin()
        for box in boxes:
            box.wait_ready()
        urls = {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url}
        names = environment_for(*(box.entry for box in boxes), **urls, **SETTINGS)
        keys = asyncio.run(made_keys(settings.load(names, None)))
        gateways = []
        for name in ("one", "two"):
            place = folder / name
            place.mkdir()
            gateways.append(Gateway(place, names))
            stack.callback(_end, gateways[-1])
            gateways[-1].begin()
        for gateway in gateways:
            gateway.wait_ready()
        yield Fleet(stores, boxes, gateways, keys)


def _end(gateway: Gateway) -> None:
    gateway.wake()
    if gateway.process and gateway.process.poll() is None:
        gateway.end(signal.SIGTERM)
