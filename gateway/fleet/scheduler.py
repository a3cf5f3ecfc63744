"""Which backends may answer a call, in which order, and what it would cost there: decided without asking any of them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.dialects.dialect import Call, Operation
from gateway.dialects.translation.translators import Translator
from gateway.fleet.backends.backend import Backend
from gateway.fleet.catalog import Model, Offer
from gateway.fleet.ways import way_of


class Candidate(NamedTuple):
    """A backend to try, and its copy of the model; `translator` is None where bytes are passed through."""

    backend: Backend
    offer: Offer
    translator: Translator | None = None

    @property
    def spelling(self) -> str:
        return self.offer.spelling

    @property
    def place(self) -> tuple[str, str]:
        """Calls with the same place take the same slots."""
        return self.offer.backend, self.offer.model


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
        (ready if backend.breaker.lets_pass else last_resort).append(Candidate(backend, offer, translator))
    return ready + last_resort


def group_of(model: Model) -> str:
    """The calls that compete for the same backends; those for an alias compete with those for its first target."""
    return (model.targets[0] if model.targets else model).name.canonical


def first_choice(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """Without the last resort, unless nothing else is left."""
    return [candidate for candidate in candidates if candidate.backend.breaker.lets_pass] or candidates


def takes_slot(operation: Operation) -> bool:
    """Whether the backend's model works for the answer."""
    return operation.need is not None or bool(operation.media)


def is_served(model: Model, call: Call) -> bool:
    """Whether any backend that has this model, up or not, can be asked for an answer to the call."""
    kinds = call.operation.kinds
    return any(offer.kind in kinds or way_of(offer, call) is not None for offer in model.offers)
