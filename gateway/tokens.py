"""Tokens guessed from text, where nobody has counted them yet: about four letters each, and one for any other character."""

from typing import Any, NamedTuple

from gateway import strict_json

LETTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
TOKENS_PER_IMAGE = 768


class Need(NamedTuple):
    """Tokens that a request will take: its prompt's, and its answer's where it names a bound. `prompt` -1: it counts none."""

    prompt: int = -1
    output: int | None = 0


NO_TOKENS = Need()


def of_text(text: str) -> int:
    """Chinese or Cyrillic take about a token a character where English takes a quarter."""
    if text.isascii():
        return -(-len(text) // LETTERS_PER_TOKEN)
    letters = len(text.encode("ascii", "ignore"))
    return -(-letters // LETTERS_PER_TOKEN) + len(text) - letters


def of_json(value: Any) -> int:
    return of_text(strict_json.write_anyhow(value).decode("utf-8", "replace")) if value else 0


def of_messages(messages: list[dict[str, Any]]) -> int:
    found = TOKENS_PER_MESSAGE * len(messages)
    for message in messages:
        found += of_content(message.get("content"))
        if "tool_calls" in message:
            found += of_json(message["tool_calls"])
        if "images" in message and isinstance(message["images"], list):
            found += len(message["images"]) * TOKENS_PER_IMAGE
    return found


def of_content(content: Any) -> int:
    """A string, or a list of parts: texts, pictures, sounds."""
    if isinstance(content, str):
        return of_text(content)
    if not isinstance(content, list):
        return 0
    return sum(_of_part(part) for part in content)


def _of_part(part: Any) -> int:
    if isinstance(part, str):
        return of_text(part)
    if isinstance(part, dict):
        text = part.get("text")
        return of_text(text) if isinstance(text, str) else TOKENS_PER_IMAGE
    return 0


def of_input(value: Any) -> int:
    """What is completed or embedded: a text, token numbers, or a list of either."""
    if isinstance(value, str):
        return of_text(value)
    if not isinstance(value, list):
        return 1
    return sum(of_input(item) for item in value)
