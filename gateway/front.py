"""The ASGI application around all routes: request id, key in the path, errors in the caller's dialect, the log line."""

import asyncio
import logging
import re
import uuid
from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import logs
from gateway.dialects.base import Dialect
from gateway.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    ClientStalled,
    GatewayError,
    MethodNotAllowed,
    ShuttingDown,
)
from gateway.guard import Guard
from gateway.record import Record

LOG = logging.getLogger("gateway")
WELL_FORMED_ID = re.compile(rb"[A-Za-z0-9_.:/+=-]{1,128}")
KEY_IN_PATH = re.compile(r"/k/([^/]*)(/.*)?", re.DOTALL)
HEALTH = frozenset({"/healthz", "/readyz"})
LINGER_S, LINGER_BYTES = 2.0, 4 * 2**20
STATUS_OF_A_CLIENT_GONE = 499
PREFLIGHT_HEADERS = (
    b"authorization, content-type, user-agent, accept, x-requested-with, x-api-key, api-key, x-request-id, openai-beta, "
    b"openai-organization, openai-project, anthropic-version, anthropic-beta, anthropic-dangerous-direct-browser-access, "
    b"x-gateway-backend, x-stainless-arch, x-stainless-async, x-stainless-custom-poll-interval, x-stainless-helper-method, "
    b"x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-poll-helper, x-stainless-read-timeout, "
    b"x-stainless-retry-count, x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout"
)


class Front:
    """Counts what is in flight; `draining` makes it refuse new work."""

    def __init__(
        self,
        routes: ASGIApp,
        client_of: Callable[[Scope], str],
        dialect_of: Callable[[str], Dialect],
        *,
        request_id_header: str,
    ) -> None:
        self.routes, self._client_of, self._dialect_of = routes, client_of, dialect_of
        self._id_header = request_id_header.lower().encode()
        self.in_flight = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        record = self._begin(scope)
        reply = Reply(record, send, self._id_header, with_cors=any(name == b"origin" for name, _ in scope["headers"]))
        self.in_flight += 1
        self.idle.clear()
        try:
            await self._handle(scope, receive, reply, record)
        finally:
            if scope["path"] not in HEALTH:
                logs.request_line(record.line())
            self.in_flight -= 1
            if not self.in_flight:
                self.idle.set()

    def _begin(self, scope: Scope) -> Record:
        presented = next((value for name, value in scope["headers"] if name == self._id_header), b"")
        request_id = presented.decode() if WELL_FORMED_ID.fullmatch(presented) else uuid.uuid4().hex
        record = Record(request_id, scope["method"], client=self._client_of(scope))
        if in_path := KEY_IN_PATH.fullmatch(scope["path"]):
            record.key_in_path = in_path[1]
            scope["path"] = in_path[2] or "/"
            scope["raw_path"] = scope["path"].encode()
        record.dialect = self._dialect_of(scope["path"]).name
        scope.setdefault("state", {})["record"] = record
        return record

    async def _handle(self, scope: Scope, receive: Receive, reply: "Reply", record: Record) -> None:
        try:
            if reply.with_cors and scope["method"] == "OPTIONS":
                await reply.preflight()
                return
            if self.draining and scope["path"] not in HEALTH:
                raise ShuttingDown(retry_after=1)
            await self.routes(scope, receive, reply.send)
            record.outcome = record.outcome or ("answered" if record.status < 400 else "refused")
        except ClientGone as gone:
            record.outcome, record.status = "client_gone", record.status or STATUS_OF_A_CLIENT_GONE
            record.detail = "stalled" if isinstance(gone, ClientStalled) else ""
        except GatewayError as error:
            await self._refuse(error, scope, receive, reply, record)
        except Exception:
            LOG.exception("request %s failed inside the gateway", record.request_id)
            await self._refuse(GatewayError(), scope, receive, reply, record)

    async def _refuse(self, error: GatewayError, scope: Scope, receive: Receive, reply: "Reply", record: Record) -> None:
        failed_upstream = error.status >= 500 and bool(record.attempts)
        record.outcome = "backend_failed" if failed_upstream else f"refused:{error.code}"
        if reply.started:
            # Only a fault of our own can come this late: an answer without an end tells the client so.
            raise error
        dialect = self._dialect_of(scope["path"])
        body = dialect.error(error, record.request_id)
        unread = isinstance(error, BodyTooLarge | BodyTooSlow)
        await reply.send(
            {"type": "http.response.start", "status": error.status, "headers": error_headers(error, body, close=unread)}
        )
        await reply.send({"type": "http.response.body", "body": body, "more_body": unread})
        if unread:
            await _linger(receive)
            await reply.send({"type": "http.response.body", "body": b""})


def error_headers(error: GatewayError, body: bytes, *, close: bool = False) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, -int(-error.retry_after // 1))).encode()))
        headers.append((b"retry-after-ms", str(max(1, round(error.retry_after * 1000))).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    if close:
        headers.append((b"connection", b"close"))
    return headers


async def _linger(receive: Receive) -> None:
    """Takes a little more of a body that was refused: closing at once would reset the connection under our answer."""
    taken = 0
    try:
        with Guard() as guard:
            guard.within(LINGER_S, BodyTooSlow())
            while taken < LINGER_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except BodyTooSlow:
        return


class Reply:
    """`send` of one request, with our headers added and what goes out counted."""

    def __init__(self, record: Record, send: Send, id_header: bytes, *, with_cors: bool) -> None:
        self._record, self._send, self._id_header = record, send, id_header
        self.with_cors = with_cors
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._record.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._own_headers()]
        else:
            self._record.bytes_out += len(message.get("body", b""))
        await self._send(message)

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(self._id_header, self._record.request_id.encode())]
        if self._record.show_backend and self._record.backend:
            headers.append((b"x-gateway-backend", self._record.backend.encode()))
        if self.with_cors:
            # Keys travel in headers or the path, never in cookies: any origin may ask.
            exposed = self._id_header + b", retry-after, retry-after-ms, x-gateway-backend"
            headers += [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", exposed)]
        return headers

    async def preflight(self) -> None:
        headers = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
            (b"access-control-allow-headers", PREFLIGHT_HEADERS),
            (b"access-control-max-age", b"86400"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})


def by_prefix(dialects: Mapping[str, Dialect]) -> Callable[[str], Dialect]:
    """The dialect of a path: the path decides, never a header."""

    def find(path: str) -> Dialect:
        return dialects["openai"] if path == "/v1" or path.startswith("/v1/") else dialects["ollama"]

    return find
