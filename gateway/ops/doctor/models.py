"""The models of all backends: aliases that lead nowhere, slots that a backend does not have or may have, copies that differ."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gateway.dialects.model_names import canonical
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.catalog import Catalog, digests_in_words
from gateway.fleet.slots import configured, is_one_at_a_time, is_remote
from gateway.ops.doctor.finding import Finding, ok, warning

ALIASES_ADVICE = "change MODEL_ALIASES, or give a backend one of the models (`make models` lists all)"
SLOTS_ADVICE = 'give these models `"slots": 1` in `models` of its entry in OLLAMA_BACKENDS: further calls only wait in Ollama'
DIGESTS_ADVICE = {
    "warn": "pull it again on all backends, or set DIGEST_PARITY=distinct to use only those that equal the first",
    "distinct": "pull it again on all backends: only those that equal the first are used",
}
MORE_SLOTS_ADVICE = 'set "slots" of its entry in OLLAMA_BACKENDS, or OLLAMA_SLOTS, to the OLLAMA_NUM_PARALLEL of that Ollama'
MOST_NAMES = 5
# Calls of the last day that make it worth a word: how many, and which part of them waited.
MANY_CALLS, MANY_WAITED = 20, 0.05


def aliases(catalog: Catalog) -> list[Finding]:
    """Those that lead to a model, and each that leads to none."""
    known, now = list(catalog.aliases), time.time()
    dead = [alias for alias in known if not ((model := catalog.reached(alias)) and model.is_listed(now))]
    nothing = [warning(f"alias {a.written}", f"leads to nothing: {', '.join(a.targets)}", ALIASES_ADVICE) for a in dead]
    return [ok("aliases", f"{len(known) - len(dead)} of {len(known)} lead to a model"), *nothing]


def slots(catalog: Catalog, configs: Sequence[BackendConfig]) -> list[Finding]:
    """Models that Ollama answers one at a time, although more slots are configured."""
    by_name = {config.name: config for config in configs}
    found = []
    for snapshot in catalog.snapshots:
        config = by_name.get(snapshot.backend)
        names = [
            entry["name"]
            for entry in snapshot.models
            if snapshot.kind == "ollama" and not is_remote(entry) and is_one_at_a_time(entry)
            if configured(config, canonical(entry["name"]).canonical) > 1
        ]
        if names:
            words = f"Ollama answers one call at a time with {_some(names)}, but more slots are configured"
            found.append(warning(f"slots of {snapshot.backend}", words, SLOTS_ADVICE))
    return found


def waits(catalog: Catalog, rows: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Backends that count as having one slot because nobody says otherwise, for which calls often wait."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        offer = catalog.offer(row["backend"], row["model"])
        is_guessed = offer is not None and offer.slots == 1 and offer.slots_source == "default"
        if is_guessed and row["calls"] >= MANY_CALLS and row["waited"] >= MANY_WAITED * row["calls"]:
            found.setdefault(row["backend"], []).append(row)
    return [warning(f"waits for {backend}", _waits_in_words(rows), MORE_SLOTS_ADVICE) for backend, rows in found.items()]


def _waits_in_words(rows: Sequence[Mapping[str, Any]]) -> str:
    waited, calls = (sum(row[name] for row in rows) for name in ("waited", "calls"))
    names = _some(row["model"] for row in rows)
    return f"{waited} of {calls} calls of the last day waited for a slot of {names}, taken to have one"


def digests(catalog: Catalog, parity: str) -> list[Finding]:
    return [
        warning(f"model {name}", f"differs between backends: {digests_in_words(found)}", DIGESTS_ADVICE[parity])
        for name, found in catalog.different.items()
    ]


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - MOST_NAMES
    return ", ".join(listed[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
