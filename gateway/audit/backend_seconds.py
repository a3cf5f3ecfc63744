"""The seconds of backends that a request took: as its backend reported them, else for how long it held a slot."""

from typing import NamedTuple

from gateway.audit.record import Record
from gateway.dialects.dialect import Usage

# Backends report some milliseconds of loading for a model that was loaded. Where nobody knows whether a call caused a load, it
# did if it took at least so long.
SHORTEST_LOAD_S = 0.25


class BackendSeconds(NamedTuple):
    """`source`: reported (by the backend), slot (the time for which a slot was held) or none.

    `total` includes the failed attempts, for which no backend reports anything; None if no backend worked on the call.
    """

    total: float | None = None
    source: str = "none"


def seconds_of(record: Record) -> BackendSeconds:
    """What the call took, once its slot is free."""
    failed_s = sum(attempt.occupied_s for attempt in record.attempts) if record.attempts else 0.0
    if record.slot_from is None:
        return BackendSeconds(failed_s, "slot") if failed_s else BackendSeconds()
    reported_s = _reported(record.usage)
    if reported_s is None:
        return BackendSeconds(failed_s + record.slot_s, "slot")
    return BackendSeconds(failed_s + reported_s, "reported")


def _reported(usage: Usage) -> float | None:
    if usage.prefill_s is None and usage.decode_s is None:
        return None
    return (usage.load_s or 0.0) + (usage.prefill_s or 0.0) + (usage.decode_s or 0.0)


def has_loaded(record: Record) -> bool:
    """Whether the call caused a load."""
    return (record.usage.load_s or 0.0) >= SHORTEST_LOAD_S if record.loaded is None else record.loaded
