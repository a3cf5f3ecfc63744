"""What the gateway adds to ASGI: a JSON response, and the client's connection as a request's scope has it."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from starlette.types import Send

from gateway.core import strict_json

# Answers that need no key must not be loadable by pages of other origins, as a script or a picture.
SAME_ORIGIN = [(b"cross-origin-resource-policy", b"same-origin")]


class Connection(Protocol):
    """A client's connection, in the scope's state as `connection`."""

    def watch(self, gone: Callable[[], None] | None) -> None:
        """Calls `gone` once when the client closes its connection, or at once if it has; None ends the watch."""

    @property
    def keeps_up(self) -> bool:
        """Whether the answer's head has been sent and the client reads without delay: only then may `push` be called."""

    def push(self, body: bytes) -> None:
        """Sends a piece of the answer at once."""


async def send_json(send: Send, value: Any, status: int = 200, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    body = strict_json.write(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
