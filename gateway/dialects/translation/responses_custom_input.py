"""The text that a model gives to a tool with free text, taken out of the JSON arguments while they arrive."""

import json
import re
from typing import Any

from gateway.dialects.translation.responses_tools import INPUT

BEGIN = re.compile(r'\s*+\{\s*+"' + INPUT + r'"\s*+:\s*+"')
# Complete characters of a JSON string; what stands for half a surrogate pair waits for the other half.
CHARACTERS = re.compile(
    r'(?:[^"\\]++|\\[^u]|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})*+'
)
ESCAPES = re.compile(r'(\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))|\\')
# Of what stands before the text, and of half a surrogate pair with the other half.
LONGEST_BEGIN, LONGEST_ESCAPE = 256, 12
END = re.compile(r'"\s*+\}?\s*+\Z')


class CustomInput:
    def __init__(self) -> None:
        self._arguments: list[str] = []
        self._given: list[str] = []
        self._rest = ""
        self._begun = self._ended = self._is_bare = False

    @property
    def text(self) -> str:
        return "".join(self._given)

    def add(self, arguments: str) -> str:
        """The part of the text that these arguments complete."""
        self._arguments.append(arguments)
        if self._ended or self._is_bare:
            return ""
        self._rest += arguments
        if not self._begun:
            begin = BEGIN.match(self._rest)
            if begin is None:
                self._is_bare = len(self._rest) > LONGEST_BEGIN
                return ""
            self._begun, self._rest = True, self._rest[begin.end() :]
        return self._take()

    def _take(self) -> str:
        end = self._end_of_characters()
        text, self._rest = self._rest[:end], self._rest[end:]
        self._ended = self._rest.startswith('"')
        return self._give(_decoded(text))

    def _end_of_characters(self) -> int:
        """An escape that JSON does not have, and half a pair that stays alone, are taken as soon as that is certain."""
        rest, end = self._rest, 0
        while True:
            end = _end_of(CHARACTERS, rest, end)
            if rest.startswith('"', end) or len(rest) - end < LONGEST_ESCAPE:
                return end
            end = _end_of(ESCAPES, rest, end)

    def _give(self, text: str) -> str:
        if text:
            self._given.append(text)
        return text

    def finish(self) -> str:
        """The part of the text that is left. A model that ignores the JSON and writes the bare text is understood, too."""
        if self._begun and not self._ended:
            return self._give(_decoded(END.sub("", self._rest)))
        return "" if self._begun else self._give(_clean(_bare("".join(self._arguments))))


def _end_of(expression: re.Pattern[str], text: str, start: int) -> int:
    found = expression.match(text, start)
    return found.end() if found else start


def _decoded(text: str) -> str:
    """Models write escapes that JSON does not have, such as those of regular expressions; these stay as they are."""
    valid = ESCAPES.sub(lambda escape: escape[1] or "\\\\", text)
    return _clean(json.loads(f'"{valid}"', strict=False))


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _bare(arguments: str) -> str:
    try:
        found: Any = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    if isinstance(found, dict):
        texts = [value for name, value in found.items() if isinstance(value, str) and (name == INPUT or len(found) == 1)]
        return texts[0] if texts else arguments
    return found if isinstance(found, str) else arguments
