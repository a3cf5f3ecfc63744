"""Answers and streams of a backend's /v1/completions, as the servers send them."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from gateway.core.strict_json import read_loosely
from gateway.dialects.dialect import Usage
from gateway.dialects.openai import ServerSentEvents
from gateway.dialects.translation.completions import CompletionReader, completion_reply_of
from gateway.dialects.translation.conversation import Counted, Event, Finished, Reply, Text, TextPiece
from gateway.dialects.translation.unreadable import Unreadable
from tests.dialects.translation.native import JSON

OLLAMA = b"""\
data: {"id":"cmpl-1","object":"text_completion","created":1,"choices":[{"text":"Hi","index":0,"finish_reason":null}],\
"model":"m","usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}

data: {"id":"cmpl-1","object":"text_completion","created":1,"choices":[{"text":"!","index":0,"finish_reason":"stop"}],\
"model":"m","usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}}

data: {"id":"cmpl-1","object":"text_completion","created":1,"choices":[],"model":"m",\
"usage":{"prompt_tokens":27,"completion_tokens":3,"total_tokens":30}}

data: [DONE]

"""
LLAMA_CPP = b"""\
data: {"choices":[{"text":"Hi","index":0,"logprobs":null,"finish_reason":null}],"created":1,\
"model":"m","object":"text_completion","id":"x"}

: ping

data: {"choices":[{"text":"!","index":0,"logprobs":null,"finish_reason":null}],"created":1,\
"model":"m","object":"text_completion","id":"x"}

data: {"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"length"}],"created":1,\
"model":"m","object":"text_completion","usage":{"completion_tokens":3,"prompt_tokens":27,"total_tokens":30},"id":"x","timings":{"cache_n":20,"prompt_n":7,"predicted_n":3}}

data: [DONE]

"""
VLLM = b"""\
data: {"id":"cmpl-a","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"Hi","logprobs":null,\
"finish_reason":null,"stop_reason":null}],"usage":null}

data: {"id":"cmpl-a","object":"text_completion","created":1,"model":"m","choices":[{"index":0,"text":"!","logprobs":null,\
"finish_reason":"stop","stop_reason":null}],"usage":null}

data: {"id":"cmpl-a","object":"text_completion","created":1,"model":"m","choices":[],\
"usage":{"prompt_tokens":27,"total_tokens":30,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":16}}}

data: [DONE]

"""


def events(stream: bytes) -> list[Event]:
    reader = CompletionReader()
    payloads = ServerSentEvents().payloads(stream)
    assert payloads.pop() == b"[DONE]"
    return [event for payload in payloads for event in reader.read(read_loosely(payload))] + reader.end()


def test_streams_of_three_servers() -> None:
    pieces: list[Event] = [TextPiece("Hi"), TextPiece("!")]
    assert events(OLLAMA) == [*pieces, Finished("stop"), Counted(Usage(27, 3))]
    assert events(LLAMA_CPP) == [*pieces, Finished("length"), Counted(Usage(27, 3, 20))]
    assert events(VLLM) == [*pieces, Finished("stop"), Counted(Usage(27, 3, 16))]


def test_each_frame_is_read_at_once_and_nothing_but_counts_after_the_end() -> None:
    reader = CompletionReader()
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    assert reader.read({"choices": [{"text": "a"}], "usage": usage}) == [TextPiece("a"), Counted(Usage(1, 1))]
    assert reader.read({"choices": [{"text": "b", "finish_reason": "eos_token"}]}) == [TextPiece("b"), Finished("stop")]
    assert reader.read({"choices": [{"text": "c", "finish_reason": "stop"}]}) == []
    assert reader.end() == []


def test_a_server_may_omit_the_reason_of_the_end() -> None:
    reader = CompletionReader()
    assert reader.read({"choices": [{"text": "a"}]}) == [TextPiece("a")]
    assert reader.end() == [Finished("stop")]


@pytest.mark.parametrize(
    "chunk, message",
    [
        ({"error": {"message": "out of memory", "code": 500}}, "out of memory"),
        ({"error": "x"}, "x"),
        ({"object": "error", "message": "too long"}, "too long"),
        ({"choices": [{"text": "a", "finish_reason": "abort"}]}, "'abort'"),
        ([], "object"),
        (5, "object"),
        (None, "object"),
    ],
)
def test_errors_and_what_is_no_answer(chunk: object, message: str) -> None:
    with pytest.raises(Unreadable, match=message):
        CompletionReader().read(chunk)


def test_a_whole_answer() -> None:
    answer: dict[str, Any] = {
        "id": "cmpl-a",
        "object": "text_completion",
        "created": 1787335200,
        "model": "m",
        "choices": [{"index": 0, "text": "Hi!", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 27, "completion_tokens": 3, "total_tokens": 30},
    }
    assert completion_reply_of(answer) == Reply([Text("Hi!")], "length", Usage(27, 3), "cmpl-a", 1787335200)
    assert completion_reply_of({"choices": [{"text": "", "finish_reason": None}]}) == Reply([], "stop")


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"choices": []}, {"choices": True}, {"choices": [5]}, {"choices": [{"text": None}]}]
)
def test_a_whole_answer_without_a_text(answer: object) -> None:
    with pytest.raises(Unreadable):
        completion_reply_of(answer)


@given(JSON)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_read_or_refused(value: Any) -> None:
    for wrapped in (
        value,
        {"choices": value},
        {"choices": [value]},
        {"choices": [{"text": value, "finish_reason": value}], "usage": value},
    ):
        try:
            CompletionReader().read(wrapped)
            completion_reply_of(wrapped)
        except Unreadable as bad:
            assert str(bad)
