"""One HTTP call to a backend and its response, on aiohttp's connector and parser, without the work of its client for each call.

`ClientSession.request` builds a URL, merges headers, checks cookies, redirects and proxies; a gateway knows all of that
beforehand. Pooling, connecting, TLS and parsing are aiohttp's.
"""

import asyncio
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from aiohttp.streams import EofStream
from yarl import URL

from gateway.core.cancel_scope import CallScope
from gateway.fleet.backends.config import BackendConfig

LONGEST_WHOLE_ANSWER = 64 * 2**20
LONGEST_LINE = 65_536
# Less than this is not counted.
SMALL = 65_536
# Bytes of a head with those before it (1xx), how many heads, and how much of it the parser gets at once.
LONGEST_HEAD, MOST_HEADS, HEAD_SLICE = 256 * 1024, 32, 4096
# Bytes of framing without any of the body: extensions of a chunk, or trailers.
MOST_FRAMING = 256 * 1024
# Of a body in tiny chunks so many are parsed, or passed on one by one, before other tasks run.
CHUNKS_AT_ONCE, PIECES_AT_ONCE = 256, 32
PRINTABLE = re.compile(r"[\x20-\x7e]*")
UNSAFE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class BackendFault(Exception):
    """A backend did not answer as it should; `reason` is a word for logs and metrics."""

    # The backend's own words, if a client that has the beginning of an answer may have them.
    for_client = ""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class ConnectionLost(BackendFault):
    """A connection ended before any byte of the answer."""


class TooLarge(BackendFault):
    """A whole answer is longer than the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__("too_large", f"more than {limit} bytes")


class BoundedResponseHandler(ResponseHandler):
    """aiohttp's protocol with bounds: on heads, on framing, and on how many tiny chunks are parsed at once.

    Bytes that come while no request is open end the connection: the next request would take them for its response.
    """

    # Whether the bytes that arrived last contained some of the body for a `flow`.
    has_yielded = False
    _in_body = False
    _head_bytes = _framing = _body_bytes = 0
    _has_request = False

    def set_response_params(self, **params: Any) -> None:
        self._in_body, self._head_bytes, self._has_request = False, 0, True
        self._framing = self._body_bytes = 0
        super().set_response_params(**params)

    def set_idle(self) -> None:
        self._has_request = False

    def _drop_timeout(self) -> None:
        # Called at each body's end, too.
        self._in_body = False
        super()._drop_timeout()

    def data_received(self, data: bytes) -> None:
        if not self._has_request:
            if self.transport is not None:
                self.transport.abort()
        elif self._in_body or not data:
            self.has_yielded = False
            super().data_received(data)
            if self.has_yielded:
                self._framing = 0
            elif self._in_body:
                self._count_framing(len(data))
        else:
            self._receive_heads(data)

    def _count_framing(self, size: int) -> None:
        """Counts bytes of which nothing was body."""
        body = self._payload
        if body is None or self._reading_paused:
            return
        if body.total_bytes != self._body_bytes:
            self._body_bytes, self._framing = body.total_bytes, 0
            return
        self._framing += size
        if self._framing > MOST_FRAMING and self.transport is not None:
            self.transport.abort()

    def _receive_heads(self, data: bytes) -> None:
        while data and not self._has_body_begun():
            if self._exception is not None or self.transport is None:
                return
            part, data = data[:HEAD_SLICE], data[HEAD_SLICE:]
            self._head_bytes += len(part)
            super().data_received(part)
            too_much = self._head_bytes > LONGEST_HEAD or len(self._buffer) > MOST_HEADS
            if too_much and not self._has_body_begun() and self.transport is not None:
                self.transport.close()
                self.set_exception(HttpProcessingError(message="an endless head"))
        if data:
            self.data_received(data)

    def _has_body_begun(self) -> bool:
        body = self._payload
        if body is None or body.is_eof():
            return False
        if not self._in_body:
            self._in_body = True
            # This slows the parser of a reader down; aiohttp has no setting for it.
            body._high_water_chunks, body._low_water_chunks = CHUNKS_AT_ONCE, CHUNKS_AT_ONCE // 2  # noqa: SLF001
        return True


class ConnectionPool(aiohttp.TCPConnector):
    """Connections with such bounds; one that is given back is idle until the next request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(limit=0, **options)
        self._factory = partial(BoundedResponseHandler, loop=asyncio.get_running_loop())  # type: ignore[assignment]

    def _release(self, key: Any, protocol: Any, *, should_close: bool = False) -> None:
        protocol.set_idle()
        super()._release(key, protocol, should_close=should_close)


