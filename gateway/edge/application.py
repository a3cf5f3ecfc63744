"""The ASGI application around all endpoints: request ids, keys in paths, errors in the caller's dialect, the log line."""

import logging
import os
import re
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.audit.record import Record
from gateway.audit.settlement import Settler
from gateway.core.cancel_scope import CancelScope
from gateway.core.errors import (
    BackendRefused,
    BodyTooSlow,
    ClientGone,
    ClientStalled,
    GatewayError,
    ShuttingDown,
    UnknownRoute,
)
from gateway.core.in_flight import InFlight
from gateway.dialects.dialect import Dialect
from gateway.edge.response import ANTHROPIC, Response, error_headers, plain_outcome
from gateway.telemetry import logs
from gateway.telemetry.metrics import Metrics

LOG = logging.getLogger("gateway")
WELL_FORMED_ID = re.compile(rb"[A-Za-z0-9_.:/+=-]{1,128}")
KEY_IN_PATH = re.compile(r"/k/([^/]*)(/.*)?", re.DOTALL)
HEALTH = frozenset({"/healthz", "/readyz"})
METRICS, ADMIN = "/metrics", "/admin/"
# Clients of Anthropic's API ask for these with a header by which they are known.
LIST_OF_MODELS = re.compile(r"/v1/models(/.*)?", re.DOTALL)
ANTHROPIC_PATH = "/v1/messages"
# Paths that pages of any origin may call: they need a key, which other pages do not have.
API = re.compile(r"/+(v1|api)(/|$)|/(v2/)?rerank$")
REFUSED_BODY_LINGERS_S, MOST_OF_REFUSED_BODY = 2.0, 4 * 2**20
STATUS_OF_A_CLIENT_GONE = 499


class Application:
    """Answers each request by its route; refuses new requests while the process is draining."""

    def __init__(
        self,
        routes: Callable[[Scope], ASGIApp],
        client_of: Callable[[Scope], str],
        dialect_of: Callable[[str], Dialect],
        settler: Settler,
        metrics: Metrics,
        in_flight: InFlight,
        *,
        request_id_header: str,
    ) -> None:
        self._routes, self._client_of, self._dialect_of, self._settler = routes, client_of, dialect_of, settler
        self._metrics, self._in_flight = metrics, in_flight
        self._id_header = request_id_header.lower().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        record = self._begin(scope)
        reply = Response(record, send, self._settler, self._id_header, with_cors=record.with_cors)
        by_operator = scope["path"].startswith(ADMIN)
        self._in_flight.begin(by_operator)
        try:
            await self._handle(scope, receive, reply, record)
        finally:
            self._settler.finish(record)
            if scope["path"] not in HEALTH and record.route != METRICS:
                if record.is_operator_read:
                    logs.request_line(record.status, record.row(), b"", logging.DEBUG)
                else:
                    logs.request_line(record.status, record.row(), record.row_json)
                    self._metrics.ended(record)
            # The connection refers to the scope: without this the memory would wait for the garbage collector.
            scope["state"].clear()
            self._in_flight.end(by_operator)

    def _begin(self, scope: Scope) -> Record:
        presented = agent = b""
        from_page = is_versioned = False
        for name, value in scope["headers"]:
            if name == self._id_header:
                presented = presented or value
            elif name == b"user-agent":
                agent = value
            elif name == b"origin":
                from_page = True
            elif name == b"anthropic-version":
                is_versioned = True
        ours = os.urandom(16).hex()
        request_id = presented.decode() if WELL_FORMED_ID.fullmatch(presented) else ours
        record = Record(ours, request_id, scope["method"], client=self._client_of(scope), agent=agent[:200].decode("latin-1"))
        path = scope["path"]
        if path[:3] == "/k/" and (in_path := KEY_IN_PATH.fullmatch(path)):
            record.key_in_path = in_path[1]
            scope["path"] = in_path[2] or "/"
            scope["raw_path"] = scope["path"].encode()
        record.with_cors = from_page and API.match(scope["path"]) is not None
        record.dialect = self._dialect_of(scope["path"]).name
        if is_versioned and LIST_OF_MODELS.fullmatch(scope["path"]):
            record.dialect = ANTHROPIC
        scope["state"]["record"] = record
        return record

    async def _handle(self, scope: Scope, receive: Receive, reply: Response, record: Record) -> None:
        try:
            if refusal := scope["state"].get("refusal"):
                raise refusal
            if reply.with_cors and scope["method"] == "OPTIONS":
                await reply.preflight()
                return
            if self._in_flight.draining and scope["path"] not in HEALTH:
                raise ShuttingDown(retry_after=1)
            await self._routes(scope)(scope, receive, reply.send)
            record.outcome = record.outcome or plain_outcome(record)
        except ClientGone as gone:
            record.status = record.status or STATUS_OF_A_CLIENT_GONE
            if not record.outcome:
                record.outcome, record.detail = "client_gone", "stalled" if isinstance(gone, ClientStalled) else ""
        except GatewayError as error:
            await self._refuse(error, scope, receive, reply, record)
        except Exception:
            LOG.exception("request %s failed inside the gateway", record.request_id)
            await self._refuse(GatewayError(), scope, receive, reply, record)

    async def _refuse(self, error: GatewayError, scope: Scope, receive: Receive, reply: Response, record: Record) -> None:
        failed_upstream = error.status >= 500 and bool(record.attempts) and not isinstance(error, BackendRefused)
        record.outcome = "backend_failed" if failed_upstream else f"refused:{error.code}"
        if reply.started:
            # Only an internal error can come this late; the missing end of the answer shows it to the client.
            raise error
        meant = error.meant if isinstance(error, UnknownRoute) else ""
        dialect = self._dialect_of(ANTHROPIC_PATH if record.dialect == ANTHROPIC else meant or scope["path"])
        record.dialect = dialect.name
        body = dialect.error(error, record.request_id)
        await reply.send(
            {
                "type": "http.response.start",
                "status": error.status,
                "headers": error_headers(error, body, close=error.leaves_body),
            }
        )
        await reply.send({"type": "http.response.body", "body": body, "more_body": error.leaves_body})
        if error.leaves_body:
            await _linger(receive)
            await reply.send({"type": "http.response.body", "body": b""})


async def _linger(receive: Receive) -> None:
    """Reads a little more of a refused body: to close at once would reset the connection and lose the answer."""
    taken = 0
    try:
        with CancelScope() as cancel_scope:
            cancel_scope.within(REFUSED_BODY_LINGERS_S, BodyTooSlow)
            while taken < MOST_OF_REFUSED_BODY:
                message = await receive()
                # Otherwise the bytes stay in memory until the next message.
                taken += len(message.pop("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except BodyTooSlow:
        return
