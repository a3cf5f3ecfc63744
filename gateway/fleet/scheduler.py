"""Which backends may answer a call, and in which order: decided from what is known, without asking any of them."""

from collections.abc import Mapping
from typing import NamedTuple

from gateway.dialects.dialect import Call
from gateway.fleet.backends.backend import Backend
from gateway.fleet.catalog import Model


class Candidate(NamedTuple):
    """A backend to try, and its spelling of the model's name."""

    backend: Backend
    spelling: str


def choose(model: Model, backends: Mapping[str, Backend], call: Call, now: float) -> list[Candidate]:
    """The backends to try, in order: those that their circuit breaker lets pass, then the others as the last resort."""
    ready: list[Candidate] = []
    last_resort: list[Candidate] = []
    for offer in model.offers:
        backend = backends.get(offer.backend)
        if backend is None or backend.is_drained or offer.good_until <= now or offer.kind not in call.operation.kinds:
            continue
        (ready if backend.breaker.lets_pass else last_resort).append(Candidate(backend, offer.spelling))
    return ready + last_resort


def is_served(model: Model, call: Call) -> bool:
    """Whether any backend that has this model, up or not, has the route that was called."""
    return any(offer.kind in call.operation.kinds for offer in model.offers)