class DirectReader(aiohttp.StreamReader):
    """A body whose pieces go to a function as they arrive, without waking a task; a StreamReader becomes this for a while.

    The first piece that the function does not accept, the end or a failure changes it back, and what follows is buffered.
    """

    # The parser keeps a reference to the reader that it created, so the class of that object is changed; only methods differ.
    __slots__ = ()
    # A StreamReader has its waiting future here; this has the function, and a future for the first piece not accepted.
    _waiter: Any

    @classmethod
    def begin(cls, body: aiohttp.StreamReader, take: Callable[[bytes], bool]) -> "asyncio.Future[bytes]":
        """The future gets the first piece not accepted, or one before which other tasks should run; b"" at the end."""
        left: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        changed: Any = body
        changed.__class__, changed._waiter = cls, [take, left, PIECES_AT_ONCE]  # noqa: SLF001
        return left

    @staticmethod
    def end(body: aiohttp.StreamReader) -> None:
        if isinstance(body, DirectReader):
            changed: Any = body
            changed.__class__, changed._waiter = aiohttp.StreamReader, None  # noqa: SLF001

    def feed_data(self, data: bytes, size: int = 0) -> bool:
        waiter = self._waiter
        take, left, more = waiter
        waiter[2] = more - 1
        wire: Any = self._protocol
        wire.has_yielded = True
        if data and not (more and take(data)):
            DirectReader.end(self)
            if not left.done():
                left.set_result(data)
        return False

    def end_http_chunk_receiving(self) -> None:
        """The chunks of the backend do not matter here."""

    def feed_eof(self) -> None:
        _, left, _ = self._waiter
        DirectReader.end(self)
        self.feed_eof()
        if not left.done():
            left.set_result(b"")

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        _, left, _ = self._waiter
        DirectReader.end(self)
        self.set_exception(exc, *cause)
        if not left.done():
            left.set_exception(exc)


class BackendResponse:
    """A response whose head has arrived; `close` returns its connection to the pool, or closes it if there is more to read."""

    def __init__(
        self,
        status: int,
        headers: Mapping[str, str],
        body: aiohttp.StreamReader,
        release: Callable[[], None],
        abort: Callable[[], None],
    ) -> None:
        self.status, self.headers, self._body = status, headers, body
        self._release, self._abort = release, abort
        # An empty body has none.
        self._wire: ResponseHandler | None = getattr(body, "_protocol", None)
        content_type = headers.get("Content-Type", "")
        self.content_type = content_type if PRINTABLE.fullmatch(content_type) else ""

    def fail(self, error: Exception) -> None:
        """The present or next read raises this."""
        self._body.set_exception(error)

    async def read(self) -> bytes:
        """The next bytes as they arrive, b"" at the end; raises BackendFault if the response breaks off."""
        try:
            if self._wire is not None and self._wire._reading_paused:  # noqa: SLF001
                await self._others_first()
            return await self._body.readany()
        except (aiohttp.ClientError, OSError) as wrong:
            raise BackendFault("broken_off", type(wrong).__name__) from wrong

    async def _others_first(self) -> None:
        """Lets other tasks run: while unparsed bytes are left, reading does not wait."""
        await asyncio.sleep(0)

    async def flow(self, take: Callable[[bytes], bool]) -> bytes:
        """Calls `take` with the bytes as they arrive and returns the first piece that it does not accept, b"" at the end.

        Raises as `read` does.
        """
        while True:
            piece = await self._flow(take)
            if not piece or not take(piece):
                return piece

    async def _flow(self, take: Callable[[bytes], bool]) -> bytes:
        """As `flow`, but what it returns may not have been offered to `take`."""
        body = self._body
        if body.is_eof() or body.exception() is not None:
            return await self.read()
        if self._wire is not None and self._wire._reading_paused:  # noqa: SLF001
            await self._others_first()
        if piece := body.read_nowait():
            return piece
        try:
            return await DirectReader.begin(body, take)
        except (aiohttp.ClientError, OSError) as wrong:
            raise BackendFault("broken_off", type(wrong).__name__) from wrong
        finally:
            DirectReader.end(body)

    async def read_whole(self, limit: int | None = None, hold: Callable[[int], None] | None = None) -> bytes:
        """Raises TooLarge above `limit` bytes, by default LONGEST_WHOLE_ANSWER; `hold` is called with each size above SMALL."""
        pieces, size, limit = [], 0, limit or LONGEST_WHOLE_ANSWER
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise TooLarge(limit)
            if hold is not None and size > SMALL:
                hold(size)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_beginning(self, limit: int) -> bytes:
        """All of it, or its beginning: somewhat more than `limit` bytes."""
        pieces, size = [], 0
        while size <= limit and (piece := await self.read()):
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        if self._body.is_eof():
            self._release()
        else:
            self._abort()


