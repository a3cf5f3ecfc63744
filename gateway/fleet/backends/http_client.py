"""One call to a backend and its answer, through aiohttp's connector and parser without what its client adds to each call.

A `ClientSession.request` builds a URL, merges headers, looks for cookies, redirects and proxies; behind a gateway all of
that is known beforehand. The pool of connections, their making, TLS and the parsing stay aiohttp's.
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
# What is held is not worth counting below this.
SMALL = 65_536
# All lines of a head, and of what comes before it (1xx); a slice of it is what one look at the parser may cost.
LONGEST_HEAD, MOST_HEADS, HEAD_SLICE = 256 * 1024, 32, 4096
# Of what frames a body so much may come of which nothing is body: the extensions of a chunk, or trailers.
MOST_FRAMING = 256 * 1024
# Of a body in tiny chunks so many are parsed at once, or passed on at once one by one; then others have their turn.
CHUNKS_AT_ONCE, PIECES_AT_ONCE = 256, 32
PRINTABLE = re.compile(r"[\x20-\x7e]*")
UNSAFE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class BackendFault(Exception):
    """A backend did not answer as it should; `reason` is one word for logs and metrics."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class ConnectionLost(BackendFault):
    """A connection ended before any byte of the answer."""


class TooLarge(BackendFault):
    """A whole answer is longer than was wanted."""

    def __init__(self, limit: int) -> None:
        super().__init__("too_large", f"more than {limit} bytes")


class Wire(ResponseHandler):
    """aiohttp's end of a connection, which parses neither endless heads or framing nor a flood of tiny chunks at once.

    What comes while nobody has asked ends the connection: the next to ask would take it for the answer.
    """

    # Whether a flow was given something of what came last.
    has_yielded = False
    _in_body = False
    _head_bytes = _framing = _body_bytes = 0
    _is_asked = False

    def set_response_params(self, **params: Any) -> None:
        self._in_body, self._head_bytes, self._is_asked = False, 0, True
        self._framing = self._body_bytes = 0
        super().set_response_params(**params)

    def rest(self) -> None:
        self._is_asked = False

    def _drop_timeout(self) -> None:
        # Called at each body's end, too.
        self._in_body = False
        super()._drop_timeout()

    def data_received(self, data: bytes) -> None:
        if not self._is_asked:
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
        """Of what came while nothing flows, or of which nothing was body."""
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
            # How a reader's parser is slowed down: no setting reaches it.
            body._high_water_chunks, body._low_water_chunks = CHUNKS_AT_ONCE, CHUNKS_AT_ONCE // 2  # noqa: SLF001
        return True


class Pool(aiohttp.TCPConnector):
    """Connections of this kind; one that is given back rests until the next request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(limit=0, **options)
        self._factory = partial(Wire, loop=asyncio.get_running_loop())  # type: ignore[assignment]

    def _release(self, key: Any, protocol: Any, *, should_close: bool = False) -> None:
        protocol.rest()
        super()._release(key, protocol, should_close=should_close)


class DirectReader(aiohttp.StreamReader):
    """A body whose pieces are taken as they arrive, without waking a task: what a StreamReader becomes for a while.

    The first piece that is not taken, the end or a failure makes it again what it was, and all that follows waits in it.
    """

    # The parser holds on to the reader that it has made, so that one must change: no more than its methods.
    __slots__ = ()
    # Where a StreamReader has whoever waits for data: here what takes it, and a future for what was not taken.
    _waiter: Any

    @classmethod
    def begin(cls, body: aiohttp.StreamReader, take: Callable[[bytes], bool]) -> "asyncio.Future[bytes]":
        """The future has what was not taken, b"" at the end, and where it may be that others have waited for long."""
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
        """Nobody asks here how the backend has cut its answer."""

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
    """An answer whose head has come; `close` gives its connection back, or ends it unless the answer was read to its end."""

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
        """Whoever reads, now or next, gets this."""
        self._body.set_exception(error)

    async def read(self) -> bytes:
        """The next bytes as they come, b"" at the end; raises BackendFault where the answer breaks off."""
        try:
            if self._wire is not None and self._wire._reading_paused:  # noqa: SLF001
                await self._others_first()
            return await self._body.readany()
        except (aiohttp.ClientError, OSError) as wrong:
            raise BackendFault("broken_off", type(wrong).__name__) from wrong

    async def _others_first(self) -> None:
        """More has been read than was parsed: a body that never runs out of it would never wait."""
        await asyncio.sleep(0)

    async def flow(self, take: Callable[[bytes], bool]) -> bytes:
        """Calls `take` with the bytes as they come and returns the first that it does not take, b"" at the end.

        Raises as `read` does.
        """
        while True:
            piece = await self._flow(take)
            if not piece or not take(piece):
                return piece

    async def _flow(self, take: Callable[[bytes], bool]) -> bytes:
        """As `flow`, but what it returns may be to be taken."""
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
        """Raises TooLarge above `limit` bytes, by default LONGEST_WHOLE_ANSWER; `hold` is told of each size above SMALL."""
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
    """POSTs to one backend over the connections of one session; `fixed` are the headers that each call carries."""

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

    async def post(self, path: bytes, headers: bytes, body: bytes, guard: CallScope) -> BackendResponse:
        """Ends with the answer's head. Raises BackendFault; `headers` are whole lines."""
        connection = await self._connect()
        protocol = connection.protocol
        if protocol is None or protocol.transport is None:
            connection.close()
            raise ConnectionLost("disconnected", "before it was asked")
        try:
            protocol.set_response_params(
                read_until_eof=True, auto_decompress=False, max_line_size=LONGEST_LINE, max_field_size=LONGEST_LINE
            )
            head = b"POST %b%b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b"
            protocol.transport.write(head % (self._prefix, path, self._fixed, headers, len(body), body))
            guard.within(self._wait_s, _no_head, protocol.set_exception)
            message, payload = await _head(protocol)
        except BaseException:
            connection.close()
            raise
        finally:
            guard.without_deadline()
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


def _no_head() -> BackendFault:
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
