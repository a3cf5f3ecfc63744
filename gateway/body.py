"""A request's body, read once: bounded in size and time, refused where it is encoded."""

from starlette.types import Receive, Scope

from gateway.errors import BadRequest, BodyTooLarge, BodyTooSlow, ClientGone, UnsupportedEncoding
from gateway.guard import Guard
from gateway.record import Record

BODY_DEADLINE_S = 30.0
LARGEST_BODY = "MAX_REQUEST_BODY_BYTES"


def check_head(scope: Scope, limit: int, setting: str = "") -> None:
    """What the head alone says against a body of more than `limit` bytes, which `setting` sets."""
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise UnsupportedEncoding
        if name == b"content-length" and (not value.isdigit() or int(value) > limit):
            raise _too_large(limit, setting)


def _too_large(limit: int, setting: str) -> BodyTooLarge:
    return BodyTooLarge(f"the request's body is larger than {limit} bytes{f'; {setting} sets that' if setting else ''}")


async def read_body(
    scope: Scope, receive: Receive, limit: int, record: Record, guard: Guard, setting: str = LARGEST_BODY
) -> bytes:
    """Its deadline is the guard's; `limit` in bytes comes of `setting`."""
    check_head(scope, limit, setting)
    pieces: list[bytes] = []
    guard.within(BODY_DEADLINE_S, BodyTooSlow)
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces.append(message.get("body", b""))
        record.bytes_in += len(pieces[-1])
        if record.bytes_in > limit:
            raise _too_large(limit, setting)
        more = message.get("more_body", False)
    guard.without_deadline()
    if not record.bytes_in:
        raise BadRequest("the body is empty; send a JSON object")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