class HttpClient:
    """POSTs to one backend over the connections of one session; `fixed` are the headers of each call."""

    def __init__(self, session: aiohttp.ClientSession, config: BackendConfig, fixed: Mapping[str, str]) -> None:
        url = URL(config.base_url, encoded=True)
        assert session.connector is not None
        self._connector = session.connector
        self._target = aiohttp.ClientRequest("POST", url, loop=asyncio.get_running_loop(), session=session)
        self._timeout = aiohttp.ClientTimeout(total=None, connect=config.read_timeout_s, sock_connect=config.connect_timeout_s)
        self._wait_s = config.read_timeout_s
        self._prefix = url.raw_path.rstrip("/").encode()
        lines = {"Host": url.host_port_subcomponent, **fixed}
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("latin-1")

    async def post(self, path: bytes, headers: bytes, body: bytes, cancel_scope: CallScope) -> BackendResponse:
        """Returns with the head of the response. Raises BackendFault; `headers` are whole lines."""
        connection = await self._connect()
        protocol = connection.protocol
        if protocol is None or protocol.transport is None:
            connection.close()
            raise ConnectionLost("disconnected", "before the request was sent")
        try:
            protocol.set_response_params(
                read_until_eof=True, auto_decompress=False, max_line_size=LONGEST_LINE, max_field_size=LONGEST_LINE
            )
            head = b"POST %b%b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b"
            protocol.transport.write(head % (self._prefix, path, self._fixed, headers, len(body), body))
            cancel_scope.within(self._wait_s, no_head, on_expiry=protocol.set_exception)
            message, payload = await _head(protocol)
        except BaseException:
            connection.close()
            raise
        finally:
            cancel_scope.without_deadline()
        return BackendResponse(message.code, message.headers, payload, connection.release, connection.close)

    async def _connect(self) -> Connection:
        try:
            return await self._connector.connect(self._target, [], self._timeout)
        except TimeoutError as wrong:
            raise BackendFault("connect_timeout") from wrong
        except aiohttp.ClientConnectorError as wrong:
            raise BackendFault("unreachable", type(wrong.os_error).__name__) from wrong
        except (aiohttp.ClientError, OSError, ValueError) as wrong:
            raise BackendFault("unreachable", type(wrong).__name__) from wrong


def no_head() -> BackendFault:
    return BackendFault("head_timeout")


async def _head(protocol: ResponseHandler) -> tuple[aiohttp.http.RawResponseMessage, aiohttp.StreamReader]:
    try:
        while True:
            message, payload = await protocol.read()
            if message.code >= 200 or message.code == 101:
                return message, payload
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError, EofStream) as wrong:
        raise ConnectionLost("disconnected", type(wrong).__name__) from wrong
    except (HttpProcessingError, aiohttp.ClientError, ValueError) as wrong:
        raise BackendFault("not_http", type(wrong).__name__) from wrong
