"""A request's body, read once: bounded in size and time, refused where it is encoded; bounded, too, while it has not ended."""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.types import Receive, Scope

from gateway.audit.record import Record
from gateway.core.cancel_scope import CancelScope
from gateway.core.errors import (
    BadRequest,
    BodiesUnfinished,
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    Overloaded,
    UnsupportedEncoding,
)
from gateway.core.shared_bytes import SharedBytes
from gateway.proxy.turns import Turns

BODY_DEADLINE_S = 30.0
LARGEST_BODY = "MAX_REQUEST_BODY_BYTES"
# Of bodies that have not ended, in bytes: those of one key and those of all; more where so many of the largest need it.
MOST_OF_A_KEY, MOST = 32 * 2**20, 128 * 2**20
LARGEST_OF_A_KEY, LARGEST = 4, 16
# What a body of that size can be made of is understood in a few milliseconds.
LARGEST_WITHOUT_TURN = 16_384

Result = TypeVar("Result")


def check_head(scope: Scope, limit: int, setting: str = "") -> None:
    """What the head alone says against a body of more than `limit` bytes, which `setting` sets."""
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise UnsupportedEncoding
        if name == b"content-length" and (not value.strip().isdigit() or int(value) > limit):
            raise _too_large(limit, setting)


def _too_large(limit: int, setting: str) -> BodyTooLarge:
    return BodyTooLarge(f"the request's body is larger than {limit} bytes{f'; {setting} sets that' if setting else ''}")


class Bodies:
    """Reads the bodies of all requests of this process; `unfinished` is what it holds of those of which more is to come, or
    which have not been understood."""

    def __init__(self, largest: int) -> None:
        self._turns = Turns()
        self._largest, self._most_of_a_key = largest, max(MOST_OF_A_KEY, LARGEST_OF_A_KEY * largest)
        self.unfinished = SharedBytes(max(MOST, LARGEST * largest))

    async def read(
        self, scope: Scope, receive: Receive, record: Record, guard: CancelScope, largest: int | None = None
    ) -> bytes:
        """Its deadline is the guard's; `largest` in bytes stands in place of the setting."""
        limit, setting = (self._largest, LARGEST_BODY) if largest is None else (largest, "")
        check_head(scope, limit, setting)
        guard.within(BODY_DEADLINE_S, BodyTooSlow)
        message = await receive()
        if _measured(message, record, limit, setting):
            with UnfinishedBody(self, record.key_id) as unfinished:
                unfinished.take(message)
                while _measured(message := await receive(), record, limit, setting):
                    unfinished.take(message)
                body = unfinished.ended_by(message)
        else:
            body = message.get("body", b"")
        guard.without_deadline()
        if not body:
            raise BadRequest("the body is empty; send a JSON object")
        return body

    async def understood(self, body: bytes, work: Callable[[bytes], Result], key_id: str, guard: CancelScope) -> Result:
        """What `work` makes of a large body, in its turn. Raises what that raises, BodiesUnfinished and Overloaded."""
        try:
            self.hold(key_id, len(body))
            return await self._turns.run(key_id, partial(work, body), guard)
        finally:
            self.unfinished.change(key_id, -len(body))

    def hold(self, key_id: str, more: int) -> None:
        """Raises BodiesUnfinished where that is too much of one key, Overloaded where there is no room for it."""
        self.unfinished.change(key_id, more)
        if self.unfinished.of(key_id) > self._most_of_a_key:
            raise BodiesUnfinished(retry_after=1)
        if self.unfinished.is_too_much(key_id):
            raise Overloaded(retry_after=1, leaves_body=True)


def _measured(message: Any, record: Record, limit: int, setting: str) -> bool:
    """Whether more of the body is to come."""
    if message["type"] == "http.disconnect":
        raise ClientGone
    record.bytes_in += len(message.get("body", b""))
    if record.bytes_in > limit:
        message.clear()
        raise _too_large(limit, setting)
    more: bool = message.get("more_body", False)
    return more


class UnfinishedBody:
    """`with` it: what has come of a body of which more is to come. Refused, nothing is left of it before its answer goes out.

    So it is taken from the messages, which live as long as the frames that are in an error's traceback.
    """

    def __init__(self, bodies: Bodies, key_id: str) -> None:
        self._bodies, self._key_id = bodies, key_id
        self._body, self._held = bytearray(), 0

    def __enter__(self) -> Self:
        return self

    def take(self, message: Any) -> None:
        self._body += message.pop("body", b"")
        more, self._held = len(self._body) - self._held, len(self._body)
        self._bodies.hold(self._key_id, more)

    def ended_by(self, message: Any) -> bytes:
        return b"".join((self._body, message.get("body", b"")))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bodies.unfinished.change(self._key_id, -self._held)
        self._body.clear()
