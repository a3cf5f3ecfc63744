"""The tokens of a request before it is read: about the same as afterwards, for anything at all."""

import base64
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.translation import messages_request, responses_request
from gateway.dialects.translation.messages_estimate import rough_need as of_messages
from gateway.dialects.translation.responses_request import rough_need as of_responses
from tests.dialects.translation.native import JSON as ANY_JSON
from tests.dialects.translation.test_messages_request import claude_code
from tests.dialects.translation.valid_requests import QUICK, anthropic_requests, responses_requests
from tests.support.prompt_tokens import estimate

JSON = dict[str, Any]
BLOCKS = st.dictionaries(st.sampled_from(["type", "source", "content", "text", "input", "data"]), ANY_JSON, max_size=3)
DEEP: Any = {}
for _ in range(5000):
    DEEP = {"a": DEEP}


def is_close(rough: int, exact: int, of_all: float, each: int) -> bool:
    return abs(rough - exact) <= of_all * exact + each


@QUICK
@given(anthropic_requests())
def test_messages(body: JSON) -> None:
    need = of_messages(body)
    blocks = sum(len(message["content"]) for message in body["messages"] if isinstance(message["content"], list))
    assert is_close(need.prompt, estimate(messages_request.read(body)), 0.05, blocks + 2)
    assert (need.output, need.answers) == (body["max_tokens"], 1)


@QUICK
@given(responses_requests())
def test_responses(body: JSON) -> None:
    need = of_responses(body)
    items = len(body["input"]) if isinstance(body["input"], list) else 1
    # The names of the fields of tools and choices count, too, and each message costs a little.
    assert is_close(need.prompt, estimate(responses_request.read(body)), 0.05, 5 * items + 20 * len(body.get("tools", ())) + 12)
    assert need.output == body.get("max_output_tokens")


def test_a_long_request_of_claude_code_is_within_a_few_percent() -> None:
    body = claude_code(turns=40)
    body["system"][1]["text"] = "Be careful with files. " * 600
    for tool in body["tools"]:
        tool["description"] = "Runs a command and returns its output. " * 40
    assert is_close(of_messages(body).prompt, estimate(messages_request.read(body)), 0.03, 0)


def test_a_long_request_of_codex_is_within_a_few_percent() -> None:
    text = "Be careful with files. " * 60
    tools = [{"type": "function", "name": f"f{number}", "parameters": {}, "description": text} for number in range(9)]
    items = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]} for _ in range(40)]
    body: JSON = {"instructions": text * 20, "input": items, "tools": tools, "store": False, "prompt_cache_key": "k"}
    assert is_close(of_responses(body).prompt, estimate(responses_request.read(body)), 0.03, 0)


def test_images_are_no_text() -> None:
    data = base64.b64encode(bytes(300_000)).decode()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    inner = {"type": "tool_result", "tool_use_id": "c", "content": [image]}
    file = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": data}}
    for block in (image, inner, file, {**image, "source": data}):
        assert 700 < of_messages({"messages": [{"role": "user", "content": [block]}]}).prompt < 2000
    part = {"type": "input_image", "image_url": f"data:image/png;base64,{data}"}
    assert 700 < of_responses({"input": [{"role": "user", "content": [part]}]}).prompt < 2000


def test_what_a_chat_template_may_write_into_the_prompt_counts() -> None:
    documents = {"documents": [{"text": "word " * 4000}]}
    message = {"role": "user", "content": "x"}
    assert of_messages({"messages": [message], "chat_template_kwargs": documents}).prompt > 5000
    assert of_responses({"input": [message], "chat_template_kwargs": documents}).prompt > 5000


def test_depth_is_no_accident() -> None:
    assert of_messages({"messages": [{"role": "user", "content": [{"type": "x", "input": DEEP}]}], "max_tokens": 3}) == (
        1,
        3,
        1,
    )
    assert of_responses({"input": [DEEP], "tools": [DEEP]}) == (1, None, 1)


ANY = st.dictionaries(
    st.sampled_from(
        ["system", "messages", "tools", "max_tokens", "output_config", "input", "instructions", "max_output_tokens"]
    ),
    ANY_JSON | st.lists(st.fixed_dictionaries({"content": ANY_JSON | st.lists(BLOCKS, max_size=2)}), max_size=2),
    max_size=3,
)


@QUICK
@given(ANY)
def test_any_object_has_a_need(body: JSON) -> None:
    for need in (of_messages(body), of_responses(body)):
        assert need.prompt >= 1
        assert need.output is None or need.output >= 1
