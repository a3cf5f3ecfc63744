"""Which backends may answer a call, and in which order."""

import json

import pytest

from gateway.dialects.dialect import Call, read_call
from gateway.dialects.model_names import ModelName
from gateway.dialects.ollama import Ollama
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.circuit_breaker import FAILURES_UNTIL_OPEN
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.catalog import Model, Offer
from gateway.fleet.scheduler import Candidate, choose, is_served

NOW = 1000.0
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture
def backends() -> dict[str, Backend]:
    return {name: Backend(BackendConfig(name, f"http://{name}")) for name in NAMES}


def model(*offers: Offer) -> Model:
    return Model(ModelName("m:latest", cloud=False), offers, {}, {})


def offer(backend: str, kind: str = "ollama", good_until: float = NOW + 1) -> Offer:
    return Offer(backend, kind, f"{backend}/m", good_until)


def call(path: str = "/api/chat") -> Call:
    operation = next(operation for operation in Ollama().operations if operation.path == path)
    return read_call(Ollama(), operation, json.dumps({"model": "m", "messages": []}).encode())


ALL = model(*map(offer, NAMES))


def chosen(model: Model, backends: dict[str, Backend]) -> list[str]:
    return [candidate.backend.name for candidate in choose(model, backends, call(), NOW)]


def test_candidates_keep_the_order_and_spelling_of_the_offers(backends: dict[str, Backend]) -> None:
    assert choose(ALL, backends, call(), NOW) == [Candidate(backends[name], offer(name)) for name in NAMES]


def test_a_backend_with_an_open_breaker_is_the_last_resort(backends: dict[str, Backend]) -> None:
    for _ in range(FAILURES_UNTIL_OPEN):
        backends["alpha"].breaker.failed()
    assert chosen(ALL, backends) == ["beta", "gamma", "alpha"]


def test_drained_unknown_outdated_and_unsuitable_backends_are_left_out(backends: dict[str, Backend]) -> None:
    backends["alpha"].is_drained = True
    offers = [offer("alpha"), offer("unknown"), offer("beta", good_until=NOW), offer("gamma", "openai"), offer("gamma")]
    assert chosen(model(*offers), backends) == ["gamma"]
    assert chosen(model(*offers[:3]), backends) == []


def test_a_route_counts_as_served_even_if_its_only_backend_is_down() -> None:
    assert is_served(model(offer("alpha", good_until=0.0)), call())
    assert not is_served(model(offer("alpha", "openai")), call("/api/show"))
