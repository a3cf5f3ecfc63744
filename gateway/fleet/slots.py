"""How many calls a backend answers at the same time with one model: as configured, as it reports, or as its kind does."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gateway.fleet.backends.config import BackendConfig

# Ollama's own default, and what servers that batch calls answer at once with ease.
OF_OLLAMA, OF_OPENAI = 1, 32
# The model families for which Ollama ignores OLLAMA_NUM_PARALLEL (server/sched.go), as it does for embedding models.
ONE_AT_A_TIME = frozenset(
    "mllama qwen3vl qwen3vlmoe qwen35 qwen35moe qwen3next lfm2 lfm2moe nemotron_h nemotron_h_moe nemotron_h_omni".split()
)
# Of these all models are for embeddings; older versions of Ollama do not list capabilities.
EMBEDDING = frozenset("bert nomic-bert nomic-bert-moe".split())
# In `Snapshot.slots`, the number for all models.
ANY_MODEL = ""


class Slots(NamedTuple):
    """`source` is where the number is from: configured, reported, family or default."""

    number: int
    source: str


def slots_of(
    config: BackendConfig | None, reported: Mapping[str, int], kind: str, model: str, entry: Mapping[str, Any]
) -> Slots:
    """`model` is its canonical name, `entry` its entry in the backend's list."""
    if own := configured(config, model):
        return Slots(own, "configured")
    if found := reported.get(model) or reported.get(ANY_MODEL):
        return Slots(found, "reported")
    if kind != "ollama" or is_remote(entry):
        return Slots(OF_OPENAI, "default")
    return Slots(1, "family") if is_one_at_a_time(entry) else Slots(OF_OLLAMA, "default")


def configured(config: BackendConfig | None, model: str) -> int:
    """The operator's number, 0 without one."""
    if config is None:
        return 0
    of_model = config.models.get(model)
    return (of_model.slots if of_model else None) or config.slots


def is_remote(entry: Mapping[str, Any]) -> bool:
    """Whether the model runs elsewhere: Ollama passes calls for cloud models on."""
    return bool(entry.get("remote_host") or entry.get("remote_model"))


def is_one_at_a_time(entry: Mapping[str, Any]) -> bool:
    """Whether Ollama answers one call at a time with this model, whatever it is configured to do."""
    family, capabilities = str(entry["details"].get("family")), entry.get("capabilities")
    is_for_embeddings = family in EMBEDDING or (isinstance(capabilities, list) and "embedding" in capabilities)
    return is_for_embeddings or family in ONE_AT_A_TIME
