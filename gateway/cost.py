"""What a request cost in tokens: as the backend counted them, else as guessed from what went through."""

from typing import NamedTuple

from gateway.record import Record

# Of these, what had gone through until the end is all that can be known.
CUT = frozenset({"client_gone", "truncated", "shutdown"})
MOST_TOKENS = 10**9


class Cost(NamedTuple):
    """`source`: reported (by the backend), estimated, partial (estimated, of an answer cut short) or none."""

    prompt: int = 0
    completion: int = 0
    source: str = "none"

    @property
    def total(self) -> int:
        return self.prompt + self.completion


def of(record: Record) -> Cost:
    if record.outcome not in CUT and record.outcome != "answered":
        return Cost()
    prompt, completion = record.usage.prompt_tokens, record.usage.completion_tokens
    if completion is None and record.need.output == 0:
        completion = 0
    if prompt is not None and completion is not None:
        return _bounded(Cost(prompt, completion, "reported" if prompt or completion or record.need.prompt > 0 else "none"))
    if record.need.prompt < 0 or not record.was_sent:
        return Cost()
    guessed = Cost(
        record.need.prompt if prompt is None else prompt,
        record.relayed_tokens if completion is None else completion,
        "partial" if record.outcome in CUT else "estimated",
    )
    return _bounded(guessed)


def _bounded(cost: Cost) -> Cost:
    return Cost(min(cost.prompt, MOST_TOKENS), min(cost.completion, MOST_TOKENS), cost.source)
