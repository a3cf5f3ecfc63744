"""Valid requests of two client APIs, made at random: conversations with tools, images and thinking."""

import base64
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
JSON = dict[str, Any]
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
NAMES = st.sampled_from(["Bash", "Read", "mcp__git__log", "get-weather"])
IDS = st.uuids().map(lambda value: f"call_{value.hex}")
VALUES = st.dictionaries(st.sampled_from(["city", "zone", "a"]), TEXTS | st.integers(-9, 9) | st.lists(TEXTS, max_size=2))
SCHEMAS = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(TEXTS, st.just({"type": "string"}), max_size=3)}
)


def optional(**fields: Any) -> st.SearchStrategy[JSON]:
    return st.fixed_dictionaries({}, optional=fields)


# Anthropic's Messages API

TEXT_BLOCKS = TEXTS.map(lambda text: {"type": "text", "text": text})
IMAGE_BLOCKS = st.just({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}})
SHOWN = st.lists(TEXT_BLOCKS | IMAGE_BLOCKS, max_size=3)
THOUGHTS = TEXTS.map(lambda text: {"type": "thinking", "thinking": text, "signature": "s"})
DOCUMENTS = TEXTS.map(lambda text: {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": text}})


@st.composite
def anthropic_turns(draw: st.DrawFn) -> list[JSON]:
    """Turns of the assistant, each followed by the results of its calls."""
    turns: list[JSON] = []
    for _ in range(draw(st.integers(0, 3))):
        calls = [
            {"type": "tool_use", "id": call_id, "name": draw(NAMES), "input": draw(VALUES)}
            for call_id in draw(st.lists(IDS, max_size=3, unique=True))
        ]
        said = draw(st.lists(THOUGHTS, max_size=1)) + draw(st.lists(TEXT_BLOCKS, min_size=0 if calls else 1, max_size=2))
        results = [
            {
                "type": "tool_result",
                "tool_use_id": call["id"],
                "content": draw(TEXTS | SHOWN),
                "is_error": draw(st.booleans()),
            }
            for call in calls
        ]
        turns.append({"role": "assistant", "content": said + calls})
        turns.append({"role": "user", "content": results + draw(st.lists(TEXT_BLOCKS, min_size=0 if calls else 1, max_size=2))})
    return turns


@st.composite
def anthropic_requests(draw: st.DrawFn) -> JSON:
    tools = [
        {"name": name, "description": draw(TEXTS), "input_schema": draw(SCHEMAS)}
        for name in draw(st.lists(NAMES, max_size=4, unique=True))
    ]
    first: JSON = {"role": "user", "content": draw(TEXTS | st.lists(TEXT_BLOCKS | IMAGE_BLOCKS, min_size=1, max_size=3))}
    choices = [{"type": "auto"}, {"type": "any"}, {"type": "none"}, *({"type": "tool", "name": tool["name"]} for tool in tools)]
    return {
        "model": "m",
        "max_tokens": draw(st.integers(1, 9999)),
        "messages": [first, *draw(anthropic_turns())],
        **({"tools": tools, **draw(optional(tool_choice=st.sampled_from(choices)))} if tools else {}),
        **draw(
            optional(
                system=TEXTS | st.lists(TEXT_BLOCKS, min_size=1, max_size=3),
                temperature=st.floats(0, 1),
                top_p=st.floats(0, 1),
                top_k=st.integers(1, 99),
                stop_sequences=st.lists(TEXTS, max_size=4),
                thinking=st.sampled_from(
                    [{"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 2048}]
                ),
                output_config=optional(effort=st.sampled_from(["low", "high", "max"])),
                metadata=optional(user_id=TEXTS),
                stream=st.booleans(),
            )
        ),
    }


# OpenAI's Responses API

INPUT_TEXTS = TEXTS.map(lambda text: {"type": "input_text", "text": text})
INPUT_IMAGES = st.just({"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"})
OUTPUT_TEXTS = TEXTS.map(lambda text: {"type": "output_text", "text": text, "annotations": []})
PARTS = st.lists(INPUT_TEXTS | INPUT_IMAGES, min_size=1, max_size=3)


@st.composite
def responses_items(draw: st.DrawFn) -> list[JSON]:
    items: list[JSON] = [{"type": "message", "role": "user", "content": draw(TEXTS | PARTS)}]
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            items.append({"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": draw(TEXTS)}]})
        ids = draw(st.lists(IDS, max_size=3, unique=True))
        for call_id in ids:
            call = {"type": "function_call", "call_id": call_id, "name": draw(NAMES), "arguments": "{}"}
            items.append(call)
        outputs = TEXTS | st.lists(INPUT_TEXTS)
        items += [
            {"type": "function_call_output", "call_id": call_id, "output": draw(outputs)}
            for call_id in draw(st.permutations(ids))
        ]
        items.append({"type": "message", "role": "assistant", "content": [draw(OUTPUT_TEXTS)]})
        items.append({"type": "message", "role": draw(st.sampled_from(["user", "developer"])), "content": draw(TEXTS)})
    return items


@st.composite
def responses_requests(draw: st.DrawFn) -> JSON:
    tools = [
        {"type": "function", "name": name, "description": draw(TEXTS), "parameters": draw(SCHEMAS), "strict": False}
        for name in draw(st.lists(NAMES, max_size=4, unique=True))
    ]
    choices = ["auto", "none", "required", *({"type": "function", "name": tool["name"]} for tool in tools)]
    return {
        "model": "m",
        "input": draw(TEXTS | responses_items()),
        **({"tools": tools, **draw(optional(tool_choice=st.sampled_from(choices)))} if tools else {}),
        **draw(
            optional(
                instructions=TEXTS,
                max_output_tokens=st.integers(16, 9999),
                temperature=st.floats(0, 2),
                top_p=st.floats(0, 1),
                parallel_tool_calls=st.booleans(),
                reasoning=optional(effort=st.sampled_from(["none", "low", "high", "xhigh"])),
                text=st.just({"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}}),
                store=st.booleans(),
                stream=st.booleans(),
            )
        ),
    }


# Ollama's /api/chat

OLLAMA_OPTIONS = optional(
    temperature=st.floats(0, 2),
    num_predict=st.integers(-2, 999),
    num_ctx=st.integers(512, 8192),
    top_k=st.integers(1, 99),
    seed=st.integers(-1, 99),
    stop=st.lists(TEXTS, max_size=2),
)


@st.composite
def ollama_messages(draw: st.DrawFn) -> list[JSON]:
    found: list[JSON] = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    found.append({"role": "user", "content": draw(TEXTS), **draw(optional(images=st.lists(st.just(PNG), max_size=2)))})
    for _ in range(draw(st.integers(0, 3))):
        names = draw(st.lists(NAMES, max_size=3))
        calls = [{"function": {"name": name, "arguments": draw(VALUES)}} for name in names]
        found.append({"role": "assistant", "content": draw(TEXTS), **({"tool_calls": calls} if calls else {})})
        found += [{"role": "tool", "tool_name": name, "content": draw(TEXTS)} for name in names]
        found.append({"role": "user", "content": draw(TEXTS)})
    return found


@st.composite
def ollama_requests(draw: st.DrawFn) -> JSON:
    tools = [
        {"type": "function", "function": {"name": name, "description": draw(TEXTS), "parameters": draw(SCHEMAS)}}
        for name in draw(st.lists(NAMES, max_size=4, unique=True))
    ]
    return {
        "model": "m",
        "messages": draw(ollama_messages()),
        **({"tools": tools} if tools else {}),
        **draw(
            optional(
                options=OLLAMA_OPTIONS,
                think=st.booleans() | st.sampled_from(["low", "high", "max"]),
                format=st.sampled_from(["json", "", {"type": "object"}]),
                keep_alive=st.sampled_from(["5m", -1, 0]),
                stream=st.booleans(),
            )
        ),
    }
