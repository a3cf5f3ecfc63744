"""Corrects estimates of the time to the first token by how earlier ones have turned out. No I/O."""

import math
from collections import OrderedDict

# A tenth of each new error counts; a single one at most as a factor of 8, and what is remembered is bounded.
WEIGHT, LARGEST, MOST_GROUPS = 0.1, math.log(8), 1000
# Shorter times are not those of queues and prompts.
SHORTEST_S = 0.005

# The group of calls, and whether they had to wait.
Kind = tuple[str, bool]


class EtaCorrection:
    """By group, apart for calls that waited and calls that did not: the mean logarithm of real to estimated seconds."""

    def __init__(self) -> None:
        self._means: OrderedDict[Kind, float] = OrderedDict()

    def corrected(self, kind: Kind, estimated_s: float) -> float:
        return estimated_s * math.exp(self._means.get(kind, 0.0))

    def note(self, kind: Kind, estimated_s: float, real_s: float) -> None:
        """`estimated_s` is the estimate before its correction."""
        if estimated_s < SHORTEST_S or real_s < SHORTEST_S:
            return
        error = min(LARGEST, max(-LARGEST, math.log(real_s / estimated_s)))
        known = self._means.get(kind)
        self._means[kind] = error if known is None else known + WEIGHT * (error - known)
        self._means.move_to_end(kind)
        if len(self._means) > MOST_GROUPS:
            self._means.popitem(last=False)
