"""A small application behind the gateway's HTTP protocol, on a real port: it answers with what it received."""

import asyncio
import json
import socket
import threading
from functools import partial
from typing import Any, Self

import uvicorn

from gateway.core.errors import GatewayError
from gateway.edge import server
from gateway.edge.connection_limit import ConnectionLimit
from gateway.edge.protocol import Protocol


class EchoServer:
    """`with EchoServer() as echo:` — answers each request with its method, path, header names and body as JSON.

    `/wait/S` waits S seconds first; if the client leaves meanwhile, the target is added to `gone`. `/stream` answers in three
    pieces without a length, `/stream/S` with S seconds between them. `/ignore` does not read the body.
    """

    def __init__(self, most_connections: int | None = None) -> None:
        self._connection_limit = ConnectionLimit(most_connections) if most_connections else ConnectionLimit()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.gone: list[str] = []

    def __enter__(self) -> Self:
        self._listener = server.listen("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(10)
        self._listener.close()

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(10)
        return connection

    def send_little_at_once(self) -> None:
        """New connections get a small send buffer, so that a client that does not read soon blocks the server."""
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    @property
    def held_bytes(self) -> int:
        """The size of the requests that wait for earlier answers."""
        return self._connection_limit.held

    @property
    def connections(self) -> int:
        return len(self._uvicorn.server_state.connections)

    @property
    def under_way(self) -> int:
        return len(self._uvicorn.server_state.tasks)

    def _run(self) -> None:
        protocol = partial(Protocol, connection_limit=self._connection_limit)
        options: Any = {"http": protocol, "ws": "none", "lifespan": "off", "interface": "asgi3", "proxy_headers": False}
        config = uvicorn.Config(self._answer, log_config=None, timeout_graceful_shutdown=1, **options)
        self._uvicorn = uvicorn.Server(config)
        server.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.call_later(0.05, self._ready.set)
        await self._uvicorn.serve([self._listener])

    def _stop(self) -> None:
        self._uvicorn.should_exit = True

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if refusal := scope["state"].get("refusal"):
            await _send(send, refusal.status, {"refused": str(refusal)})
            return
        if scope["path"].startswith("/wait/") and await self._client_leaves(scope):
            return
        body, more = b"", scope["path"] != "/ignore"
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message["body"]
                more = message["more_body"]
        except GatewayError as wrong:
            await _send(send, wrong.status, {"refused": str(wrong)})
            return
        if scope["path"].startswith("/stream"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"piece\n", "more_body": True})
                await asyncio.sleep(float(scope["path"].partition("/stream/")[2] or 0.01))
            await send({"type": "http.response.body", "body": b""})
            return
        names = [name.decode() for name, _ in scope["headers"]]
        echo = {"method": scope["method"], "path": scope["path"], "headers": names, "body": body.decode("latin-1")}
        await _send(send, 200, echo)

    async def _client_leaves(self, scope: Any) -> bool:
        left = asyncio.Event()
        scope["state"]["connection"].watch(left.set)
        try:
            async with asyncio.timeout(float(scope["path"].rpartition("/")[2])):
                await left.wait()
        except TimeoutError:
            return False
        finally:
            scope["state"]["connection"].watch(None)
        self.gone.append(f"{scope['path']}?{scope['query_string'].decode()}")
        return True


async def _send(send: Any, status: int, value: Any) -> None:
    body = json.dumps(value).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
