"""One chat request in both dialects, streamed and whole, sent through the official clients."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gateway.core import strict_json
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2"
MESSAGES: Any = [{"role": "user", "content": "Say hi"}]


@dataclass(frozen=True)
class Chat:
    """The request in one dialect, for a streamed or a whole answer."""

    dialect: Literal["ollama", "openai"]
    streamed: bool

    @property
    def path(self) -> str:
        return "/api/chat" if self.dialect == "ollama" else "/v1/chat/completions"

    @property
    def body(self) -> dict[str, object]:
        return {"model": MODEL, "messages": MESSAGES, "stream": self.streamed}

    def __str__(self) -> str:
        return f"{self.dialect}-{'stream' if self.streamed else 'whole'}"

    def ask(self, gateway: RunningGateway, key: str, **options: object) -> str:
        return SENDERS[self](gateway, key)


def _ollama_whole(gateway: RunningGateway, key: str) -> str:
    return gateway.ollama(key).chat(MODEL, MESSAGES).message.content or ""


def _ollama_stream(gateway: RunningGateway, key: str) -> str:
    chunks = gateway.ollama(key).chat(MODEL, MESSAGES, stream=True)
    return "".join(chunk.message.content or "" for chunk in chunks)


def _openai_whole(gateway: RunningGateway, key: str) -> str:
    with gateway.openai(key) as client:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES)
        return answer.choices[0].message.content or ""


def _openai_stream(gateway: RunningGateway, key: str) -> str:
    with gateway.openai(key) as client:
        chunks = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


SENDERS: dict[Chat, Callable[[RunningGateway, str], str]] = {
    Chat("ollama", False): _ollama_whole,
    Chat("ollama", True): _ollama_stream,
    Chat("openai", False): _openai_whole,
    Chat("openai", True): _openai_stream,
}
CHATS = list(SENDERS)


def send(gateway: RunningGateway, key: str, chat: Chat, **more: object) -> socket.socket:
    """Sends the request on a plain socket, which the test can close at any moment."""
    body = strict_json.write({**chat.body, **more})
    head = f"POST {chat.path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2])))
    connection.sendall(head.encode() + body)
    return connection
