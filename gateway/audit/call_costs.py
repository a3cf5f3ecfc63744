"""What finished requests show of the cost of calls to their backends."""

import time
from collections.abc import Callable

from gateway.audit.record import Record
from gateway.audit.token_usage import TokenUsage
from gateway.dialects.model_names import canonical
from gateway.fleet.catalog import Catalog, Offer
from gateway.fleet.costs import Costs
from gateway.fleet.observation import Observation

# Of one backend and model; more calls in a second teach nothing new.
MOST_PER_S = 10
JOINS = "join"
SOURCES = frozenset({"reported", "estimated"})


class CallCosts:
    """Notes what is learned from the calls of a second, from the first ones if they are many."""

    def __init__(self, costs: Costs, catalog: Callable[[], Catalog]) -> None:
        self._costs, self._catalog = costs, catalog
        self._noted: dict[tuple[str, str], int] = {}
        self._until = 0.0

    def note(self, record: Record, spent: TokenUsage) -> None:
        """Once the slot is free. An answer that was cut short shows nothing, nor does a request that used no tokens."""
        if record.outcome != "answered" or record.slot_from is None or not record.backend or spent.source not in SOURCES:
            return
        if record.chosen_because == JOINS and record.usage.load_s is None:
            # It has waited for a part of a load, and only the clock shows for how long.
            return
        now = time.monotonic()
        if now >= self._until:
            self._noted.clear()
            self._until = now + 1.0
        place = record.backend, canonical(record.answered_as).canonical
        noted = self._noted[place] = self._noted.get(place, 0) + 1
        if noted <= MOST_PER_S:
            self._costs.note(*place, observation_of(record, spent, self._catalog().offer(*place)))


def observation_of(record: Record, spent: TokenUsage, offer: Offer | None) -> Observation:
    first_at = record.first_byte_at if record.stream else None
    never_loads = offer is not None and not offer.swaps
    return Observation(
        record.slot_s,
        None if first_at is None or record.slot_from is None else first_at - record.slot_from,
        spent.prompt,
        spent.completion,
        record.usage,
        cached_tokens=record.expected_cached,
        estimated_prompt=record.need.prompt,
        loaded=False if record.loaded is None and never_loads else record.loaded,
        size=0 if offer is None else offer.size,
        key_id=record.key_id,
        asked_model=record.canonical,
        most_output=record.need.output,
    )
