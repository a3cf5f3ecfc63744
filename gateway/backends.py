"""The servers behind us: one aiohttp session each, claims on their connections, their failures in our words."""

import logging
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from gateway.backend_config import BackendConfig
from gateway.breaker import Breaker
from gateway.guard import Guard

LOG = logging.getLogger("gateway.backends")
KEEP_IDLE_CONNECTIONS_S = 30.0
LONGEST_WHOLE_ANSWER = 64 * 2**20
PRINTABLE = re.compile(r"[\x20-\x7e]*")


class BackendFault(Exception):
    """A backend did not answer as it should; `reason` is one word for logs and metrics."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class ConnectionLost(BackendFault):
    """A connection ended before any byte of the answer."""


class Upstream:
    """An answer whose head has come; leaving its block closes the connection unless the answer was read to its end."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        content_type = response.headers.get("Content-Type", "")
        self.content_type = content_type if PRINTABLE.fullmatch(content_type) else ""
        self.headers = response.headers

    async def read(self) -> bytes:
        """The next bytes as they come, b"" at the end; raises BackendFault where the answer breaks off."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as wrong:
            raise BackendFault("broken_off", type(wrong).__name__) from wrong

    async def read_whole(self, limit: int = LONGEST_WHOLE_ANSWER) -> bytes:
        pieces, size = [], 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise BackendFault("too_large", f"more than {limit} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        if self._response.content.is_eof():
            self._response.release()
        else:
            self._response.close()


class Backend:
    """`async with Backend(config) as backend:` opens its session; `claim()` takes one of its connections."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self.name, self.kind = config.name, config.kind
        self.breaker = Breaker()
        self.in_flight = 0
        self._auth = config.auth()

    async def __aenter__(self) -> Self:
        self._session = self._new_session(force_close=False)
        self._fresh_session = self._new_session(force_close=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()
        await self._fresh_session.close()

    def _new_session(self, *, force_close: bool) -> aiohttp.ClientSession:
        # Claims bound the connections, so the connector need not queue.
        connector = (
            aiohttp.TCPConnector(limit=0, force_close=True)
            if force_close
            else aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_IDLE_CONNECTIONS_S)
        )
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.config.connect_timeout_s),
            headers={"Accept-Encoding": "identity"},
            skip_auto_headers=("User-Agent",),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            max_line_size=65_536,
            max_field_size=65_536,
        )

    @property
    def is_full(self) -> bool:
        return self.in_flight >= self.config.max_connections

    @contextmanager
    def claim(self) -> Iterator[None]:
        self.in_flight += 1
        self.breaker.attempt()
        try:
            yield
        finally:
            self.in_flight -= 1
            self.breaker.abandoned()

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
    ) -> AsyncIterator[Upstream]:
        """Ends with the answer's head. A connection that was lost before any byte is replaced by a fresh one, once."""
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
    ) -> Upstream:
        try:
            with Guard() as guard:
                guard.within(wait_s or self.config.read_timeout_s, BackendFault("head_timeout"))
                return Upstream(
                    await session.request(
                        method, self.url(path), data=body, headers={**headers, **self._auth}, allow_redirects=False
                    )
                )
        except (aiohttp.ConnectionTimeoutError, aiohttp.ServerTimeoutError) as wrong:
            raise BackendFault("connect_timeout") from wrong
        except aiohttp.ClientConnectorError as wrong:
            raise BackendFault("unreachable", type(wrong.os_error).__name__) from wrong
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as wrong:
            raise ConnectionLost("disconnected", type(wrong).__name__) from wrong
        except (aiohttp.ClientError, ValueError) as wrong:
            raise BackendFault("not_http", type(wrong).__name__) from wrong
