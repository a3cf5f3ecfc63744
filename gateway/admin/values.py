"""What operators write, on the command line and in addresses, as values: durations, times, limits, statuses, groups.

Each raises argparse.ArgumentTypeError, whose words say what was wrong and what would be right.
"""

import argparse
import re
import uuid
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from gateway.dialects.model_names import NAME_RULE, canonical, is_name
from gateway.limits.quota import UNLIMITED

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
LONGEST = timedelta(days=36_500)
GROUPS = ("key", "model", "backend", "day")
FIRST_MOMENT = datetime(1970, 1, 1, tzinfo=UTC)


def duration(text: str) -> timedelta:
    """`90s`, `15m`, `24h`, `30d`, `2w` or `0`."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])|0", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 90s, 15m, 24h, 30d or 2w")
    length = timedelta(**{UNITS[found[2]]: int(found[1])}) if found[2] else timedelta()
    if length > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is too long: write at most {LONGEST.days}d")
    return length


def lifetime(text: str) -> timedelta:
    length = duration(text)
    if not length:
        raise argparse.ArgumentTypeError("a key needs time to be used: write 15m, 24h, 30d, or leave it out for no end")
    return length


def limit(text: str) -> int | None:
    """A number, `unlimited`, or `unset` for the default."""
    if text in ("unset", "unlimited"):
        return UNLIMITED if text == "unlimited" else None
    if not re.fullmatch(r"\d{1,15}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no limit: write a whole number from 0, unlimited, or unset for the default"
        )
    return int(text)


def retention(text: str) -> timedelta:
    length = duration(text)
    if not length:
        raise argparse.ArgumentTypeError("nothing can be kept for no time: write 12h, 7d, 8w")
    return length


def since(text: str) -> datetime:
    """`24h` ago, or a day or a moment as ISO 8601, in UTC unless it says otherwise."""
    try:
        return datetime.now(UTC) - duration(text)
    except argparse.ArgumentTypeError:
        try:
            moment = datetime.fromisoformat(text.strip())
            return max(FIRST_MOMENT, moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC))
        except (ValueError, OverflowError):
            told = f"{text!r} is no time: write 24h, 7d, 2026-01-31 or 2026-01-31T12:00"
            raise argparse.ArgumentTypeError(told) from None


def status(text: str) -> tuple[int, int]:
    """`429`, or `4xx` for the whole class: the first and the last."""
    if re.fullmatch(r"[1-5]xx", text.lower()):
        first = int(text[0]) * 100
        return first, first + 99
    if not re.fullmatch(r"[1-5]\d\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no status: write a number such as 429, or a class such as 4xx")
    return int(text), int(text)


def count(text: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows: write a whole number from 1")
    return int(text)


def words(text: str) -> str:
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is in no row: write printable characters")
    return text


def model_name(text: str) -> str:
    if not is_name(text):
        raise argparse.ArgumentTypeError(f"the model {NAME_RULE}")
    return text


def groups(text: str) -> list[str]:
    found = list(dict.fromkeys(text.replace(",", " ").split()))
    if not found or set(found) - set(GROUPS):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be summed by: write one or more of {','.join(GROUPS)}")
    return found


class ModelFilter(NamedTuple):
    """Patterns of PostgreSQL's LIKE: of canonical names, and, for ILIKE, what every spelling of such a name has in it."""

    canonical: list[str]
    spelled: list[str]


def model_filter(model: str) -> ModelFilter:
    """Of a name or a glob; a glob without a tag means every tag."""
    plain = model_name(words(model)).strip().lower()
    if not set(plain) & {"*", "?"}:
        plain = canonical(plain).canonical
    pattern = _like(plain)
    return ModelFilter(
        [pattern] if ":" in pattern else [pattern, f"{pattern}:latest"], [f"%{_like(_in_every_spelling(plain))}%"]
    )


def _like(glob: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", glob).replace("*", "%").replace("?", "_")


def _in_every_spelling(glob: str) -> str:
    """What is left of a glob where the tag `latest` may have been added to what was asked for."""
    name, colon, tag = glob.rpartition(":")
    if not colon:
        return re.split(r"[*?]", glob)[0]
    return name if tag == "latest" or set(tag) & {"*", "?"} else glob


def our_id(text: str) -> uuid.UUID | None:
    """A request's id as we give it, None where it is some caller's own."""
    try:
        return uuid.UUID(text)
    except ValueError:
        return None
