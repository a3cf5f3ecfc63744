"""One request and its answer over HTTP/1: uvicorn's cycle with less work for each piece, and framing for HTTP/1.0."""

from collections.abc import Callable
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from gateway.core.errors import GatewayError


class RequestReader(Protocol):
    """Reads a connection's requests."""

    def watch(self, gone: Callable[[], None] | None) -> None: ...

    def take_more(self) -> None:
        """Continues reading, unless enough data is waiting already."""

    def close(self) -> None:
        """Closes the connection once all written data has been sent."""


class Cycle(RequestResponseCycle):
    """One request and its answer; for the application it is the client's `Connection`.

    The head is sent with the first piece of the body; the gateway's own headers are not validated again.
    """

    _head = b""
    request_reader: RequestReader
    # The error in the rest of the body.
    refusal: GatewayError | None = None

    def watch(self, gone: Callable[[], None] | None) -> None:
        self.request_reader.watch(gone)

    @property
    def keeps_up(self) -> bool:
        return self.response_started and not (self._head or self.flow.write_paused or self.disconnected)

    def push(self, body: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body) if self.chunked_encoding else self._framed(body, more=True))

    async def receive(self) -> Any:
        """Raises BadRequest if the rest of the body is not valid HTTP."""
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.disconnected and not self.response_complete:
            if self.flow.read_paused:
                self.request_reader.take_more()
            await self.message_event.wait()
            self.message_event.clear()
        if self.refusal is not None and not self.response_started:
            raise self.refusal
        if self.disconnected or self.response_complete or self.refusal is not None:
            return {"type": "http.disconnect"}
        body, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    def refuse(self, wrong: GatewayError) -> None:
        """The rest of the body cannot be read: its reader gets the error, and the connection ends with the answer."""
        self.keep_alive, self.refusal = False, wrong
        self.message_event.set()

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

    def probe(self) -> bool:
        """Sends bytes that no client mistakes for a part of its answer. Returns False if there are none at this point."""
        if self.chunked_encoding and not self._head:
            # The size of the next chunk may begin with any number of zeros.
            self.transport.write(b"0")
        elif self.scope["http_version"] != "1.0" and (self._head or not self.response_started):
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        else:
            return self.response_started and not self._head
        return True

    def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.response_started, self.waiting_for_100_continue = True, False
        lines = [STATUS_LINE[status]]
        unframed = self.scope["method"] != "HEAD" and status not in (204, 304)
        for name, value in self.default_headers + headers:
            if name == b"content-length":
                unframed = False
            elif name == b"connection":
                self.keep_alive = False
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        self.chunked_encoding = unframed and self.scope["http_version"] != "1.0"
        if unframed and not self.chunked_encoding:
            self.keep_alive = False
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        elif self.scope["http_version"] == "1.0":
            lines.append(b"connection: keep-alive\r\n")
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
            self.request_reader.close()
        self.on_response()
