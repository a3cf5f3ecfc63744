"""A proxy in front of Redis that can be frozen: its clients get no answer, while the server serves others."""

import asyncio
import ssl
from contextlib import suppress
from typing import Self
from urllib.parse import SplitResult, urlunsplit

from gateway.stores.urls import split

HOST = "127.0.0.1"
PIECE, CONNECT_S = 65_536, 3.0


def can_be_proxied(url: str) -> bool:
    """Not a cluster or sentinels, which give clients addresses of servers, nor a server that checks client certificates."""
    parts = split(url)
    return parts.scheme in ("redis", "unix") or (parts.scheme == "rediss" and "ssl_" not in parts.query)


class RedisProxy:
    """`async with RedisProxy(url) as proxy:` listens on `proxy.url`."""

    def __init__(self, url: str) -> None:
        self._to = split(url)
        self._flows = asyncio.Event()
        self._flows.set()
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry, HOST, 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.thaw()
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()

    @property
    def url(self) -> str:
        login, at, _ = self._to.netloc.rpartition("@")
        port = self._server.sockets[0].getsockname()[1]
        # The path of a socket is its address; the rest, with the query, is for Redis.
        path = "" if self._to.scheme == "unix" else self._to.path
        return urlunsplit(SplitResult("redis", f"{login}{at}{HOST}:{port}", path, self._to.query, ""))

    def freeze(self) -> None:
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.wait_for(self._connect(), CONNECT_S)
        except (OSError, TimeoutError):
            writer.transport.abort()
            return
        self._open |= {writer, far_writer}
        ways = [asyncio.create_task(self._pass(*way)) for way in ((reader, far_writer), (far_reader, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for one in (writer, far_writer):
                self._open.discard(one)
                one.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._to.scheme == "unix":
            return await asyncio.open_unix_connection(self._to.path)
        secure = ssl.create_default_context() if self._to.scheme == "rediss" else None
        return await asyncio.open_connection(self._to.hostname or HOST, self._to.port or 6379, ssl=secure)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(PIECE):
                await self._flows.wait()
                writer.write(piece)
                await writer.drain()
