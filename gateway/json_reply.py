"""A JSON answer of our own."""

from typing import Any

from starlette.types import Send

from gateway import strict_json


async def send_json(send: Send, value: Any, status: int = 200) -> None:
    body = strict_json.write(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
