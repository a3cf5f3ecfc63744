"""The HTTP server: uvicorn with deadlines for slow senders, and an end that first drains."""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.app import Rooms
from gateway.errors import ShuttingDown
from gateway.stop_signals import stop_signals

LOG = logging.getLogger("gateway.server")
HEAD_DEADLINE_S = 10.0
LARGEST_HEAD = 65_536
KEEP_ALIVE_S = 75
LAST_FRAMES_S = 5.0
READER_DEADLINE_S = 60.0
UPGRADE = re.compile(rb"\r\n(?:upgrade|http2-settings):[^\r\n]*", re.IGNORECASE)


class Cycle(RequestResponseCycle):
    """One request and its answer, a `gateway.connection`.

    The head goes out with the first of the body, and our own headers need no second look.
    """

    _head = b""
    protocol: "Protocol"

    def watch(self, gone: Callable[[], None] | None) -> None:
        self.protocol.watch(gone)

    @property
    def keeps_up(self) -> bool:
        return self.response_started and not (self._head or self.flow.write_paused or self.disconnected)

    def push(self, body: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body) if self.chunked_encoding else self._framed(body, more=True))

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._begin(message["status"], message["headers"])
            return
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        head, self._head = self._head, b""
        self.transport.write(head + self._framed(body, more=more))
        if not more:
            self._end()

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.response_started, self.waiting_for_100_continue = True, False
        lines = [STATUS_LINE[status]]
        self.chunked_encoding = self.scope["method"] != "HEAD" and status not in (204, 304)
        for name, value in self.default_headers + headers:
            if name == b"content-length":
                self.chunked_encoding = False
            elif name == b"connection":
                self.keep_alive = False
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"transfer-encoding: chunked\r\n\r\n" if self.chunked_encoding else b"\r\n")
        self._head = b"".join(lines)

    def _framed(self, body: bytes, *, more: bool) -> bytes:
        if self.scope["method"] == "HEAD":
            return b""
        if not self.chunked_encoding:
            return body
        frame = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return frame if more else frame + b"0\r\n\r\n"

    def _end(self) -> None:
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class Protocol(HttpToolsProtocol):
    """Closes connections whose head, rest of a refused body, or reading makes no progress; takes no upgrades."""

    _arriving: asyncio.TimerHandle | None = None
    _leaving: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _in_head = True
    _unsent = 0
    _gone: Callable[[], None] | None = None
    _is_lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Its lines would show paths, and with them keys, whatever the logging's configuration says.
        self.access_log = False
        self._await_rest()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching_reader()
        super().connection_lost(exc)
        self._is_lost = True
        self.watch(self._gone)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self.headers.append((name, value))
        if name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"

    def watch(self, gone: Callable[[], None] | None) -> None:
        self._gone = gone
        if gone is not None and self._is_lost:
            self._gone = None
            gone()
        elif gone is not None:
            # A body that came all at once may have stopped the reading, and with it the news of the end.
            self.flow.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if b"upgrade" in data.lower() or b"http2-settings" in data.lower():
                data = without_upgrade(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > LARGEST_HEAD:
            self.transport.close()
        if self._is_between_answers and (self._head_bytes or not self._in_head):
            self._await_rest()

    @property
    def _is_between_answers(self) -> bool:
        """No answer is under way, so what still arrives holds nothing but this connection."""
        return self.cycle is None or self.cycle.response_complete

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()
        # Its task has not run yet; there is no other way to say which class of cycles to make.
        cycle: Any = self.cycle
        cycle.__class__ = Cycle
        cycle.protocol = self
        self.scope["state"]["connection"] = cycle

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._stop_waiting()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._head_bytes or not self._in_head:
            self._await_rest()

    def _await_rest(self) -> None:
        if self._arriving is None:
            self._arriving = self.loop.call_later(HEAD_DEADLINE_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_watching_reader()
        super().resume_writing()

    def _watch_reader(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._leaving = self.loop.call_later(READER_DEADLINE_S, self._look_at_reader)

    def _stop_watching_reader(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _look_at_reader(self) -> None:
        """A slow reader may take its time; one that took nothing since the last look is gone."""
        if self.transport.get_write_buffer_size() >= self._unsent:
            self.transport.abort()
        else:
            self._watch_reader()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(READER_DEADLINE_S, self.transport.abort)


def without_upgrade(data: bytes) -> bytes:
    """A head without its wish for another protocol, which the parser would take for the end of the request.

    Java's HTTP client and `curl --http2` send one with each first request; RFC 9110 lets a server ignore it.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return UPGRADE.sub(b"", head) + end + rest if end else data


class Server(uvicorn.Server):
    """Serves until told to stop; then refuses new work, lets what runs finish within `drain_s`, and ends the rest truly."""

    def __init__(self, rooms: Rooms, *, drain_s: float, on_ready: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            rooms.front,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            backlog=2048,
        )
        super().__init__(config)
        self._rooms, self._drain_s, self._on_ready = rooms, drain_s, on_ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: whoever runs us calls begin_drain
            for number in stop_signals():
                loop.add_signal_handler(number, self.begin_drain)
        yield

    def begin_drain(self) -> None:
        if self._draining is not None:
            self._rooms.watch.end_all(ShuttingDown)
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain(), name="drain")

    async def _drain(self) -> None:
        front, running = self._rooms.front, self._rooms.watch
        front.draining = True
        LOG.info("draining: %d requests in flight, at most %g s", front.in_flight, self._drain_s)
        await self._until_idle(self._drain_s)
        if front.in_flight:
            LOG.warning("the drain limit has come: ending %d requests", front.in_flight)
        running.end_all(ShuttingDown)
        await self._until_idle(LAST_FRAMES_S)
        self.should_exit = True

    async def _until_idle(self, limit_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._rooms.front.idle.wait()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; `::` takes IPv4 as well. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if family == socket.AF_INET and not host.replace(".", "").isdigit():
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run(main: Any) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)
