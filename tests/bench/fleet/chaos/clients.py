"""Clients of all dialects: some stream, some leave; each notes how its call ended."""

import asyncio
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.bench.fleet.chaos.fleet import MODELS, QUEUE_WAIT_S

# After the wait in the queue: the wait for a slot of the key, loads, backends that do not answer, and the answer itself.
OWN_TIME_S = 60.0
# After the end of the run, clients leave.
LAST_WAIT_S = 2.0
PATHS = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages")
WEIGHTS = {"qwen3:32b": 3, "gemma3:12b": 4, "llama3.2": 4, "embed": 0}
SHORT, LONG = 20, 160


@dataclass
class Call:
    """`outcome`: complete, cut, error (in the answer), left, reset (before an answer), unreachable, hung or a status."""

    id: str
    key: str
    sent: float
    outcome: str = ""
    detail: str = ""
    ended: float = 0.0
    waited_s: float = 0.0

    @property
    def has_row(self) -> bool:
        """Whether the gateway has answered it; one that is ending refuses calls before it knows whose they are."""
        is_status = self.outcome.isdecimal() and "shutting down" not in self.detail
        return is_status or self.outcome in ("complete", "error")


@dataclass
class Clients:
    urls: Callable[[], list[str]]
    keys: dict[str, str]
    chance: random.Random
    until: float
    calls: list[Call] = field(default_factory=list)

    async def run(self, at_once: int) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as session:
            tasks = [asyncio.create_task(self._client(session)) for _ in range(at_once)]
            await asyncio.wait(tasks, timeout=self.until + LAST_WAIT_S - time.time())
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.result()

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while time.time() < self.until:
            key = self.chance.choice(list(self.keys))
            call = Call(f"chaos-{uuid.uuid4().hex}", key, time.time())
            self.calls.append(call)
            try:
                async with asyncio.timeout(QUEUE_WAIT_S + OWN_TIME_S):
                    await self._call(session, call)
            except TimeoutError:
                call.outcome = "hung"
            except asyncio.CancelledError:
                call.outcome, call.ended = "left", time.time()
                raise
            except aiohttp.ClientConnectorError:
                call.outcome = "unreachable"
            except aiohttp.ClientPayloadError:
                call.outcome = "cut"
            except (aiohttp.ClientError, OSError):
                call.outcome = call.outcome or "reset"
            call.ended = time.time()
            await asyncio.sleep(self.chance.random() * 0.3)

    async def _call(self, session: aiohttp.ClientSession, call: Call) -> None:
        path, body = self._request(call)
        headers = {"Authorization": f"Bearer {self.keys[call.key]}", "X-Request-ID": call.id}
        if call.key == "people":
            headers["X-OpenWebUI-User-Id"] = self.chance.choice("abc")
        elif call.key == "heavy" and self.chance.random() < 0.3:
            headers["X-Gateway-Class"] = "batch"
        leaves_after = self.chance.choice((0.05, 0.5, 2.0)) if self.chance.random() < 0.2 else None
        try:
            async with asyncio.timeout(leaves_after):
                async with session.post(self.chance.choice(self.urls()) + path, json=body, headers=headers) as answer:
                    call.outcome = "cut"
                    call.waited_s = int(answer.headers.get("X-Queue-Wait-Ms", 0)) / 1000
                    whole = await answer.read()
        except TimeoutError:
            call.outcome = "left"
            return
        call.outcome = str(answer.status) if answer.status != 200 else judged(whole)
        if answer.status != 200:
            call.detail = whole[:300].decode(errors="replace")

    def _request(self, call: Call) -> tuple[str, dict[str, Any]]:
        path, stream = self.chance.choice(PATHS), self.chance.random() < 0.6
        model = self.chance.choices(list(MODELS), [WEIGHTS[name] for name in MODELS])[0]
        text = "word " * self.chance.randint(5, 800)
        most = self.chance.choice((SHORT, LONG))
        body: dict[str, Any] = {"model": model, "stream": stream}
        body |= {"prompt": text} if path == "/api/generate" else {"messages": [{"role": "user", "content": text}]}
        body |= {"options": {"num_predict": most}} if path.startswith("/api/") else {"max_tokens": most}
        return path, body


def judged(whole: bytes) -> str:
    """How an answer with status 200 ended."""
    if b'"error":' in whole.replace(b" ", b"") or b"event: error" in whole:
        return "error"
    ends = (b"[DONE]", b'"done":true', b"message_stop", b'"finish_reason":"', b'"stop_reason":"')
    return "complete" if any(end in whole.replace(b" ", b"") for end in ends) else "cut"
