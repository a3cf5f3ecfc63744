"""How many calls a backend answers at the same time with a model, and where the number is from."""

from typing import Any

import pytest

from gateway.dialects.model_entries import native_entry
from gateway.fleet import catalog
from gateway.fleet.backends.config import BackendConfig, ModelConfig
from gateway.fleet.catalog import Snapshot
from gateway.fleet.slots import slots_of

MODEL = "qwen3:8b"
PLAIN = BackendConfig("a", "http://a")


def entry(**more: Any) -> dict[str, Any]:
    return native_entry({"name": MODEL, **more})


def of_family(family: str) -> dict[str, Any]:
    return entry(details={"family": family})


@pytest.mark.parametrize(
    ("config", "reported", "expected"),
    [
        (BackendConfig("a", "http://a", slots=3, models={MODEL: ModelConfig(slots=7)}), {MODEL: 5}, (7, "configured")),
        (BackendConfig("a", "http://a", slots=3, models={MODEL: ModelConfig()}), {MODEL: 5}, (3, "configured")),
        (BackendConfig("a", "http://a", slots=3, models={"other": ModelConfig(slots=7)}), {}, (3, "configured")),
        (PLAIN, {MODEL: 5, "": 2}, (5, "reported")),
        (PLAIN, {"other": 5, "": 2}, (2, "reported")),
        (PLAIN, {"other": 5}, (1, "family")),
        (None, {}, (1, "family")),
    ],
)
def test_the_operators_number_wins_then_the_reported_one(
    config: BackendConfig | None, reported: dict[str, int], expected: tuple[int, str]
) -> None:
    assert slots_of(config, reported, "ollama", MODEL, of_family("qwen3vl")) == expected


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        ("ollama", of_family("llama"), (1, "default")),
        ("ollama", of_family("mllama"), (1, "family")),
        ("ollama", of_family("nomic-bert"), (1, "family")),
        ("ollama", entry(capabilities=["embedding"]), (1, "family")),
        ("ollama", entry(capabilities=["completion", "tools"]), (1, "default")),
        ("ollama", entry(remote_host="https://ollama.com"), (32, "default")),
        ("openai", of_family("mllama"), (32, "default")),
        ("ollama", entry(capabilities="embedding", details={"family": ["mllama"]}), (1, "default")),
    ],
)
def test_an_unknown_number_depends_on_kind_and_family(kind: str, found: dict[str, Any], expected: tuple[int, str]) -> None:
    assert slots_of(PLAIN, {}, kind, MODEL, found) == expected


def test_offers_have_what_is_needed_to_choose_between_them() -> None:
    local = entry(size=5_000_000_000, details={"family": "qwen3"})
    cloud = entry(name="Big:cloud", remote_host="https://ollama.com")
    served = {**entry(name="qwen3:8B"), "openai": {"id": "qwen3:8B", "meta": {"size": 4_000}}}
    snapshots = [
        Snapshot("a", "http://a", "ollama", models=(local, cloud)),
        Snapshot("b", "http://b", "openai", models=(served,), slots={"": 4}),
        Snapshot("c", "http://c", "openai", models=(served,), slots={MODEL: 2}, swaps=True),
    ]
    configs = {"a": BackendConfig("a", "http://a", tier=3), "b": BackendConfig("b", "http://b", tier=1)}
    models = catalog.build(snapshots, 60, configs=configs).models
    facts = [(o.backend, o.model, o.slots, o.slots_source, o.size, o.swaps, o.tier) for o in models[MODEL].offers]
    assert facts == [
        ("a", MODEL, 1, "default", 5_000_000_000, True, 3),
        ("b", MODEL, 4, "reported", 4_000, False, 1),
        ("c", MODEL, 2, "reported", 4_000, True, 1),
    ]
    (remote,) = models["big:cloud"].offers
    assert (remote.slots, remote.size, remote.swaps) == (32, 0, False)


def test_a_stored_list_keeps_its_slots_and_loses_what_are_none() -> None:
    stored = Snapshot("a", "http://a", "openai", slots={"": 4, MODEL: 2}, swaps=True)
    assert catalog.unpack(stored.packed()) == stored
    assert catalog.unpack({**stored.packed(), "slots": {"": "4", "m": -1, "n": True, "o": 3}}).slots == {"o": 3}
    older = {name: value for name, value in stored.packed().items() if name not in ("slots", "swaps")}
    assert catalog.unpack(older).slots == {}
