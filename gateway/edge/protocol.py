"""HTTP/1 from untrusted clients: requests are read one after another, in bounded steps, and refused in the caller's dialect."""

import asyncio
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from gateway.core.errors import BadRequest, GatewayError, HeadTooLarge, Overloaded
from gateway.edge.connection_limit import ConnectionLimit
from gateway.edge.cycle import Cycle
from gateway.edge.deadlines import Deadlines
from gateway.edge.disconnect import DisconnectPoll
from gateway.edge.request_head import LINE_ENDS, LONGEST_LINE_END, NO_HOST, fault_of

LARGEST_HEAD, MOST_LINES = 65_536, 256
BLANK_LINE = b"\r\n\r\n"
# The bytes that the parser gets at once, and the pieces and chunks in one turn of the loop: about a millisecond of work.
LARGEST_PIECE, MOST_STEPS = 2048, 200
# Bytes of chunk framing that are free for each byte of a body; more of them count against the bound of a head.
FRAMING_FOR_A_BYTE = 16
MOST_HELD, MOST_AT_ONCE = 262_144, 65_536
# Health checks are answered even without a free connection.
HEALTH = frozenset({b"/healthz", b"/readyz"})
REFUSED_CONNECTION_LINGERS_S, MOST_DISCARDED = 2.0, 262_144


