"""The content blocks of Anthropic's Messages API, read as parts of the neutral form; messages_request reads the rest."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.translation.conversation import Image, Part, Role, Text, Thinking, ToolCall, ToolResult

LONGEST_SHOWN = 64
DATA_URL = re.compile(r"data:(?P<media_type>[^;,]*);base64,(?P<data>.*)", re.IGNORECASE)

Block = dict[str, Any]
# A function reads one kind of block; its second argument is the block's place in the body, for error messages.
ReadBlock = Callable[[Block, str], tuple[Part, ...]]


def parts_of(content: Any, where: str, role: Role) -> tuple[Part, ...]:
    """The parts of a message's content. Raises BadRequest on blocks whose meaning no backend could be given."""
    return _parts(content, where, BLOCKS[role], f"a message of the role {role!r}")


def string(value: Block, name: str, where: str, *, default: str | None = None) -> str:
    """A string of an object in the body. Without a default the field is required."""
    found = value.get(name)
    if found is None and default is not None:
        return default
    if not isinstance(found, str):
        raise BadRequest(f"the field '{where}.{name}' must be a string")
    return found


def shown(value: object) -> str:
    return ascii(value)[:LONGEST_SHOWN]


def _parts(content: Any, where: str, readers: Mapping[str, ReadBlock], place: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Text(content),) if content else ()
    if not isinstance(content, list):
        raise BadRequest(f"the field {where!r} must be a string or a list of blocks")
    found: list[Part] = []
    for number, block in enumerate(content):
        at = f"{where}.{number}"
        if not isinstance(block, dict):
            raise BadRequest(f"the field {at!r} must be an object")
        kind = string(block, "type", at)
        if kind not in readers:
            raise BadRequest(f"the field {at!r} is a block of type {shown(kind)}, which cannot be passed on in {place}")
        found += readers[kind](block, at)
    return tuple(found)


def _text(block: Block, where: str) -> tuple[Part, ...]:
    text = string(block, "text", where)
    return (Text(text),) if text else ()


def _image(block: Block, where: str) -> tuple[Part, ...]:
    source = _source(block, where)
    kind = source.get("type")
    if kind == "base64":
        return (Image(string(source, "media_type", f"{where}.source"), string(source, "data", f"{where}.source")),)
    if kind == "url":
        url = string(source, "url", f"{where}.source")
        inline = DATA_URL.fullmatch(url)
        return (Image(inline["media_type"], inline["data"]) if inline else Image(url=url),)
    raise _unreadable_source(kind, where, "'base64' or 'url'")


def _document(block: Block, where: str) -> tuple[Part, ...]:
    """Plain text and lists of blocks are passed on as they are; no backend reads a PDF."""
    source = _source(block, where)
    kind = source.get("type")
    head = _joined(string(block, name, where, default="") for name in ("title", "context"))
    if kind == "text":
        return (Text(_joined((head, string(source, "data", f"{where}.source")))),)
    if kind == "content":
        body = _parts(source.get("content"), f"{where}.source.content", TEXTS_AND_IMAGES, "a document")
        return (Text(head), *body) if head else body
    raise _unreadable_source(kind, where, "'text' or 'content'")


def _search_result(block: Block, where: str) -> tuple[Part, ...]:
    texts = _parts(block.get("content"), f"{where}.content", TEXTS, "a search result")
    head = (string(block, name, where, default="") for name in ("title", "source"))
    return (Text(_joined((*head, *(part.text for part in texts if isinstance(part, Text))))),)


def _source(block: Block, where: str) -> Block:
    source = block.get("source")
    if not isinstance(source, dict):
        raise BadRequest(f"the field '{where}.source' must be an object")
    return source


def _unreadable_source(kind: object, where: str, readable: str) -> BadRequest:
    return BadRequest(
        f"the field '{where}.source' has the type {shown(kind)}, which no model server here reads; send {readable}"
    )


def _joined(texts: Any) -> str:
    return "\n".join(text for text in texts if text)


def _tool_use(block: Block, where: str) -> tuple[Part, ...]:
    value = block.get("input")
    if value is not None and not isinstance(value, dict):
        raise BadRequest(f"the field '{where}.input' must be an object")
    name = string(block, "name", where)
    return (ToolCall(string(block, "id", where), name, strict_json.write_strictly(value or {}).decode()),)


def _tool_result(block: Block, where: str) -> tuple[Part, ...]:
    content = block.get("content")
    parts = () if content is None else _parts(content, f"{where}.content", RESULTS, "a tool's result")
    is_error = block.get("is_error")
    if is_error is not None and not isinstance(is_error, bool):
        raise BadRequest(f"the field '{where}.is_error' must be true or false")
    shown_parts = tuple(part for part in parts if isinstance(part, Text | Image))
    return (ToolResult(string(block, "tool_use_id", where), shown_parts, is_error or False),)


def _tool_reference(block: Block, where: str) -> tuple[Part, ...]:
    """The outcome of a search for tools. A backend has every tool from the beginning, so a sentence is enough."""
    return (Text(f"The tool {string(block, 'tool_name', where)} is available."),)


def _thinking(block: Block, where: str) -> tuple[Part, ...]:
    """The text is empty if the client asked not to be shown it."""
    text = string(block, "thinking", where)
    return (Thinking(text),) if text else ()


def _summary(block: Block, where: str) -> tuple[Part, ...]:
    """A summary of what stood before; none if it could not be made."""
    text = string(block, "content", where, default="")
    return (Text(text),) if text else ()


def _nothing(block: Block, where: str) -> tuple[Part, ...]:
    """Encrypted thinking, and the mark of a change of models: no model is shown them."""
    return ()


TEXTS: Mapping[str, ReadBlock] = MappingProxyType({"text": _text})
TEXTS_AND_IMAGES: Mapping[str, ReadBlock] = MappingProxyType({"text": _text, "image": _image})
SHOWN: Mapping[str, ReadBlock] = MappingProxyType({**TEXTS_AND_IMAGES, "document": _document, "search_result": _search_result})
RESULTS: Mapping[str, ReadBlock] = MappingProxyType({**SHOWN, "tool_reference": _tool_reference})
BLOCKS: Mapping[Role, Mapping[str, ReadBlock]] = MappingProxyType(
    {
        "system": TEXTS,
        "user": MappingProxyType({**SHOWN, "tool_result": _tool_result, "compaction": _summary}),
        "assistant": MappingProxyType(
            {
                "text": _text,
                "thinking": _thinking,
                "redacted_thinking": _nothing,
                "tool_use": _tool_use,
                "compaction": _summary,
                "fallback": _nothing,
            }
        ),
    }
)
