"""A model server with a configurable behaviour, on an address of this machine only."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from gateway.ops.drill import agent_answers
from gateway.ops.drill.agent_answers import AGENTS

HOST = "127.0.0.1"
LONGEST_HEAD, LONGEST_WAIT_S = 65_536, 60.0
THOUGHT_S = 0.3
MOMENT = "2026-01-01T00:00:00Z"
REFUSAL = "this message is the model server's"
WORDS = ("The ", "tide ", "comes ", "in.")
CHATS = ("/api/chat", "/v1/chat/completions")


@dataclass
class ReceivedCall:
    """One chat call: `began` and `ended` by the monotonic clock; `left`: the caller hung up before the end."""

    path: str
    headers: dict[str, str] = field(repr=False)
    body: dict[str, Any] = field(repr=False)
    began: float
    ended: float = 0.0
    left: bool = False

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream", self.path == "/api/chat"))


Writer = asyncio.StreamWriter
Behaviour = Callable[["FakeBackend", ReceivedCall, Writer], Awaitable[None]]


class FakeBackend:
    """`async with FakeBackend(name, model) as backend:`; `behaviour` answers each chat.

    One that `is_native` has the APIs of coding agents, too.
    """

    def __init__(self, name: str, *models: str, is_native: bool = False) -> None:
        self.name, self.models = name, models
        self._paths = CHATS + (AGENTS if is_native else ())
        self.behaviour: Behaviour = answer_well
        self.chats: list[ReceivedCall] = []
        self.heads: list[str] = []
        # What `pause_after_one_frame` waits for.
        self.go_on = asyncio.Event()
        self._open: set[Writer] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0, limit=LONGEST_HEAD)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.go_on.set()
        await self.close()

    async def close(self) -> None:
        """From now on connections are refused."""
        self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._server.wait_closed(), 1)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def received(self, request_id: str) -> list[ReceivedCall]:
        return [chat for chat in self.chats if chat.headers.get("x-request-id") == request_id]

    async def _serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        self._open.add(writer)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, asyncio.CancelledError):
            # The caller left, or the drill has ended.
            pass
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: Writer) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.heads.append(head)
        first, *lines = head.rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        path = first.split(" ")[1]
        if path not in self._paths:
            await send_whole(writer, 200, self._fact(path))
            return True
        fields = json.loads(body)
        if not isinstance(fields, dict):
            # By this the gateway finds out which paths there are.
            await send_whole(writer, 400, {"error": "not an object"})
            return True
        chat = ReceivedCall(path, headers, fields, time.monotonic())
        self.chats.append(chat)
        watch = asyncio.create_task(self._watch(reader, chat, writer))
        try:
            await self.behaviour(self, chat, writer)
        finally:
            chat.ended = chat.ended or time.monotonic()
            watch.cancel()
        # An answer without a length ends with the connection.
        return False

    async def _watch(self, reader: asyncio.StreamReader, chat: ReceivedCall, writer: Writer) -> None:
        with suppress(ConnectionError):
            if await reader.read(1):
                return
        chat.left, chat.ended = True, time.monotonic()
        writer.transport.abort()

    def _fact(self, path: str) -> Any:
        common = {"modified_at": MOMENT, "size": 1, "digest": "0" * 64, "details": {}}
        entries = [{"name": f"{model}:latest", "model": f"{model}:latest", **common} for model in self.models]
        facts = {"/api/tags": {"models": entries}, "/api/ps": {"models": []}, "/api/version": {"version": "0.12.0"}}
        return facts.get(path, {})


async def send_whole(writer: Writer, status: int, value: Any, kind: str = "application/json") -> None:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = b"HTTP/1.1 %d Status\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (status, kind.encode(), len(body))
    writer.write(head + body)
    await writer.drain()


async def begin_stream(chat: ReceivedCall, writer: Writer) -> None:
    """In chunks, as HTTP/1.1 has them."""
    kind = b"application/x-ndjson" if chat.path == "/api/chat" else b"text/event-stream"
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind)
    await writer.drain()


async def send_frame(writer: Writer, frame: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
    await writer.drain()


def frames(chat: ReceivedCall) -> list[bytes]:
    """The frames of the answer; the last one is marked as the last."""
    model = chat.body["model"]
    if chat.path in AGENTS:
        return agent_answers.frames(chat.path, model, WORDS)
    if chat.path == "/api/chat":
        head = {"model": model, "created_at": MOMENT}
        pieces = [{**head, "message": {"role": "assistant", "content": word}, "done": False} for word in WORDS]
        last = {**head, "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
        records: list[dict[str, Any]] = [*pieces, {**last, "prompt_eval_count": 3, "eval_count": len(WORDS)}]
        return [json.dumps(record).encode() + b"\n" for record in records]
    head = {"id": "chatcmpl-drill", "object": "chat.completion.chunk", "created": 1767225600, "model": model}
    deltas: list[tuple[dict[str, str], str | None]] = [*(({"content": word}, None) for word in WORDS), ({}, "stop")]
    events = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": why}]} for delta, why in deltas]
    return [*(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events), b"data: [DONE]\n\n"]


def whole(chat: ReceivedCall) -> bytes:
    message = {"role": "assistant", "content": "".join(WORDS)}
    model = chat.body["model"]
    if chat.path in AGENTS:
        return agent_answers.whole(chat.path, model, WORDS)
    if chat.path == "/api/chat":
        record = {"model": model, "created_at": MOMENT, "message": message, "done": True, "done_reason": "stop"}
        return json.dumps({**record, "prompt_eval_count": 3, "eval_count": len(WORDS)}).encode()
    usage = {"prompt_tokens": 3, "completion_tokens": len(WORDS), "total_tokens": 3 + len(WORDS)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    head = {"id": "chatcmpl-drill", "object": "chat.completion", "created": 1767225600, "model": model}
    return json.dumps({**head, "choices": [choice], "usage": usage}).encode()


# ── behaviours ──


async def answer_well(backend: FakeBackend, chat: ReceivedCall, writer: Writer) -> None:
    if not chat.streams:
        await send_whole(writer, 200, whole(chat))
        return
    await begin_stream(chat, writer)
    for frame in frames(chat):
        await send_frame(writer, frame)
    await send_frame(writer, b"")


async def think_first(backend: FakeBackend, chat: ReceivedCall, writer: Writer) -> None:
    await asyncio.sleep(THOUGHT_S)
    await answer_well(backend, chat, writer)


async def pause_after_one_frame(backend: FakeBackend, chat: ReceivedCall, writer: Writer) -> None:
    """The rest comes when `go_on` is set."""
    await begin_stream(chat, writer)
    first, *rest = frames(chat)
    await send_frame(writer, first)
    await asyncio.wait_for(backend.go_on.wait(), LONGEST_WAIT_S)
    for frame in [*rest, b""]:
        await send_frame(writer, frame)


async def never_answer(backend: FakeBackend, chat: ReceivedCall, writer: Writer) -> None:
    await asyncio.sleep(LONGEST_WAIT_S)


async def fail(backend: FakeBackend, chat: ReceivedCall, writer: Writer) -> None:
    await send_whole(writer, 500, b"out of memory", "text/plain")


async def refuse(backend: FakeBackend, chat: ReceivedCall, writer: Writer) -> None:
    await send_whole(writer, 400, {"error": REFUSAL})


async def begin_with_garbage(backend: FakeBackend, chat: ReceivedCall, writer: Writer) -> None:
    await begin_stream(chat, writer)
    for frame in (b"<html>not what was asked for</html>\n\n", b""):
        await send_frame(writer, frame)


async def die_in_the_middle(backend: FakeBackend, chat: ReceivedCall, writer: Writer) -> None:
    await begin_stream(chat, writer)
    for frame in frames(chat)[:2]:
        await send_frame(writer, frame)
    # The frames sent so far must be read before the connection breaks.
    await asyncio.sleep(0.1)
    chat.ended = time.monotonic()
    writer.transport.abort()
