"""The kinds of model servers that answer the Messages and Responses APIs, themselves or through a translation."""

from dataclasses import dataclass
from typing import Any

from tests.support.fake_backend.answers import Kind
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import FAULTS, Received

MODEL = "qwen3:8b"
CHAT = "/v1/chat/completions"
PROBE = b"[]"
# One pixel.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@dataclass(frozen=True)
class ModelServer:
    """`messages` and `responses` are the paths at which it gets plain requests of these APIs."""

    name: str
    kind: Kind
    is_native: bool
    messages: str
    responses: str

    def __str__(self) -> str:
        return self.name

    def backend(self, name: str = "alpha") -> FakeBackend:
        return FakeBackend(self.kind, [MODEL], name=name, is_native=self.is_native)


CHAT_ONLY = ModelServer("chat only", "openai", False, CHAT, CHAT)
OLDER_OLLAMA = ModelServer("older Ollama", "ollama", False, CHAT, CHAT)
OLLAMA = ModelServer("Ollama", "ollama", True, "/v1/messages", "/v1/responses")
# The official client cannot read its Responses, in which no event has an index.
LLAMACPP = ModelServer("llama.cpp", "openai", True, "/v1/messages", CHAT)
# What a backend can do before it has answered, so that another one is asked.
FAILURES = ["503", "close_after_head", "garbage", "error_first_frame", "refused"]
SERVERS = [CHAT_ONLY, OLDER_OLLAMA, OLLAMA, LLAMACPP]


def asked(backend: FakeBackend) -> list[Received]:
    """The requests for answers; those by which the gateway finds out the paths of a backend are not among them."""
    return [request for request in backend.requests if request.method == "POST" and request.body != PROBE]


def fail(backend: FakeBackend, path: str, fault: str, kind: Kind, is_streamed: bool) -> None:
    """From now on, this backend has one of the FAILURES."""
    if fault == "refused":
        backend.stop()
    else:
        backend.play(path, FAULTS[fault](kind, is_streamed))
