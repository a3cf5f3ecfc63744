"""Answers of backends: whether they are answers at all, the message of an error, counts of tokens, durations."""

import re
from typing import Any

from gateway.dialects import large_json
from gateway.dialects.dialect import Framing, Operation

LONGEST_FRAME = 8 * 2**20
LONGEST_COPIED_MESSAGE = 1000
LONGEST_DURATION_S = 86_400.0
JSON = frozenset({"application/json"})
CODE = re.compile(r"[A-Za-z0-9_.-]{1,40}")


class BadFrame(Exception):
    """An answer begins with an error or is not an answer; the message is for the log, `error` is the object."""

    def __init__(self, message: str, error: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.error = error or {}


class LongFrame(Exception):
    """The first frame of an answer is longer than a frame may be."""


def content_type_of(reported: str, framing: Framing | None = None) -> str:
    """The content type for the client: the backend's if the dialect knows it, else the dialect's."""
    known = JSON if framing is None else framing.content_types
    if reported in known:
        return reported
    kind, _, more = reported.lower().replace(" ", "").partition(";")
    if kind in known and more in ("", "charset=utf-8"):
        return reported
    return "application/json" if framing is None else framing.content_type


def media_type(content_type: str) -> str:
    """The type without its parameters."""
    return content_type.lower().partition(";")[0].strip()


def read_answer(payload: bytes) -> Any:
    """A whole answer or a frame as JSON. Raises BadFrame if it is an error or not JSON."""
    try:
        value = large_json.read(payload)
    except ValueError:
        raise BadFrame("not JSON") from None
    if isinstance(value, dict) and value.get("error"):
        raise BadFrame(f"an error{error_code(value)}", value)
    if not isinstance(value, dict | list) or not value:
        raise BadFrame("no answer in it")
    return value


def judge_whole(value: Any, operation: Operation) -> None:
    """Raises BadFrame if a whole answer lacks the operation's fields; several prompts may be answered with a list."""
    answers = value if isinstance(value, list) else [value]
    wanted = operation.answers_with
    if wanted and not all(isinstance(answer, dict) and any(answer.get(name) for name in wanted) for answer in answers):
        raise BadFrame(f"no {' or '.join(wanted)} in it")


def try_read(payload: bytes) -> dict[str, Any]:
    try:
        value = large_json.read(payload)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def error_text(value: dict[str, Any]) -> str:
    """The message of an error, in any of the shapes that backends use."""
    reported = value.get("error") or value.get("detail") or value.get("message")
    if isinstance(reported, dict):
        reported = reported.get("message")
    return " ".join(str(reported or "").split())[:LONGEST_COPIED_MESSAGE]


def error_code(value: dict[str, Any]) -> str:
    """An error's code and type for the log, without its message, which may repeat the prompt."""
    reported = value["error"] if isinstance(value["error"], dict) else {}
    codes = [str(reported[name]) for name in ("code", "type") if CODE.fullmatch(str(reported.get(name) or ""))]
    return f" ({', '.join(codes)})" if codes else ""


def token_count(value: object) -> int | None:
    """A token count of a backend, None if it is not usable: null, negative or huge."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2**53:
        return None
    return int(value)


def cached_token_count(value: object) -> int | None:
    """A count of cached tokens; only a whole number makes a call cheaper."""
    return value if value.__class__ is int and 0 <= value < 2**53 else None


def duration_s(value: Any, units_per_s: int) -> float | None:
    """A duration of a backend in seconds, None if it is not usable: no number, negative or longer than a day."""
    kind = value.__class__
    is_usable = (kind is int or kind is float) and 0 <= value <= LONGEST_DURATION_S * units_per_s
    return value / units_per_s if is_usable else None
