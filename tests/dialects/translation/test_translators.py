"""A call in one client's API as the call of another: what the backend is asked, what is named as lost, what comes back."""

import json
from typing import Any

import pytest

from gateway.core import strict_json
from gateway.dialects.anthropic import Anthropic
from gateway.dialects.dialect import Dialect, Kind, read_call
from gateway.dialects.ollama import Ollama
from gateway.dialects.responses import Responses
from gateway.dialects.translation import translators
from gateway.dialects.translation.translation import Translation

JSON = dict[str, Any]
HELLO = {"role": "user", "content": "Hello"}
BEGUN = [HELLO, {"role": "assistant", "content": "One, two"}]
DIALECTS: dict[str, Dialect] = {"/v1/messages": Anthropic(), "/v1/responses": Responses(), "/api/chat": Ollama()}


def translated(path: str, kind: Kind, **body: Any) -> Translation:
    dialect = DIALECTS[path]
    operation = next(operation for operation in dialect.operations if operation.path == path)
    call = read_call(dialect, operation, strict_json.write({"model": "m", **body}))
    translator = translators.find(call, kind)
    assert translator is not None
    return translator.translate(call, kind)


def answered(translation: Translation, text: str, **fields: Any) -> JSON:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    answer: JSON = json.loads(translation.whole({"id": "x", "choices": [choice], **fields}))
    return answer


def test_an_answer_that_is_begun_is_continued_and_not_given_again() -> None:
    translation = translated("/v1/messages", "openai", messages=BEGUN, max_tokens=9, thinking={"type": "adaptive"})
    assert translation.call.body["continue_final_message"] is True
    assert translation.call.body["messages"][-1] == BEGUN[-1]
    assert translation.dropped == []
    for text in ("One, two, three", ", three"):
        (block,) = answered(translation, text, timings={})["content"]
        assert block["text"] == ", three"


def test_ollama_continues_an_answer_too() -> None:
    translation = translated("/api/chat", "openai", messages=BEGUN, stream=False)
    assert translation.call.body["add_generation_prompt"] is False
    assert answered(translation, "One, two, three", timings={})["message"]["content"] == ", three"


@pytest.mark.parametrize(
    ("path", "fields", "dropped"),
    [
        (
            "/v1/messages",
            {
                "messages": [HELLO],
                "max_tokens": 9,
                "top_k": 5,
                "output_config": {"effort": "high"},
                "fallbacks": [{"model": "x"}],
            },
            ["output_config.effort", "top_k"],
        ),
        (
            "/v1/responses",
            {"input": "Hi", "store": True, "reasoning": {"effort": "low"}, "user": "u"},
            ["store", "reasoning.effort", "user"],
        ),
    ],
)
def test_what_ollama_ignores_is_named_with_what_no_server_has(path: str, fields: JSON, dropped: list[str]) -> None:
    translation = translated(path, "ollama", **fields)
    assert [name for name in translation.dropped if name != "fallbacks"] == dropped
    assert "reasoning_effort" not in translation.call.body
    others = translated(path, "openai", **fields)
    assert set(others.dropped) <= {"store", "fallbacks"}
