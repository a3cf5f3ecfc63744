"""The caller's side: each request has an id that finds its audit row and the call that a backend received."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

Content = aiohttp.StreamReader
LONGEST_ANSWER_S, FETCH_S = 20.0, 3.0
MESSAGES = [{"role": "user", "content": "How is the tide?"}]


@dataclass
class ClientAnswer:
    """`body` has the bytes as they came; `is_cut`: the connection broke before the end of the answer."""

    request_id: str
    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    is_cut: bool = False
    seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)


class Client:
    """`sent` has the ids of the requests that must be in the audit."""

    def __init__(self, id_header: str) -> None:
        self._id_header = id_header
        self.sent: list[str] = []

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=LONGEST_ANSWER_S)
        # A connection for each request: what one does to its connection must not affect the next.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, url: str, key: str, body: Any = None, *, method: str = "POST", counts: bool = True) -> ClientAnswer:
        """`counts`: the key is valid, so that the request will be in the audit."""
        async with self.asking(url, key, body, method=method, counts=counts) as (answer, content):
            try:
                async for piece in content.iter_any():
                    answer.body += piece
            except (aiohttp.ClientError, ConnectionError):
                answer.is_cut = True
            answer.seconds = time.monotonic() - answer.began
        return answer

    @asynccontextmanager
    async def asking(
        self, url: str, key: str, body: Any = None, *, method: str = "POST", counts: bool = True
    ) -> AsyncIterator[tuple[ClientAnswer, Content]]:
        """The answer's head, and its body to be read; leaving the block closes the connection. Raises ConnectionError."""
        request_id = f"drill-{uuid.uuid4().hex}"
        if counts:
            self.sent.append(request_id)
        headers = {self._id_header: request_id, **({"Authorization": f"Bearer {key}"} if key else {})}
        began = time.monotonic()
        try:
            async with self._session.request(method, url, json=body, headers=headers) as response:
                seconds = time.monotonic() - began
                yield (
                    ClientAnswer(request_id, response.status, response.headers, began=began, seconds=seconds),
                    response.content,
                )
                response.close()
        except aiohttp.ClientError as wrong:
            raise ConnectionError(f"{type(wrong).__name__}: {wrong}") from wrong


async def fetch(url: str) -> bytes | None:
    """The answer of a route that needs no key, over a separate connection; None if nothing answers."""
    timeout = aiohttp.ClientTimeout(total=FETCH_S)
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
