"""What a fake backend answers in the Messages and Responses APIs, before either writes it in its own events."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.fake_backend.content import (
    Json,
    last_user_text,
    prompt_tokens,
    split_evenly,
    text_of,
    tool_arguments,
)
from tests.support.fake_backend.scripts import Received, Step, answer, compact

if TYPE_CHECKING:
    from tests.support.fake_backend.answers import HealthyServer

LLAMACPP = ("Server", "llama.cpp")


@dataclass(frozen=True)
class ToolCall:
    id: str
    name: str
    arguments: Json

    @property
    def written(self) -> str:
        return json.dumps(self.arguments, separators=(",", ":"), ensure_ascii=False)


@dataclass(frozen=True)
class Turn:
    thinking: list[str]
    text: list[str]
    calls: list[ToolCall]
    prompt: int
    cached: int
    is_cut: bool

    @property
    def completion(self) -> int:
        return len(self.thinking) + len(self.text) + len(self.calls)


def turn_of(healthy: "HealthyServer", messages: list[Json], tools: list[Json], is_after_tool: bool, fields: Json) -> Turn:
    """`tools` are functions: name and parameters."""
    calls = [] if is_after_tool else calls_of(healthy, tools)
    text = [] if calls else split_evenly(healthy.text(last_user_text(messages)), healthy.pieces)
    cached: Any = healthy.cached(fields) if healthy.cached is not None else 0
    counted = prompt_tokens({"messages": messages}) + sum(len(json.dumps(tool).split()) for tool in tools)
    return Turn(thinking_of(healthy), text, calls, counted, cached, healthy.is_cut)


def thinking_of(healthy: "HealthyServer") -> list[str]:
    return split_evenly(healthy.thinking, 2) if healthy.thinking else []


def calls_of(healthy: "HealthyServer", tools: list[Json]) -> list[ToolCall]:
    """One call of each of the first tools."""
    called = tools[: healthy.parallel_calls]
    return [ToolCall(f"call_{n}_k1ujbeiw", tool["name"], tool_arguments(tool)) for n, tool in enumerate(called)]


def event_frames(events: list[Json]) -> list[bytes]:
    """Server-sent events whose name stands in the data, too, as both APIs have them."""
    return [b"event: %b\ndata: %b\n\n" % (event["type"].encode(), compact(event)) for event in events]


def fields_of(request: Received) -> Json | None:
    """None for a body that is JSON, but no object."""
    fields = json.loads(request.body)
    return fields if isinstance(fields, dict) else None


def refused_by_llamacpp(status: int, words: str) -> list[Step]:
    kind = "invalid_request_error" if status == 400 else "server_error"
    return answer(
        status, {"error": {"code": status, "message": words, "type": kind}}, "application/json; charset=utf-8", LLAMACPP
    )


def flattened(content: Any) -> str:
    """The text of content blocks and parts of both APIs."""
    if isinstance(content, list):
        return " ".join(text_of(block.get("text") or block.get("content") or "") for block in content)
    return text_of(content)
