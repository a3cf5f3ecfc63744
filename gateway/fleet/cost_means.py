"""Moving means of what the calls of one model on one backend cost, as sums that several processes can add up.

Each observation counts half as much after HALF_LIFE further ones. A process keeps what is known of all processes, and apart
from it what it has observed itself since it last shared that.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

HALF_LIFE = 20
DECAY = 0.5 ** (1 / HALF_LIFE)
# The sum of all weights, of endlessly many observations.
MOST_WEIGHT = 1 / (1 - DECAY)
# Rates and durations spread by factors, so their logarithms are averaged; the other two are sums of work.
LOAD, PREFILL, DECODE, PROMPT, SERVICE, OUTPUT = range(6)
IN_LOGARITHMS = frozenset({LOAD, PREFILL, DECODE, PROMPT})
COUNT = 6
LEAST, MOST = 1e-9, 1e12
# No sum is larger; what is, was not written by a gateway.
LARGEST = 1e15
# Of each kind, as it is summed.
USABLE_MEANS = tuple((math.log(LEAST), math.log(MOST)) if kind in IN_LOGARITHMS else (0.0, MOST) for kind in range(COUNT))
# From so many observations on, one that differs by more than this factor counts as if it differed by it.
CLIPPED_FROM, CLIPPED_TO = 3.0, 8.0
LOG_OF_CLIP = math.log(CLIPPED_TO)
# In the text of means: size in bytes, and when something was observed last, in seconds since the epoch.
HEAD = 2


class Sums(NamedTuple):
    """Of each kind: how many observations, and the decayed sums of their values and weights."""

    counts: list[int]
    values: list[float]
    weights: list[float]


def no_sums() -> Sums:
    return Sums([0] * COUNT, [0.0] * COUNT, [0.0] * COUNT)


class CostMeans:
    """The means of one model on one backend; `size` is the model's in bytes, 0 if unknown."""

    __slots__ = ("at", "known", "own", "shared", "size")

    def __init__(self) -> None:
        self.size, self.at = 0, 0.0
        self.known, self.own = no_sums(), no_sums()
        # As Redis had them last.
        self.shared = b""

    def mean(self, kind: int) -> float | None:
        weight = self.known.weights[kind]
        if weight <= 0.0:
            return None
        mean = self.known.values[kind] / weight
        return math.exp(mean) if kind in IN_LOGARITHMS else mean

    def add(self, values: Sequence[float | None]) -> bool:
        """Adds an observation of each kind, None for none; returns whether one is the first of its kind.

        What is no usable number is left out. This is one function because it runs for most calls.
        """
        known, own, begins = self.known, self.own, False
        for kind, value in enumerate(values):
            if value is None or not (LEAST <= value <= MOST or (kind == OUTPUT and value == 0)):
                continue
            weight, is_logarithm = known.weights[kind], kind in IN_LOGARITHMS
            term = math.log(value) if is_logarithm else value
            if weight >= CLIPPED_FROM:
                mean = known.values[kind] / weight
                most = mean + LOG_OF_CLIP if is_logarithm else mean * CLIPPED_TO or MOST
                least = mean - LOG_OF_CLIP if is_logarithm else 0.0
                if not least <= term <= most:
                    term = least if term < least else most
            for sums in (known, own):
                sums.counts[kind] += 1
                sums.values[kind] = sums.values[kind] * DECAY + term
                sums.weights[kind] = sums.weights[kind] * DECAY + 1.0
            begins = begins or weight <= 0.0
        return begins

    def take_own(self) -> tuple[Sums, bytes]:
        """What has been observed here since it was last taken, also as text for `merge_costs.lua`."""
        own, self.own = self.own, no_sums()
        numbers: list[float] = [self.size, self.at]
        for kind in range(COUNT):
            numbers += own.counts[kind], own.values[kind], own.weights[kind]
        return own, " ".join(map(repr, numbers)).encode()

    def put_back(self, own: Sums) -> None:
        """What was taken could not be shared: it comes before what has been observed since."""
        self.own = _joined(own, self.own)

    def replace(self, text: bytes) -> bool:
        """Takes the means of all processes; adds to them what has been observed here since. Returns whether they are usable."""
        numbers = _numbers(text)
        if numbers is None:
            return False
        self.shared = text
        self.size, self.at = int(numbers[0]) or self.size, max(numbers[1], self.at)
        shared = no_sums()
        for kind, (least, most) in enumerate(USABLE_MEANS):
            value, weight = numbers[HEAD + 2 * kind], numbers[HEAD + 2 * kind + 1]
            if 1 <= weight <= MOST_WEIGHT + 1 and least <= value / weight <= most:
                shared.values[kind], shared.weights[kind] = value, weight
        self.known = _joined(shared, self.own)
        return True


def _joined(earlier: Sums, later: Sums) -> Sums:
    joined = no_sums()
    for kind in range(COUNT):
        decay = DECAY ** later.counts[kind]
        joined.counts[kind] = earlier.counts[kind] + later.counts[kind]
        joined.values[kind] = earlier.values[kind] * decay + later.values[kind]
        joined.weights[kind] = earlier.weights[kind] * decay + later.weights[kind]
    return joined


def _numbers(text: bytes) -> list[float] | None:
    """None if it is no text of means: Redis may hold anything. A later version may append kinds, an earlier one lacks some."""
    try:
        numbers = list(map(float, text.split()))
    except ValueError:
        return None
    for number in numbers:
        if not -LARGEST < number < LARGEST:
            return None
    return None if len(numbers) < HEAD else numbers + [0.0] * (HEAD + 2 * COUNT - len(numbers))
