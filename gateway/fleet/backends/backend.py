"""The servers behind us: one aiohttp session each, claims on their connections, their failures in our words."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from gateway.core.cancel_scope import CallScope, CancelScope
from gateway.fleet.backends.circuit_breaker import CircuitBreaker
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.backends.frame_buffer import UnfinishedFrames
from gateway.fleet.backends.http_client import LONGEST_LINE, BackendFault, BackendResponse, ConnectionLost, HttpClient, Pool

KEEP_IDLE_CONNECTIONS_S = 30.0
# Of all calls together: frames without end.
MOST_UNFRAMED = 32 * 2**20
FIXED = {"Accept-Encoding": "identity", "Content-Type": "application/json"}


class Backend:
    """`async with Backend(config) as backend:` opens its session; `claim()` takes one of its connections."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self.name, self.kind = config.name, config.kind
        self.breaker = CircuitBreaker()
        self.in_flight = 0
        self.is_drained = False
        self.unframed = UnfinishedFrames(MOST_UNFRAMED)
        self._auth = config.auth()

    async def __aenter__(self) -> Self:
        self._session = self._new_session(force_close=False)
        self._fresh_session = self._new_session(force_close=True)
        fixed = {**FIXED, **self._auth}
        self._caller = HttpClient(self._session, self.config, fixed)
        self._fresh_caller = HttpClient(self._fresh_session, self.config, fixed)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._fresh_session.close()

    def _new_session(self, *, force_close: bool) -> aiohttp.ClientSession:
        # Claims bound the connections, so the connector need not queue.
        connector = Pool(force_close=True) if force_close else Pool(keepalive_timeout=KEEP_IDLE_CONNECTIONS_S)
        return aiohttp.ClientSession(
            connector=connector,
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
        """One of its connections; `give_back` is owed."""
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

    async def post(self, path: bytes, headers: bytes, body: bytes, guard: CallScope) -> BackendResponse:
        """The way of calls to models: ends with the answer's head, `close` is owed to it; `headers` are whole lines.

        A connection that was lost before any byte is replaced by a fresh one, once.
        """
        try:
            return await self._caller.post(path, headers, body, guard)
        except ConnectionLost:
            return await self._fresh_caller.post(path, headers, body, guard)

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
        """The way of everything else, as `post` in all but the method."""
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
            with CancelScope() as guard:
                guard.within(wait_s or self.config.read_timeout_s, lambda: BackendFault("head_timeout"))
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
