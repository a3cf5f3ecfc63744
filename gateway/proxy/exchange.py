"""One call to a model: authenticate, read, find the model, admit, open an answer, relay it, finish."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from starlette.types import Receive, Scope, Send

from gateway.audit.prompt_log import PromptLog
from gateway.audit.record import Record
from gateway.audit.settlement import Settler
from gateway.auth.key import ADMIN_MODELS, KEEP_VOLATILE_LINES, SHOW_BACKEND, SHOW_OVERHEAD, Key
from gateway.core.asgi import Connection, send_json
from gateway.core.cancel_scope import CallScope, ScopeTimer
from gateway.core.errors import (
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    ClientGone,
    ClientStalled,
    GatewayError,
    NoBackend,
    RouteNotServed,
)
from gateway.dialects.dialect import Call, Dialect, Operation, read_call
from gateway.fleet.backends.http_client import UNSAFE
from gateway.fleet.catalog import Catalog, Model
from gateway.fleet.failover import Failover, FailoverRun
from gateway.fleet.opening import Opening
from gateway.fleet.scheduler import is_served
from gateway.proxy.access import Access
from gateway.proxy.body import LARGEST_WITHOUT_TURN, Bodies
from gateway.proxy.byte_answer import ByteAnswer
from gateway.proxy.callers import Callers
from gateway.proxy.heartbeats import Heartbeats, suit
from gateway.proxy.local_answers import AnswerHere, LocalAnswer, unload
from gateway.proxy.relay import Answer, StreamedAnswer, WholeAnswer
from gateway.proxy.visibility import missing

PASSED_ON = {
    b"user-agent": b"User-Agent: %b\r\n",
    b"accept": b"Accept: %b\r\n",
    b"anthropic-version": b"Anthropic-Version: %b\r\n",
    b"anthropic-beta": b"Anthropic-Beta: %b\r\n",
}
# Whether a call that got its slot for this reason causes a load; of others the backend may report it.
LOADED = {"load": True, "join": False}
# Failures after which the gateway may have an answer of its own.
NO_ANSWER = (RouteNotServed, NoBackend, BackendFailed, BackendTimeout, BackendRefused)


class Exchange:
    """The ASGI endpoint of one operation; `answer_here` may answer for models whose backends cannot."""

    def __init__(
        self,
        dialect: Dialect,
        operation: Operation,
        access: Access,
        failover: Failover,
        scope_timer: ScopeTimer,
        catalog: Callable[[], Catalog],
        settler: Settler,
        *,
        bodies: Bodies,
        callers: Callers,
        most_tokens: int,
        answer_here: AnswerHere | None = None,
        strips_volatile: bool = True,
    ) -> None:
        self.dialect, self.operation = dialect, operation
        self._answer_here, self._strips_volatile = answer_here, strips_volatile
        # What takes no tokens is answered without a slot of the key.
        self._asks_no_backend = answer_here is not None and operation.need is None
        self._access, self._failover, self._scope_timer, self._catalog = access, failover, scope_timer, catalog
        self._settler, self._bodies, self._callers, self._most_tokens = settler, bodies, callers, most_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        connection: Connection = scope["state"]["connection"]
        answer: Answer | None = None
        local: LocalAnswer | None = None
        try:
            with self._scope_timer.call_scope() as cancel_scope:
                key = await self._access.key_of(scope, record)
                call = await self._read(scope, receive, record, cancel_scope)
                model = self._find(call, key, record)
                local = self._without_backend(model, call, record)
                if local is not None:
                    await self._access.admit(record, model.name.canonical, takes_slot=False)
                else:
                    connection.watch(partial(cancel_scope.interrupt, ClientGone()))
                    try:
                        await self._access.admit(record, model.name.canonical, call.needs)
                        every_s = key.heartbeat_after_s
                        heartbeats = self._heartbeats(call, record, send, every_s) if every_s else None
                        answer = heartbeats.answer if heartbeats else None
                        opening = await self._open(call, model, scope, record, cancel_scope, heartbeats)
                        answer = answer or self._answer(call, opening, record, send)
                        await answer.relay(opening, cancel_scope, connection)
                    except NO_ANSWER as failure:
                        local = self._instead_of(failure, model, call, answer)
                    finally:
                        # The key's slot is given back elsewhere: Application's `finally` calls Settler.finish, that
                        # Limiter.settle. The rest is quick, and a client that leaves now has its answer.
                        connection.watch(None)
        except GatewayError as error:
            if answer is None or not answer.started:
                await self._access.charge(record, error)
                raise
            await answer.break_off(error)
        except ClientGone as gone:
            # A client that leaves after the last frame has its answer, though the body has not ended; one that stalls has not.
            if answer is None or not answer.is_complete or isinstance(gone, ClientStalled):
                with suppress(GatewayError):
                    await self._access.charge(record, gone)
                raise
        if local is not None:
            await send_json(send, local.value, more=local.headers)
        elif answer is not None:
            await answer.finish()

    def _without_backend(self, model: Model, call: Call, record: Record) -> LocalAnswer | None:
        """The gateway's own answer to a call that no backend gets."""
        if self._asks_no_backend and self._answer_here is not None:
            return None if is_served(model, call) else self._answer_here(model, call)
        if "keep_alive" not in call.body or call.may_unload:
            return None
        local = unload(model, call)
        record.dropped = call.dropped
        return local

    def _instead_of(self, failure: GatewayError, model: Model, call: Call, answer: Answer | None) -> LocalAnswer:
        """The gateway's own answer instead of a failure; raises the failure if there is none, or if one has begun."""
        if answer is not None and answer.started:
            raise failure
        may_answer = isinstance(failure, RouteNotServed) or call.operation.estimate is not None
        local = self._answer_here(model, call) if may_answer and self._answer_here is not None else None
        if local is None:
            raise failure
        return local

    async def _read(self, scope: Scope, receive: Receive, record: Record, cancel_scope: CallScope) -> Call:
        began = time.monotonic()
        raw = await self._bodies.read(scope, receive, record, cancel_scope)
        record.reading_s = time.monotonic() - began
        if len(raw) <= LARGEST_WITHOUT_TURN:
            call = self._parse(raw)
        else:
            call = await self._bodies.parsed(raw, self._parse, record.key_id, cancel_scope)
        call.size, record.model, record.stream = len(raw), call.asked_model, call.stream
        return call

    def _parse(self, raw: bytes) -> Call:
        """The call with the tokens that it needs, whose estimate may take as long as the parsing."""
        call = read_call(self.dialect, self.operation, raw)
        call.needs = call.need(self._most_tokens)
        if self.operation.estimate is not None:
            call.estimate = self.operation.estimate(call.body)
        return call

    def _find(self, call: Call, key: Key, record: Record) -> Model:
        catalog = self._catalog()
        model = catalog.find(call.model, key.models)
        if model is None:
            raise missing(call.asked_model, key, catalog)
        record.canonical, call.context = model.counted_as or model.name.canonical, model.context
        call.is_for_alias, call.entry = bool(model.targets), model.native
        call.may_unload = ADMIN_MODELS in key.flags
        stable = call.operation.without_volatile
        if stable is not None and self._strips_volatile and KEEP_VOLATILE_LINES not in key.flags:
            call.body = stable(call.body)
        record.show_backend, record.show_overhead = SHOW_BACKEND in key.flags, SHOW_OVERHEAD in key.flags
        if key.prompt_log and call.operation.need:
            record.prompt_log = PromptLog(call.body)
        return model

    def _answer(self, call: Call, opening: Opening, record: Record, send: Send) -> Answer:
        if call.stream:
            return StreamedAnswer(self.dialect, call, record, send, self._settler)
        if opening.value is None:
            return ByteAnswer(self.dialect, call, record, send)
        return WholeAnswer(self.dialect, call, record, send)

    def _heartbeats(self, call: Call, record: Record, send: Send, every_s: float) -> Heartbeats | None:
        if not suit(call):
            return None
        return Heartbeats(StreamedAnswer(self.dialect, call, record, send, self._settler), record, every_s)

    async def _open(
        self, call: Call, model: Model, scope: Scope, record: Record, cancel_scope: CallScope, heartbeats: Heartbeats | None
    ) -> Opening:
        """Gets an answer from a backend; notes in the record what was done for it, however it ended."""
        headers = _passed_on(scope["headers"], record.request_id)
        caller = self._callers.of(scope["headers"], record)
        assert record.key is not None
        allowed = record.key.models
        find_again = lambda: self._catalog().find(call.model, allowed)  # noqa: E731
        run = self._failover.for_call(call, self.dialect, model, find_again, headers, caller)
        try:
            return await (heartbeats.opening_of(run, cancel_scope) if heartbeats else run.open(cancel_scope))
        finally:
            record.attempts, record.detail = run.attempts, run.detail
            record.dropped = call.dropped
            if run.translation is not None:
                record.translated_to = run.translation.call.operation.path
                record.dropped = list(dict.fromkeys([*call.dropped, *run.translation.dropped]))
            record.backend, record.answered_as = run.backend, run.answered_as
            record.upstream_s, record.was_sent = run.upstream_s, run.was_sent
            record.slot_backend, record.slot_from = run.slot_backend, run.slot_from
            _note_slot(run, record)


def _note_slot(run: FailoverRun, record: Record) -> None:
    """How the call came to the slot that it has had last."""
    if run.queued is not None:
        record.queue_position, record.estimated_s = run.queued.position, run.queued.estimated_s
    record.fleet_wait_s = run.waited_s
    if record.admission is not None:
        record.admission.queue_s += run.waited_s
    if run.slot is not None:
        record.chosen_because, record.expected_cached = run.slot.why, run.slot.cached
        record.loaded = LOADED.get(run.slot.why)


def _passed_on(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> bytes:
    """The headers that a backend gets from a request, as lines."""
    lines = [PASSED_ON[name] % value for name, value in headers if name in PASSED_ON and not UNSAFE.search(value)]
    return b"".join(lines) + b"X-Request-ID: %b\r\n" % request_id.encode()
