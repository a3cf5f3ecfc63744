"""Clients with random behaviour: some read the whole answer, others leave before it, within it, or within their request."""

import asyncio
import json
import random
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tests.support.chat_requests import CHATS, Chat

Behaviour = Literal["reads", "leaves at once", "leaves while waiting", "leaves in the middle", "sends half"]
BEHAVIOURS: list[Behaviour] = [
    "reads",
    "reads",
    "reads",
    "leaves at once",
    "leaves while waiting",
    "leaves in the middle",
    "sends half",
]
PATIENCE_S = 60.0


@dataclass
class RandomClients:
    """`ends` counts what clients saw: each status; of the answers with 200 `complete`, `cut` and `error`; and `left`."""

    key: str
    rng: random.Random
    behaviours: Sequence[Behaviour] = tuple(BEHAVIOURS)
    sent: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    whole: set[str] = field(default_factory=set)
    took_s: list[float] = field(default_factory=list)

    async def ask(self, url: str) -> None:
        chosen: Behaviour = self.rng.choice(self.behaviours)
        chat = self.rng.choice(CHATS)
        number = f"crowd-{uuid.uuid4().hex}"
        self.sent += 1
        host, port = url.removeprefix("http://").split(":")
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            self.sent -= 1
            self.ends["unreachable"] += 1
            return
        try:
            began = asyncio.get_running_loop().time()
            async with asyncio.timeout(PATIENCE_S):
                await self._converse((reader, writer), chosen, chat, number)
            if chosen == "reads":
                self.took_s.append(asyncio.get_running_loop().time() - began)
        except OSError:
            self.ends["reset"] += 1
        finally:
            writer.close()

    async def _converse(
        self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], behaviour: Behaviour, chat: Chat, number: str
    ) -> None:
        reader, writer = connection
        body = json.dumps({**chat.body, "max_tokens": 20, "options": {"num_predict": 20}}).encode()
        head = f"POST {chat.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\nX-Request-ID: {number}\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + (body[:10] if behaviour == "sends half" else body))
        await writer.drain()
        if behaviour in ("leaves at once", "sends half"):
            self.ends["left"] += 1
        elif behaviour == "leaves while waiting":
            await asyncio.sleep(self.rng.random() * 0.03)
            self.ends["left"] += 1
        elif behaviour == "leaves in the middle":
            await reader.read(300)
            self.ends["left"] += 1
        else:
            self._judge(await reader.read(), chat, number)

    def _judge(self, received: bytes, chat: Chat, number: str) -> None:
        if not received:
            self.ends["nothing"] += 1
            return
        head, _, body = received.partition(b"\r\n\r\n")
        status = head.split(b" ", 2)[1].decode()
        self.ends[status] += 1
        if status != "200":
            return
        if b'"error":' in body:
            self.ends["error"] += 1
        elif b"\ndata: [DONE]" in body or b'"done":true' in body or (not chat.streamed and body.rstrip().endswith(b"}")):
            self.ends["complete"] += 1
            self.whole.add(number)
        else:
            self.ends["cut"] += 1


async def run_clients(crowd: RandomClients, urls: list[str], requests: int, at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with gate:
            await crowd.ask(urls[number % len(urls)])

    await asyncio.gather(*(one(number) for number in range(requests)))
