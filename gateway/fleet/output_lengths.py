"""How many tokens the answers to a key's calls of a model will have, predicted from earlier ones."""

from collections import OrderedDict

from gateway.fleet.cost_means import DECAY

REMEMBERED = 10_000


class _Lengths:
    """Decayed sums of a key's calls of a model: its answers, their part of the limit, and the errors of both predictions."""

    __slots__ = ("mean_error", "ratio", "ratio_error", "ratio_weight", "tokens", "weight")

    def __init__(self) -> None:
        self.tokens = self.weight = self.ratio = self.ratio_weight = self.mean_error = self.ratio_error = 0.0

    def predicted(self, most_output: int | None) -> float:
        mean = self.tokens / self.weight
        if most_output is None:
            return mean
        if self.ratio_weight and self.ratio_error < self.mean_error:
            return self.ratio / self.ratio_weight * most_output
        return min(mean, most_output)

    def add(self, output_tokens: int, most_output: int | None) -> None:
        if most_output:
            if self.ratio_weight:
                by_ratio = self.ratio / self.ratio_weight * most_output
                by_mean = min(self.tokens / self.weight, most_output)
                self.mean_error = self.mean_error * DECAY + abs(by_mean - output_tokens)
                self.ratio_error = self.ratio_error * DECAY + abs(by_ratio - output_tokens)
            self.ratio = self.ratio * DECAY + min(1.0, output_tokens / most_output)
            self.ratio_weight = self.ratio_weight * DECAY + 1.0
        self.tokens, self.weight = self.tokens * DECAY + output_tokens, self.weight * DECAY + 1.0


class OutputLengths:
    """Of the keys and models that were used last in this process.

    Some callers always ask for the same limit and use what they need, others set a limit that fits each answer. So both the
    mean length and the mean part of the limit are learned, and that with the smaller error is used.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._lengths: OrderedDict[tuple[str, str], _Lengths] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, key_id: str, model: str, output_tokens: int, most_output: int | None) -> None:
        lengths = self._lengths.get((key_id, model))
        if lengths is None:
            if len(self._lengths) >= self._remembered:
                self._lengths.popitem(last=False)
            lengths = self._lengths[key_id, model] = _Lengths()
        else:
            self._lengths.move_to_end((key_id, model))
        lengths.add(output_tokens, most_output)

    def predicted(self, key_id: str, model: str, most_output: int | None) -> float | None:
        """None for a key that has not used the model."""
        lengths = self._lengths.get((key_id, model))
        return None if lengths is None else lengths.predicted(most_output)
