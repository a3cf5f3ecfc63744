"""Admission of a request: what it requests, what it is granted, and the error that refuses it."""

import shlex
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.core.errors import NO_RETRY, BudgetSpent, LimitReached
from gateway.dialects.tokens import Need
from gateway.limits.quota import CounterSet

BUDGETS = ("day", "month", "day_seconds", "month_seconds")
Header = tuple[bytes, bytes]
# What was reserved is known to Redis only; the settlement reads it there.
RESERVE_UNKNOWN = -1
# Client libraries obey a retry-after of up to a minute, the AI SDK of less; after a longer one they try again at once.
LONGEST_WAIT_OF_CLIENTS_S = 59.9
# The window of a minute counts by seconds: what is used now is free after 61, and one is added for rounding.
WINDOW_S = 62.0
WORDS = {
    "rpm": ("requests", "requests per minute"),
    "tpm": ("tokens", "tokens per minute"),
    "concurrent": ("requests", "requests at once"),
    "day": ("insufficient_quota", "tokens per day"),
    "month": ("insufficient_quota", "tokens per month"),
    "day_seconds": ("insufficient_quota", "seconds of backends per day"),
    "month_seconds": ("insufficient_quota", "seconds of backends per month"),
}
REQUESTS, TOKENS = (
    (b"x-ratelimit-limit-" + name, b"x-ratelimit-remaining-" + name, b"x-ratelimit-reset-" + name)
    for name in (b"requests", b"tokens")
)


class Ticket(NamedTuple):
    """A request for admission; `info` is what Redis keeps to settle the call if its process dies, b"" if it takes no slot.

    `seconds_ms` of backends are reserved, 0 if nothing limits them.
    """

    id: str
    counter_sets: tuple[CounterSet, ...]
    model: str
    need: Need
    info: bytes
    seconds_ms: int = 0


@dataclass
class Admission:
    """What a request holds until it is settled; `how` is "admitted" (by Redis) or "local" (by this process without Redis)."""

    id: str
    counter_sets: tuple[CounterSet, ...]
    model: str
    takes_slot: bool
    how: str
    reserved: int = 0
    queue_s: float = 0.0
    headers: list[Header] = field(default_factory=list)
    began: float = 0.0
    seconds_ms: int = 0
    # It waits for a backend and has given up its slot.
    is_paused: bool = False
    # It asks for its slot again.
    is_resuming: bool = False


class WindowUsage(NamedTuple):
    """The usage of one counter set in the last minute; the resets are in milliseconds."""

    requests: int
    tokens: int
    requests_reset: int
    tokens_reset: int


@dataclass
class Settlement:
    """What a finished request leaves: tokens and ms of backends to bill, and its row and prompt for the audit, b"" for none.

    `completion` are the tokens that count for the model's mean, -1 for none.
    """

    admission: Admission | None
    used: int
    completion: int
    row: bytes
    prompt: bytes = b""
    id: str = ""
    key_id: str = ""
    used_ms: int = 0


class CounterUsage(NamedTuple):
    """The usage of one counter set, under the names of its limits."""

    rpm: int
    tpm: int
    concurrent: int
    day: int
    month: int
    day_seconds: float
    month_seconds: float


Verdict = Admission | LimitReached


def limit_error(
    limit: str,
    counter_set: CounterSet,
    retry_after: float | None,
    headers: list[Header],
    tokens: int = 0,
    *,
    may_wait: bool = False,
) -> LimitReached:
    """Names the limit, when the request would pass and how to change the limit; `retry_after` None: never."""
    if retry_after is not None and LONGEST_WAIT_OF_CLIENTS_S < retry_after <= WINDOW_S:
        retry_after = LONGEST_WAIT_OF_CLIENTS_S
    kind, words = WORDS[limit]
    most = getattr(counter_set, limit)
    whose = "this model with this key" if counter_set.is_of_rule else "this key"
    message = f"Limit of {most} {words} for {whose} reached{_advice(most, tokens, retry_after)} {_remedy(limit, counter_set)}"
    error = (BudgetSpent if limit in BUDGETS else LimitReached)(message, retry_after=retry_after)
    error.kind, error.limit, error.may_wait = kind, limit, may_wait
    is_long = retry_after is None or retry_after > LONGEST_WAIT_OF_CLIENTS_S
    error.headers = [*headers, *NO_RETRY] if is_long else headers
    return error


def _advice(most: int, tokens: int, retry_after: float | None) -> str:
    if retry_after is not None:
        return f"; try again in {duration(round(retry_after * 1000))}."
    if most == 0:
        return ": it allows none."
    return f": this request alone may take {tokens}; ask for fewer with max_tokens or num_predict, or shorten the prompt."


def _remedy(limit: str, counter_set: CounterSet) -> str:
    """The operator's command to change the limit; the id of a key in it is no secret."""
    key_id, _, pattern = counter_set.name.partition("|")
    rule = f" MODEL={shlex.quote(pattern)}" if pattern else ""
    command = f"`make limit KEY={key_id}{rule} {limit.upper()}=…` changes it"
    has_default = not pattern and limit not in BUDGETS
    return (
        f"{command}; DEFAULT_{limit.upper()} sets it for keys without a limit of their own." if has_default else f"{command}."
    )


def rate_limit_headers(counter_sets: tuple[CounterSet, ...], usages: list[WindowUsage]) -> list[Header]:
    """The x-ratelimit headers of the OpenAI API, for the counter set with the least left."""
    requests = tokens = None
    for counter_set, usage in zip(counter_sets, usages, strict=True):
        if counter_set.rpm >= 0 and (requests is None or counter_set.rpm - usage.requests < requests[0]):
            requests = counter_set.rpm - usage.requests, counter_set.rpm, usage.requests_reset
        if counter_set.tpm >= 0 and (tokens is None or counter_set.tpm - usage.tokens < tokens[0]):
            tokens = counter_set.tpm - usage.tokens, counter_set.tpm, usage.tokens_reset
    found: list[Header] = []
    for (limit, remaining, reset), left in ((REQUESTS, requests), (TOKENS, tokens)):
        if left is not None:
            found.append((limit, b"%d" % left[1]))
            found.append((remaining, b"%d" % max(0, left[0])))
            found.append((reset, duration(left[2]).encode()))
    return found


def duration(milliseconds: int) -> str:
    """In Go's format: 12ms, 1.5s, 6m0s, 1h0m0s."""
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds > 0 else "0s"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:.15g}s"
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    shown = f"{seconds}.{rest:03d}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{shown}" if hours else f"{minutes}m{shown}"
