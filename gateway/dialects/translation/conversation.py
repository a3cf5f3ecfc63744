"""The neutral form of a conversation, into which each client dialect is read and from which each is written.

A request becomes a `Prompt`, an answer a `Reply`, a stream a sequence of events. What a dialect cannot carry is named in
`Prompt.dropped`; what would be lost in meaning is refused when it is read. No I/O.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from gateway.dialects.dialect import Usage

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length", "tool_calls", "content_filter"]
# How much a model is to think; None leaves it to the model.
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# By the names that Ollama and the Responses API have for them.
EFFORTS: Mapping[str, Effort] = MappingProxyType(
    {
        "none": "none",
        "minimal": "minimal",
        "low": "low",
        "medium": "medium",
        "high": "high",
        "xhigh": "xhigh",
        "max": "max",
        "ultra": "max",
    }
)


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """`data` is base64 of `media_type`; or else `url` says where it is."""

    media_type: str = ""
    data: str = field(default="", repr=False)
    url: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Thinking:
    """What a model thought. Signatures of other vendors' servers are not part of it: nobody here can check them."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is the JSON text as the model wrote it, byte for byte; "" stands for no arguments.

    `name` is the name that the backend knows. Whoever reads a request keeps how it is called in the client's dialect.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The outcome of the call with this id, in the order of the client."""

    call_id: str
    content: tuple["Text | Image", ...]
    is_error: bool = False


Part = Text | Image | Thinking | ToolCall | ToolResult


@dataclass(frozen=True, slots=True)
class Message:
    """Parts in their order. Tool results are parts of a user's message; a backend's dialect may want messages of their own."""

    role: Role
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Tool:
    """`schema` is the JSON schema of its arguments, with its keys in the client's order."""

    name: str
    description: str = ""
    schema: dict[str, Any] = field(default_factory=dict, hash=False)
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class Format:
    """The answer is JSON, of a schema if there is one."""

    schema: dict[str, Any] | None = field(default=None, hash=False)
    name: str = "answer"
    strict: bool | None = None


@dataclass(slots=True)
class Prompt:
    """A request to a model. None and empty values leave a choice to the backend.

    `tool_choice` is "auto", "none", "required", or a tool's name in a tuple of one.
    `sampling` has numbers whose names are the same everywhere: temperature, top_p, top_k, min_p, seed, presence_penalty,
    frequency_penalty, repeat_penalty.
    `dropped` names the client's fields that the answer does not depend on and that no backend is sent.
    `continues_last` says that the last message is the beginning of the answer: the model is to go on from it.
    `client_names` has the names of fields in the client's API where they differ from those of chat/completions.
    """

    messages: list[Message]
    tools: list[Tool] = field(default_factory=list)
    tool_choice: str | tuple[str] = ""
    parallel_tools: bool | None = None
    most_output: int | None = None
    stop: Sequence[str] = ()
    sampling: dict[str, float] = field(default_factory=dict)
    effort: Effort | None = None
    format: Format | None = None
    stream: bool = False
    user: str = ""
    dropped: list[str] = field(default_factory=list)
    continues_last: bool = False
    client_names: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(slots=True)
class Reply:
    """A whole answer; `parts` are Thinking, Text and ToolCall in their order."""

    parts: list[Thinking | Text | ToolCall]
    finish: Finish
    usage: Usage = field(default_factory=Usage)
    id: str = ""
    created: int = 0


@dataclass(frozen=True, slots=True)
class ThinkingPiece:
    text: str


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class ToolPiece:
    """A piece of the tool call at this index of the answer. `id` and `name` are complete in its first piece and "" later;
    pieces of different calls may come interleaved."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """Nothing but `Counted` may follow."""

    finish: Finish


@dataclass(frozen=True, slots=True)
class Counted:
    """The last one of a stream holds; servers may send one with each piece."""

    usage: Usage


Event = ThinkingPiece | TextPiece | ToolPiece | Finished | Counted
