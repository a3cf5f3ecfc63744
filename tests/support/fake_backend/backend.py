"""A fake model server: a real HTTP/1.1 server on 127.0.0.1, healthy unless a test gives it a script."""

import asyncio
import copy
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from typing import Any, Self

from tests.support.fake_backend.answers import HealthyServer, Kind
from tests.support.fake_backend.connection import Connection
from tests.support.fake_backend.scripts import Outcome, Received, Script, Steps

BACKLOG = 1024
# Below the kernel's range of client ports, so that nobody takes the port while the backend is stopped.
PORTS = range(15_000, 32_000)
LONGEST_WAIT_S = 5.0


class FakeBackend:
    """Every method may be called from any thread; `stop` and `start` keep the port."""

    def __init__(
        self,
        kind: Kind = "ollama",
        models: Iterable[str] = ("llama3.2:latest",),
        *,
        name: str = "fake",
        port: int = 0,
        pieces: int = 4,
        pause_s: float = 0.0,
        token: str | None = None,
        token_header: str = "Authorization",
        close_idle_as_request_arrives: bool = False,
        is_native: bool = False,
    ) -> None:
        self.healthy = HealthyServer(kind, list(models), name, pieces, pause_s, token, token_header, is_native=is_native)
        self._as_made = copy.deepcopy(self.healthy)
        self.port = port
        self.close_idle_as_request_arrives = close_idle_as_request_arrives
        self.stale_resets = 0
        self.in_flight = 0
        self._lock = threading.Lock()
        self._requests: list[Received] = []
        self._scripts: dict[str, Script] = {}
        self._queues: dict[str, deque[Script]] = {}
        self._connections: set[Connection] = set()
        self._accepted = 0
        self._accepting: set[asyncio.Task[Any]] = set()
        self._queue_fillers: list[socket.socket] = []
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def models(self) -> list[str]:
        return self.healthy.models

    @property
    def requests(self) -> list[Received]:
        with self._lock:
            return list(self._requests)

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    def calls(self, path: str) -> list[Received]:
        return [request for request in self.requests if request.path == path]

    def play(self, path: str, script: Script | None) -> None:
        """Every later request for the path gets the script; None restores the healthy answer."""
        with self._lock:
            self._queues.pop(path, None)
            if script is None:
                self._scripts.pop(path, None)
            else:
                self._scripts[path] = script

    def play_once(self, path: str, *scripts: Script) -> None:
        """The next requests for the path get these scripts, one each."""
        with self._lock:
            self._queues.setdefault(path, deque()).extend(scripts)

    def wait_idle(self, timeout_s: float = LONGEST_WAIT_S) -> bool:
        """Waits until no request is being answered, as only then every outcome is known; false if that takes too long."""
        deadline = time.monotonic() + timeout_s
        while self.in_flight:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def renew(self) -> None:
        """For the next test: healthy as it was made, without scripts and without what it has got."""
        self.start()
        assert self.wait_idle()
        with self._lock:
            self.healthy = copy.deepcopy(self._as_made)
            for kept in (self._requests, self._scripts, self._queues):
                kept.clear()

    def start(self) -> None:
        if self._thread is not None:
            return
        self._listener = _listen(self.port)
        self.port = self._listener.getsockname()[1]
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), name=self.url, daemon=True)
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """Like a killed process: connections are closed and new ones refused."""
        if self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None

    def freeze(self, *, accepting: bool = True) -> None:
        """Like a process stopped by SIGSTOP: the kernel still accepts connections, but nobody answers.

        With accepting=False the kernel's queue is full as well, so that new connections wait.
        """
        self._call(self._freeze(accepting))

    def thaw(self) -> None:
        self._call(self._thaw())

    def arrived(self, request: Received) -> Steps:
        with self._lock:
            self.in_flight += 1
            self._requests.append(request)
            queue = self._queues.get(request.path)
            script = queue.popleft() if queue else self._scripts.get(request.path, self.healthy)
        return script(request) if callable(script) else script

    def finished(self, request: Received, outcome: Outcome) -> None:
        request.finished = time.monotonic()
        request.outcome = outcome
        with self._lock:
            self.in_flight -= 1

    def opened(self, connection: Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def _call(self, doing: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(doing, self._loop).result(LONGEST_WAIT_S)

    async def _run(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self.thawed = asyncio.Event()
        await self._thaw()
        ready.set()
        try:
            await self._stopping.wait()
        finally:
            await self._hang_up()

    async def _hang_up(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._empty_queue()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        connections = list(self._connections)
        for connection in connections:
            connection.task.cancel()
        await asyncio.gather(*(connection.task for connection in connections), return_exceptions=True)
        for connection in connections:
            connection.transport.abort()
        await asyncio.gather(*(connection.lost.wait() for connection in connections))

    async def _freeze(self, accepting: bool) -> None:
        self.thawed.clear()
        self._loop.remove_reader(self._listener)
        if not accepting:
            self._listener.listen(0)
            self._queue_fillers = [_open_connection(self.port) for _ in range(3)]

    async def _thaw(self) -> None:
        self._empty_queue()
        self._listener.listen(BACKLOG)
        self._loop.add_reader(self._listener, self._accept)
        self.thawed.set()

    def _empty_queue(self) -> None:
        for sock in self._queue_fillers:
            sock.close()
        self._queue_fillers = []

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        sock.setblocking(False)
        # As real servers do; otherwise a body waits 40 ms for the acknowledgement of its head.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._accepted += 1
        task = self._loop.create_task(self._connect(sock, self._accepted))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    async def _connect(self, sock: socket.socket, number: int) -> None:
        await self._loop.connect_accepted_socket(lambda: Connection(self, number), sock)


def _listen(port: int) -> socket.socket:
    for candidate in [port] if port else random.sample(PORTS, 50):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        try:
            listener.bind(("127.0.0.1", candidate))
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            continue
        return listener
    raise OSError(f"no port to listen on (asked for {port})")


def _open_connection(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.connect_ex(("127.0.0.1", port))
    return sock
