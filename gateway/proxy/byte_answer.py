"""Passes on an answer that is neither JSON nor a stream of frames, such as audio."""

from gateway.core.asgi import Connection
from gateway.core.cancel_scope import CallScope
from gateway.core.errors import AnswerCutShort, BackendTimeout, ClientGone, ClientStalled, GatewayError
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.opening import Opening, Upstream
from gateway.proxy.relay import Answer


class ByteAnswer(Answer):
    """The backend's bytes as they arrive; a connection that ends early shows the client that the answer broke off."""

    async def relay(self, opening: Opening, cancel_scope: CallScope, connection: Connection) -> None:
        try:
            cancel_scope.end_within(opening.backend.config.total_timeout_s, BackendTimeout)
            await self._start(opening.upstream.content_type, _length_of(opening.upstream))
            await self._relay_pieces(opening, cancel_scope)
        except BackendFault as fault:
            self._record.detail = str(fault)
            raise AnswerCutShort from fault
        finally:
            opening.close()
        self.is_complete = True

    async def _relay_pieces(self, opening: Opening, cancel_scope: CallScope) -> None:
        piece, idle_s = opening.frames, opening.backend.config.idle_timeout_s
        while piece:
            cancel_scope.within(idle_s, ClientStalled)
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            cancel_scope.within(idle_s, BackendTimeout)
            piece = await opening.upstream.read()
        opening.at_end = True

    async def break_off(self, error: GatewayError) -> None:
        await super().break_off(error)
        raise ClientGone

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})


def _length_of(upstream: Upstream) -> list[tuple[bytes, bytes]]:
    """Players show the length of what they play."""
    length = upstream.headers.get("Content-Length", "")
    return [(b"content-length", length.encode())] if length.isascii() and length.isdigit() else []
