"""Where a call would go now, when, and what of that is known of each of its places; nothing is taken."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gateway.fleet.board import Board
from gateway.fleet.board_state import seconds
from gateway.fleet.claim import Claim, Place
from gateway.fleet.eta import EtaCorrection
from gateway.fleet.local_slots import LocalSlots
from gateway.stores.redis_client import RedisUnavailable


class Terms(NamedTuple):
    """A place with the terms of its estimate in seconds, None for what is unknown. `can_begin`: it has a free slot and nothing
    stands in the way. `why` is as in Slot. `penalty_s` counts in addition: for a further copy, or a conversation that would be
    forgotten."""

    backend: str
    model: str
    tier: int
    slots: int
    running: int
    can_begin: bool
    why: str
    load_s: float | None
    evict_s: float | None
    block_s: float | None
    queue_s: float | None
    prefill_s: float | None
    cached_tokens: int | None
    total_s: float | None
    penalty_s: float | None
    is_chosen: bool


class Forecast(NamedTuple):
    """`position` is the place in the queue, 0 if the call would begin now; `waiting` calls and `tokens` are in it.

    `is_exact`: from the board of all processes; else Redis is away, and only this process is known.
    """

    is_exact: bool
    position: int
    waiting: int
    tokens: int
    is_full: bool
    wait_s: float | None
    first_token_s: float | None
    places: tuple[Terms, ...]

    def corrected(self, factor: float) -> "Forecast":
        """Times of earlier calls have turned out to be longer or shorter by a factor."""
        wait_s = None if self.wait_s is None else self.wait_s * factor
        return self._replace(wait_s=wait_s, first_token_s=None if self.first_token_s is None else self.first_token_s * factor)

    @property
    def chosen(self) -> Terms:
        return next((place for place in self.places if place.is_chosen), self.places[0])


async def forecast(claim: Claim, board: Board, local: LocalSlots, eta: EtaCorrection) -> Forecast:
    """What the board would decide; while Redis is away, what this process would."""
    try:
        found = _of_board(await board.preview(claim))
    except RedisUnavailable:
        return _of_process(claim, local)
    return found.corrected(eta.corrected((claim.group, found.position > 0), 1.0))


def _of_board(found: Mapping[str, Any]) -> Forecast:
    return Forecast(
        True,
        found["position"],
        found["waiting"],
        found["tokens"],
        found["full"],
        seconds(found["wait"]),
        seconds(found["ms"]),
        tuple(map(_terms, found["places"])),
    )


def _terms(place: Mapping[str, Any]) -> Terms:
    facts: list[Any] = [place[name] for name in ("backend", "model", "tier", "slots", "running", "can", "why")]
    facts += [seconds(place[name]) for name in ("load", "evict", "block", "queue", "prefill")]
    facts += [place["cached"], seconds(place["total"]), place["penalty"] / 1000, place["is_chosen"]]
    return Terms(*facts)


def _of_process(claim: Claim, local: LocalSlots) -> Forecast:
    """What is not known of other processes is None."""
    chosen = None if local.waiting else local.free_place(claim)
    places = tuple(_local_terms(claim, place, local, is_chosen=place is chosen) for place in claim.places)
    waiting = len(local.waiting)
    position = 0 if chosen else waiting + 1
    is_full = not chosen and (waiting >= local.most_waiting or claim.patience_ms <= 0)
    first_s = None
    if chosen is not None:
        first_s = next((place.load_s or 0.0) + (place.prefill_s or 0.0) for place in places if place.is_chosen)
    return Forecast(False, position, waiting, 0, is_full, None if position else 0.0, first_s, places)


def _local_terms(claim: Claim, place: Place, local: LocalSlots, *, is_chosen: bool) -> Terms:
    offer, slots, running = place.candidate.offer, local.share(place), local.running(place.name)
    load_s, prefill_s = 0.0 if local.has(place) else place.load_ms / 1000, claim.prompt * place.prefill_us / 1_000_000
    facts = offer.backend, offer.model, place.tier, slots, running, running < slots, local.mode
    return Terms(*facts, load_s, None, None, None, prefill_s, None, None, None, is_chosen)
