"""The name that was asked for in answers to calls for an alias: one value is replaced, every other byte stays."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.dialects.answered_model import asked_name, frames_renamed, renamed
from gateway.dialects.large_json import LARGEST_READ_WHOLE

NAME = asked_name("asked")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(['"model":"x"', "model", '\\"model\\":', "{", "}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "message", "b"]), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["model", "message", "response", "choices", "content", '"model"', "models"])


def expected(value: dict[str, Any]) -> dict[str, Any]:
    """The first name among those of the object and of its containers."""
    for key, inner in value.items():
        if key == "model" and isinstance(inner, str):
            return {**value, "model": "asked"}
        if key in ("message", "response") and isinstance(inner, dict) and isinstance(inner.get("model"), str):
            return {**value, key: {**inner, "model": "asked"}}
    return value


@given(value=st.dictionaries(FIELDS, VALUES, max_size=6), indent=st.sampled_from([None, 2]), is_ascii=st.booleans())
@example(value={"message": {"model": {"model": "x"}}, "model": "y"}, indent=None, is_ascii=True)
@example(value={"content": "model", "model": 'a"\\'}, indent=None, is_ascii=True)
def test_one_value_is_replaced_and_all_others_stay(value: dict[str, Any], indent: int | None, is_ascii: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii).encode()
    assert json.loads(renamed(text, NAME)) == expected(value)
    line = json.dumps(value, ensure_ascii=is_ascii).encode()
    for begin, end in ((b"", b"\n"), (b"data: ", b"\n\n"), (b"event: message_start\r\ndata:", b"\r\n\r\n")):
        shown = frames_renamed(begin + line + end, NAME)
        assert shown.startswith(begin) and shown.endswith(end)
        assert json.loads(shown[len(begin) : len(shown) - len(end)]) == expected(value)


FRAMES = {
    "Ollama": b'{"model":"served:1b","created_at":"t","message":{"content":"\\"model\\":\\"x\\""},"done":false}\n',
    "vLLM": b'data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"served:1b","choices":[]}\n\n',
    "llama.cpp": b'data: {"choices":[{"delta":{"content":"model"}}],"created":1,"id":"1","model":"served:1b","object":"x"}\n\n',
    "Anthropic": b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","model":"served:1b"}}\n\n',
    "Responses": b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","model":"served:1b"}}\n\n',
}


@pytest.mark.parametrize("server", FRAMES)
def test_frames_of_each_server(server: str) -> None:
    frame = FRAMES[server]
    assert frames_renamed(frame, NAME) == frame.replace(b'"served:1b"', NAME.text)
    assert frames_renamed(frame * 3, NAME) == frame.replace(b'"served:1b"', NAME.text) * 3


@pytest.mark.parametrize(
    "frame",
    [
        b"data: [DONE]\n\n",
        b": ping\n\n",
        b'data: {"type":"content_block_start","content_block":{"type":"tool_use","input":{"model":"x"}}}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{\\"model\\":\\"x\\"}"}}]}}]}\n\n',
        b'data: {"model":null}\n\n',
        b'{"model":5}\n',
        b'{"model":"cut',
        b'"model":"x"\n',
    ],
)
def test_what_is_no_name_of_the_answer_stays(frame: bytes) -> None:
    assert frames_renamed(frame, NAME) == frame


def test_each_object_of_a_list_has_the_name() -> None:
    values = [{"model": "a", "choices": [{"model": "inner"}]}, {"object": "x", "model": "b", "list": ["model"]}, {}, 5, "model"]
    assert (
        json.loads(renamed(json.dumps(values).encode(), NAME))
        == [
            {**values[0], "model": "asked"},  # type: ignore[dict-item]
            {**values[1], "model": "asked"},  # type: ignore[dict-item]
            *values[2:],
        ]
    )


def test_a_large_answer_is_searched_at_both_ends() -> None:
    numbers = [0.5] * LARGEST_READ_WHOLE
    for value in (
        {"model": "served", "data": numbers},
        {"data": numbers, "model": "served", "usage": {"prompt_tokens": 1}},
        {"data": [{"model": "inner"}, *numbers], "object": "list", "model": "served"},
    ):
        for indent in (None, 1):
            text = json.dumps(value, indent=indent).encode() + b"\n"
            shown = renamed(text, NAME)
            assert json.loads(shown) == {**value, "model": "asked"} and shown.endswith(b"\n")
    for unnamed in ({"data": numbers}, {"data": [*numbers, {"model": "inner"}]}):
        text = json.dumps(unnamed).encode()
        assert renamed(text, NAME) == text
    assert renamed(json.dumps([numbers]).encode(), NAME) == json.dumps([numbers]).encode()


def test_a_large_frame_is_searched_at_both_ends_and_in_bounded_time() -> None:
    text = "word " * LARGEST_READ_WHOLE
    for fields in ({"choices": [text], "model": "served"}, {"id": [], "model": "served", "choices": [text]}):
        for begin, end in ((b"", b"\n"), (b"data: ", b"\n\n")):
            shown = frames_renamed(begin + json.dumps(fields).encode() + end, NAME)
            assert shown.startswith(begin) and shown.endswith(end)
            assert json.loads(shown[len(begin) :]) == {**fields, "model": "asked"}
    hostile = b'{"a":' + b"[" * 4 * 2**20 + b'"model":"x"}\n'
    began = time.process_time()
    assert frames_renamed(hostile, NAME).startswith(b'{"a":[[')
    assert time.process_time() - began < 0.2


def test_names_are_written_as_json() -> None:
    assert frames_renamed(b'{"model":"a"}\n', asked_name('q"\\ü')) == '{"model":"q\\"\\\\ü"}\n'.encode()
