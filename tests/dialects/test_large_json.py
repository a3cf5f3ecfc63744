"""Of an answer that is too large to be parsed the outermost fields are read, with the same values."""

import json
import time
from contextlib import suppress
from typing import Any

import pytest

from gateway.dialects import large_json

FILL = large_json.LARGEST_READ_WHOLE
LONG: list[Any] = ["x" * FILL, [[]] * FILL, [{"usage": {"prompt_tokens": 9}, "error": "x"}] * (FILL // 20), {"a": [1.5] * FILL}]


@pytest.mark.parametrize("value", LONG, ids=["text", "lists", "objects", "object"])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["tight", "loose"])
def test_the_outermost_fields_equal_those_of_the_parsed_answer(value: Any, separators: tuple[str, str]) -> None:
    small = {"done": True, "usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1}}}
    other = {"model": 'a"b\\', "id": None, "created": 5}
    for fields in ({**other, "data": value, **small}, {"data": value, **small}, {**small, **other, "data": value}):
        found = large_json.read(json.dumps(fields, separators=separators).encode())
        assert found == {**fields, "data": True}


def test_small_answers_are_parsed_completely() -> None:
    assert large_json.read(b'{"a":[1,{"b":[]}]}') == {"a": [1, {"b": []}]}
    for text in (b"", b"{", b"[" * 2000, b"nonsense", b'{"a":1}{}'):
        with pytest.raises(ValueError, match=r".*"):
            large_json.read(text)


@pytest.mark.parametrize("name", ['"usage":', '{"usage":{"prompt_tokens":7}}', '\\"usage\\":{\\"x\\":1}}', ',"error":"x"}'])
def test_text_inside_strings_is_not_a_field(name: str) -> None:
    data = json.dumps({"content": name * (FILL // 5), "done": True}).encode()
    assert large_json.read(data) == {"content": True, "done": True}


def test_several_answers_in_a_list() -> None:
    assert large_json.read(json.dumps([{"index": 0, "choices": ["x" * FILL]}, {}]).encode()) == [{"index": 0, "choices": True}]


@pytest.mark.parametrize("data", [b"{" + b"x" * FILL, b'"' + b"x" * FILL + b'"', b"[" * FILL, b"<html>" + b"}" * FILL])
def test_text_that_does_not_resemble_an_answer_is_rejected(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        large_json.read(data)


@pytest.mark.parametrize("piece", [b"[],", b'"a":1,', b'"a":{"a":', b"\\", b'"', b"{}", b'"usage":[],', b" ", b'{"', b'\\"'])
def test_large_answers_are_read_quickly(piece: bytes) -> None:
    """To parse fifteen megabytes of small lists takes seconds."""
    data = b'{"a":' + piece * (15 * 2**20 // len(piece)) + b"}"
    began = time.process_time()
    with suppress(ValueError):
        large_json.read(data)
    assert time.process_time() - began < 0.5
