"""Reads request bodies: bounded in size and time, decompressed, and bounded in memory while unfinished."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from starlette.types import Message, Receive, Scope

from gateway.audit.record import Record
from gateway.core.cancel_scope import CancelScope
from gateway.core.errors import (
    BadRequest,
    BodiesUnfinished,
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    EncodedUpload,
    GatewayError,
    Overloaded,
    UnsupportedEncoding,
)
from gateway.core.shared_bytes import Reservation, SharedBytes
from gateway.proxy.content_encoding import LARGEST_PIECE_WRITTEN, NOT_ENCODED, Decoder, encoding_of
from gateway.proxy.turns import Turns

BODY_DEADLINE_S = 30.0
SIZE_SETTING = "MAX_REQUEST_BODY_BYTES"
# Memory for unfinished bodies of one key and of all keys; raised if this many bodies of the maximum size need more.
BYTES_PER_KEY, BYTES_IN_ALL = 32 * 2**20, 128 * 2**20
LARGEST_BODIES_PER_KEY, LARGEST_BODIES_IN_ALL = 4, 16
# Any body up to this size is parsed in a few milliseconds.
LARGEST_WITHOUT_TURN = 16_384

Result = TypeVar("Result")


def check_head(scope: Scope, limit: int, setting: str = "") -> str:
    """Returns how the body is encoded, if it is. Refuses one of more than `limit` bytes, which `setting` sets."""
    encoding = ""
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in NOT_ENCODED:
            if encoding:
                raise UnsupportedEncoding
            encoding = encoding_of(value)
        if name == b"content-length" and (not value.strip().isdigit() or int(value) > limit):
            raise _too_large(limit, setting)
    return encoding


def check_head_of_upload(scope: Scope, limit: int, setting: str = "") -> None:
    """The same for a body that is not decoded. Raises EncodedUpload for any encoding."""
    try:
        encoding = check_head(scope, limit, setting)
    except UnsupportedEncoding:
        raise EncodedUpload from None
    if encoding:
        raise EncodedUpload


def _too_large(limit: int, setting: str, when: str = "") -> BodyTooLarge:
    sets = f"; {setting} sets that" if setting else ""
    return BodyTooLarge(f"the request's body is larger than {limit} bytes{when}{sets}")


class UnfinishedBodies(SharedBytes):
    """The memory of bodies that have not arrived completely or have not been parsed."""

    def __init__(self, largest: int) -> None:
        super().__init__(max(BYTES_IN_ALL, LARGEST_BODIES_IN_ALL * largest))
        self.most_of_a_key = max(BYTES_PER_KEY, LARGEST_BODIES_PER_KEY * largest)

    def check(self, caller: str) -> None:
        """Raises BodiesUnfinished where one key holds too much, Overloaded where all do."""
        if self.of(caller) > self.most_of_a_key:
            raise BodiesUnfinished(retry_after=1)
        if self.is_too_much(caller):
            raise Overloaded(retry_after=1, leaves_body=True)


class Bodies:
    """Reads the bodies of all requests of this process."""

    def __init__(self, largest: int, largest_upload: int) -> None:
        self._turns, self._largest, self.largest_upload = Turns(), largest, largest_upload
        self.unfinished, self.uploads = UnfinishedBodies(largest), UnfinishedBodies(largest_upload)

    async def read(
        self, scope: Scope, receive: Receive, record: Record, cancel_scope: CancelScope, largest: int | None = None
    ) -> bytes:
        """`cancel_scope` has the deadline; `largest`, in bytes, overrides the setting."""
        limit, setting = (self._largest, SIZE_SETTING) if largest is None else (largest, "")
        encoding = check_head(scope, limit, setting)
        cancel_scope.within(BODY_DEADLINE_S, BodyTooSlow)
        message = await receive()
        if measured(message, record, limit, setting):
            body = await self._read_on(message, receive, record, limit, setting)
        else:
            body = message.get("body", b"")
        cancel_scope.without_deadline()
        if encoding and body:
            try:
                body = await self._decoded(Decoder(encoding, body), record, cancel_scope, limit, setting)
            except GatewayError as error:
                # The body has been read; its connection can be used again.
                error.leaves_body = False
                raise
        if not body:
            raise BadRequest("the body is empty; send a JSON object")
        return body

    async def _read_on(self, message: Message, receive: Receive, record: Record, limit: int, setting: str) -> bytes:
        """Reads a body of several pieces. A refused one is cleared, here and in the messages, because the frames in the error's
        traceback live until the answer is sent."""
        body = bytearray()
        with Reservation(self.unfinished, record.key_id) as reservation:
            try:
                while True:
                    body += message.pop("body", b"")
                    reservation.hold(len(body))
                    message = await receive()
                    if not measured(message, record, limit, setting):
                        return b"".join((body, message.get("body", b"")))
            finally:
                body.clear()

    async def _decoded(self, decoder: Decoder, record: Record, cancel_scope: CancelScope, limit: int, setting: str) -> bytes:
        """Decompresses a small body at once and a large one in turns, of which each is a short piece of work."""
        with Reservation(self.unfinished, record.key_id) as reservation:
            try:
                if decoder.held <= LARGEST_WITHOUT_TURN:
                    decoder.decode(min(LARGEST_WITHOUT_TURN, limit + 1))
                while not decoder.is_complete and decoder.size <= limit:
                    reservation.hold(decoder.held)
                    work = partial(decoder.decode, min(LARGEST_PIECE_WRITTEN, limit + 1 - decoder.size))
                    await self._turns.run(record.key_id, work, cancel_scope)
                if decoder.size > limit:
                    raise _too_large(limit, setting, " when decompressed")
                return decoder.take()
            finally:
                decoder.close()

    async def in_turn(self, key_id: str, work: Callable[[], Result], cancel_scope: CancelScope) -> Result:
        """Runs work that may block the event loop, in its turn. Raises Overloaded."""
        return await self._turns.run(key_id, work, cancel_scope)

    async def parsed(self, body: bytes, parse: Callable[[bytes], Result], key_id: str, cancel_scope: CancelScope) -> Result:
        """Parses a large body with `parse`, in its turn. Raises what that raises, BodiesUnfinished and Overloaded."""
        with Reservation(self.unfinished, key_id) as reservation:
            reservation.hold(len(body))
            return await self._turns.run(key_id, partial(parse, body), cancel_scope)


def measured(message: Message, record: Record, limit: int, setting: str) -> bool:
    """Whether more of the body is to come."""
    if message["type"] == "http.disconnect":
        raise ClientGone
    record.bytes_in += len(message.get("body", b""))
    if record.bytes_in > limit:
        message.clear()
        raise _too_large(limit, setting)
    more: bool = message.get("more_body", False)
    return more
