"""A JSON answer of our own."""

from collections.abc import Iterable
from typing import Any

from starlette.types import Send

from gateway.core import strict_json

# What needs no key must not be loaded by a page of another origin either, as a script or a picture.
SAME_ORIGIN = [(b"cross-origin-resource-policy", b"same-origin")]


async def send_json(send: Send, value: Any, status: int = 200, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    body = strict_json.write(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
