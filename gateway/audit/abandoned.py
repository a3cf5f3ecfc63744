"""Calls whose process has died: what Redis keeps of a running call, and the settlement that follows from it."""

import logging
from collections.abc import Sequence
from typing import Any

from gateway.core import strict_json
from gateway.limits.admission import RESERVE_UNKNOWN, Admission, Settlement
from gateway.limits.limiter import Limiter
from gateway.limits.quota import CounterSet

LOG = logging.getLogger("gateway.audit")
# What a call that waits for a slot of its key has in the place of the tokens that it has reserved.
QUEUED = b"queued"
# The fields of a row that are known only when a request ends.
UNFINISHED_FIELDS = {
    "answered_as": "",
    "backend": "",
    "attempts": [],
    "status": 0,
    "detail": "",
    "completion_tokens": 0,
    "cached_tokens": None,
    "billed_tokens": None,
    "translated_to": "",
    "dropped": "",
    "load_ms": None,
    "prefill_ms": None,
    "decode_ms": None,
    "backend_ms": None,
    "seconds_from": "none",
    "loaded": False,
    "chosen_because": "",
    "estimated_ms": None,
    "queue_position": 0,
    "bytes_out": 0,
    "queue_ms": 0.0,
    "ttfb_ms": None,
    "total_ms": None,
}


def call_info(counter_sets: Sequence[CounterSet], model: str, prompt: int, row: dict[str, Any], seconds_ms: int = 0) -> bytes:
    """What Redis keeps of a running call. `seconds_ms` of backends are reserved for it, 0 if nothing limits them."""
    info: dict[str, Any] = {
        # A gateway of the version before takes no other limits.
        "scopes": [list(counter_set[:6]) for counter_set in counter_sets],
        "model": model,
        "prompt": prompt,
        "row": row,
    }
    if seconds_ms:
        info["seconds_ms"] = seconds_ms
        info["of_seconds"] = [counter_set[6:] for counter_set in counter_sets]
    return strict_json.write(info)


def settlement_of(call_id: str, info: bytes) -> Settlement:
    """`info` is preceded by the tokens that were reserved, or by QUEUED. Raises ValueError, KeyError or TypeError."""
    reserved, _, text = info.partition(b" ")
    was_queued = reserved == QUEUED
    fields = strict_json.read_loosely(text)
    scopes = fields["scopes"]
    of_seconds = fields.get("of_seconds") or [()] * len(scopes)
    counter_sets = tuple(_counter_set(*scope, *more) for scope, more in zip(scopes, of_seconds, strict=True))
    used = 0 if was_queued else max(0, fields["prompt"])
    row = {
        **UNFINISHED_FIELDS,
        **fields["row"],
        "outcome": "abandoned",
        "prompt_tokens": used,
        "tokens_from": "partial" if used else "none",
    }
    names = (call_id, counter_sets, fields["model"], True, "abandoned", RESERVE_UNKNOWN if was_queued else int(reserved))
    admission = Admission(*names, seconds_ms=int(fields.get("seconds_ms", 0)))
    return Settlement(admission, used, -1, strict_json.write(row), id=call_id, key_id=counter_sets[0].name)


def _counter_set(name: str, *limits: int) -> CounterSet:
    if not isinstance(name, str):
        raise TypeError
    return CounterSet(name, *limits)


async def settle_expired(limits: Limiter, since_ms: int, most: int) -> int:
    """Settles calls whose lease ended `since_ms` ago, and removes entries that are not calls. Returns how many were settled.

    Raises RedisUnavailable.
    """
    settled = 0
    for call in await limits.leases.expired(since_ms, most):
        try:
            settlement = settlement_of(call.id, call.info)
        except (ValueError, KeyError, TypeError):
            LOG.error("an entry among the running calls in Redis is not a call of this gateway and is removed")
            await limits.leases.forget(call)
        else:
            await limits.resend(settlement, "abandoned")
            settled += 1
    return settled
