"""The arguments of a tool call as a model writes them: the text of a JSON object, which may arrive in pieces."""

import re
from typing import Any

from gateway.core import strict_json

MARKS = re.compile(r'["\\{}\[\]]')


def object_of(arguments: str) -> dict[str, Any] | None:
    """The object, {} if the model wrote no arguments, None if it wrote anything else."""
    text = arguments.strip()
    if text in ("", "null"):
        return {}
    try:
        value = strict_json.read_loosely(text.encode("utf-8", "replace"))
        # What is nested more deeply than can be written again would fail later.
        strict_json.write(value)
    except (ValueError, TypeError):
        return None
    return value if isinstance(value, dict) else None


class ArgumentPieces:
    """Says at any time whether the object is complete, in time that is linear in the text."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._depth = 0
        self.has_begun = self._in_string = self._escaped = False

    @property
    def is_complete(self) -> bool:
        return self.has_begun and self._depth <= 0

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, piece: str) -> str:
        """What a client may be sent now: nothing before the first bracket, as servers write `null` for no arguments."""
        self._texts.append(piece)
        if self.has_begun:
            self._scan(piece)
            return piece
        head = self.text
        if not head.lstrip().startswith("{"):
            return ""
        self.has_begun = True
        self._scan(head)
        return head

    def _scan(self, text: str) -> None:
        position = 0
        if self._escaped and text:
            position, self._escaped = 1, False
        while found := MARKS.search(text, position):
            position = found.end()
            mark = found.group()
            if mark == '"':
                self._in_string = not self._in_string
            elif mark == "\\":
                self._escaped = position == len(text)
                position += 1
            elif not self._in_string:
                self._depth += 1 if mark in "{[" else -1
