"""Ollama's /api/embed and /api/embeddings over a backend's /v1/embeddings."""

import base64
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.embeddings import Embedding, Vectors, embeddings_body_of, embeddings_reply_of
from gateway.dialects.translation.native_embed import read_embed, read_embeddings, write_embed, write_embeddings
from gateway.dialects.translation.native_records import Durations
from gateway.dialects.translation.unreadable import Unreadable
from tests.dialects.translation.native import JSON


def answer(*vectors: object, **fields: Any) -> dict[str, Any]:
    data = [{"object": "embedding", "embedding": vector, "index": index} for index, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": "m", "usage": {"prompt_tokens": 8, "total_tokens": 8}, **fields}


@pytest.mark.parametrize("given, texts", [("a", ["a"]), (["a", "b"], ["a", "b"]), ("", []), ([], []), (None, [])])
def test_texts(given: object, texts: list[str]) -> None:
    assert read_embed({"model": "m", "input": given}).texts == texts


def test_a_body_for_the_backend() -> None:
    body = {
        "model": "m",
        "input": ["a", "b"],
        "dimensions": 256,
        "truncate": True,
        "keep_alive": "5m",
        "options": {"num_ctx": 512},
    }
    embedding = read_embed(body)
    assert embedding.dropped == ["keep_alive", "options.num_ctx"]
    assert embeddings_body_of(embedding, "bge") == {
        "model": "bge",
        "input": ["a", "b"],
        "encoding_format": "float",
        "dimensions": 256,
        "truncate_prompt_tokens": -1,
    }


@pytest.mark.parametrize("truncate", [None, False])
def test_texts_are_cut_only_where_the_client_asks_for_it(truncate: bool | None) -> None:
    assert "truncate_prompt_tokens" not in embeddings_body_of(read_embed({"input": "a", "truncate": truncate}), "m")


def test_the_older_request() -> None:
    assert read_embeddings({"model": "m", "prompt": "a", "options": {"temperature": 1}}) == Embedding(["a"])
    assert read_embeddings({"model": "m", "prompt": ""}).texts == []
    with pytest.raises(BadRequest, match="'prompt'"):
        read_embeddings({"prompt": ["a"]})


@pytest.mark.parametrize(
    "body",
    [
        {"input": 5},
        {"input": [[1, 2]]},
        {"input": {}},
        {"dimensions": "5"},
        {"dimensions": -1},
        {"dimensions": 2**40},
        {"truncate": "x"},
    ],
)
def test_what_cannot_be_read_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        read_embed({"input": "a", **body})


def test_vectors_of_numbers_and_of_base64() -> None:
    packed = base64.b64encode(struct.pack("<3f", 0.5, -0.25, 1.0)).decode()
    assert embeddings_reply_of(answer([0.5, -0.25, 1], packed), 2) == Vectors(
        [[0.5, -0.25, 1], [0.5, -0.25, 1.0]], Usage(8, None)
    )


def test_vectors_stand_in_the_order_of_their_texts() -> None:
    data = [{"embedding": [2.0], "index": 1}, {"embedding": [1.0], "index": 0}]
    assert embeddings_reply_of({"data": data}, 2).vectors == [[1.0], [2.0]]
    assert embeddings_reply_of({"data": [{"embedding": [2.0]}, {"embedding": [1.0]}]}, 2).vectors == [[2.0], [1.0]]


@pytest.mark.parametrize(
    "reply",
    [
        None,
        [],
        {},
        answer(),
        answer([1.0], [2.0]),
        answer(["1"]),
        answer([True]),
        answer(None),
        answer("AAA="),
        answer("AAAA"),
        answer("ä"),
        {"data": [5]},
        {"data": True},
    ],
)
def test_what_is_not_one_vector_for_each_text(reply: object) -> None:
    with pytest.raises(Unreadable):
        embeddings_reply_of(reply, 1)


def test_both_answers() -> None:
    vectors = embeddings_reply_of(answer([0.5], [1.0]), 2)
    assert write_embed(vectors, "m", Durations(14, 1, 5, 6)) == {
        "model": "m",
        "embeddings": [[0.5], [1.0]],
        "total_duration": 14,
        "load_duration": 1,
        "prompt_eval_count": 8,
    }
    assert write_embeddings(embeddings_reply_of(answer([0.5]), 1)) == {"embedding": [0.5]}


def test_a_request_that_only_loads_has_an_answer_without_vectors() -> None:
    assert write_embed(Vectors([]), "m") == {"model": "m", "embeddings": []}
    assert write_embeddings(Vectors([])) == {"embedding": []}


def test_a_server_that_counts_nothing_leaves_the_count_out() -> None:
    counted = embeddings_reply_of(answer([0.5], usage={"prompt_tokens": 0, "total_tokens": 0}), 1)
    assert write_embed(counted, "m") == {"model": "m", "embeddings": [[0.5]]}


NAMES = ["input", "prompt", "dimensions", "truncate", "options", "keep_alive"]


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, JSON)), JSON)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_read_or_refused(body: dict[str, Any], reply: Any) -> None:
    for read in (read_embed, read_embeddings):
        try:
            assert isinstance(embeddings_body_of(read(body), "m")["input"], list)
        except BadRequest as refusal:
            assert refusal.message
    for wrapped in (reply, {"data": reply}, {"data": [reply]}, {"data": [{"embedding": reply}], "usage": reply}):
        try:
            embeddings_reply_of(wrapped, 1)
        except Unreadable as bad:
            assert str(bad)
