"""One model server: its aiohttp sessions, claims on its connections, its failures as BackendFault."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from gateway.core.cancel_scope import CallScope, CancelScope
from gateway.dialects.dialect import Upload
from gateway.fleet.backends.circuit_breaker import CircuitBreaker
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.backends.frame_buffer import HeldPieces, UnfinishedFrames
from gateway.fleet.backends.http_client import (
    LONGEST_LINE,
    BackendFault,
    BackendResponse,
    ConnectionLost,
    ConnectionPool,
    HttpClient,
    no_head,
)

KEEP_IDLE_CONNECTIONS_S = 30.0
# Bytes of unfinished frames that all calls of a backend may hold together.
MOST_UNFRAMED = 32 * 2**20
# Bytes of translated streams that have not ended.
MOST_PIECES = 256 * 2**20
FIXED = {"Accept-Encoding": "identity", "Content-Type": "application/json"}


class Backend:
    """`async with Backend(config) as backend:` opens its sessions; `claim()` takes one of its connections."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self.name, self.kind = config.name, config.kind
        self.breaker = CircuitBreaker()
        self.in_flight = 0
        self.is_drained = False
        self.unframed, self.pieces = UnfinishedFrames(MOST_UNFRAMED), HeldPieces(MOST_PIECES)
        self._auth = config.auth()

    async def __aenter__(self) -> Self:
        self._session = self._new_session(force_close=False)
        self._fresh_session = self._new_session(force_close=True)
        fixed = {**FIXED, **self._auth}
        self._client = HttpClient(self._session, self.config, fixed)
        self._fresh_client = HttpClient(self._fresh_session, self.config, fixed)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._fresh_session.close()

    def _new_session(self, *, force_close: bool) -> aiohttp.ClientSession:
        # Claims bound the connections, so the connector need not queue.
        keep_alive: dict[str, Any] = {"force_close": True} if force_close else {"keepalive_timeout": KEEP_IDLE_CONNECTIONS_S}
        return aiohttp.ClientSession(
            connector=ConnectionPool(**keep_alive),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.config.connect_timeout_s),
            headers={"Accept-Encoding": "identity"},
            skip_auto_headers=("User-Agent",),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
        )

    @property
    def is_full(self) -> bool:
        return self.in_flight >= self.config.max_connections

    def take(self) -> None:
        """Takes one of its connections; the caller must `give_back`."""
        self.in_flight += 1
        self.breaker.attempt()

    def give_back(self) -> None:
        self.in_flight -= 1
        self.breaker.abandoned()

    @contextmanager
    def claim(self) -> Iterator[None]:
        self.take()
        try:
            yield
        finally:
            self.give_back()

    async def post(self, path: bytes, headers: bytes, body: bytes, cancel_scope: CallScope) -> BackendResponse:
        """Sends a call to a model; returns with the head of the response, which the caller must close.

        `headers` are whole lines. A connection that is lost before the first byte of the response is replaced once.
        """
        try:
            return await self._client.post(path, headers, body, cancel_scope)
        except ConnectionLost:
            return await self._fresh_client.post(path, headers, body, cancel_scope)

    async def upload(self, path: bytes, headers: bytes, upload: Upload, model: str) -> BackendResponse:
        """Sends a form in pieces; returns as `post`. Each piece has the deadline of an answer, which comes after them."""
        wait_s = self.config.read_timeout_s

        async def pieces() -> AsyncIterator[bytes]:
            for piece in upload.pieces(model):
                yield piece
                cancel_scope.within(wait_s, no_head)

        lines = headers.decode("latin-1").splitlines()
        sent = {name: value for name, _, value in (line.partition(": ") for line in lines)}
        sent |= {"Content-Type": upload.content_type, "Content-Length": str(upload.length(model))}
        with CancelScope() as cancel_scope:
            cancel_scope.within(wait_s, no_head)
            # A connection that the backend closes while it is idle would cost a second upload.
            return await self._head(self._fresh_session, "POST", path.decode(), sent, pieces(), self.config.total_timeout_s)

    def url(self, path: str) -> URL:
        return URL(self.config.base_url + path, encoded=True)

    @asynccontextmanager
    async def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | AsyncIterator[bytes] | None = None,
        *,
        wait_s: float | None = None,
    ) -> AsyncIterator[BackendResponse]:
        """Sends any other request; otherwise as `post`."""
        try:
            upstream = await self._head(self._session, method, path, headers, body, wait_s)
        except ConnectionLost:
            if not isinstance(body, bytes | None):
                raise
            upstream = await self._head(self._fresh_session, method, path, headers, body, wait_s)
        try:
            yield upstream
        finally:
            upstream.close()

    async def _head(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | AsyncIterator[bytes] | None,
        wait_s: float | None,
    ) -> BackendResponse:
        try:
            with CancelScope() as cancel_scope:
                cancel_scope.within(wait_s or self.config.read_timeout_s, no_head)
                response = await session.request(
                    method, self.url(path), data=body, headers={**headers, **self._auth}, allow_redirects=False
                )
        except (aiohttp.ConnectionTimeoutError, aiohttp.ServerTimeoutError) as wrong:
            raise BackendFault("connect_timeout") from wrong
        except aiohttp.ClientConnectorError as wrong:
            raise BackendFault("unreachable", type(wrong.os_error).__name__) from wrong
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as wrong:
            raise ConnectionLost("disconnected", type(wrong).__name__) from wrong
        except (aiohttp.ClientError, ValueError) as wrong:
            raise BackendFault("not_http", type(wrong).__name__) from wrong
        return BackendResponse(response.status, response.headers, response.content, response.release, response.close)
