"""One call and its answer: the body read, the model found, the answer relayed, the end told truthfully."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.types import Receive, Scope, Send

from gateway.audit.prompt_log import PromptLog
from gateway.audit.record import Record
from gateway.audit.settlement import Settler
from gateway.auth.key import SHOW_BACKEND, SHOW_OVERHEAD
from gateway.core.asgi import send_json
from gateway.core.cancel_scope import CallScope, ScopeTimer
from gateway.core.connection import Connection
from gateway.core.errors import BackendTimeout, ClientGone, ClientStalled, GatewayError
from gateway.dialects.dialect import Call, Dialect, Operation, read_call
from gateway.fleet.backends.http_client import UNSAFE
from gateway.fleet.catalog import Catalog, Model
from gateway.fleet.failover import Failover, Routing
from gateway.fleet.scheduler import is_served
from gateway.proxy.access import Access
from gateway.proxy.body import LARGEST_WITHOUT_TURN, Bodies
from gateway.proxy.relay import AT_ONCE, Answer
from gateway.proxy.visibility import missing

PASSED_ON = {b"user-agent": b"User-Agent: %b\r\n", b"accept": b"Accept: %b\r\n"}


class Exchange:
    """The ASGI endpoint of one operation."""

    def __init__(
        self,
        dialect: Dialect,
        operation: Operation,
        access: Access,
        router: Failover,
        watch: ScopeTimer,
        catalog: Callable[[], Catalog],
        settler: Settler,
        *,
        bodies: Bodies,
        most_tokens: int,
        stand_in: Callable[[Model], dict[str, Any]] | None = None,
    ) -> None:
        self.dialect, self.operation, self._stand_in = dialect, operation, stand_in
        self._access, self._router, self._watch, self._catalog = access, router, watch, catalog
        self._settler, self._bodies, self._most_tokens = settler, bodies, most_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        answer = None
        try:
            with self._watch.guard() as guard:
                call, model = await self._read(scope, receive, record, guard)
                if self._stand_in is not None and not is_served(model, call):
                    await self._access.admit(record, model.name.canonical, takes_slot=False)
                    await send_json(send, self._stand_in(model))
                    return
                answer = Answer(self.dialect, call, record, send, self._settler)
                await self._answer(call, model, answer, scope, guard)
        except GatewayError as error:
            if answer is None or not answer.started:
                await self._access.count(record, error)
                raise
            await answer.break_off(error)
        except ClientGone as gone:
            # Clients leave at the last frame, before the end of the body: they have had their answer. Who stalls in it has not.
            if answer is None or not answer.is_complete or isinstance(gone, ClientStalled):
                with suppress(GatewayError):
                    await self._access.count(record, gone)
                raise
        await answer.finish()

    async def _read(self, scope: Scope, receive: Receive, record: Record, guard: CallScope) -> tuple[Call, Model]:
        key = await self._access.key_of(scope, record)
        began = time.monotonic()
        raw = await self._bodies.read(scope, receive, record, guard)
        record.reading_s = time.monotonic() - began
        if len(raw) <= LARGEST_WITHOUT_TURN:
            call = self._understand(raw)
        else:
            call = await self._bodies.understood(raw, self._understand, key.id, guard)
        record.model, record.stream = call.asked_model, call.stream
        model = self._catalog().find(call.model, key.models)
        if model is None:
            raise missing(call.asked_model, key, self._catalog())
        record.canonical, call.context = model.name.canonical, model.context
        record.show_backend, record.show_overhead = SHOW_BACKEND in key.flags, SHOW_OVERHEAD in key.flags
        if key.prompt_log and call.operation.need:
            record.prompt_log = PromptLog(call.body)
        return call, model

    def _understand(self, raw: bytes) -> Call:
        """The call with its need, which may take as long as the reading."""
        call = read_call(self.dialect, self.operation, raw)
        call.needs = call.need(self._most_tokens)
        return call

    async def _answer(self, call: Call, model: Model, answer: Answer, scope: Scope, guard: CallScope) -> None:
        headers = _passed_on(scope["headers"], answer.record.request_id)
        connection: Connection = scope["state"]["connection"]
        connection.watch(partial(guard.interrupt, ClientGone()))
        try:
            await self._access.admit(answer.record, model.name.canonical, call.needs)
            routing = self._router.route(call, self.dialect, model, headers, answer.record.key_id)
            try:
                opening = await routing.open(guard)
            finally:
                _note(answer.record, routing)
            if call.stream:
                try:
                    guard.end_within(opening.backend.config.total_timeout_s, BackendTimeout)
                    await answer.relay(opening, guard, connection)
                finally:
                    opening.close()
                return
            opening.give_back()
            try:
                answer.keep_whole(opening)
                if len(opening.frames) > AT_ONCE:
                    await answer.pass_most(guard)
            finally:
                opening.held.close()
        finally:
            # The rest is quick, and a client that leaves now has had its answer.
            connection.watch(None)


def _note(record: Record, routing: Routing) -> None:
    """What the search for a backend came to, however it ended."""
    record.attempts, record.detail = routing.attempts, routing.detail
    record.backend, record.answered_as = routing.backend, routing.answered_as
    record.upstream_s, record.was_sent = routing.upstream_s, routing.was_sent


def _passed_on(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> bytes:
    """What a backend is told of a request's headers, as lines."""
    lines = [PASSED_ON[name] % value for name, value in headers if name in PASSED_ON and not UNSAFE.search(value)]
    return b"".join(lines) + b"X-Request-ID: %b\r\n" % request_id.encode()
