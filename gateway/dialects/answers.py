"""What a backend answered: whether it is an answer at all, the words of an error, counts of tokens."""

import re
from typing import Any

from gateway.dialects import large_json
from gateway.dialects.dialect import Framing, Operation

LONGEST_FRAME = 8 * 2**20
LONGEST_COPIED_MESSAGE = 1000
JSON = frozenset({"application/json"})
CODE = re.compile(r"[A-Za-z0-9_.-]{1,40}")


class BadFrame(Exception):
    """The first of an answer is an error or not an answer at all; the message is for the log, `error` what was read."""

    def __init__(self, message: str, error: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.error = error or {}


class LongFrame(Exception):
    """The first of an answer is longer than a frame may be."""


def content_type_of(told: str, framing: Framing | None = None) -> str:
    """The type of an answer in the dialect: as the backend told it where that is one of ours. Whole answers have no framing."""
    known = JSON if framing is None else framing.content_types
    if told in known:
        return told
    kind, _, more = told.lower().replace(" ", "").partition(";")
    if kind in known and more in ("", "charset=utf-8"):
        return told
    return "application/json" if framing is None else framing.content_type


def read_answer(payload: bytes) -> Any:
    """A whole answer or a frame as JSON; raises BadFrame where it is an error or no JSON object."""
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
    """Raises BadFrame where a whole answer lacks what makes it one; several prompts may be answered by a list."""
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
    """The words of an error in any of the shapes that backends use."""
    told = value.get("error") or value.get("detail") or value.get("message")
    if isinstance(told, dict):
        told = told.get("message")
    return " ".join(str(told or "").split())[:LONGEST_COPIED_MESSAGE]


def error_code(value: dict[str, Any]) -> str:
    """An error's code or type for the log. Its words stay out: they may repeat the prompt."""
    told = value["error"] if isinstance(value["error"], dict) else {}
    codes = [str(told[name]) for name in ("code", "type") if CODE.fullmatch(str(told.get(name) or ""))]
    return f" ({', '.join(codes)})" if codes else ""


def count(value: object) -> int | None:
    """A token count of a backend, which may be null, negative, a fraction or huge."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2**53:
        return None
    return int(value)


def cached(value: object) -> int | None:
    """Of a prompt's tokens those that a backend says it had cached: a whole number, for what is none makes no call cheaper."""
    return value if value.__class__ is int and 0 <= value < 2**53 else None
