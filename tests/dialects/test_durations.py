"""The seconds that a backend reports for a call: Ollama's durations and llama.cpp's timings, read with suspicion."""

from typing import Any

import pytest

from gateway.core import strict_json
from gateway.dialects.answers import LONGEST_DURATION_S, duration_s
from gateway.dialects.anthropic import Anthropic
from gateway.dialects.dialect import Dialect, Usage
from gateway.dialects.ollama import Ollama
from gateway.dialects.openai import OpenAI
from gateway.dialects.responses import Responses
from gateway.dialects.translation.native_records import Durations, metrics
from tests.support.fake_backend.scripts import recording

NS = 10**9
CHAT = {"total_duration": 9 * NS, "load_duration": 4 * NS, "prompt_eval_duration": 3 * NS, "eval_duration": NS}
LLAMA_CPP = {"prompt_n": 30, "prompt_ms": 4022, "predicted_n": 12, "predicted_ms": 6116.5}
NO_NUMBERS: list[Any] = [None, True, "5", -1, -0.1, float("nan"), float("inf"), 10**400, [], {}]


def seconds(usage: Usage) -> tuple[float | None, float | None, float | None]:
    return usage.load_s, usage.prefill_s, usage.decode_s


def of_ollama(**fields: Any) -> tuple[float | None, float | None, float | None]:
    body = {"done": True, "prompt_eval_count": 40, "eval_count": 2, **fields}
    return seconds(Ollama().usage_of(body))


def test_ollama_reports_nanoseconds_in_whole_answers_and_last_records() -> None:
    assert of_ollama(**CHAT) == (4, 3, 1)
    assert seconds(Ollama().usage([b'{"done":false}', strict_json.write_with_replacements({"done": True, **CHAT})])) == (
        4,
        3,
        1,
    )
    assert of_ollama() == (None, None, None)


def test_an_embedding_takes_what_its_load_did_not() -> None:
    assert of_ollama(total_duration=9 * NS, load_duration=4 * NS) == (4, 5, None)
    assert of_ollama(total_duration=9 * NS) == (None, 9, None)
    assert of_ollama(total_duration=NS, load_duration=4 * NS) == (4, 0, None)


def test_a_prompt_that_was_cached_takes_no_seconds() -> None:
    assert of_ollama(total_duration=9 * NS, eval_duration=NS) == (None, None, 1)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=str)
def test_what_is_no_duration_is_not_read(value: Any) -> None:
    assert duration_s(value, NS) is None
    assert of_ollama(**{**CHAT, "load_duration": value}) == (None, 3, 1)
    timings = {**LLAMA_CPP, "prompt_ms": value}
    assert seconds(OpenAI().usage_of({"usage": {"prompt_tokens": 5}, "timings": timings})) == (None, None, 6.1165)


def test_no_duration_is_longer_than_a_day() -> None:
    assert duration_s(LONGEST_DURATION_S * 1000, 1000) == LONGEST_DURATION_S
    assert duration_s(LONGEST_DURATION_S * 1000 + 1, 1000) is None


@pytest.mark.parametrize("usage", [{"prompt_tokens": 36, "completion_tokens": 12}, None])
def test_llama_cpp_reports_milliseconds_with_or_without_usage(usage: Any) -> None:
    found = OpenAI().usage_of({"usage": usage, "timings": LLAMA_CPP})
    assert seconds(found) == (None, 4.022, 6.1165)


@pytest.mark.parametrize("timings", [None, [], [1], "x", 5, {}, {"cache_n": 3}], ids=str)
def test_timings_that_are_none(timings: Any) -> None:
    assert seconds(OpenAI().usage_of({"usage": {"prompt_tokens": 5}, "timings": timings})) == (None, None, None)


@pytest.mark.parametrize(
    ("dialect", "name", "expected"),
    [
        (Ollama(), "ollama_chat_stream.ndjson", (0.041234567, 0.12, 0.06)),
        (Ollama(), "ollama_generate_stream.ndjson", (0.041234567, 0.12, 0.06)),
        (OpenAI(), "openai_chat_stream_llamacpp.sse", (None, 4.022 / 1000, 6.116 / 1000)),
        (Responses(), "responses_stream_llamacpp.sse", (None, 1.095 / 1000, 2.188 / 1000)),
        (Responses(), "responses_stream_ollama.sse", (None, None, None)),
        (Anthropic(), "messages_stream_llamacpp.sse", (None, None, None)),
    ],
)
def test_recorded_streams(dialect: Dialect, name: str, expected: tuple[float | None, ...]) -> None:
    payloads = dialect.framing.payloads(recording(name))
    assert seconds(dialect.usage(payloads[-4:])) == expected


def test_a_translated_answer_has_the_seconds_of_its_backend() -> None:
    clock = Durations(10 * NS, 0, 2 * NS, 8 * NS)
    reported = metrics(Usage(27, 3, None, None, 1.5, 0.25), clock)
    assert (reported["prompt_eval_duration"], reported["eval_duration"], reported["total_duration"]) == (
        15 * NS // 10,
        NS // 4,
        10 * NS,
    )
    measured = metrics(Usage(27, 3), clock)
    assert (measured["prompt_eval_duration"], measured["eval_duration"]) == (2 * NS, 8 * NS)
