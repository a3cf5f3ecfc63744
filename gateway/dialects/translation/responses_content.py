"""Content of the Responses API: a string, or a list of texts, images and files."""

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Any

from gateway.core.errors import BadRequest
from gateway.dialects.translation.conversation import Image, Text

TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
# What only OpenAI can read.
UNREADABLE = frozenset({"encrypted_content"})
IMAGES = frozenset({"input_image", "computer_screenshot"})
INLINE = re.compile(r"data:([^;,]*)(?:;[^;,]*)*;base64,", re.IGNORECASE)
PLAIN_TYPES = re.compile(r"text/|application/(?:json|xml|yaml|x-yaml|toml|javascript)$", re.IGNORECASE)


def read_content(content: Any, where: str) -> tuple[Text | Image, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Text(content),)
    if not isinstance(content, list):
        raise BadRequest(f"{where} must be a string or a list of parts")
    return tuple(part for number, one in enumerate(content) for part in _read_part(one, f"{where}[{number}]"))


def read_text(content: Any, where: str) -> tuple[Text, ...]:
    """Content of a role that has no images."""
    parts = read_content(content, where)
    texts = tuple(part for part in parts if isinstance(part, Text))
    if len(texts) != len(parts):
        raise BadRequest(f"{where} has an image; send it in a message of the user")
    return texts


def _read_part(part: Any, where: str) -> Iterator[Text | Image]:
    if isinstance(part, str):
        yield Text(part)
        return
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise BadRequest(f"{where} must be an object with a 'type'")
    kind: str = part["type"]
    if kind in TEXTS or kind == "refusal":
        yield Text(_string(part, "refusal" if kind == "refusal" else "text", where))
    elif kind in IMAGES:
        yield _image(part, where)
    elif kind == "input_file":
        yield _file(part, where)
    elif kind not in UNREADABLE:
        raise BadRequest(f"{where} has the type {kind[:64]!r}, which no backend takes; send text or images")


def _string(part: dict[str, Any], name: str, where: str) -> str:
    found = part.get(name)
    if not isinstance(found, str):
        raise BadRequest(f"the {name!r} of {where} must be a string")
    return found


def _image(part: dict[str, Any], where: str) -> Image:
    given: Any = part.get("image_url")
    # Some clients nest the address as chat/completions does.
    found = {**part, **given} if isinstance(given, dict) else {**part, "url": given}
    url, detail = found.get("url"), found.get("detail")
    if url is None and part.get("file_id"):
        raise BadRequest(f"{where} names an uploaded file, but this gateway keeps none; send the image as a data URL")
    if not isinstance(url, str) or not url.lower().startswith(("data:", "http://", "https://")):
        raise BadRequest(f"the 'image_url' of {where} must be a data URL or a web address")
    return _image_at(url, detail if isinstance(detail, str) else "")


def _image_at(url: str, detail: str = "") -> Image:
    inline = INLINE.match(url)
    return Image(inline[1], url[inline.end() :], detail=detail) if inline else Image(url=url, detail=detail)


def _file(part: dict[str, Any], where: str) -> Text | Image:
    if part.get("file_data") is None and (part.get("file_id") or part.get("file_url")):
        raise BadRequest(f"{where} is a file that is kept elsewhere; this gateway does not fetch it; send its text")
    data = _string(part, "file_data", where)
    inline = INLINE.match(data)
    if inline and inline[1].lower().startswith("image/"):
        return _image_at(data)
    text = _plain_text(data, inline)
    if text is None:
        raise BadRequest(f"{where} is a file that no backend takes; send its text, or its pages as images")
    name = part.get("filename")
    return Text(f"{name}:\n{text}" if isinstance(name, str) and name else text)


def _plain_text(data: str, inline: re.Match[str] | None) -> str | None:
    if inline is None or not PLAIN_TYPES.match(inline[1]):
        return None
    try:
        return base64.b64decode(data[inline.end() :], validate=True).decode("utf-8")
    except (binascii.Error, ValueError):
        return None
