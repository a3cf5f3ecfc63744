"""Any valid request of each client API becomes a body that a strict server takes, with all that the model is to read."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.dialects.dialect import Kind
from gateway.dialects.openai import OpenAI
from gateway.dialects.translation import messages_request, native_chat, responses_request
from gateway.dialects.translation.chat_request import body_of
from gateway.dialects.translation.conversation import Prompt
from tests.dialects.translation.valid_requests import QUICK, anthropic_requests, ollama_requests, responses_requests
from tests.support import strict_chat

JSON = dict[str, Any]
KINDS: list[Kind] = ["ollama", "openai"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def strictly_written(read: Callable[[JSON], Prompt], request: JSON, kind: Kind) -> JSON:
    """The body, as a strict server takes it. Ollama takes more efforts than the others."""
    body: JSON = {"model": "m", **body_of(read(strict_json.read_object(json.dumps(request).encode())), kind)}
    strict = {name: value for name, value in body.items() if name != "reasoning_effort" or kind == "openai"}
    assert not strict_chat.problem_of(strict), body
    OpenAI().operations[0].check(body)
    assert strict_json.write_strictly(body)
    return body


def texts_in(value: Any, names: tuple[str | int, ...]) -> Iterator[str]:
    """All texts under these names or places in lists, in their order."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, str):
            yield from [inner] if name in names else []
        elif isinstance(inner, dict | list) and name not in ("input", "source", "function"):
            yield from texts_in(inner, names)


def has_in_order(whole: str, texts: Iterator[str]) -> bool:
    place = 0
    for text in texts:
        place = whole.find(text, place)
        if place < 0:
            return False
        place += len(text)
    return True


def text_of(body: JSON, *names: str) -> str:
    return "\n".join(texts_in(body["messages"], names or ("content", "text")))


def calls_in(body: JSON) -> list[tuple[str, str, Any]]:
    calls = [call for message in body["messages"] for call in message.get("tool_calls", ())]
    return [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def results_in(body: JSON) -> list[str]:
    return [message["tool_call_id"] for message in body["messages"] if message["role"] == "tool"]


def images_in(body: JSON) -> int:
    return json.dumps(body["messages"]).count('"image_url": {')


def check_tools(body: JSON, names: list[str], choice: Any) -> None:
    found = [tool["function"]["name"] for tool in body.get("tools", ())]
    assert found in (names, [choice], [] if choice == "none" else names)


@each_kind
@QUICK
@given(request=anthropic_requests())
def test_messages(request: JSON, kind: Kind) -> None:
    body = strictly_written(messages_request.read, request, kind)
    content = [message["content"] for message in request["messages"]]
    blocks = [block for one in content if isinstance(one, list) for block in one]
    assert has_in_order(text_of(body), texts_in([request.get("system", []), content], ("text", "content", 0)))
    thoughts = texts_in(content, ("thinking",))
    assert has_in_order(text_of(body, "reasoning"), thoughts)
    calls = [(block["id"], block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"]
    assert calls_in(body) == calls
    assert results_in(body) == [call_id for call_id, _, _ in calls]
    assert images_in(body) == json.dumps(request["messages"]).count('"base64"')
    choice = request.get("tool_choice", {})
    check_tools(body, [tool["name"] for tool in request.get("tools", ())], choice.get("name", choice.get("type")))
    assert body["max_tokens"] == request["max_tokens"]


@each_kind
@QUICK
@given(request=responses_requests())
def test_responses(request: JSON, kind: Kind) -> None:
    body = strictly_written(responses_request.read, request, kind)
    items = request["input"] if isinstance(request["input"], list) else [{"content": request["input"]}]
    shown = [item for item in items if item.get("type") not in ("reasoning", "function_call_output")]
    assert has_in_order(text_of(body), texts_in([request.get("instructions", []), shown], ("text", "content", 0)))
    calls: list[tuple[str, str, Any]] = [
        (item["call_id"], item["name"], {}) for item in items if item.get("type") == "function_call"
    ]
    assert calls_in(body) == calls
    assert results_in(body) == [call_id for call_id, _, _ in calls]
    assert images_in(body) == json.dumps(items).count('"image_url"')
    choice = request.get("tool_choice")
    name = choice["name"] if isinstance(choice, dict) else choice
    check_tools(body, [tool["name"] for tool in request.get("tools", ())], name)
    assert body.get("max_tokens") == request.get("max_output_tokens")


@QUICK
@given(request=ollama_requests())
def test_ollama(request: JSON) -> None:
    body = strictly_written(native_chat.read_chat, request, "openai")
    assert has_in_order(text_of(body), texts_in(request["messages"], ("content",)))
    asked = [call["function"] for message in request["messages"] for call in message.get("tool_calls", ())]
    assert [(name, arguments) for _, name, arguments in calls_in(body)] == [(call["name"], call["arguments"]) for call in asked]
    assert results_in(body) == [call_id for call_id, _, _ in calls_in(body)]
    assert images_in(body) == sum(len(message.get("images", ())) for message in request["messages"])


@QUICK
@given(anthropic_requests(), st.text(min_size=1, max_size=20))
def test_an_answer_that_is_begun_is_the_last_message(request: JSON, beginning: str) -> None:
    request["messages"].append({"role": "assistant", "content": beginning})
    if not beginning.strip():
        return
    body = strictly_written(messages_request.read, request, "openai")
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
    assert body["messages"][-1]["content"] == beginning.rstrip()
    assert "reasoning_effort" not in body


@QUICK
@given(anthropic_requests(), st.integers(1, 9))
def test_a_longer_conversation_begins_with_the_shorter_one(request: JSON, turns: int) -> None:
    """A backend's cache of prompts is found by the bytes."""
    before = {**request, "messages": request["messages"][: 2 * turns - 1]}
    texts = [strict_json.write(body_of(messages_request.read(one), "openai")["messages"])[:-1] for one in (before, request)]
    assert texts[1].startswith(texts[0])
