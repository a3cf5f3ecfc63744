"""What calls cost by backend and model, learned from finished ones: seconds to load a model, tokens per second, seconds a call.

`CostStore` shares it with the other processes and keeps it over restarts.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from gateway.fleet.cost_means import DECODE, LOAD, OUTPUT, PREFILL, PROMPT, SERVICE, CostMeans
from gateway.fleet.observation import Guess, Observation, measured
from gateway.fleet.output_lengths import OutputLengths

# Backends and models of which something is known.
MOST_ENTRIES = 1000
MEDIANS_KEPT_S = 5.0
# What is guessed of a fleet that has answered nothing yet.
TYPICAL_SIZE, TYPICAL_LOAD_S = 8_000_000_000, 15.0
TYPICAL = {LOAD: TYPICAL_LOAD_S, PREFILL: 1000.0, DECODE: 30.0, PROMPT: 1.0, SERVICE: 10.0, OUTPUT: 256.0}
# In the order of the fields of Rates.
KINDS = (LOAD, PREFILL, DECODE, OUTPUT, SERVICE, PROMPT)

# Where a number is from: calls of the model on the backend; other backends with the model; the size of the model and the speed
# at which the backend, or else the fleet, loads; other models of the backend; the fleet; or nothing but experience.
Origin = Literal["learned", "model", "size", "backend", "fleet", "default"]
LEARNED: Origin = "learned"


class Rates(NamedTuple):
    """What a call of a model on a backend will probably cost; `origins` says of each number where it is from.

    `service_s` is the time of a whole call without loading. `prompt_ratio` is by how much backends count more tokens in a
    prompt than the gateway estimates.
    """

    load_s: float
    prefill_tps: float
    decode_tps: float
    output_tokens: float
    service_s: float
    prompt_ratio: float
    origins: tuple[Origin, ...]

    @property
    def is_learned(self) -> bool:
        """Whether both rates are from calls of the model on the backend."""
        return self.origins[1] == self.origins[2] == LEARNED


class Learned(NamedTuple):
    """What is known of a model on a backend, None where nothing is; `at` is in seconds since the epoch."""

    backend: str
    model: str
    size: int
    at: float
    load_s: float | None
    prefill_tps: float | None
    decode_tps: float | None
    output_tokens: float | None
    service_s: float | None
    prompt_ratio: float | None


class _Medians(NamedTuple):
    """By kind: of each model, of each backend, of all; LOAD of a backend and of all also in bytes per second."""

    models: Mapping[tuple[int, str], float]
    backends: Mapping[tuple[int, str], float]
    fleet: Mapping[int, float]
    bytes_per_s: Mapping[str, float]
    fleet_bytes_per_s: float | None


class Costs:
    """Everything is a look-up in memory. `version` grows with each change."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], CostMeans] = {}
        self._rates: dict[tuple[str, str], tuple[int, Rates]] = {}
        self._medians: _Medians | None = None
        self._medians_at = 0.0
        # What was known when they were computed last.
        self._known: dict[tuple[str, str], list[bool]] = {}
        self._lengths = OutputLengths()
        self.version = 0

    def rates(self, backend: str, model: str, size: int = 0) -> Rates:
        """`model` is the canonical name at the backend; `size` is in bytes, 0 if unknown."""
        known = self._rates.get((backend, model))
        if known is not None and known[0] == size:
            return known[1]
        if len(self._rates) >= 4 * MOST_ENTRIES:
            self._rates.clear()
        found = self._estimated(backend, model, size)
        self._rates[backend, model] = size, found
        return found

    def predicted_output(self, key_id: str, model: str, most_output: int | None) -> float:
        """The tokens of the answer to a call of a key; `model` is the canonical name that it asks for."""
        found = self._lengths.predicted(key_id, model, most_output)
        if found is not None:
            return found
        mean = self._medians_now().models.get((OUTPUT, model), TYPICAL[OUTPUT])
        return mean if most_output is None else min(mean, most_output)

    def note(self, backend: str, model: str, seen: Observation) -> None:
        """Learns from a call that was answered completely."""
        if seen.key_id:
            self._lengths.add(seen.key_id, seen.asked_model, seen.output_tokens, seen.most_output)
        entry = self._entries.get((backend, model)) or self._begun(backend, model)
        found = measured(seen, self._guess(entry, backend, model, seen))
        entry.size, entry.at = seen.size or entry.size, time.time()
        self.version += 1
        if entry.add(found):
            self._forget_estimates()
        else:
            self._rates.pop((backend, model), None)

    def _forget_estimates(self) -> None:
        """What is not learned is estimated anew from what is."""
        self._rates.clear()
        self._medians = None

    def learned(self) -> list[Learned]:
        """All that is known, in the order of backends and models."""
        return [
            Learned(*key, entry.size, entry.at, *(entry.mean(kind) for kind in KINDS))
            for key, entry in sorted(self._entries.items())
        ]

    def entries(self) -> Iterator[tuple[tuple[str, str], CostMeans]]:
        yield from self._entries.items()

    def replace(self, texts: Iterable[tuple[tuple[str, str], bytes]]) -> None:
        """Takes the means of all processes; keeps of others only what has been observed here and not been shared yet."""
        entries: dict[tuple[str, str], CostMeans] = {}
        for key, text in texts:
            entry = self._entries.get(key) or CostMeans()
            if entry.replace(text):
                entries[key] = entry
        own = {key: entry for key, entry in self._entries.items() if key not in entries and any(entry.own.counts)}
        self._entries = entries | own
        self.version += 1
        self._rates.clear()
        # Medians move slowly, unless something is learned for the first time.
        known = {key: [weight > 0 for weight in entry.known.weights] for key, entry in self._entries.items()}
        if known != self._known or time.monotonic() - self._medians_at >= MEDIANS_KEPT_S:
            self._known, self._medians = known, None

    def _begun(self, backend: str, model: str) -> CostMeans:
        if len(self._entries) >= MOST_ENTRIES:
            oldest = min(self._entries, key=lambda key: self._entries[key].at)
            del self._entries[oldest]
        entry = self._entries[backend, model] = CostMeans()
        return entry

    def _guess(self, entry: CostMeans, backend: str, model: str, seen: Observation) -> Guess:
        """What `measured` needs to know, and no more."""
        load_s, prefill_tps, is_load_learned = TYPICAL[LOAD], TYPICAL[PREFILL], False
        if seen.may_have_loaded:
            known = entry.mean(LOAD)
            is_load_learned = known is not None
            load_s = self._guessed(LOAD, backend, model, seen.size)[0] if known is None else known
        if not seen.is_reported:
            prefill_tps = entry.mean(PREFILL) or self._guessed(PREFILL, backend, model, seen.size)[0]
        return Guess(load_s, prefill_tps, is_load_learned)

    def _estimated(self, backend: str, model: str, size: int) -> Rates:
        entry = self._entries.get((backend, model))
        numbers: list[float] = []
        origins: list[Origin] = []
        for kind in KINDS:
            mean = None if entry is None else entry.mean(kind)
            number, origin = self._guessed(kind, backend, model, size) if mean is None else (mean, LEARNED)
            numbers.append(number)
            origins.append(origin)
        load_s, prefill_tps, decode_tps, output_tokens, service_s, prompt_ratio = numbers
        return Rates(load_s, prefill_tps, decode_tps, output_tokens, service_s, prompt_ratio, tuple(origins))

    def _guessed(self, kind: int, backend: str, model: str, size: int) -> tuple[float, Origin]:
        medians = self._medians_now()
        if kind == LOAD and size and (per_s := medians.bytes_per_s.get(backend)):
            return size / per_s, "size"
        if (found := medians.models.get((kind, model))) is not None:
            return found, "model"
        if kind == LOAD and size:
            per_s = medians.fleet_bytes_per_s
            return (size / per_s, "size") if per_s else (TYPICAL_LOAD_S * size / TYPICAL_SIZE, "default")
        if (found := medians.backends.get((kind, backend))) is not None:
            return found, "backend"
        if (found := medians.fleet.get(kind)) is not None:
            return found, "fleet"
        return TYPICAL[kind], "default"

    def _medians_now(self) -> _Medians:
        if self._medians is None:
            self._medians, self._medians_at = _medians_of(self._entries), time.monotonic()
        return self._medians


def _medians_of(entries: Mapping[tuple[str, str], CostMeans]) -> _Medians:
    models: dict[tuple[int, str], list[float]] = defaultdict(list)
    backends: dict[tuple[int, str], list[float]] = defaultdict(list)
    fleet: dict[int, list[float]] = defaultdict(list)
    speeds: dict[str, list[float]] = defaultdict(list)
    for (backend, model), entry in entries.items():
        for kind in KINDS:
            if (mean := entry.mean(kind)) is None:
                continue
            models[kind, model].append(mean)
            backends[kind, backend].append(mean)
            fleet[kind].append(mean)
            if kind == LOAD and entry.size:
                speeds[backend].append(entry.size / mean)
    bytes_per_s = {backend: statistics.median(found) for backend, found in speeds.items()}
    return _Medians(
        {key: statistics.median(found) for key, found in models.items()},
        {key: statistics.median(found) for key, found in backends.items()},
        {kind: statistics.median(found) for kind, found in fleet.items()},
        bytes_per_s,
        statistics.median(bytes_per_s.values()) if bytes_per_s else None,
    )
