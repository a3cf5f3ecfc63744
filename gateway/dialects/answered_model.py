"""Puts the name that was asked for into answers to calls for an alias: backends write the name that they were sent.

The bytes around it stay as they are.
"""

import re
from typing import NamedTuple

from gateway.core import strict_json
from gateway.dialects.large_json import HEAD, LARGEST_READ_WHOLE, TAIL, TOKEN, last_fields

MODEL = b'"model"'
# The objects that have the name in the first event of Anthropic's streams, and in events of the Responses API.
CONTAINERS = frozenset({b'"message"', b'"response"'})
OBJECT = re.compile(rb"[{\[]")
# A frame whose fields before the name are texts and numbers, as most servers write it.
SIMPLE = re.compile(
    rb'^((?:data: ?)?\{(?:(?!"model")"\w++": ?(?:"[^"\\]*+"|[\w.+-]++), ?)*+"model": ?)"[^"\\]*+"', re.MULTILINE
)
VALUE = re.compile(rb'\s*+:\s*+("[^"\\]*+(?:\\.[^"\\]*+)*+")', re.DOTALL)


class AskedName(NamedTuple):
    """The name as JSON, and what SIMPLE is replaced with."""

    text: bytes
    template: bytes


def asked_name(name: str) -> AskedName:
    text = strict_json.write(name)
    return AskedName(text, rb"\g<1>" + text.replace(b"\\", rb"\\"))


def renamed(answer: bytes, asked: AskedName) -> bytes:
    """A whole answer; of a large one only the first and last kilobytes are searched, where the outermost fields are."""
    name = asked.text
    if len(answer) <= LARGEST_READ_WHOLE:
        return _renamed(answer, name)
    head = _renamed(answer[:HEAD], name)
    if head != answer[:HEAD]:
        return head + answer[HEAD:]
    tail = answer[-TAIL:]
    start, _ = last_fields(tail.rstrip())
    return answer[:-TAIL] + tail[:start] + _renamed(b"{" + tail[start:], name)[1:]


def frames_renamed(frames: bytes, asked: AskedName) -> bytes:
    """Whole lines of JSON, or whole server-sent events."""
    if MODEL not in frames:
        return frames
    shown, count = SIMPLE.subn(asked.template, frames)
    if count == frames.count(MODEL):
        return shown
    return b"".join([renamed(line, asked) for line in frames.splitlines(keepends=True)])


def _renamed(text: bytes, name: bytes) -> bytes:
    """With `name` as the first field `model` of the object, or of one of its containers; of a list, in each object."""
    if MODEL not in text:
        return text
    start = OBJECT.search(text)
    depth = -1 if start and start[0] == b"[" else 0
    parts, done, last, container, is_found = [], 0, b"", b"", False
    for token in TOKEN.finditer(text, start.start() if start else 0):
        found = token[0]
        if found in (b"{", b"["):
            depth += 1
            is_found = is_found and depth > 1
            if depth == 2:
                container = last if found == b"{" else b""
        elif found in (b"}", b"]"):
            depth -= 1
        elif found == MODEL and not is_found and (depth == 1 or (depth == 2 and container in CONTAINERS)):
            if value := VALUE.match(text, token.end()):
                parts += [text[done : value.start(1)], name]
                done, is_found = value.end(1), True
                if start and start[0] == b"{":
                    break
        elif depth == 1:
            last = found
    return b"".join((*parts, text[done:]))
