"""What a request cost in tokens: as the backend counted them, else as guessed from what went through."""

from typing import NamedTuple

from gateway.audit.record import Record

# Of these, what had gone through until the end is all that can be known.
CUT = frozenset({"client_gone", "truncated", "shutdown"})
# A prompt is estimated from its text alone: templates, pictures and odd alphabets may make more of it, but no backend's word
# makes a month's budget of it.
PROMPT_FACTOR, PROMPT_BASE = 16, 65_536
# What one answer grows by while nobody sees it: about what a model of 7 to 14 billion parameters does on one card.
TOKENS_PER_S = 50
MILLION = 1_000_000


class TokenUsage(NamedTuple):
    """`source`: reported (by the backend), estimated, partial (estimated, of an answer cut short) or none.

    `cached` are part of the prompt's; `billed` is what counts for limits where that is less than all tokens.
    """

    prompt: int = 0
    completion: int = 0
    source: str = "none"
    cached: int | None = None
    billed: int | None = None

    @property
    def total(self) -> int:
        """What counts for limits."""
        return self.prompt + self.completion if self.billed is None else self.billed


def usage_of(record: Record, most_output: int, cached_weight: int) -> TokenUsage:
    """`most_output`: what a backend was allowed to answer at most; what it says beyond that is not billed.

    `cached_weight`: what a prompt token counts that the backend had cached, in millionths.
    """
    if record.outcome not in CUT and record.outcome != "answered":
        return TokenUsage()
    prompt, completion = record.usage.prompt_tokens, record.usage.completion_tokens
    if completion is None and record.need.output == 0:
        completion = 0
    if prompt is not None and completion is not None:
        source = "reported" if prompt or completion or record.need.prompt > 0 else "none"
        found = TokenUsage(prompt, completion, source)
    elif record.need.prompt < 0 or not record.was_sent:
        return TokenUsage()
    else:
        found = TokenUsage(
            record.need.prompt if prompt is None else prompt,
            _answered(record) if completion is None else completion,
            "partial" if record.outcome in CUT else "estimated",
        )
    found = _bounded(found, record, most_output)
    cached = record.usage.cached_tokens
    # Of a prompt that we have estimated, nobody knows how much was cached.
    return found if cached is None or prompt is None else _weighed(found, min(cached, found.prompt), cached_weight)


def _answered(record: Record) -> int:
    """What went through; of a whole answer that its caller did not wait for, about what its backend had made of it."""
    if record.stream or record.outcome != "client_gone" or record.relayed_tokens:
        return record.relayed_tokens
    failed_s = sum(attempt.ms for attempt in record.attempts) / 1000
    made = int(max(0.0, record.upstream_s - failed_s) * TOKENS_PER_S) * record.need.answers
    return made if record.need.output is None else min(made, record.need.output)


def _bounded(cost: TokenUsage, record: Record, most_output: int) -> TokenUsage:
    most_prompt = PROMPT_FACTOR * max(0, record.need.prompt) + PROMPT_BASE
    if cost.prompt <= most_prompt and cost.completion <= most_output:
        return cost
    return TokenUsage(min(cost.prompt, most_prompt), min(cost.completion, most_output), cost.source)


def _weighed(cost: TokenUsage, cached: int, weight: int) -> TokenUsage:
    saved = cached - -(-cached * weight // MILLION)
    billed = cost.prompt + cost.completion - saved if saved else None
    return TokenUsage(cost.prompt, cost.completion, cost.source, cached, billed)
