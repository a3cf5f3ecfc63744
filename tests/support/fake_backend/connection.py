"""One connection of a fake backend: HTTP/1.1 by hand, so that every fault is possible."""

import asyncio
import fcntl
import http
import re
import socket
import struct
import termios
import time
from contextlib import suppress
from typing import Protocol, cast

from tests.support.fake_backend.scripts import (
    Close,
    End,
    Forever,
    Head,
    Hold,
    Outcome,
    Pause,
    Piece,
    Raw,
    Received,
    Reset,
    Step,
    Steps,
    answer,
)

LONGEST_HEAD = 64 * 2**10
LONGEST_BODY = 256 * 2**20
_REQUEST_LINE = re.compile(r"([A-Z]+) (\S+) HTTP/1\.([01])")


class Unreadable(Exception):
    """The request is not valid HTTP, or too large."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class ConnectionOwner(Protocol):
    """What a connection needs of its backend."""

    close_idle_as_request_arrives: bool
    stale_resets: int
    thawed: asyncio.Event

    def arrived(self, request: Received) -> Steps: ...
    def finished(self, request: Received, outcome: Outcome) -> None: ...
    def opened(self, connection: "Connection") -> None: ...
    def closed(self, connection: "Connection") -> None: ...


class Connection(asyncio.Protocol):
    def __init__(self, owner: ConnectionOwner, number: int) -> None:
        self._owner = owner
        self._number = number
        self._served = 0
        self._buffer = bytearray()
        self._news = asyncio.Event()
        self._gone = asyncio.Event()
        self.lost = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(0)
        self.task = asyncio.get_running_loop().create_task(self._serve())
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._news.set()

    def eof_received(self) -> bool:
        self._gone.set()
        self._news.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.eof_received()
        self._writable.set()
        self.lost.set()
        self._owner.closed(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def _serve(self) -> None:
        try:
            while await self._exchange():
                self._served += 1
        except Unreadable as problem:
            with suppress(ConnectionError):
                await _Response(self, "GET").send_steps(answer(problem.status, str(problem).encode(), "text/plain"))
        finally:
            self.transport.close()

    async def _exchange(self) -> bool:
        if await self._is_stale():
            return False
        request = await self._read_request()
        if request is None:
            return False
        response = _Response(self, request.method)
        outcome: Outcome = "aborted"
        try:
            outcome = await self._respond(response, self._owner.arrived(request))
        finally:
            request.last_step = response.last_step
            self._owner.finished(request, outcome)
        return outcome == "answered" and response.complete and _keeps_alive(request)

    async def _is_stale(self) -> bool:
        if not (self._owner.close_idle_as_request_arrives and self._served):
            return False
        if self._buffer or await self._more():
            self._owner.stale_resets += 1
            self.reset()
        return True

    async def _respond(self, response: "_Response", steps: Steps) -> Outcome:
        """Sends the steps until the client leaves."""
        sending = asyncio.ensure_future(response.send_steps(steps))
        leaving = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                return sending.result()
        except ConnectionError:
            pass
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        self.transport.abort()
        return "client_left"

    async def _more(self) -> bool:
        had = len(self._buffer)
        while len(self._buffer) == had and not self._gone.is_set():
            self._news.clear()
            await self._news.wait()
        return len(self._buffer) > had

    async def _until(self, mark: bytes, limit: int = LONGEST_HEAD) -> bytes | None:
        while (end := self._buffer.find(mark)) < 0:
            if len(self._buffer) > limit:
                raise Unreadable(431, "head too large")
            if not await self._more():
                return None
        return self._take(end + len(mark))[:end]

    async def _exactly(self, n: int) -> bytes | None:
        if n > LONGEST_BODY:
            raise Unreadable(413, "body too large")
        while len(self._buffer) < n:
            if not await self._more():
                return None
        return self._take(n)

    def _take(self, n: int) -> bytes:
        taken = bytes(self._buffer[:n])
        del self._buffer[:n]
        return taken

    async def _read_request(self) -> Received | None:
        head = await self._until(b"\r\n\r\n")
        if head is None:
            return None
        await self._owner.thawed.wait()
        line, *rest = head.decode("latin-1").split("\r\n")
        matched = _REQUEST_LINE.fullmatch(line)
        if matched is None:
            raise Unreadable(400, "bad request line")
        request = Received(matched[1], matched[2], [_header(each) for each in rest], b"", self._number, time.monotonic())
        if matched[3] == "0":
            request.headers.append(("connection", "close"))
        if (request.header("expect") or "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await self._read_body(request)
        if body is None:
            return None
        request.body = body
        return request

    async def _read_body(self, request: Received) -> bytes | None:
        if (request.header("transfer-encoding") or "").lower() == "chunked":
            return await self._read_chunks()
        length = request.header("content-length") or "0"
        if not re.fullmatch("[0-9]+", length):
            raise Unreadable(400, "bad content-length")
        return await self._exactly(int(length))

    async def _read_chunks(self) -> bytes | None:
        body = bytearray()
        while True:
            line = await self._until(b"\r\n")
            if line is None:
                return None
            size = _chunk_size(line)
            data = await self._exactly(size + 2) if size else await self._trailers()
            if data is None:
                return None
            if not size:
                return bytes(body)
            body += data[:-2]
            if len(body) > LONGEST_BODY:
                raise Unreadable(413, "body too large")

    async def _trailers(self) -> bytes | None:
        while line := await self._until(b"\r\n"):
            pass
        return line

    async def send(self, data: bytes) -> None:
        """Returns when the kernel has all of it."""
        if self.transport.is_closing():
            raise ConnectionResetError
        self.transport.write(data)
        await self._writable.wait()
        if self.lost.is_set():
            raise ConnectionResetError

    async def thawed(self) -> None:
        await self._owner.thawed.wait()

    async def delivered(self) -> None:
        """Waits until the client's kernel has everything, as a reset discards what is still on our side."""
        sock = self.transport.get_extra_info("socket")
        while not self.transport.is_closing():
            waiting: int = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0]
            if not waiting:
                return
            await asyncio.sleep(0.001)

    def reset(self) -> None:
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class _Response:
    """One answer in progress; knows its framing, and at the end whether the connection can be reused."""

    def __init__(self, connection: Connection, method: str) -> None:
        self._connection = connection
        self._bodiless = method == "HEAD"
        self._head: Head | None = None
        self._sent = 0
        self._ended = False
        self.last_step = 0.0

    @property
    def complete(self) -> bool:
        if self._bodiless or self._ended:
            return True
        return self._head is not None and not self._head.chunked and self._sent == self._head.content_length

    async def send_steps(self, steps: Steps) -> Outcome:
        for step in steps:
            await self._connection.thawed()
            self.last_step = time.monotonic()
            if isinstance(step, Reset):
                await self._connection.delivered()
                self._connection.reset()
                return "aborted"
            if isinstance(step, Close):
                return "aborted"
            await self._take(step)
        return "aborted" if self._falls_short() else "answered"

    def _falls_short(self) -> bool:
        promised = self._head is not None and (self._head.chunked or self._head.content_length is not None)
        return promised and not self.complete

    async def _take(self, step: Step) -> None:
        match step:
            case Head():
                self._head = step
                self._bodiless |= step.status in (204, 304)
                await self._connection.send(_head_bytes(step))
            case Piece(data) if data and not self._bodiless:
                self._sent += len(data)
                await self._connection.send(self._framed(data))
            case Raw(data):
                await self._connection.send(data)
            case End() if not self._bodiless:
                self._ended = True
                await self._connection.send(b"0\r\n\r\n")
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Hold(event):
                while not event.is_set():  # noqa: ASYNC110 - set from another thread
                    await asyncio.sleep(0.002)
            case Forever():
                await asyncio.Event().wait()

    def _framed(self, data: bytes) -> bytes:
        if self._head is not None and self._head.chunked:
            return b"%x\r\n%b\r\n" % (len(data), data)
        return data


def _head_bytes(head: Head) -> bytes:
    lines = [f"HTTP/1.1 {head.status} {_phrase(head.status)}", *(f"{name}: {value}" for name, value in head.headers)]
    if head.chunked:
        lines.append("Transfer-Encoding: chunked")
    elif head.content_length is not None:
        lines.append(f"Content-Length: {head.content_length}")
    elif head.status not in (204, 304):
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _header(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon or not name or name != name.strip():
        raise Unreadable(400, "bad header line")
    return name.lower(), value.strip()


def _chunk_size(line: bytes) -> int:
    size = line.partition(b";")[0].strip()
    if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
        raise Unreadable(400, "bad chunk size")
    return int(size, 16)


def _keeps_alive(request: Received) -> bool:
    return not any(name == "connection" and "close" in value.lower() for name, value in request.headers)
