"""The arguments of a tool call as a model writes them: the text of a JSON object, which may arrive in pieces."""

from typing import Any

from gateway.core import strict_json


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
        self.has_begun = self._is_other = self._in_string = self._escaped = False
        # Whether the text was an object when its last bracket came; None before that is known.
        self._was_object: bool | None = None
        self._has_fields = False

    @property
    def is_complete(self) -> bool:
        return self.has_begun and self._depth <= 0

    @property
    def is_object(self) -> bool:
        """Whether the text is a complete object; it is examined once, as nothing that follows makes it one."""
        if self._was_object is None and self.is_complete:
            found = object_of(self.text)
            self._was_object, self._has_fields = found is not None, bool(found)
        return self._was_object is True

    @property
    def is_filled(self) -> bool:
        """Whether the text is a complete object that is not empty."""
        return self.is_object and self._has_fields

    @property
    def has_any(self) -> bool:
        return bool(self._texts)

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def add(self, piece: str) -> str:
        """What a client may be sent now: nothing before the first bracket, as servers write `null` for no arguments."""
        self._texts.append(piece)
        if self.has_begun:
            if self._depth <= 0 and piece.strip():
                self._was_object = False
            self._scan(piece)
            return piece
        if self._is_other or not piece.strip():
            return ""
        self.has_begun = piece.lstrip().startswith("{")
        self._is_other = not self.has_begun
        if self._is_other:
            return ""
        head = self.text
        self._scan(head)
        return head

    def _scan(self, text: str) -> None:
        """Counts the brackets outside of strings, without a step for each: a frame may have millions."""
        if self._escaped and text:
            text, self._escaped = text[1:], False
        if "\\" in text:
            text = text.replace("\\\\", "").replace('\\"', "")
            self._escaped = text.endswith("\\")
        parts = text.split('"')
        outside = "".join(parts[self._in_string :: 2])
        self._in_string = self._in_string == (len(parts) % 2 == 1)
        self._depth += outside.count("{") + outside.count("[") - outside.count("}") - outside.count("]")
