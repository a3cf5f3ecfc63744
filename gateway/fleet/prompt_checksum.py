"""The checksum and the tokens of a prompt as far as it has been read. No I/O.

A checksum of a long text costs a fraction of what a cryptographic hash does. Whoever makes two prompts with the same checksum
deceives only their own key, and only about what is cached.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from struct import pack
from typing import Any
from zlib import crc32

from gateway.core import strict_json
from gateway.dialects import tokens

# What clients often send again in another form, and what no template makes part of a prompt.
VOLATILE = frozenset(
    "id type role status call_id tool_use_id tool_call_id cache_control annotations logprobs index phase is_error audio "
    "refusal thinking reasoning reasoning_content reasoning_details reasoning_text signature encrypted_content".split()
)
COMMON = {"text": "text", "input_text": "text", "output_text": "text", "tool_result": "content"}
THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
# Objects of a tool, whose own names are like those above.
OF_TOOLS = frozenset({"input", "arguments", "action"})
MEDIA = tokens.MEDIA | {"document", "audio", "input_file"}
# Of a longer text only its ends and its length count, so that no request takes long.
LONGEST_TEXT, LONGEST_MEDIUM, LONGEST_TOOLS = 16_384, 2_048, 262_144
# What follows on so many letters is shortened more. Behind so many messages only their number counts; behind so many other
# values none do.
MOST_LETTERS, SHORTENED, MOST_MESSAGES, MOST_VALUES = 1_000_000, 512, 2_000, 8_000
MOST_PARTS, DEEPEST = 64, 4
PLAIN_FIELDS = 2


class PromptChecksum:
    """Where a prompt was divided makes no difference. `tokens` are those up to the last `state` or `count`."""

    def __init__(self) -> None:
        self.tokens = 0
        self._pieces: list[str] = []
        self._crc = self._length = 0
        # What was read in each of the ways that are bounded.
        self._letters = self._values = self._skipped = 0

    @property
    def has_begun(self) -> bool:
        return bool(self._pieces)

    def state(self) -> bytes:
        self._read_pieces()
        return pack("<IQQ", self._crc, self._length, self._skipped)

    def count(self) -> int:
        """The tokens so far."""
        self._read_pieces()
        return self.tokens

    def _read_pieces(self) -> None:
        if not self._pieces:
            return
        self._pieces.append("")
        text = "\0".join(self._pieces)
        self._pieces.clear()
        self.tokens += tokens.of_text(text)
        data = text.encode("utf-8", "surrogatepass")
        self._crc = crc32(data, self._crc)
        self._length += len(data)

    def add_tools(self, tools: Any) -> None:
        text = _json(tools)
        self.tokens += max(0, len(text) - LONGEST_TOOLS) // tokens.LETTERS_PER_TOKEN
        self._pieces.append(text if len(text) <= LONGEST_TOOLS else _ends(text, LONGEST_TOOLS))

    def add_messages(self, messages: Sequence[Any], begin: int, end: int) -> None:
        pieces = self._pieces
        read = messages[begin : min(end, MOST_MESSAGES)]
        for message in read:
            if message.__class__ is not dict:
                self._add_value(message, 0)
                continue
            role, content = message.get("role"), message.get("content")
            if content.__class__ is not str or role.__class__ is not str or len(message) != PLAIN_FIELDS:
                self._add_message(message, role)
                continue
            pieces.append(role)
            letters = len(content)
            if letters > SHORTENED:
                self._letters += letters
                if letters > LONGEST_TEXT or self._letters > MOST_LETTERS:
                    self._shorten(content)
                    continue
            if letters:
                pieces.append(content)
        self.tokens += tokens.TOKENS_PER_MESSAGE * len(read)
        if end - begin > len(read):
            self._skip(end - begin - len(read))

    def _skip(self, messages: int) -> None:
        """Counts messages without reading them, as if each was like those before."""
        self.state()
        self.tokens += self.tokens * messages // MOST_MESSAGES
        self._skipped += messages

    def _add_message(self, message: Mapping[str, Any], role: Any) -> None:
        kind = role or message.get("type")
        if kind.__class__ is not str or kind in THOUGHTS:
            return
        self._pieces.append(kind)
        for name, value in message.items() if len(message) <= MOST_PARTS else islice(message.items(), MOST_PARTS):
            if not value or name in VOLATILE:
                continue
            if value.__class__ is str:
                self.add_text(value)
            elif name == "content":
                self.add_content(value)
            elif name == "tool_calls" and value.__class__ is list:
                self._add_calls(value)
            else:
                self._add_field(name, value, 0, is_medium=False)

    def _add_calls(self, calls: list[Any]) -> None:
        """The name and the arguments of each, which are a text in one API and an object in another."""
        for call in _few(calls):
            function = call.get("function") if call.__class__ is dict else None
            if function.__class__ is not dict:
                self._add_value(call, 1)
                continue
            self._values += 1
            for value in (function.get("name"), function.get("arguments")):
                if value.__class__ is str:
                    self.add_text(value)
                elif value:
                    self._add_field("arguments", value, 1, is_medium=False)

    def add_content(self, content: Any) -> None:
        """The same for a text as for a list of this one text."""
        if content.__class__ is str:
            self.add_text(content)
        else:
            self._add_value(content, 0)

    def add_text(self, text: str) -> None:
        letters = len(text)
        if letters > SHORTENED:
            self._letters += letters
            if letters > LONGEST_TEXT or self._letters > MOST_LETTERS:
                self._shorten(text)
                return
        if letters:
            self._pieces.append(text)

    def _shorten(self, text: str) -> None:
        most = LONGEST_TEXT if self._letters <= MOST_LETTERS else SHORTENED
        self.tokens += max(0, len(text) - most) // tokens.LETTERS_PER_TOKEN
        self._pieces.append(_ends(text, most) if len(text) > most else text)

    def _add_value(self, value: Any, depth: int, *, is_medium: bool = False) -> None:
        self._values += 1
        if value is None or self._values > MOST_VALUES:
            return
        if value.__class__ is str:
            if is_medium:
                self._add_medium(value)
            else:
                self.add_text(value)
        elif value.__class__ is dict and depth < DEEPEST:
            self._add_part(value, depth, is_medium=is_medium)
        elif value.__class__ is list and depth < DEEPEST:
            for inner in _few(value):
                self._add_value(inner, depth + 1, is_medium=is_medium)
        else:
            self.add_text(_json(value))

    def _add_part(self, part: Mapping[str, Any], depth: int, *, is_medium: bool) -> None:
        kind = part.get("type")
        if kind.__class__ is str:
            # What most parts are, quickly.
            field = COMMON.get(kind)
            if field is not None and part.get(field).__class__ is str:
                self.add_text(part[field])
                return
            if kind in THOUGHTS:
                return
            is_medium = is_medium or kind in MEDIA
        for name, value in part.items() if len(part) <= MOST_PARTS else islice(part.items(), MOST_PARTS):
            if not value or name in VOLATILE:
                continue
            if value.__class__ is str and not is_medium and name not in MEDIA:
                self.add_text(value)
            else:
                self._add_field(name, value, depth + 1, is_medium=is_medium)

    def _add_field(self, name: str, value: Any, depth: int, *, is_medium: bool) -> None:
        if name in OF_TOOLS and value.__class__ is dict:
            self.add_text(_json(value))
        else:
            self._add_value(value, depth, is_medium=is_medium or name in MEDIA)

    def _add_medium(self, data: str) -> None:
        """A picture or sound, or where it is."""
        if len(data) <= SHORTENED:
            self._pieces.append(data)
            return
        self.tokens += tokens.TOKENS_PER_IMAGE + len(data) // tokens.LETTERS_PER_TOKEN_OF_MEDIA
        self._pieces.append(_ends(data, LONGEST_MEDIUM) if len(data) > LONGEST_MEDIUM else data)


def _few(values: list[Any]) -> Sequence[Any]:
    return values if len(values) <= MOST_PARTS else (*values[: MOST_PARTS // 2], *values[-MOST_PARTS // 2 :])


def _ends(text: str, letters: int) -> str:
    half = letters // 2
    return f"{text[:half]}\0{len(text)}\0{text[-half:]}"


def _json(value: Any) -> str:
    """What is nested too deeply for JSON counts as nothing."""
    try:
        return strict_json.write_with_replacements(value).decode("utf-8", "replace")
    except RecursionError:
        return ""
