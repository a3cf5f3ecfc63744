"""The caller's side: each request has an id by which its audit row and what a backend saw of it are found."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

LONGEST_ANSWER_S, LOOK_S = 20.0, 3.0
MESSAGES = [{"role": "user", "content": "How is the tide?"}]


@dataclass
class Heard:
    """`body` is what was read, as it came; `is_cut` where the connection broke before the end of the answer."""

    request_id: str
    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    is_cut: bool = False
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)


class Client:
    """Requests with a key count: `sent` has their ids."""

    def __init__(self, id_header: str) -> None:
        self._id_header = id_header
        self.sent: list[str] = []

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=LONGEST_ANSWER_S)
        # Connections of their own: what one request does to its connection must not touch the next.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, url: str, key: str, body: Any = None, *, method: str = "POST", counts: bool = True) -> Heard:
        """`counts`: whether the key is one that works, so that the request will be in the audit."""
        async with self.asking(url, key, body, method=method, counts=counts) as (heard, content):
            try:
                async for piece in content.iter_any():
                    heard.body += piece
            except (aiohttp.ClientError, ConnectionError):
                heard.is_cut = True
            heard.seconds = time.monotonic() - heard.began
        return heard

    @asynccontextmanager
    async def asking(
        self, url: str, key: str, body: Any = None, *, method: str = "POST", counts: bool = True
    ) -> AsyncIterator[tuple[Heard, aiohttp.StreamReader]]:
        """The head of the answer, and its body to be read; leaving hangs up. Raises ConnectionError."""
        request_id = f"drill-{uuid.uuid4().hex}"
        if counts:
            self.sent.append(request_id)
        headers = {self._id_header: request_id, **({"Authorization": f"Bearer {key}"} if key else {})}
        began = time.monotonic()
        try:
            async with self._session.request(method, url, json=body, headers=headers) as answer:
                heard = Heard(request_id, answer.status, answer.headers, began=began, seconds=time.monotonic() - began)
                yield heard, answer.content
                answer.close()
        except aiohttp.ClientError as wrong:
            raise ConnectionError(f"{type(wrong).__name__}: {wrong}") from wrong


async def look(url: str) -> bytes | None:
    """What a route without a key says, over a connection of its own; None where nobody answers."""
    timeout = aiohttp.ClientTimeout(total=LOOK_S)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            return await answer.read()
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None


def chat(model: str, *, stream: bool) -> dict[str, Any]:
    return {"model": model, "messages": MESSAGES, "stream": stream}


async def until(found: Any, seconds: float) -> bool:
    """Whether `found()` becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True