class Protocol(Deadlines):
    """Accepts no upgrades and no trailers.

    The parser gets pieces that never extend beyond a request's end; what follows is held until the answer has been sent.
    """

    cycle: Any
    _going_on: asyncio.Handle | None = None
    _disconnect_poll: DisconnectPoll | None = None
    _head_bytes = _head_lines = _hosts = _length = _left = _framing = _discarded = _steps = 0
    _codings: tuple[bytes, ...] = ()
    _tail = _line = b""
    _has_line = False
    _in_head = True
    _gone: Callable[[], None] | None = None
    _is_lost = _is_refused = _is_lingering = _has_ended = _is_extra = False

    def __init__(self, *, connection_limit: ConnectionLimit | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._connection_limit = connection_limit or ConnectionLimit()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn's access log would show paths, which may contain keys, whatever the configuration of logging is.
        self.access_log = False
        self._held = bytearray()
        self.on_message_begin()
        self._await_rest()
        taken: Any = self.connections
        self._is_extra = not self._connection_limit.admits(self, taken)
        if self._is_extra and not self._connection_limit.admits_extra(taken):
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching_client()
        self._let_go(len(self._held))
        super().connection_lost(exc)
        self._is_lost = True
        self.watch(self._gone)

    def watch(self, gone: Callable[[], None] | None) -> None:
        self._gone = gone
        if gone is not None and self._is_lost:
            self._gone = None
            gone()
        elif gone is not None and self.flow.read_paused:
            # A body that arrived at once may have paused reading; then the end of the connection would not be noticed.
            self.take_more()

    # Reading

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        if self._is_refused:
            self._discard(len(data))
            return
        taken = 0 if self._held else self._read(data)
        if taken < len(data):
            self._hold(data[taken:])
        if self._has_ended or self._head_bytes or not self._in_head:
            self._check_rest()

    def _read(self, data: bytes) -> int:
        """Parses and returns how much of `data` was used: the rest follows a request, or exceeds one turn of the loop."""
        at = self._steps = 0
        while at < len(data) and self._steps < MOST_STEPS:
            if self._in_head and self.cycle is not None and not self.cycle.response_complete:
                break
            piece = data[at : at + self._left] if self._left else data[at : self._cut(data, at)]
            at += len(piece)
            self._steps += 1
            if self._left:
                self._left -= len(piece)
                self._feed(piece)
            elif self._is_within_bounds(piece):
                self._tail = (self._tail + piece[-3:])[-3:]
                self._feed(piece)
            if self._is_refused:
                return len(data)
        return at

    def _cut(self, data: bytes, at: int) -> int:
        """The end of the next piece: right after a blank line, which may be a request's end."""
        if self._tail:
            seam = (self._tail + data[at : at + 3]).find(BLANK_LINE)
            if seam >= 0:
                return at + seam + len(BLANK_LINE) - len(self._tail)
        found = data.find(BLANK_LINE, at, at + LARGEST_PIECE)
        return found + len(BLANK_LINE) if found >= 0 else at + LARGEST_PIECE

    def _is_within_bounds(self, piece: bytes) -> bool:
        if self._in_head:
            if not self._has_line:
                self._note_line(piece)
            self._head_bytes += len(piece)
            self._head_lines += piece.count(b"\n")
            if self._head_bytes > LARGEST_HEAD or self._head_lines > MOST_LINES:
                self._refuse(HeadTooLarge())
        else:
            self._framing += len(piece)
            if self._framing > LARGEST_HEAD:
                self._refuse(BadRequest("the trailers or the chunk extensions of the body are too large"))
        return not self._is_refused

    def _note_line(self, piece: bytes) -> None:
        """Keeps the end of the request line, which the parser does not report; it skips blank lines before."""
        line, end, _ = (self._line + piece).lstrip(b"\r\n").partition(b"\n")
        self._line, self._has_line = line[-LONGEST_LINE_END:], bool(end)

    def _feed(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            if not self._is_refused:
                self._ignore_upgrade()
        except httptools.HttpParserError as wrong:
            reason = "" if isinstance(wrong, httptools.HttpParserCallbackError) else f": {wrong}"
            self._refuse(BadRequest(f"the request is not valid HTTP{reason}"))

    def _ignore_upgrade(self) -> None:
        """Parses the head again without its upgrade header, which the parser would treat as the end of the request.

        Java's HTTP client and `curl --http2` send one with each first request; RFC 9110 lets a server ignore it.
        """
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        target = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._feed(b"%b%b\r\n" % (target, b"".join(lines)))

    def _hold(self, rest: bytes) -> None:
        self._held += rest
        if not self._connection_limit.hold(len(rest)) and self._in_head and not self._is_between_answers:
            self.transport.abort()
            return
        if len(self._held) > MOST_HELD and not self._has_ended:
            self.flow.pause_reading()
            self.take_more()
        self._go_on_soon()

    def _let_go(self, count: int) -> None:
        del self._held[:count]
        self._connection_limit.hold(-count)

    def _go_on_soon(self) -> None:
        """Continues with held bytes, unless they wait for an answer."""
        if self._held and self._going_on is None and (self._is_between_answers or not self._in_head):
            self._going_on = self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._going_on = None
        if self._held and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            taken = self._read(bytes(self._held[:MOST_AT_ONCE]))
            self._let_go(taken)
            self._go_on_soon()
            self._check_rest()
            if self.flow.read_paused:
                self.take_more()

    def _check_rest(self) -> None:
        if self._has_ended and not self._still_answers():
            self.transport.close()
        elif self._is_between_answers and (self._head_bytes or not self._in_head):
            self._await_rest()

    def take_more(self) -> None:
        if len(self._held) > MOST_HELD:
            if not self._is_between_answers:
                # While nothing is read, the client's end is not noticed.
                self._watch_client()
        elif not self._has_ended and (self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT):
            self.flow.resume_reading()

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._hosts, self._codings, self._length, self._framing = 0, (), 0, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer, which is ignored
        name = name.lower()
        self.headers.append((name, value))
        if name == b"host":
            self._hosts += 2 if NO_HOST.search(value) else 1
        elif name == b"content-length":
            self._length = int(value)
        elif name == b"transfer-encoding":
            self._codings += tuple(value.lower().replace(b" ", b"").replace(b"\t", b"").split(b","))
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if self.parser.should_upgrade() and method != b"CONNECT":
            return
        wrong = None
        is_http = self._line.endswith(LINE_ENDS)
        if self._hosts != 1 or self._codings or version != "1.1" or method == b"CONNECT" or not is_http or b"#" in self.url:
            wrong = fault_of(method, version if is_http else "", self.url, self._hosts, self._codings)
        if self._is_extra:
            wrong = wrong or (None if self.url in HEALTH else Overloaded(retry_after=1))
        if wrong is not None:
            self._refuse(wrong, method.decode("ascii"))
            return
        target = httptools.parse_url(self.url)
        self._in_head, self._left = False, self._length
        if self._head_timer is not None:
            self._stop_waiting()
        self._begin(method.decode("ascii"), version, target)

    def _begin(self, method: str, version: str, target: Any, refusal: GatewayError | None = None) -> None:
        path = target.path.decode("ascii") if target.path else "/"
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": "http",
            "root_path": "",
            "headers": self.headers,
            "state": {} if refusal is None else {"refusal": refusal},
            "method": method,
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": target.path or b"/",
            "query_string": target.query or b"",
        }
        self.cycle = Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and version != "1.0",
            keep_alive=refusal is None and not self._is_extra and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self.cycle.request_reader = self
        self.scope["state"]["connection"] = self.cycle
        self._start_asgi_task(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        self._steps += 1
        self._framing = max(0, self._framing - FRAMING_FOR_A_BYTE * len(body))
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._in_head:
            return  # of a head that is refused, or is read again
        self._in_head, self._head_bytes, self._head_lines, self._left, self._tail = True, 0, 0, 0, b""
        self._line, self._has_line = b"", False
        if self._head_timer is not None:
            self._stop_waiting()
        cycle = self.cycle
        cycle.keep_alive = cycle.keep_alive and self.parser.should_keep_alive()
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()
        elif not cycle.keep_alive:
            self.transport.close()

    # Refusing

    def _refuse(self, wrong: GatewayError, method: str = "-") -> None:
        """Reads nothing more of this connection, which ends after the answer."""
        if self._is_refused:
            return
        self._is_refused = True
        self._let_go(len(self._held))
        was_in_head, self._in_head, self._head_bytes = self._in_head, True, 0
        self._stop_waiting()
        if not was_in_head:
            if self.cycle.response_complete:
                self.transport.close()
            else:
                self.cycle.refuse(wrong)
            return
        try:
            target = httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            target = httptools.parse_url(b"/")
        self._begin(method, "1.1", target, wrong)
        self.cycle.more_body = False

    def close(self) -> None:
        if not self._is_refused:
            self.transport.close()
            return
        # To close with unread bytes would reset the connection, and the answer could be lost on its way.
        self._is_lingering = True
        with suppress(OSError, RuntimeError):
            self.transport.write_eof()
        self.loop.call_later(REFUSED_CONNECTION_LINGERS_S, self.transport.close)

    def _discard(self, count: int) -> None:
        self._discarded += count
        if self._discarded > MOST_DISCARDED and self._is_lingering:
            self.transport.close()
        elif self._discarded > MOST_DISCARDED:
            self.flow.pause_reading()

    @property
    def idle_since(self) -> float | None:
        # Also idle: clients that have their answer and have not sent the rest of the body, or that send without reading.
        owes = not self._in_head and self._is_between_answers
        if self._is_lingering or owes or (self._held and self.flow.write_paused):
            return 0.0
        is_busy = self._is_refused or self._held or not self._in_head or not self._is_between_answers
        return None if is_busy else self._waits_since

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the connection stays open: a client may close its side and still wait for answers."""
        self._has_ended = True
        return not self._is_lingering and self._still_answers()

    def _still_answers(self) -> bool:
        """After the client's end: whether answers are left to send. A request that is incomplete stays so."""
        is_answering = self._in_head and not self._is_between_answers
        if is_answering:
            self._watch_client()
            self.cycle.keep_alive = self.cycle.keep_alive and bool(self._held)
        return is_answering or bool(self._held)

    @property
    def _is_between_answers(self) -> bool:
        """No answer is in progress, so whatever arrives occupies only this connection."""
        return self.cycle is None or self.cycle.response_complete

    def on_response_complete(self) -> None:
        if self._disconnect_poll is not None:
            self._stop_watching_client()
        self.server_state.total_requests += 1
        self.cycle.body.clear()
        if self.transport.is_closing():
            return
        if self.flow.read_paused:
            self.take_more()
        if self._held:
            self._go_on()
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        if self._head_bytes or not self._in_head:
            self._await_rest()

    def _watch_client(self) -> None:
        """Notices the client's end even while nothing is read."""
        if self._disconnect_poll is None:
            descriptor = self.transport.get_extra_info("socket").fileno()
            self._disconnect_poll = DisconnectPoll(descriptor, self.cycle.probe, self.transport.abort)
        self._disconnect_poll.has_ended = self._has_ended

    def _stop_watching_client(self) -> None:
        if self._disconnect_poll is not None:
            self._disconnect_poll.stop()
            self._disconnect_poll = None
