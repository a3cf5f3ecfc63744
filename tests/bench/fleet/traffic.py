"""`python -m tests.bench.fleet.traffic SCENARIO`: the people of a scenario; prints their calls as JSON.

They begin when a line of standard input has the URL and the secrets of the keys: `{"url": "http://…", "keys": {}}`.
"""

import argparse
import asyncio
import base64
import json
import random
import string
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import uvloop

from tests.bench.fleet import scenario
from tests.bench.fleet.scenario import Group, Scenario

LETTERS = string.ascii_lowercase + "     "
LETTERS_PER_TOKEN, FEWEST_ANSWERED = 4, 8
PAUSE_AFTER_FAILURE_S = 1.0
BUFFER = 1 << 20
PATHS = {"openai": "/v1/chat/completions", "ollama": "/api/chat"}
Message = dict[str, Any]


@dataclass
class Row:
    """One call; times in the scenario's seconds, from its beginning. `ttft` is what has passed if nothing came."""

    who: str
    key: str
    model: str
    began: float
    asked: int
    prompt: int
    status: int | str = 0
    tokens: int = 0
    ttft: float = 0.0
    total: float = 0.0
    in_time: bool = False

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.tokens >= self.asked


@dataclass
class Town:
    """What all people share."""

    url: str
    keys: dict[str, str]
    http: aiohttp.ClientSession
    speed: float
    seconds: float
    seed: int
    rows: list[Row] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        return (time.monotonic() - self.began) * self.speed

    def is_over(self) -> bool:
        return self.now() >= self.seconds

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self.speed)


class Person:
    def __init__(self, group: Group, number: int, town: Town) -> None:
        self._group, self._town = group, town
        self._random = random.Random(f"{town.seed}/{group.name}/{number}")
        self._system = text(random.Random(group.name), group.system) if group.system else ""
        self._headers = {"Authorization": f"Bearer {town.keys.get(group.key, 'none')}", "Content-Type": "application/json"}

    async def run(self) -> None:
        await self._town.wait(self._random.random() * self._group.think)
        if self._group.is_batch:
            await asyncio.gather(*(self._job() for _ in range(self._group.at_once)))
        while not self._town.is_over():
            await self._conversation()

    async def _job(self) -> None:
        while not self._town.is_over():
            await self._ask([self._message()])

    async def _conversation(self) -> None:
        messages = [{"role": "system", "content": self._system}] if self._system else []
        messages.append(self._message())
        for _ in range(self._group.turns):
            if self._town.is_over():
                return
            answer = await self._ask(messages)
            messages += [{"role": "assistant", "content": answer}, self._message(0.5 + self._random.random())]
            await self._town.wait(self._random.expovariate(1 / max(0.001, self._group.think)))

    def _message(self, part: float = 1.0) -> Message:
        message: Message = {"role": "user", "content": text(self._random, self._group.turn * part)}
        if self._group.picture:
            message["images"] = [base64.b64encode(self._random.randbytes(self._group.picture * 1000)).decode()]
        return message

    async def _ask(self, messages: list[Message]) -> str:
        group, town = self._group, self._town
        asked = max(FEWEST_ANSWERED, int(group.answer * (0.5 + self._random.random())))
        row = Row(group.name, group.key, group.model, town.now(), asked, tokens_of(messages))
        town.rows.append(row)
        answer: list[str] = []
        try:
            await self._read(body_of(group, messages, asked), row, answer)
        except (aiohttp.ClientError, TimeoutError) as failure:
            row.status = type(failure).__name__
        except asyncio.CancelledError:
            row.status = "unfinished"
            raise
        finally:
            row.total = town.now() - row.began
            row.ttft, row.in_time = row.ttft or row.total, not town.is_over()
        if not row.ok:
            await town.wait(PAUSE_AFTER_FAILURE_S)
        return "".join(answer)

    async def _read(self, body: bytes, row: Row, answer: list[str]) -> None:
        path = PATHS[self._group.dialect]
        async with self._town.http.post(self._town.url + path, data=body, headers=self._headers) as response:
            row.status = response.status
            async for line in response.content:
                piece = piece_of(line) if row.status == 200 else ""
                if piece is None:
                    row.status = "error frame"
                elif piece:
                    row.ttft = row.ttft or self._town.now() - row.began
                    row.tokens += len(piece.split())
                    answer.append(piece)


def piece_of(line: bytes) -> str | None:
    """The text of a frame of either dialect; None for an error."""
    content = line.removeprefix(b"data: ").strip()
    if not content.startswith(b"{"):
        return ""
    frame = orjson.loads(content)
    if frame.get("error"):
        return None
    choices = frame.get("choices") or [{}]
    message = frame.get("message") or choices[0].get("delta") or {}
    return message.get("content") or ""


def body_of(group: Group, messages: list[Message], asked: int) -> bytes:
    limit = {"options": {"num_predict": asked}} if group.dialect == "ollama" else {"max_tokens": asked}
    return orjson.dumps({"model": group.model, "messages": messages, "stream": True, **limit})


def tokens_of(messages: list[Message]) -> int:
    return sum(len(message["content"]) // LETTERS_PER_TOKEN for message in messages)


def text(source: random.Random, tokens: float) -> str:
    return "".join(source.choices(LETTERS, k=max(LETTERS_PER_TOKEN, int(tokens * LETTERS_PER_TOKEN))))


async def send(found: Scenario, url: str, keys: dict[str, str], speed: float, seed: int, without: list[str]) -> list[Row]:
    """Runs the scenario once, without the groups that are named."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), read_bufsize=BUFFER
    ) as http:
        town = Town(url, keys, http, speed, found.seconds, seed)
        groups = [group for group in found.who if group.name not in without]
        people = [Person(group, number, town) for group in groups for number in range(group.people)]
        running = [asyncio.create_task(person.run()) for person in people]
        _, late = await asyncio.wait(running, timeout=(found.seconds + found.grace) / speed)
        for person in late:
            person.cancel()
        for failure in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(failure, Exception):
                raise failure
    return town.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--speed", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without", nargs="*", default=[])
    arguments = parser.parse_args()
    found = scenario.read(arguments.scenario)
    target = json.loads(sys.stdin.readline())
    rows = uvloop.run(send(found, target["url"], target["keys"], arguments.speed, arguments.seed, arguments.without))
    json.dump([{**asdict(row), "ok": row.ok} for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
