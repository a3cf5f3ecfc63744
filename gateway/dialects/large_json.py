"""JSON answers: small ones are parsed, of large ones only the outermost fields, so that other requests do not wait.

Parsing creates an object for each value, which takes a second for ten megabytes of small values. The fields that decide what
becomes of an answer are in its first and last kilobytes.
"""

import re
from itertools import islice
from typing import Any

from gateway.core import strict_json

LARGEST_READ_WHOLE = 256 * 1024
HEAD, TAIL = 16 * 1024, 8 * 1024
MOST_KEYS_OF_TAIL = 48
TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
FIELD = re.compile(rb'[{,]\s*+"([^"\\]{1,64}+)"\s*+:\s*+(\S)\s?(\S?)')
KEY = re.compile(rb'"\w{1,40}"\s?:')
EMPTY = frozenset({b"[]", b"{}", b'""'})


def read(data: bytes) -> Any:
    """The parsed JSON; of a large answer only the outermost fields, with True for a value whose end has not been read.

    Raises ValueError if it is not JSON; of a large answer only the first and last bytes are checked.
    """
    if len(data) <= LARGEST_READ_WHOLE:
        return strict_json.read_loosely(data)
    head, tail = data[:HEAD].lstrip(), data[-TAIL:].rstrip()
    if head[:1] == b"[" and tail[-1:] == b"]":
        return [_first_fields(head[1:].lstrip())]
    if head[:1] != b"{" or tail[-1:] != b"}":
        raise ValueError("no JSON object")
    return {**last_fields(tail)[1], **_first_fields(head)}


def _first_fields(head: bytes) -> dict[str, Any]:
    """The fields up to the value that continues after the head, with that one."""
    end = _last_outer_comma(head)
    fields: dict[str, Any] = strict_json.read_loosely(head[:end] + b"}") if end else {}
    if (field := FIELD.match(head, end)) is not None:
        first, second = field[2], field[3]
        fields[field[1].decode("utf-8", "replace")] = first + second not in EMPTY and first not in b"nf0"
    return fields


def _last_outer_comma(head: bytes) -> int:
    """The position of the last comma of the outermost object; 0, where the object begins, if there is none."""
    depth = found = 0
    for token in TOKEN.finditer(head):
        kind = token[0]
        if kind in (b"[", b"{"):
            depth += 1
        elif kind in (b"]", b"}"):
            depth -= 1
        elif kind == b"," and depth == 1:
            found = token.start()
        if kind == b'"' or depth == 0:
            break
    return found


def last_fields(tail: bytes) -> tuple[int, dict[str, Any]]:
    """Where the first outermost key in the last bytes begins, and the fields from there; the end of the bytes without one.

    The text from an outermost key on, with a brace in front, is an object again; from any other key on it is not.
    """
    starts = [key.start() for key in KEY.finditer(tail)]
    for start in islice(starts, max(0, len(starts) - MOST_KEYS_OF_TAIL), None):
        try:
            found: dict[str, Any] = strict_json.read_loosely(b"{" + tail[start:])
        except ValueError:
            continue
        return start, found
    return len(tail), {}
