"""What a finished call shows of its backend's time."""

from typing import Any

import pytest

from gateway.dialects.dialect import Usage
from gateway.fleet.observation import Guess, Measured, Observation, measured

GUESS = Guess(load_s=15.0, prefill_tps=1000.0)


def seen(took_s: float = 10.0, first_s: float | None = 4.0, **more: Any) -> Observation:
    return Observation(**{"took_s": took_s, "first_s": first_s, "prompt_tokens": 1000, "output_tokens": 61, **more})


def shown(observation: Observation, guess: Guess = GUESS) -> Measured:
    return measured(observation, guess)


def reported(load_s: float | None, prefill_s: float | None, decode_s: float | None, cached: int | None = None) -> Usage:
    return Usage(1000, 61, cached, load_s, prefill_s, decode_s)


def test_what_a_backend_reports() -> None:
    found = shown(seen(usage=reported(3.0, 0.5, 6.1)))
    assert found == Measured(3.0, 2000, 10, None, 7.0, 61)


def test_cached_tokens_are_not_read_again() -> None:
    usage = reported(None, 0.5, 6.1, cached=900)
    assert shown(seen(usage=usage)).prefill_tps == 200
    assert shown(seen(usage=usage, cached_tokens=500)).prefill_tps == 200, "what the backend reports counts first"
    assert shown(seen(usage=reported(None, 0.5, 6.1), cached_tokens=500)).prefill_tps == 1000
    assert shown(seen(usage=reported(None, 0.5, 6.1, cached=936))).prefill_tps is None, "too few to show a rate"
    assert shown(seen(usage=reported(None, 0.5, 6.1, cached=2000))).prefill_tps is None


def test_the_clock_shows_the_prompt_until_the_first_frame_and_then_the_answer() -> None:
    assert shown(seen(16.0, 4.0)) == Measured(None, 250, 5, None, 16.0, 61)


def test_a_load_that_is_reported_alone_is_no_part_of_the_prompt() -> None:
    found = shown(seen(16.0, 4.0, usage=reported(2.0, None, None)))
    assert found == Measured(2.0, 500, 5, None, 14.0, 61)


def test_a_load_that_only_the_clock_shows() -> None:
    assert shown(seen(16.0, 4.0, loaded=True)) == Measured(3.0, None, 5, None, 13.0, 61)
    assert shown(seen(3.0, None, loaded=True, output_tokens=0)) == Measured(2.0, None, None, None, 1.0, 0)
    assert shown(seen(0.5, None, loaded=True, output_tokens=0)).load_s is None


def test_an_answer_that_comes_whole() -> None:
    assert shown(seen(7.1, None)).decode_tps == pytest.approx(10)
    assert shown(seen(4.9, None)).decode_tps is None, "the guessed part of the prompt is too large"
    assert shown(seen(7.1, None, loaded=True))[:3] == (None, None, None)
    assert shown(seen(2.0, None, output_tokens=0)) == Measured(None, 500, None, None, 2.0, 0)


def test_some_milliseconds_of_loading_are_no_load() -> None:
    assert shown(seen(usage=reported(0.1, 0.5, 6.1))).load_s is None
    assert shown(seen(usage=reported(0.2, 0.5, 6.1))).load_s == 0.2
    known = Guess(10.0, 1000.0, is_load_learned=True)
    assert shown(seen(usage=reported(2.0, 0.5, 6.1)), known).load_s is None
    assert shown(seen(usage=reported(3.0, 0.5, 6.1)), known).load_s == 3.0


def test_whoever_knows_whether_a_model_was_loaded_decides() -> None:
    assert shown(seen(usage=reported(0.1, 0.5, 6.1), loaded=True)).load_s == 0.1
    assert shown(seen(usage=reported(3.0, 0.5, 6.1), loaded=False)).load_s is None
    assert shown(seen(16.0, 4.0, loaded=False)).prefill_tps == 250


def test_durations_that_exceed_the_call_are_shares_of_it() -> None:
    """The clock of a backend may run faster, or it lies."""
    found = shown(seen(1.0, 0.4, usage=reported(3.0, 1.0, 6.0)))
    assert found.load_s == pytest.approx(0.3)
    assert found.prefill_tps == pytest.approx(10_000)
    assert found.decode_tps == pytest.approx(61 / 0.6)
    assert found.service_s == pytest.approx(0.7)


def test_short_prompts_and_answers_show_no_rate() -> None:
    found = shown(seen(prompt_tokens=64, output_tokens=8, usage=reported(None, 0.5, 6.1)))
    assert (found.prefill_tps, found.decode_tps, found.output_tokens) == (None, None, 8)


def test_how_wrong_the_estimate_of_the_prompt_was() -> None:
    assert shown(seen(estimated_prompt=800, usage=reported(None, 0.5, 6.1))).prompt_ratio == 1.25
    assert shown(seen(estimated_prompt=800)).prompt_ratio is None, "the count is the estimate"
    assert shown(seen(estimated_prompt=10, usage=reported(None, 0.5, 6.1))).prompt_ratio is None


@pytest.mark.parametrize("took_s", [0.0, -1.0])
@pytest.mark.parametrize("first_s", [None, -1.0, 0.0, 5.0])
@pytest.mark.parametrize("usage", [Usage(), reported(0.0, 0.0, 0.0), reported(5.0, 5.0, 5.0)])
@pytest.mark.parametrize("output", [0, 100])
def test_clocks_that_stand_still_or_run_backwards(took_s: float, first_s: float | None, usage: Usage, output: int) -> None:
    for loaded in (None, True, False):
        found = shown(seen(took_s, first_s, usage=usage, output_tokens=output, loaded=loaded))
        assert all(value is None or value >= 0 for value in found)
