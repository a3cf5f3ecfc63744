"""Which backends may answer a call, and in which order: decided from what is known, without asking any of them."""

from collections.abc import Mapping
from typing import NamedTuple

from gateway.dialects.dialect import Call
from gateway.dialects.translation.translators import Translator
from gateway.fleet.backends.backend import Backend
from gateway.fleet.catalog import Model
from gateway.fleet.ways import way_of


class Candidate(NamedTuple):
    """A backend to try, and its spelling of the model's name; `translator` is None where bytes are passed through."""

    backend: Backend
    spelling: str
    translator: Translator | None = None


def choose(model: Model, backends: Mapping[str, Backend], call: Call, now: float) -> list[Candidate]:
    """The backends to try, in order: those that their circuit breaker lets pass, then the others as the last resort."""
    ready: list[Candidate] = []
    last_resort: list[Candidate] = []
    for offer in model.offers:
        backend = backends.get(offer.backend)
        if backend is None or backend.is_drained or offer.good_until <= now:
            continue
        translator = None
        if offer.kind not in call.operation.kinds:
            way = way_of(offer, call)
            if way is None:
                continue
            translator = way.translator
        (ready if backend.breaker.lets_pass else last_resort).append(Candidate(backend, offer.spelling, translator))
    return ready + last_resort


def is_served(model: Model, call: Call) -> bool:
    """Whether any backend that has this model, up or not, can be asked for an answer to the call."""
    kinds = call.operation.kinds
    return any(offer.kind in kinds or way_of(offer, call) is not None for offer in model.offers)
