"""Answers of the Responses API: the order of events, their numbers and ids, and that the parts add up to the whole."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.core.errors import AnswerCutShort, BackendRefused, BudgetSpent, GatewayError, LimitReached, PromptTooLong
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.conversation import (
    Counted,
    Event,
    Finish,
    Finished,
    Reply,
    Text,
    TextPiece,
    Thinking,
    ThinkingPiece,
    ToolCall,
    ToolPiece,
)
from gateway.dialects.translation.responses_answer import EventWriter, write
from gateway.dialects.translation.responses_custom_input import CustomInput
from gateway.dialects.translation.responses_models import codex_models
from gateway.dialects.translation.responses_request import ResponsesPrompt, read

TOOLS = [
    {"type": "function", "name": "weather", "parameters": {"type": "object"}},
    {"type": "custom", "name": "apply_patch"},
    {"type": "local_shell"},
    {"type": "namespace", "name": "mcp__repl", "description": "", "tools": [{"type": "function", "name": "js"}]},
    {"type": "shell"},
    {"type": "apply_patch_v2"},
]
COUNTED = Counted(Usage(27, 3, 20))


def prompt_of(**fields: Any) -> ResponsesPrompt:
    return read({"model": "qwen3", "input": "Hi", "tools": TOOLS, **fields})


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """The events; each has its type twice, and the numbers have no gap."""
    found = []
    for frame in stream.split(b"\n\n")[:-1]:
        name, data = frame.split(b"\n")
        found.append(json.loads(data.removeprefix(b"data: ")))
        assert name == b"event: " + found[-1]["type"].encode()
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def written(*events: Event, prompt: ResponsesPrompt | None = None) -> list[dict[str, Any]]:
    writer = EventWriter(prompt or prompt_of(), "resp_ab", 7)
    return events_of(b"".join([writer.start(), *map(writer.write, events), writer.end()]))


def kinds(events: Iterable[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_thought_and_a_text_in_the_order_of_events() -> None:
    events = written(ThinkingPiece("h"), ThinkingPiece("m"), TextPiece("Hi"), TextPiece("!"), Finished("stop"), COUNTED)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.get("output_index") for event in events] == [None, None, *[0] * 7, *[1] * 7, None]
    response = events[-1]["response"]
    assert response["output"] == [events[8]["item"], events[15]["item"]]
    assert [event["response"]["usage"] for event in events[:2]] == [None, None]
    assert response["usage"] == {
        "input_tokens": 27,
        "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 30,
    }
    assert {event["response"]["id"] for event in events if "response" in event} == {"resp_ab"}
    assert len({event["item"]["id"] for event in events if "item" in event}) == 2


def test_each_event_is_written_at_once() -> None:
    writer = EventWriter(prompt_of())
    assert writer.start() and not writer.start()
    assert writer.write(TextPiece("a")).count(b"event: ") == 3
    assert writer.write(TextPiece("b")).count(b"event: ") == 1
    assert writer.write(TextPiece("")) == writer.write(COUNTED) == b""
    assert writer.write(ToolPiece(0, "c", "weather")).count(b"event: ") == 4
    assert writer.write(ToolPiece(0, arguments='{"a"')).count(b"event: ") == 1


def test_the_settings_of_the_request_come_back() -> None:
    prompt = prompt_of(
        instructions="i", temperature=0.5, metadata={"a": "b"}, max_output_tokens=9, store=True, tool_choice="auto"
    )
    for response in (written(prompt=prompt)[0]["response"], write(Reply([], "stop"), prompt, created=7)):
        assert response["model"] == "qwen3" and response["instructions"] == "i" and response["tools"] == TOOLS
        assert response["temperature"] == 0.5 and response["metadata"] == {"a": "b"} and response["max_output_tokens"] == 9
        assert response["store"] is False and response["tool_choice"] == "auto" and response["parallel_tool_calls"] is True
        assert (
            response["created_at"] == 7
            and response["object"] == "response"
            and response["text"] == {"format": {"type": "text"}}
        )


def test_parallel_calls_end_one_before_the_other_begins() -> None:
    events = written(
        ToolPiece(0, "c1", "weather"),
        ToolPiece(0, arguments='{"city":'),
        ToolPiece(0, arguments='"Bonn"}'),
        ToolPiece(1, "c2", "mcp__repl__js", '{"code":"1"}'),
        Finished("tool_calls"),
    )
    assert kinds(events)[2:] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    first, second = events[-1]["response"]["output"]
    assert (first["call_id"], first["name"], first["arguments"]) == ("c1", "weather", '{"city":"Bonn"}')
    assert (second["namespace"], second["name"], second["arguments"]) == ("mcp__repl", "js", '{"code":"1"}')
    assert first["id"] != first["call_id"] and "namespace" not in first


def test_calls_that_arrive_by_turns_stay_apart() -> None:
    events = written(
        ToolPiece(0, "c1", "weather", '{"a'),
        ToolPiece(1, "c2", "weather", '{"b'),
        ToolPiece(0, arguments='":1}'),
        ToolPiece(1, arguments='":2}'),
        Finished("tool_calls"),
    )
    deltas = [event for event in events if event["type"].endswith(".delta")]
    assert [(event["output_index"], event["delta"]) for event in deltas] == [(0, '{"a'), (1, '{"b'), (0, '":1}'), (1, '":2}')]
    assert [item["arguments"] for item in events[-1]["response"]["output"]] == ['{"a":1}', '{"b":2}']


def test_calls_without_arguments_and_without_ids() -> None:
    events = written(ToolPiece(0, "", "weather"), ToolPiece(1, "c", "weather"), ToolPiece(2, "c", "weather"), Finished("stop"))
    items = events[-1]["response"]["output"]
    assert [item["arguments"] for item in items] == ["{}"] * 3
    assert len({item["call_id"] for item in items}) == 3 and items[1]["call_id"] == "c"
    sums = Counter[str]()
    for event in events:
        if event["type"].endswith(".delta"):
            sums[event["item_id"]] += len(event["delta"])
    assert set(sums.values()) == {2}


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_the_text_of_a_custom_tool_arrives_piece_by_piece(size: int) -> None:
    text = '*** Begin Patch\n+"ü"\t\\d 😀 \u2028\n*** End Patch'
    arguments = json.dumps({"input": text})
    pieces = [ToolPiece(0, arguments=arguments[at : at + size]) for at in range(0, len(arguments), size)]
    events = written(ToolPiece(0, "c1", "apply_patch"), *pieces, Finished("tool_calls"))
    assert kinds(events)[2] == "output_item.added" and kinds(events)[-3:-1] == [
        "custom_tool_call_input.done",
        "output_item.done",
    ]
    deltas = [event["delta"] for event in events if event["type"] == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == text and (size == 1000 or len(deltas) > 5)
    (item,) = events[-1]["response"]["output"]
    assert item["type"] == "custom_tool_call" and item["input"] == events[-3]["input"] == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": "a"}', "a"),
        ('{"patch": "a"}', "a"),
        ('"a"', "a"),
        ("*** Begin Patch", "*** Begin Patch"),
        ('{"input": "a\nb"}', "a\nb"),
        (r'{"input": "a\d\\d\u00e4"}', r"a\d\dä"),
        (r'{"input": "a\ud83d"}', "a?"),
        ('{"input": "a', "a"),
        (r'{"input": "a\uzz b"}', r"a\uzz b"),
        ('{"other": 1, "input": "a"}', "a"),
        ("", ""),
    ],
)
def test_what_models_write_for_a_custom_tool(arguments: str, text: str) -> None:
    whole, bit_by_bit = CustomInput(), CustomInput()
    assert whole.add(arguments) + whole.finish() == text
    assert "".join(map(bit_by_bit.add, arguments)) + bit_by_bit.finish() == text == bit_by_bit.text


@given(st.text(), st.booleans(), st.integers(1, 9))
def test_any_text_reaches_a_custom_tool(text: str, ascii_only: bool, size: int) -> None:
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only)
    reader = CustomInput()
    found = "".join(reader.add(arguments[at : at + size]) for at in range(0, len(arguments), size)) + reader.finish()
    assert found == text


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("local_shell", '{"command":["ls","-l"]}', {"type": "exec", "env": {}, "command": ["ls", "-l"]}),
        ("local_shell", '{"command":"ls | wc"}', {"type": "exec", "env": {}, "command": ["bash", "-lc", "ls | wc"]}),
        ("shell", '{"commands":["ls"],"timeout_ms":5}', {"commands": ["ls"], "timeout_ms": 5}),
    ],
)
def test_a_shell_is_called_in_its_own_type(name: str, arguments: str, expected: dict[str, Any]) -> None:
    events = written(ToolPiece(0, "c1", name), ToolPiece(0, arguments=arguments), Finished("tool_calls"))
    assert kinds(events)[2:] == ["output_item.added", "output_item.done", "completed"]
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["call_id"], item["action"], item["status"]) == (f"{name}_call", "c1", expected, "completed")


@pytest.mark.parametrize("arguments", ["", '{"command": [', '{"command": []}', '{"command": [1]}', "ls"])
def test_no_broken_command_is_run(arguments: str) -> None:
    events = written(ToolPiece(0, "c1", "local_shell"), ToolPiece(0, arguments=arguments), Finished("stop"))
    (item,) = events[-1]["response"]["output"]
    assert (item["type"], item["name"], item["arguments"]) == ("function_call", "local_shell", arguments or "{}")


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
def test_an_answer_that_was_cut_is_incomplete(finish: Finish, reason: str) -> None:
    events = written(TextPiece("Hi"), Finished(finish), COUNTED)
    response = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete" and response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": reason} and response["usage"]["total_tokens"] == 30
    assert response["output"][0]["status"] == "incomplete"
    call = written(ToolPiece(0, "c", "weather", '{"a":1}'), ToolPiece(1, "d", "weather", '{"a'), Finished(finish))
    assert [item["status"] for item in call[-1]["response"]["output"]] == ["completed", "incomplete"]


def test_a_stream_that_ends_early_has_failed() -> None:
    events = written(TextPiece("Hi"))
    assert kinds(events)[-2:] == ["error", "failed"]
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": AnswerCutShort().message}
    assert events[-1]["response"]["status"] == "failed"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AnswerCutShort(), "server_error"),
        (LimitReached(), "rate_limit_exceeded"),
        (BudgetSpent(), "insufficient_quota"),
        (PromptTooLong("too long", 400, {"type": "exceed_context_size_error"}), "context_length_exceeded"),
        (BackendRefused("no", 400), "invalid_prompt"),
        (GatewayError(), "server_error"),
    ],
)
def test_failures_have_codes_that_clients_know(error: GatewayError, code: str) -> None:
    writer = EventWriter(prompt_of())
    events = events_of(writer.write(TextPiece("Hi")) + writer.fail(error))
    assert kinds(events)[:2] == ["created", "in_progress"]
    assert events[-2]["error"]["code"] == events[-2]["code"] == events[-1]["response"]["error"]["code"] == code
    assert writer.write(TextPiece("more")) == writer.end() == writer.fail(error) == writer.start() == b""


def test_nothing_but_counts_follows_the_finish() -> None:
    events = written(TextPiece("a"), Finished("stop"), TextPiece("b"), COUNTED)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "a"
    assert events[-1]["response"]["usage"]["input_tokens"] == 27


PARTS = st.lists(
    st.builds(Thinking, st.text(min_size=1))
    | st.builds(Text, st.text(min_size=1))
    | st.builds(
        ToolCall,
        st.sampled_from(["", "c1", "c2"]),
        st.sampled_from(["weather", "apply_patch", "local_shell", "mcp__repl__js", "unknown"]),
        st.sampled_from(["", "{}", '{"input":"x"}', '{"command":["ls"]}', '{"a":']) | st.text(max_size=5),
    ),
    max_size=5,
)
FINISHES = st.sampled_from(["stop", "length", "tool_calls", "content_filter"])


@given(PARTS, FINISHES, st.integers(1, 4))
def test_a_stream_ends_with_what_the_whole_answer_has(parts: list[Any], finish: Finish, size: int) -> None:
    events: list[Event] = []
    for index, part in enumerate(parts):
        if isinstance(part, ToolCall):
            events.append(ToolPiece(index, part.id, part.name))
        text = part.arguments if isinstance(part, ToolCall) else part.text
        events += [piece_of(part, index, text[at : at + size]) for at in range(0, len(text), size)]
    prompt = prompt_of()
    stream = written(*events, Finished(finish), COUNTED, prompt=prompt)
    whole = write(Reply(parts, finish, COUNTED.usage), prompt, "resp_ab", 7)
    assert stream[-1]["response"] == json.loads(strict_json.write_with_replacements(whole))
    check_items(stream)


def piece_of(part: Any, index: int, text: str) -> Event:
    if isinstance(part, ToolCall):
        return ToolPiece(index, arguments=text)
    return ThinkingPiece(text) if isinstance(part, Thinking) else TextPiece(text)


def check_items(stream: list[dict[str, Any]]) -> None:
    """Each item is added once, then done once in the same place; its deltas add up to its end."""
    deltas: Counter[int] = Counter()
    is_open: dict[int, str] = {}
    for event in stream:
        place = event.get("output_index", -1)
        if event["type"] == "response.output_item.added":
            assert place == len(is_open)
            is_open[place] = event["item"]["id"]
        elif event["type"] == "response.output_item.done":
            assert is_open[place] == event["item"]["id"]
        elif place >= 0:
            assert is_open[place] == event["item_id"]
            deltas[place] += len(event.get("delta", ""))
    for place, item in enumerate(stream[-1]["response"]["output"]):
        texts = [
            item.get("arguments"),
            item.get("input"),
            *(part["text"] for part in item.get("content", item.get("summary", []))),
        ]
        assert deltas[place] == sum(len(text) for text in texts if isinstance(text, str))


def test_codex_finds_what_it_requires() -> None:
    first, second = codex_models(["qwen3:8b", "gemma"], {"qwen3:8b": 32768}, {"gemma"})
    required = """slug display_name supported_reasoning_levels shell_type visibility supported_in_api priority base_instructions
                  support_verbosity truncation_policy experimental_supported_tools supports_reasoning_summaries
                  supports_parallel_tool_calls""".split()
    assert all(first.get(name) is not None for name in required)
    assert (first["context_window"], first["input_modalities"]) == (32768, ["text"])
    assert "context_window" not in second and second["input_modalities"] == ["text", "image"]
    assert [first["priority"], second["priority"]] == [0, 1]
