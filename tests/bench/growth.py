"""Whether the cost of a request grows with the installation: many keys, models and backends compared with few."""

import asyncio
import json
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from gateway import settings
from gateway.auth.key_store import KeyStore, NewKey
from gateway.components import database_of, hasher_of
from tests.bench import subjects
from tests.bench.subjects import Subject
from tests.bench.tools import Tools, load

# Making and first checking ten thousand keys would else take longer than everything else.
CHEAP = {"ARGON2_TIME_COST": "1", "ARGON2_MEMORY_COST_KIB": "64", "ARGON2_PARALLELISM": "1"}
ROUNDS, MADE_AT_ONCE = 3, 8


class Size(NamedTuple):
    keys: int
    models: int
    backends: int


FEW, MANY = Size(10, 5, 2), Size(10_000, 1_000, 50)


class List(BaseHTTPRequestHandler):
    """A backend that only lists its models."""

    protocol_version = "HTTP/1.1"

    def __init__(self, names: Sequence[str], *args: Any) -> None:
        self._names = names
        super().__init__(*args)

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in self._names]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *loaded: Any) -> None:
        """Logs nothing."""


@contextmanager
def lists(models: int, backends: int) -> Iterator[list[int]]:
    """Starts backends that share the models; yields their ports."""
    each = -(-models // backends)
    names = [f"model-{number}" for number in range(models)]
    with ExitStack() as stack:
        ports = []
        for start in range(0, models, each):
            server = ThreadingHTTPServer(("127.0.0.1", 0), partial(List, names[start : start + each]))
            stack.callback(server.server_close)
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            stack.callback(server.shutdown)
            ports.append(server.server_address[1])
        yield ports


@contextmanager
def installation(size: Size, mock_port: int, folder: Path) -> Iterator[tuple[Subject, Path]]:
    """A gateway of that size, in front of the mock as the last backend, and the file with its keys."""
    folder.mkdir(mode=0o711)
    with lists(size.models - 1, size.backends - 1) as ports:
        addresses = [*ports, mock_port]
        backends = [
            {"name": f"backend-{n}", "kind": "openai", "base_url": f"http://127.0.0.1:{port}", "max_connections": 1000}
            for n, port in enumerate(addresses)
        ]
        named = {**CHEAP, "OLLAMA_BACKENDS": json.dumps(backends)}
        with subjects.gateway(mock_port, folder, more=named) as gateway:
            keys = folder / "keys"
            keys.write_text("\n".join(asyncio.run(made(size.keys, gateway.names))) + "\n")
            yield gateway, keys


async def made(wanted: int, names: dict[str, str]) -> list[str]:
    loaded = settings.load(names, None)
    gate = asyncio.Semaphore(MADE_AT_ONCE)
    async with database_of(loaded) as database:
        key_store = KeyStore(database, hasher_of(loaded), None)

        async def one(number: int) -> str:
            async with gate:
                return (await key_store.make(NewKey(f"grown {number}")))[1]

        return await asyncio.gather(*(one(number) for number in range(wanted)))


def measure(tools: Tools, mock_port: int, folder: Path) -> dict[str, float]:
    """CPU time of a request in microseconds, by size: the median of rounds in turn, with all keys in use."""
    found: dict[str, list[float]] = {}
    with ExitStack() as stack:
        grown = [(size, *stack.enter_context(installation(size, mock_port, folder / f"{size.keys}"))) for size in (FEW, MANY)]
        for size, gateway, keys in grown:
            asked = 0
            # Each key is checked once.
            while asked < size.keys:
                asked += load(tools, gateway.port, "", gateway.pids, "-k", str(keys), "-c", "16", "-t", "4", "-w", "0")["ok"]
        for _ in range(ROUNDS):
            for size, gateway, keys in grown:
                loaded = load(tools, gateway.port, "", gateway.pids, "-k", str(keys), "-c", "32", "-t", "2", "-w", "0.5")
                found.setdefault(name_of(size), []).append(loaded["cpu_us_req"])
    return {name: statistics.median(values) for name, values in found.items()}


def name_of(size: Size) -> str:
    return f"CPU of a request with {size.keys:,} keys, {size.models:,} models, {size.backends} backends, µs"
