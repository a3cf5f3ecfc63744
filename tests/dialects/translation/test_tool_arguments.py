"""Arguments of tool calls in pieces: when the object is complete, and what a client may be sent."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.translation.tool_arguments import ArgumentPieces, object_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text() | st.sampled_from(['"', "\\", '\\"}', "{", "]["]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(), VALUES, max_size=4),
    st.booleans(),
    st.sampled_from([1, 2, 3, 7]),
    st.sampled_from(["", " ", "\n\t"]),
)
def test_an_object_is_complete_with_its_last_bracket(value: dict[str, Any], is_ascii: bool, size: int, blanks: str) -> None:
    text = blanks + json.dumps(value, ensure_ascii=is_ascii)
    pieces, sent = ArgumentPieces(), ""
    for begin in range(0, len(text) - 1, size):
        sent += pieces.add(text[begin : min(begin + size, len(text) - 1)])
        assert not pieces.is_complete
    sent += pieces.add(text[-1])
    assert pieces.is_complete
    assert sent == pieces.text == text
    assert object_of(pieces.text) == value


@pytest.mark.parametrize("text", ["", " ", "null", " null\n"])
def test_no_arguments(text: str) -> None:
    pieces = ArgumentPieces()
    assert [pieces.add(letter) for letter in text] == [""] * len(text)
    assert not pieces.has_begun
    assert not pieces.is_complete
    assert object_of(text) == {}


@pytest.mark.parametrize(
    "text",
    [
        '{"a":',
        '{"a": tru}',
        "[1]",
        '"{}"',
        "5",
        "{}{}",
        "{} x",
        "{'a': 1}",
        '{"a": NaN}',
        "nul",
        '{"a":' * 600 + "1" + "}" * 600,
    ],
)
def test_anything_else_is_no_object(text: str) -> None:
    assert object_of(text) is None
