"""Calls whose body is a form with a file: kept while backends are tried, because a form can name its model behind the file."""

import time

from starlette.types import Receive, Scope, Send

from gateway.audit.record import Record
from gateway.core.cancel_scope import CallScope
from gateway.core.errors import BadRequest, BodyTooSlow
from gateway.dialects import multipart
from gateway.dialects.dialect import Call
from gateway.dialects.form_call import read_form_call
from gateway.dialects.multipart import FormReader
from gateway.dialects.openai import CAPS
from gateway.proxy.body import check_head_of_upload, measured
from gateway.proxy.exchange import Exchange
from gateway.proxy.spool import Spool, SpooledForm

SIZE_SETTING = "MAX_UPLOAD_BYTES"
# For each piece of an upload; and for all of it, with a second more for each of so many bytes that it may have.
PIECE_DEADLINE_S, UPLOAD_WITHIN_S, SLOWEST_UPLOAD = 60.0, 60.0, 65_536
# Digits of a limit of tokens.
LONGEST_LIMIT = 18


class UploadExchange(Exchange):
    """The ASGI endpoint of an operation whose body is a form."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with Spool(self._bodies.uploads) as spool:
            scope["state"]["spool"] = spool
            await super().__call__(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, record: Record, cancel_scope: CallScope) -> Call:
        began = time.monotonic()
        check_head_of_upload(scope, self._bodies.largest_upload, SIZE_SETTING)
        boundary = multipart.boundary_of(_content_type(scope))
        reader, spool = FormReader(boundary), scope["state"]["spool"]
        spool.begin(record.key_id)
        await self._read_pieces(reader, spool, receive, record, cancel_scope)
        record.reading_s = time.monotonic() - began
        form = reader.form()
        call = self._capped(read_form_call(self.dialect, self.operation, form, SpooledForm(spool, form, boundary)))
        record.model, record.stream = call.asked_model, call.stream
        return call

    def _capped(self, call: Call) -> Call:
        """Refuses a larger limit of output tokens than the gateway's: a form is passed on as it came."""
        for name in call.body.keys() & CAPS:
            limit = str(call.body[name])
            is_number = limit.isascii() and limit.isdecimal() and len(limit) <= LONGEST_LIMIT
            if not is_number or not 1 <= int(limit) <= self._most_tokens:
                raise BadRequest(f"the field {name!r} must be an integer from 1 to {self._most_tokens}")
        return call

    async def _read_pieces(
        self, reader: FormReader, spool: Spool, receive: Receive, record: Record, cancel_scope: CallScope
    ) -> None:
        last = time.monotonic() + UPLOAD_WITHIN_S + self._bodies.largest_upload / SLOWEST_UPLOAD
        more = True
        while more:
            cancel_scope.within(min(PIECE_DEADLINE_S, last - time.monotonic()), BodyTooSlow)
            message = await receive()
            more = measured(message, record, self._bodies.largest_upload, SIZE_SETTING)
            # Otherwise the error's traceback would keep it until the answer is sent.
            piece = message.pop("body", b"")
            reader.feed(piece)
            spool.add(piece)
        cancel_scope.without_deadline()


def _content_type(scope: Scope) -> bytes:
    found = [value for name, value in scope["headers"] if name == b"content-type"]
    if len(found) > 1:
        raise BadRequest("the request has more than one Content-Type")
    return bytes(found[0]) if found else b""
