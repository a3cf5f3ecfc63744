"""`/admin/v1/events`: the overview as server-sent events, every two seconds; all watchers share one query of the stores."""

import asyncio
from functools import partial

from starlette.types import Receive, Scope, Send

from gateway.admin.overview import Overview
from gateway.audit.record import Record
from gateway.core import strict_json
from gateway.core.asgi import Connection
from gateway.core.cancel_scope import CallScope, ScopeTimer
from gateway.core.errors import ClientGone, ClientStalled, GatewayError
from gateway.core.in_flight import InFlight
from gateway.proxy.access import Access

EVERY_S = 2.0
CHECK_EVERY_S = 0.25
STALL_DEADLINE_S = 30.0
HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class AdminEvents:
    def __init__(self, access: Access, scope_timer: ScopeTimer, overview: Overview, in_flight: InFlight) -> None:
        self._access, self._scope_timer, self._overview, self._in_flight = access, scope_timer, overview, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        await self._access.admit_operator(scope, record)
        connection: Connection = scope["state"]["connection"]
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        try:
            with self._scope_timer.call_scope() as cancel_scope:
                connection.watch(partial(cancel_scope.interrupt, ClientGone()))
                try:
                    if scope["method"] != "HEAD":
                        await self._send_events(scope, send, record, cancel_scope)
                finally:
                    connection.watch(None)
        except GatewayError:
            # The key was revoked, a store is unreachable, or the process ends: the last event was complete, so ending the
            # stream is enough.
            record.outcome = "answered"
        await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, scope: Scope, send: Send, record: Record, cancel_scope: CallScope) -> None:
        while not self._in_flight.draining:
            event = b"data: " + strict_json.write(await self._overview.now()) + b"\n\n"
            cancel_scope.within(STALL_DEADLINE_S, ClientStalled)
            await send({"type": "http.response.body", "body": event, "more_body": True})
            cancel_scope.without_deadline()
            await self._pause()
            # A key that was revoked meanwhile gets no further events.
            await self._access.key_of(scope, record)

    async def _pause(self) -> None:
        """A watcher must not delay the end of the process."""
        for _ in range(round(EVERY_S / CHECK_EVERY_S)):
            if self._in_flight.draining:
                return
            await asyncio.sleep(CHECK_EVERY_S)
