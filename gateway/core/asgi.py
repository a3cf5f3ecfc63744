"""What the gateway adds to ASGI: a JSON response, and the client's connection as a request's scope has it."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from starlette.types import Send

from gateway.core import strict_json

# What needs no key must not be loaded by a page of another origin either, as a script or a picture.
SAME_ORIGIN = [(b"cross-origin-resource-policy", b"same-origin")]


class Connection(Protocol):
    def watch(self, gone: Callable[[], None] | None) -> None:
        """Call `gone` once when the client closes its connection, at once where it has; None: nobody asks any more."""

    @property
    def keeps_up(self) -> bool:
        """Whether the answer's head has gone out and the client takes what comes: then `push` is allowed."""

    def push(self, body: bytes) -> None:
        """Sends a piece of the answer at once."""


async def send_json(send: Send, value: Any, status: int = 200, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    body = strict_json.write(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
