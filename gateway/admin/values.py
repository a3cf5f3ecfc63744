"""Text that operators type, read as values: durations, times, limits, statuses, groups.

Used for command-line options and for query parameters alike.
"""

import re
from datetime import UTC, datetime, timedelta

from gateway.audit import reports
from gateway.audit.reports import ModelFilter
from gateway.dialects.model_names import NAME_RULE, is_name
from gateway.limits.quota import UNLIMITED

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
LONGEST = timedelta(days=36_500)
# The options of a key, each with what its values are and the largest; all are above 0.
OPTIONS = {
    "weight": "a number above 0 and at most 1000",
    "heartbeat_after_s": "a number of seconds above 0 and at most 3600",
}
LARGEST_OPTION = {"weight": 1000.0, "heartbeat_after_s": 3600.0}
GROUPS = ("key", "model", "answered_as", "backend", "day")


class BadValue(ValueError):
    """A text is not a valid value; the message says what is wrong and names valid values."""


def duration(text: str) -> timedelta:
    """`90s`, `15m`, `24h`, `30d`, `2w` or `0`."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])|0", text.strip())
    if not found:
        raise BadValue(f"{text!r} is not a duration: write 90s, 15m, 24h, 30d or 2w")
    length = timedelta(**{UNITS[found[2]]: int(found[1])}) if found[2] else timedelta()
    if length > LONGEST:
        raise BadValue(f"{text!r} is too long: write at most {LONGEST.days}d")
    return length


def lifetime(text: str) -> timedelta:
    length = duration(text)
    if not length:
        raise BadValue("a key must be valid for some time: write 15m, 24h, 30d, or leave it out for a key that does not expire")
    return length


def limit(text: str) -> int | None:
    """A number, `unlimited`, or `unset` for the default."""
    if text in ("unset", "unlimited"):
        return UNLIMITED if text == "unlimited" else None
    if not re.fullmatch(r"\d{1,15}", text):
        raise BadValue(f"{text!r} is not a limit: write a whole number from 0, unlimited, or unset for the default")
    return int(text)


def is_option(name: str, value: float) -> bool:
    return 0 < value <= LARGEST_OPTION[name]


def option(name: str, text: str) -> float | None:
    """A number, or `unset` for the default."""
    if text == "unset":
        return None
    if not re.fullmatch(r"\d{1,4}(\.\d{1,6})?", text) or not is_option(name, float(text)):
        raise BadValue(f"{text!r} is not {OPTIONS[name]}: write such a number, or unset for the default")
    return float(text)


def retention(text: str) -> timedelta:
    length = duration(text)
    if not length:
        raise BadValue("a retention of 0 keeps nothing: write 12h, 7d, 8w")
    return length


def since(text: str) -> datetime:
    """`24h` ago, or a day or a moment as ISO 8601, in UTC unless it says otherwise."""
    try:
        return datetime.now(UTC) - duration(text)
    except BadValue:
        try:
            moment = datetime.fromisoformat(text.strip())
            return max(reports.EPOCH, moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC))
        except (ValueError, OverflowError):
            raise BadValue(f"{text!r} is not a time: write 24h, 7d, 2026-01-31 or 2026-01-31T12:00") from None


def status(text: str) -> tuple[int, int]:
    """`429`, or `4xx` for the whole class: the first and the last."""
    if re.fullmatch(r"[1-5]xx", text.lower()):
        first = int(text[0]) * 100
        return first, first + 99
    if not re.fullmatch(r"[1-5]\d\d", text):
        raise BadValue(f"{text!r} is not a status: write a number such as 429, or a class such as 4xx")
    return int(text), int(text)


def count(text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text) or not int(text):
        raise BadValue(f"{text!r} is not a number of rows: write a whole number from 1")
    return int(text)


def tokens(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise BadValue(f"{text!r} is not a number of tokens: write a whole number from 0")
    return int(text)


def words(text: str) -> str:
    if not text or not text.isprintable():
        raise BadValue(f"{text!r} cannot be in the audit: write printable characters")
    return text


def model_name(text: str) -> str:
    if not is_name(text):
        raise BadValue(f"the model {NAME_RULE}")
    return text


def names(text: str) -> list[str]:
    """Names, separated by commas or blanks."""
    return text.replace(",", " ").split()


def groups(text: str) -> list[str]:
    found = list(dict.fromkeys(names(text)))
    if not found or set(found) - set(GROUPS):
        raise BadValue(f"{text!r} is not something to group by: write one or more of {','.join(GROUPS)}")
    return found


def model_filter(text: str) -> ModelFilter:
    """A model's name, or a glob."""
    return reports.model_filter(model_name(words(text)))
