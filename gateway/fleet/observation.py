"""What a finished call showed of its backend: durations that the backend reported, or only those of the gateway's clock."""

from typing import NamedTuple

from gateway.dialects.dialect import Usage

# Shorter prompts and answers take their time for other things than tokens.
LEAST_PROMPT, LEAST_OUTPUT = 64, 8
# A backend reports some milliseconds of loading for a model that was loaded. Where nobody knows better, it has loaded if
# that took at least this part of a load as it is known, or as it is guessed.
PART_OF_KNOWN_LOAD, PART_OF_GUESSED_LOAD = 0.25, 0.01
# In an answer that came whole, the prompt's part can only be guessed; if it is larger, nothing is learned of the rest.
LARGEST_GUESSED_PART = 0.2


class Observation(NamedTuple):
    """A call that was answered completely.

    `took_s` is from its slot until its connection was given back, `first_s` until the first frame, None if the answer came
    whole. `cached_tokens` of the prompt were probably cached, if the backend does not report how many. `estimated_prompt` is
    what the gateway had counted before. `loaded` is whether the call caused its model to be loaded, None if unknown. `size` is
    the model's in bytes, 0 if unknown. `key_id`, `asked_model` and `most_output` are those of the request.
    """

    took_s: float
    first_s: float | None
    prompt_tokens: int
    output_tokens: int
    usage: Usage = Usage()
    cached_tokens: int = 0
    estimated_prompt: int = 0
    loaded: bool | None = None
    size: int = 0
    key_id: str = ""
    asked_model: str = ""
    most_output: int | None = None

    @property
    def read_tokens(self) -> int:
        """The tokens of the prompt that were not cached."""
        reported = self.usage.cached_tokens
        read = self.prompt_tokens - (self.cached_tokens if reported is None else reported)
        return max(0, read)

    @property
    def is_reported(self) -> bool:
        """Whether the backend reports how long it took, so that the clock does not matter."""
        return self.usage.prefill_s is not None or self.usage.decode_s is not None

    @property
    def may_have_loaded(self) -> bool:
        """Whether only the length of a reported load shows if it was one."""
        return self.loaded is None and self.usage.load_s is not None


class Guess(NamedTuple):
    """What was known of the model on its backend before the call."""

    load_s: float
    prefill_tps: float
    is_load_learned: bool = False


class Measured(NamedTuple):
    """What the call shows, None what it does not. `service_s` is its time without loading."""

    load_s: float | None
    prefill_tps: float | None
    decode_tps: float | None
    prompt_ratio: float | None
    service_s: float
    output_tokens: int


class Split(NamedTuple):
    """A call's time in seconds; `decoded` is how many tokens were generated in `decode_s`."""

    load_s: float | None
    prefill_s: float | None
    decode_s: float | None
    decoded: int


def measured(seen: Observation, guess: Guess) -> Measured:
    usage = seen.usage
    if seen.took_s <= 0:
        return Measured(None, None, None, None, 0.0, seen.output_tokens)
    reported = _reported(seen)
    loaded = bool(seen.loaded)
    if seen.may_have_loaded and reported.load_s is not None:
        loaded = reported.load_s >= guess.load_s * (PART_OF_KNOWN_LOAD if guess.is_load_learned else PART_OF_GUESSED_LOAD)
    split = reported if seen.is_reported else _clocked(seen, reported.load_s, guess, loaded=loaded)
    load_s = split.load_s if loaded else None
    ratio = seen.prompt_tokens / seen.estimated_prompt if seen.estimated_prompt > LEAST_PROMPT else None
    return Measured(
        load_s or None,
        _rate(seen.read_tokens, LEAST_PROMPT, split.prefill_s),
        _rate(split.decoded, LEAST_OUTPUT, split.decode_s),
        ratio if usage.prompt_tokens is not None else None,
        max(0.0, seen.took_s - (split.load_s or 0.0)),
        seen.output_tokens,
    )


def _rate(tokens: int, least: int, seconds: float | None) -> float | None:
    return tokens / seconds if seconds and tokens > least else None


def _reported(seen: Observation) -> Split:
    """The backend's durations. They cannot exceed the time of the call: a backend's clock may be another, or wrong."""
    usage = seen.usage
    total = (usage.load_s or 0.0) + (usage.prefill_s or 0.0) + (usage.decode_s or 0.0)
    if total <= seen.took_s:
        return Split(usage.load_s, usage.prefill_s, usage.decode_s, seen.output_tokens)
    scale = seen.took_s / total
    load, prefill, decode = (
        None if value is None else value * scale for value in (usage.load_s, usage.prefill_s, usage.decode_s)
    )
    return Split(load, prefill, decode, seen.output_tokens)


def _clocked(seen: Observation, load_s: float | None, guess: Guess, *, loaded: bool) -> Split:
    if seen.first_s is not None:
        # The first frame brings the first token.
        decode_s, decoded = max(0.0, seen.took_s - seen.first_s), seen.output_tokens - 1
        if loaded and load_s is None:
            return Split(max(0.0, seen.first_s - seen.read_tokens / guess.prefill_tps), None, decode_s, decoded)
        return Split(load_s, max(0.0, seen.first_s - (load_s or 0.0)), decode_s, decoded)
    prefill_s = seen.read_tokens / guess.prefill_tps
    rest_s = max(0.0, seen.took_s - (load_s or 0.0))
    if loaded and load_s is None:
        return Split(max(0.0, rest_s - prefill_s) if seen.output_tokens == 0 else None, None, None, 0)
    if seen.output_tokens == 0:
        return Split(load_s, rest_s, None, 0)
    if prefill_s > rest_s * LARGEST_GUESSED_PART:
        return Split(load_s, None, None, 0)
    return Split(load_s, None, rest_s - prefill_s, seen.output_tokens)
