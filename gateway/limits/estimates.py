"""What a call will probably take, estimated from earlier ones: seconds of a key's calls, output tokens of a model, seconds of
backends."""

from collections.abc import Sequence

from gateway.limits.quota import CounterSet

MEAN_OF_UNKNOWN_MODEL = 256
# What a call of an unknown model takes of backends.
UNKNOWN_BACKEND_S = 10.0
# Client libraries try twice more: with less than a second between, they would have given up before anything could change.
LONGEST_S, SHORTEST_S = 60.0, 1.0
REMEMBERED = 10_000


class Estimates:
    """Moving means of the calls of this process, for at most REMEMBERED keys and models."""

    def __init__(self) -> None:
        self.output_tokens: dict[str, float] = {}
        self._call_seconds: dict[str, float] = {}
        # By model, and by key and model; only of keys that limit them.
        self._backend_seconds: dict[str, float] = {}

    def add(self, counter_set: CounterSet, seconds: float, model: str, output_tokens: int) -> None:
        """`output_tokens` is -1 where they are not typical of the model."""
        _move(self._call_seconds, counter_set.name, seconds, 0.2)
        if output_tokens >= 0:
            _move(self.output_tokens, model, output_tokens, 0.05)

    def add_backend_seconds(self, counter_set: CounterSet, model: str, seconds: float) -> None:
        for name in (model, f"{counter_set.name} {model}"):
            _move(self._backend_seconds, name, seconds, 0.2)

    def ms_to_reserve(self, counter_sets: Sequence[CounterSet], model: str) -> int:
        """What a call will take of backends, 0 if nothing limits that; the first counter set is the key's own."""
        for counter_set in counter_sets:
            if counter_set.day_seconds >= 0 or counter_set.month_seconds >= 0:
                means, of_key = self._backend_seconds, f"{counter_sets[0].name} {model}"
                return max(1, round(1000 * (means.get(of_key) or means.get(model) or UNKNOWN_BACKEND_S)))
        return 0

    def tokens_of(self, model: str) -> int:
        return round(self.output_tokens.get(model, MEAN_OF_UNKNOWN_MODEL))

    def call_s(self, counter_set: CounterSet) -> float:
        """How long a call takes."""
        return min(LONGEST_S, max(SHORTEST_S, self._call_seconds.get(counter_set.name, 1.0)))

    def slot_s(self, counter_set: CounterSet) -> float:
        """How long until one of the calls that hold a slot ends."""
        return max(SHORTEST_S, self.call_s(counter_set) / max(1, counter_set.concurrent))


def _move(means: dict[str, float], name: str, value: float, weight: float) -> None:
    known = means.get(name)
    if known is None and len(means) >= REMEMBERED:
        del means[next(iter(means))]
    means[name] = value if known is None else known * (1 - weight) + value * weight
