"""No stream of tool calls, however it is cut or mixed, takes time that grows with the square of its length."""

import json
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest

from gateway.dialects import registry
from gateway.dialects.answers import BadFrame
from gateway.dialects.dialect import read_call
from gateway.dialects.translation import translators
from gateway.dialects.translation.tool_arguments import ArgumentPieces
from gateway.dialects.translation.translation import Translation

JSON = dict[str, Any]
PIECES, CALLS, ROUNDS = 30_000, 990, 40
LONGEST_S = 3.0
HELLO = [{"role": "user", "content": "Hi"}]
# The tool has free text in the Responses API, so that its text is taken out of JSON.
ASKED: dict[str, JSON] = {
    "/v1/messages": {"max_tokens": 9, "messages": HELLO},
    "/v1/responses": {"input": "Hi", "tools": [{"type": "custom", "name": "f"}]},
    "/api/chat": {"messages": HELLO},
}


def translation(path: str) -> Translation:
    dialect, operation = next(
        (dialect, operation)
        for dialect in registry.dialects().values()
        for operation in dialect.operations
        if operation.path == path
    )
    call = read_call(dialect, operation, json.dumps({"model": "m", "stream": True, **ASKED[path]}).encode())
    translator = translators.find(call, "openai")
    assert translator is not None
    return translator.translate(call, "openai")


def piece(arguments: str, index: int = 0, **more: str) -> JSON:
    return {"index": index, "function": {"arguments": arguments, **more}}


def first(arguments: str, index: int = 0) -> JSON:
    return {**piece(arguments, index, name="f"), "id": f"call{index}"}


def repeated(arguments: str) -> list[JSON]:
    return [first(arguments)] * PIECES


def by_turns() -> Iterator[JSON]:
    yield from (first("{", index) for index in range(CALLS))
    for _ in range(ROUNDS):
        yield from (piece(" ", index) for index in range(CALLS))
    yield from (piece("}", index) for index in range(CALLS))


STREAMS = {
    "a name in each piece": repeated("{"),
    "a name in each piece of a call that cannot be read": [first('{"a":1}}'), *repeated("{}")],
    "blanks before the arguments": [first(" "), *[piece(" ")] * PIECES],
    "no object": [first("x"), *[piece("x")] * PIECES],
    "half a surrogate pair": [first('{"input":"\\ud83d'), *[piece("x" * 50)] * PIECES],
    "calls by turns": list(by_turns()),
}


@lru_cache(maxsize=1)
def chunks_of(name: str) -> list[bytes]:
    return [json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [delta]}}]}).encode() for delta in STREAMS[name]]


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("name", STREAMS)
def test_time_is_linear(path: str, name: str) -> None:
    translated, chunks = translation(path), chunks_of(name)
    began = time.process_time()
    for chunk in chunks:
        try:
            translated.frames(chunk)
        except BadFrame:
            break
    assert time.process_time() - began < LONGEST_S


@pytest.mark.parametrize("path", ASKED)
def test_texts_between_the_pieces_of_a_long_call(path: str) -> None:
    translated = translation(path)
    deltas: list[JSON] = [{"tool_calls": [first('{"input":"' + "x" * 4_000_000)]}]
    deltas += [{"content": "x"}, {"tool_calls": [piece("x")]}] * 2000
    began = time.process_time()
    for delta in deltas:
        translated.frames(json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode())
    assert time.process_time() - began < LONGEST_S


def test_a_chunk_has_no_more_pieces_than_an_answer_has_calls() -> None:
    chunk = {"choices": [{"index": 0, "delta": {"tool_calls": repeated("{")}}]}
    with pytest.raises(BadFrame) as refused:
        translation("/v1/messages").frames(json.dumps(chunk).encode())
    assert refused.value.error == {"error": "a chunk has more than 1000 pieces of tool calls"}


@pytest.mark.parametrize("text", ["{" + '""' * 2**21, "{" * 2**22, '{"' + '\\"' * 2**21, '{"' + "\\\\" * 2**21])
def test_a_piece_of_megabytes(text: str) -> None:
    pieces = ArgumentPieces()
    began = time.process_time()
    pieces.add(text)
    assert time.process_time() - began < LONGEST_S / 10
    assert not pieces.is_complete
