"""`/admin/v1/warm`, `/admin/v1/unload` and `/admin/v1/pull`: load, unload and pull models, with the progress as it happens."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from starlette.types import Scope, Send

from gateway.admin.endpoint import AdminRequest, AdminRoute
from gateway.admin.events import HEADERS, STALL_DEADLINE_S
from gateway.core import strict_json
from gateway.core.asgi import Connection
from gateway.core.cancel_scope import CallScope, ScopeTimer
from gateway.core.errors import ClientGone, ClientStalled, GatewayError, ShuttingDown
from gateway.core.in_flight import InFlight
from gateway.fleet import jobs
from gateway.fleet.jobs import Changes, Job
from gateway.proxy.access import Access
from gateway.proxy.body import Bodies

Plan = Callable[[str, Mapping[str, Any]], Awaitable[Job]]
# The names of what a body may have, by verb.
TAKES = {"warm": ("model", "backend"), "unload": ("model", "backend"), "pull": ("model", "backends")}
COMMENT = b":\n\n"


class JobRoute(AdminRoute):
    """Plans a job, then streams its progress as server-sent events; it ends when the client leaves or the process stops."""

    def __init__(
        self, access: Access, scope_timer: ScopeTimer, bodies: Bodies, verb: str, plan: Plan, in_flight: InFlight
    ) -> None:
        super().__init__(access, scope_timer, bodies, self._plan, takes=TAKES[verb], has_body=True)
        self._verb, self._planned, self._in_flight = verb, plan, in_flight

    async def _plan(self, request: AdminRequest) -> Job:
        job = await self._planned(self._verb, request.body)
        backends = ", ".join(dict.fromkeys(row["backend"] for row in job.rows))
        request.note_action(f"{self._verb} {request.body['model']} on {backends}")
        return job

    async def _respond(self, scope: Scope, send: Send, request: AdminRequest, answer: Any) -> None:
        record, connection = request.record, scope["state"]["connection"]
        action = record.detail
        await send({"type": "http.response.start", "status": self.status, "headers": HEADERS})
        try:
            failed = await self._stream(connection, send, answer)
            last: dict[str, Any] = {"ended": True, "failed": failed}
            record.outcome = "answered"
        except ClientGone:
            # What was done stays in the audit.
            record.outcome = "client_gone"
            raise
        except GatewayError as error:
            failed, last = [error.code], {"error": error.message}
            record.outcome = "truncated"
        if failed:
            request.note_action(f"{action[:150]}; failed: {', '.join(failed)}")
        await send({"type": "http.response.body", "body": _event(last)})

    async def _stream(self, connection: Connection, send: Send, job: Job) -> list[str]:
        """Returns the backends on which it failed."""
        changes = Changes()
        with self._scope_timer.call_scope() as cancel_scope:
            connection.watch(partial(cancel_scope.interrupt, ClientGone()))
            try:
                async with job:
                    async for rows in job.progress():
                        if self._in_flight.draining:
                            raise ShuttingDown
                        events = b"".join(_event(row) for row in changes.among(rows))
                        await _send(send, events or COMMENT, cancel_scope)
            finally:
                connection.watch(None)
        return jobs.failed(job.rows)


async def _send(send: Send, events: bytes, cancel_scope: CallScope) -> None:
    cancel_scope.within(STALL_DEADLINE_S, ClientStalled)
    await send({"type": "http.response.body", "body": events, "more_body": True})
    cancel_scope.without_deadline()


def _event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + strict_json.write_with_replacements(value) + b"\n\n"
