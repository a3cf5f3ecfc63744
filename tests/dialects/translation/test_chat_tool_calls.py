"""Deltas of tool calls belong to the right call, however a server numbers them, or are refused."""

from typing import Any

import pytest

from gateway.dialects.translation.chat_tool_calls import MOST_CALLS, ToolCalls
from gateway.dialects.translation.unreadable import Unreadable

Piece = tuple[int | None, str | None, str | None, Any]


def delta(piece: Piece) -> dict[str, Any]:
    """A delta with an index, id, name and arguments; a field that is None is absent."""
    index, call_id, name, arguments = piece
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    fields = {key: value for key, value in (("index", index), ("id", call_id)) if value is not None}
    return {**fields, "type": "function", "function": function}


def read(*chunks: list[Piece]) -> list[tuple[str, str, str]]:
    """Id, name and arguments of each call. An id of our own is shown as "?"."""
    reader = ToolCalls()
    found: list[list[str]] = []
    for chunk in chunks:
        for piece in reader.read([delta(one) for one in chunk]):
            if piece.id:
                assert piece.index == len(found) and piece.name
                found.append([piece.id, piece.name, piece.arguments])
            else:
                found[piece.index][2] += piece.arguments
    reader.end()
    assert reader.count == len(found)
    assert len({call_id for call_id, _, _ in found}) == len(found), "ids are unique"
    return [("?" if call_id.startswith("call_") else call_id, name, arguments) for call_id, name, arguments in found]


A, B = '{"city":"Zürich"}', '{"city":"Bern"}'


@pytest.mark.parametrize(
    ("chunks", "wanted"),
    [
        pytest.param(
            [
                [(0, "a", "f", "")],
                [(0, None, None, A[:5])],
                [(0, None, None, A[5:])],
                [(1, "b", "g", "")],
                [(1, None, None, B)],
            ],
            [("a", "f", A), ("b", "g", B)],
            id="OpenAI, vLLM, llama.cpp",
        ),
        pytest.param(
            [[(0, "a", "f", A[:5]), (1, "b", "g", B[:5])], [(1, None, None, B[5:]), (0, None, None, A[5:])]],
            [("a", "f", A), ("b", "g", B)],
            id="interleaved by index",
        ),
        pytest.param([[(0, "a", "f", A)], [(0, "b", "f", B)]], [("a", "f", A), ("b", "f", B)], id="Ollama: index 0 for all"),
        pytest.param([[(0, "a", "f", A), (0, "b", "f", A)]], [("a", "f", A), ("b", "f", A)], id="Ollama: in one chunk"),
        pytest.param([[(0, None, "f", A)], [(0, None, "f", B)]], [("?", "f", A), ("?", "f", B)], id="index 0 for all, no ids"),
        pytest.param(
            [[(0, "0", "f", "")], [(0, "0", None, A)], [(1, "1", "g", "")], [(1, "1", None, B)]],
            [("0", "f", A), ("1", "g", B)],
            id="SGLang: the id in each delta",
        ),
        pytest.param(
            [[(0, "r1", "f", "")], [(0, "r2", None, A[:5])], [(0, "r3", None, A[5:])]],
            [("r1", "f", A)],
            id="vLLM of 2024: another id in each delta",
        ),
        pytest.param(
            [[(0, "a", "f", A[:5])], [(0, "a", "f", A[5:9])], [(0, "", "f", A[9:])], [(0, None, "f", "")]],
            [("a", "f", A)],
            id="llama.cpp of May 2025: the name in each delta",
        ),
        pytest.param(
            [[(None, "a", "f", "")], [(None, None, None, A)], [(None, "b", "g", B[:5])], [(None, None, None, B[5:])]],
            [("a", "f", A), ("b", "g", B)],
            id="no index: more belongs to the last call",
        ),
        pytest.param(
            [[(None, "a", "f", ""), (None, "b", "g", "")], [(None, "a", None, A)], [(None, "b", None, B)]],
            [("a", "f", A), ("b", "g", B)],
            id="no index: found by id",
        ),
        pytest.param([[(None, None, "f", A), (None, None, "f", B)]], [("?", "f", A), ("?", "f", B)], id="neither index nor id"),
        pytest.param(
            [[(None, None, "f", ""), (None, None, "g", "")]], [("?", "f", ""), ("?", "g", "")], id="without arguments"
        ),
        pytest.param([[(None, "a", "f", "")], [(0, None, None, A)]], [("a", "f", A)], id="the index comes later"),
        pytest.param([[(3, "a", "f", A)], [(7, "b", "g", B)]], [("a", "f", A), ("b", "g", B)], id="gaps between indexes"),
        pytest.param([[(0, "a", "f", A)], [(1, "a", "g", B)]], [("a", "f", A), ("?", "g", B)], id="one id for two calls"),
        pytest.param([[(None, "a", "f", A)], [(None, "a", "g", B)]], [("a", "f", A), ("?", "g", B)], id="one id, no index"),
        pytest.param([[(0, "", "f", "")], [(0, "", "", A)]], [("?", "f", A)], id="empty for none"),
        pytest.param(
            [[(0, "a", None, "")], [(0, None, None, A[:5])], [(0, None, "f", A[5:])]], [("a", "f", A)], id="the name last"
        ),
        pytest.param([[(0, "a", "f", {"b": 1})]], [("a", "f", '{"b":1}')], id="an object"),
        pytest.param([[]], [], id="none"),
    ],
)
def test_calls_of_servers(chunks: list[list[Piece]], wanted: list[tuple[str, str, str]]) -> None:
    assert read(*chunks) == wanted


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([[(None, None, None, A)]], id="more of no call"),
        pytest.param(
            [[(None, "a", "f", ""), (None, "b", "g", "")], [(None, None, None, A), (None, None, None, B)]], id="of which?"
        ),
        pytest.param([[(0, "a", "f", "")], [(1, None, None, A)]], id="never named"),
        pytest.param([[(0, None, "get_", "")], [(0, None, "weather", "")]], id="a name in pieces"),
        pytest.param([[(0, "a", "f", A[:5])], [(0, "a", "g", A[5:])]], id="another name"),
        pytest.param([[(0, "a", "f", A[:5])], [(0, "b", "f", B)]], id="another call before the end"),
        pytest.param([[(None, None, "f", A[:5])], [(None, None, "g", B)]], id="another name before the end"),
        pytest.param([[(index, None, "f", "") for index in range(MOST_CALLS + 1)]], id="too many"),
    ],
)
def test_doubtful_deltas_are_refused(chunks: list[list[Piece]]) -> None:
    with pytest.raises(Unreadable):
        read(*chunks)


def test_an_id_of_our_own_is_the_same_for_all_pieces_and_new_for_each_answer() -> None:
    ids = set()
    for _ in range(2):
        reader = ToolCalls()
        (piece,) = reader.read([delta((0, None, "f", ""))])
        ids.add(piece.id)
        assert [more.id for more in reader.read([delta((0, None, None, A))])] == [""]
    assert len(ids) == 2
