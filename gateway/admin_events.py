"""`/admin/v1/events`: the overview every two seconds, as server-sent events; whoever watches, the stores are asked once."""

import asyncio
from functools import partial

from starlette.types import Receive, Scope, Send

from gateway import strict_json
from gateway.access import Access
from gateway.connection import Connection
from gateway.errors import ClientGone, ClientStalled, NotPermitted, ShuttingDown, WrongKey
from gateway.guard import Watch, Watched
from gateway.keys import ADMIN
from gateway.overview import Overview
from gateway.record import Record

EVERY_S = 2.0
READER_S = 30.0
HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class AdminEvents:
    def __init__(self, access: Access, watch: Watch, overview: Overview) -> None:
        self._access, self._watch, self._overview = access, watch, overview

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        key = await self._access.visitor(scope, record)
        if ADMIN not in key.flags:
            raise NotPermitted("this needs a key with the role admin: make key ROLE=admin")
        connection: Connection = scope["state"]["connection"]
        try:
            with self._watch.guard() as guard:
                connection.watch(partial(guard.interrupt, ClientGone()))
                try:
                    await self._tell(scope, send, record, guard)
                finally:
                    connection.watch(None)
        except (ShuttingDown, WrongKey):
            # The last event was whole: the end of the stream says enough.
            record.outcome = "answered"
        await send({"type": "http.response.body", "body": b""})

    async def _tell(self, scope: Scope, send: Send, record: Record, guard: Watched) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        while True:
            event = b"data: " + strict_json.write(await self._overview.now()) + b"\n\n"
            guard.within(READER_S, ClientStalled)
            await send({"type": "http.response.body", "body": event, "more_body": True})
            guard.without_deadline()
            await asyncio.sleep(EVERY_S)
            # A key that has been revoked meanwhile sees no more.
            await self._access.key_of(scope, record)
