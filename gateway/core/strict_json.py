"""JSON, read so strictly that no backend can understand the same bytes differently."""

import json
import re
from collections.abc import Collection
from typing import Any, NoReturn

import orjson

from gateway.core.errors import BadRequest

LARGEST_INTEGER = 2**63 - 1
BLANKS = " \t\n\r"
# Commas and opening brackets outside strings; the longest lists of tokens that clients send have fewer.
MOST_VALUES = 300_000
# In a larger body an error is reported without its position, which costs many times the parsing to find.
MOST_VALUES_EXAMINED = 10_000
# An integer with fewer digits is in range.
DIGITS_OF_LARGE = 19
AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")
LARGE_INTEGER = re.compile(rb"(?<![0-9.eE+-])-?[0-9]{19,}+(?![.eE])")


def write(value: object) -> bytes:
    return orjson.dumps(value)


def write_with_replacements(value: object) -> bytes:
    """The same for strings that may not be valid Unicode, such as half a surrogate pair from a client's JSON."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")


def read_loosely(data: bytes) -> Any:
    """JSON of a backend or store. Raises ValueError if it is not JSON."""
    return orjson.loads(data)


def read_object(body: bytes, known_fields: Collection[str] = ()) -> dict[str, Any]:
    """A client's body as a dict. Raises BadRequest on anything that two JSON parsers could understand differently.

    Refused: duplicate keys at any depth, NaN and Infinity, numbers beyond a signed 64-bit integer or a double, text after
    the value, invalid UTF-8, more than 300,000 values, and top-level keys that only case folding makes equal to one of
    `known_fields` (Go's encoding/json would read them as that field).
    """
    if has_more_values(body, MOST_VALUES):
        raise BadRequest(f"the body has more than {MOST_VALUES} values")
    try:
        value = orjson.loads(body)
        _refuse_what_was_lost(body, orjson.dumps(value))
    except (orjson.JSONDecodeError, orjson.JSONEncodeError, BadRequest) as wrong:
        value = _examined(body, wrong)
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    refuse_case_variants(value, known_fields)
    return value


def has_more_values(body: bytes, most: int) -> bool:
    """Whether parsing takes more time and memory than so many values do."""
    if len(body) <= most or _values(body) <= most:
        return False
    plain = _without_escapes(body)
    return plain.count(b'"') > 4 * most or _values(_outside_strings(plain)) > most


def _values(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _without_escapes(text: bytes) -> bytes:
    return text.replace(b"\\\\", b"").replace(b'\\"', b"")


def _outside_strings(plain: bytes) -> bytes:
    return b"".join(plain.split(b'"')[::2])


def _refuse_what_was_lost(body: bytes, written: bytes) -> None:
    """Compares a body with what was parsed. Raises BadRequest on duplicate keys and on integers out of range."""
    is_same = body.count(b":") == written.count(b":") and b"\\u003" not in body
    if is_same and b"0" * DIGITS_OF_LARGE not in body.translate(AS_ZEROS):
        return
    outside = _outside_strings(_without_escapes(body))
    if outside.count(b":") != _outside_strings(_without_escapes(written)).count(b":"):
        raise BadRequest("a field occurs twice in one object")
    for number in LARGE_INTEGER.findall(outside):
        _bounded_integer(number.decode())


def _examined(body: bytes, wrong: Exception) -> Any:
    """Raises BadRequest with the exact error, or returns the value after all: what orjson refuses may still be JSON."""
    try:
        text = body.decode("utf-8")
        if not has_more_values(body, MOST_VALUES_EXAMINED):
            return _decode(text)
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid UTF-8") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except json.JSONDecodeError as found:
        raise BadRequest(f"the body is not valid JSON: {found.msg} at position {found.pos}") from None
    if isinstance(wrong, BadRequest):
        raise wrong
    if isinstance(wrong, json.JSONDecodeError) and "depth" not in wrong.msg:
        raise BadRequest(f"the body is not valid JSON: {wrong.msg} at position {wrong.pos}") from None
    raise BadRequest("the body is nested too deeply")


def write_strictly(value: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError as wrong:
        reason = "is nested too deeply" if "ecursion" in str(wrong) else "has text that is not valid Unicode"
        raise BadRequest(f"the body {reason}") from None


def refuse_case_variants(value: dict[str, Any], known_fields: Collection[str]) -> None:
    for key in value:
        if key not in known_fields and key.casefold() in known_fields:
            raise BadRequest(f"the field {_shown(key)} must be written {_shown(key.casefold())}")


def _shown(key: str) -> str:
    return ascii(key[:64])


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadRequest(f"the field {_shown(twice)} occurs twice in one object")
    return found


def _bounded_integer(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) > LARGEST_INTEGER:
        raise BadRequest("a number in the body is out of range")
    return number


def _bounded_float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise BadRequest("a number in the body is out of range")
    return number


def _refused_constant(name: str) -> NoReturn:
    raise BadRequest(f"{name} is not a JSON value")


def _decode(text: str) -> Any:
    """Like the decoder's own `decode`, whose search for blanks costs as much as parsing a short body."""
    start = 0 if text.startswith("{") else len(text) - len(text.lstrip(BLANKS))
    try:
        value, end = _decoder.scan_once(text, start)  # type: ignore[attr-defined]
    except StopIteration as nothing:
        raise json.JSONDecodeError("Expecting value", text, nothing.value) from None
    if end != len(text) and (rest := text[end:].lstrip(BLANKS)):
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


_decoder = json.JSONDecoder(
    object_pairs_hook=_without_duplicates,
    parse_int=_bounded_integer,
    parse_float=_bounded_float,
    parse_constant=_refused_constant,
)
