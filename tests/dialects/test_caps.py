"""A backend is sent what was parsed, and no spelling of a limit lets an answer exceed the cap."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Call, Dialect, Kind, read_call
from gateway.dialects.ollama import Ollama
from gateway.dialects.openai import OpenAI

CAP = 100
ABSURD = [None, 0, -1, -2, -100, 101, 10**9, 2**62, 1e30, -1e30, 0.5]


def call_of(dialect: Dialect, path: str, body: dict[str, object]) -> Call:
    operation = next(operation for operation in dialect.operations if operation.path == path)
    fields = {"messages": [], "prompt": "hi", **body}
    return read_call(dialect, operation, json.dumps({"model": "a", **fields}).encode())


def sent(dialect: Dialect, path: str, body: dict[str, object], kind: Kind) -> dict[str, object]:
    return dict(json.loads(call_of(dialect, path, body).body_for(kind, "a:latest", CAP)))


@pytest.mark.parametrize("wish", ABSURD)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_ollama_limits_outside_the_cap_become_the_cap(path: str, wish: object) -> None:
    assert sent(Ollama(), path, {"options": {"num_predict": wish}}, "ollama")["options"] == {"num_predict": CAP}


def test_ollama_options_are_kept_or_created() -> None:
    assert sent(Ollama(), "/api/chat", {}, "ollama")["options"] == {"num_predict": CAP}
    assert sent(Ollama(), "/api/chat", {"options": None}, "ollama")["options"] == {"num_predict": CAP}
    given_options = {"num_predict": 7, "temperature": 0.5}
    assert sent(Ollama(), "/api/chat", {"options": given_options}, "ollama")["options"] == given_options


@pytest.mark.parametrize("wish", ABSURD)
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_spelling_of_the_limit_is_capped_for_every_kind(path: str, field: str, wish: object) -> None:
    for_ollama = sent(OpenAI(), path, {field: wish}, "ollama")
    assert for_ollama["max_tokens"] == CAP
    assert not {"max_completion_tokens", "max_new_tokens", "n_predict"} & set(for_ollama)
    for_others = sent(OpenAI(), path, {field: wish}, "openai")
    assert for_others["max_tokens"] == for_others["max_completion_tokens"] == CAP
    assert not {"max_new_tokens", "n_predict"} & set(for_others)


def test_the_smallest_limit_counts() -> None:
    body: dict[str, object] = {"max_tokens": 50, "max_completion_tokens": 20, "n_predict": -1}
    assert sent(OpenAI(), "/v1/chat/completions", body, "openai")["max_tokens"] == 20


def test_choices_and_prompts_share_the_cap() -> None:
    assert sent(OpenAI(), "/v1/chat/completions", {"n": 4}, "openai")["max_tokens"] == 25
    assert sent(OpenAI(), "/v1/chat/completions", {"n_cmpl": 4, "max_tokens": 90}, "openai")["max_tokens"] == 25
    assert sent(OpenAI(), "/v1/completions", {"prompt": ["a", "b"], "best_of": 2}, "openai")["max_tokens"] == 25
    assert sent(OpenAI(), "/v1/completions", {"prompt": [1, 2, 3]}, "openai")["max_tokens"] == CAP
    assert sent(OpenAI(), "/v1/completions", {"prompt": [[1], [2]]}, "openai")["max_tokens"] == 50
    with pytest.raises(BadRequest, match="answers in one request are too many"):
        sent(OpenAI(), "/v1/completions", {"prompt": ["a"] * 26, "n": 4}, "openai")
    assert sent(OpenAI(), "/v1/chat/completions", {"min_tokens": 500}, "openai")["min_tokens"] == CAP


SCALAR = st.none() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.dictionaries(st.sampled_from(["max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict"]), SCALAR),
    st.integers(1, CAP),
)
def test_no_combination_exceeds_the_cap(wishes: dict[str, object], choices: int) -> None:
    for kind in ("ollama", "openai"):
        body = sent(OpenAI(), "/v1/chat/completions", {**wishes, "n": choices}, kind)
        most = body["max_tokens"]
        assert isinstance(most, int) and most >= 1 and most * choices <= max(CAP, choices)


@pytest.mark.parametrize("wish", ABSURD)
def test_only_a_reduced_limit_is_reported_in_a_header(wish: object) -> None:
    native = call_of(Ollama(), "/api/chat", {"options": {"num_predict": wish}})
    openai = call_of(OpenAI(), "/v1/chat/completions", {"max_completion_tokens": wish, "n": 4})
    beside = call_of(OpenAI(), "/v1/chat/completions", {"max_completion_tokens": wish, "max_tokens": CAP})
    for call in (native, openai, beside):
        call.body_for("ollama", "a:latest", CAP)
    is_cut = wish is not None
    assert (native.capped, openai.capped, beside.capped) == (CAP * is_cut, CAP // 4 * is_cut, 0)


def test_without_a_limit_the_default_leaves_space_for_the_prompt() -> None:
    for context, wish, most in [(0, None, CAP), (40, None, 10), (40, 30, 30), (3, None, CAP), (10**6, None, CAP)]:
        call = call_of(OpenAI(), "/v1/chat/completions", {"max_tokens": wish})
        call.context = context
        assert json.loads(call.body_for("openai", "a", CAP))["max_tokens"] == most
        assert call.capped == 0


def test_model_names_are_sent_in_their_plain_spelling() -> None:
    for asked, kept in [("a", "a"), ("a:latest", "a:latest"), ("A", "A"), ("library/a", "a:latest"), ("a:local", "a:latest")]:
        operation = Ollama().operations[0]
        body = json.dumps({"model": asked, "messages": []}).encode()
        assert json.loads(read_call(Ollama(), operation, body).body_for("ollama", "a:latest", CAP))["model"] == kept
    openai = call_of(OpenAI(), "/v1/chat/completions", {})
    assert json.loads(openai.body_for("openai", "A", CAP))["model"] == "A"
