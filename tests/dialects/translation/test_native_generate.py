"""Ollama's /api/generate read as a chat or as a completion, and answers written as its records."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.completions import Completion, completion_body_of
from gateway.dialects.translation.conversation import (
    Counted,
    Finished,
    Format,
    Image,
    Message,
    Prompt,
    Reply,
    Text,
    TextPiece,
    Thinking,
    ThinkingPiece,
)
from gateway.dialects.translation.native_generate import GenerateWriter, is_load, load_answer, read_generate, write_generate
from gateway.dialects.translation.native_records import Durations
from tests.dialects.translation.native import JSON, NOW, PNG, records


def prompt_of(**fields: Any) -> Prompt:
    found = read_generate({"model": "m", **fields})
    assert isinstance(found, Prompt)
    return found


def completion_of(**fields: Any) -> Completion:
    found = read_generate({"model": "m", **fields})
    assert isinstance(found, Completion)
    return found


def refused(**fields: Any) -> str:
    with pytest.raises(BadRequest) as found:
        read_generate({"model": "m", **fields})
    return found.value.message


def test_a_prompt_is_a_chat_with_its_system_prompt_and_images() -> None:
    prompt = prompt_of(prompt="What is this?", system="Be brief.", images=[PNG], format="json", think="high", stream=False)
    assert prompt.messages == [
        Message("system", (Text("Be brief."),)),
        Message("user", (Image("image/png", PNG), Text("What is this?"))),
    ]
    assert (prompt.format, prompt.effort, prompt.stream) == (Format(), "high", False)


def test_the_empty_fields_of_ollamas_command_line_mean_nothing() -> None:
    fields = {
        "suffix": "",
        "system": "",
        "template": "",
        "context": None,
        "options": None,
        "images": None,
        "format": "",
        "raw": False,
    }
    prompt = prompt_of(prompt="Hi", **fields)
    assert prompt.messages == [Message("user", (Text("Hi"),))]
    assert prompt.dropped == []
    assert prompt.stream is True


def test_a_raw_prompt_is_a_completion_of_the_same_text() -> None:
    completion = completion_of(
        prompt="<|im_start|>user\nHi<|im_end|>\n",
        raw=True,
        suffix="x",
        think=True,
        keep_alive="5m",
        options={"num_predict": 9, "stop": ["<|im_end|>"], "temperature": 0, "repeat_penalty": 1.1, "num_ctx": 1},
    )
    assert completion.dropped == ["keep_alive", "think", "suffix", "options.num_ctx"]
    assert strict_json.write(completion_body_of(completion, "qwen")).decode() == (
        '{"model":"qwen","prompt":"<|im_start|>user\\nHi<|im_end|>\\n","max_tokens":9,"stop":["<|im_end|>"],"temperature":0,'
        '"repeat_penalty":1.1,"repetition_penalty":1.1,"stream":true,"stream_options":{"include_usage":true}}'
    )


def test_a_prompt_with_a_suffix_is_a_gap_to_fill() -> None:
    completion = completion_of(prompt="def f(", suffix="return x", system="You write code.", stream=False)
    assert completion.dropped == ["system"]
    assert completion_body_of(completion, "coder") == {"model": "coder", "prompt": "def f(", "suffix": "return x"}


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"template": "{{ .Prompt }}"}, "'template'"),
        ({"context": [1, 2, 3]}, "'context'"),
        ({"raw": True, "system": "x"}, "'raw'"),
        ({"raw": True, "context": [1]}, "'raw'"),
        ({"raw": True, "images": [PNG]}, "'images'"),
        ({"raw": True, "format": "json"}, "'format'"),
        ({"suffix": "x", "format": {"type": "object"}}, "'format'"),
        ({"suffix": "x", "images": [PNG]}, "'images'"),
        ({"logprobs": True}, "'logprobs'"),
        ({"raw": "yes"}, "'raw'"),
        ({"system": 5}, "'system'"),
        ({"context": "x"}, "'context'"),
        ({"images": ["x"]}, "'images'"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(fields: dict[str, Any], name: str) -> None:
    assert name in refused(prompt="Hi", **fields)


def test_the_context_of_the_gateways_own_answers_may_come_back() -> None:
    assert prompt_of(prompt="Hi", context=[]).dropped == []


@pytest.mark.parametrize("keep_alive, reason", [(None, "load"), ("0s", "unload"), (0, "unload")])
def test_an_empty_prompt_loads_or_unloads(keep_alive: object, reason: str) -> None:
    body = {"model": "m", "prompt": "", "keep_alive": keep_alive}
    assert is_load(body)
    assert load_answer(body, "m", NOW) == {"model": "m", "created_at": NOW, "response": "", "done": True, "done_reason": reason}


def test_a_whole_answer() -> None:
    reply = Reply([Thinking("Hm."), Text("Hi"), Text("!")], "stop", Usage(27, 3))
    assert json.dumps(write_generate(reply, "m", NOW, Durations(9, 1, 2, 6)), separators=(",", ":")) == (
        '{"model":"m","created_at":"2026-08-21T18:00:00.101234567Z","response":"Hi!","thinking":"Hm.","done":true,"done_reason":"stop",'
        '"context":[],"total_duration":9,"load_duration":1,"prompt_eval_count":27,"prompt_eval_duration":2,"eval_count":3,"eval_duration":6}'
    )
    assert "context" not in write_generate(reply, "m", NOW, raw=True)


def test_a_stream() -> None:
    writer = GenerateWriter("m")
    data = b"".join(
        writer.write(event, NOW) for event in (ThinkingPiece("Hm"), TextPiece("Hi"), Finished("length"), Counted(Usage(4, 2)))
    )
    assert records(data + writer.end(NOW)) == [
        {"model": "m", "created_at": NOW, "response": "", "thinking": "Hm", "done": False},
        {"model": "m", "created_at": NOW, "response": "Hi", "done": False},
        {
            "model": "m",
            "created_at": NOW,
            "response": "",
            "done": True,
            "done_reason": "length",
            "context": [],
            "prompt_eval_count": 4,
            "eval_count": 2,
        },
    ]
    raw = GenerateWriter("m", raw=True)
    raw.write(Finished("stop"), NOW)
    assert "context" not in records(raw.end(NOW))[0]


NAMES = "prompt system suffix template context raw images format think stream options keep_alive logprobs truncate".split()
BODIES = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(NAMES, JSON),
        "prompt": st.text(max_size=5) | JSON,
        "suffix": st.text(max_size=5) | JSON,
        "raw": st.booleans() | JSON,
    },
)


@given(BODIES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_read_or_refused(body: dict[str, Any]) -> None:
    load_answer(body, "m", NOW)
    try:
        found = read_generate(body)
    except BadRequest as refusal:
        assert refusal.message
        return
    if isinstance(found, Completion):
        assert completion_body_of(found, "m")["prompt"] == (body.get("prompt") or "")
