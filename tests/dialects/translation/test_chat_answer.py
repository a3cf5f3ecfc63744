"""Answers of chat/completions, whole and in chunks, as the servers send them."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.dialects.dialect import Usage
from gateway.dialects.openai import ServerSentEvents
from gateway.dialects.translation.chat_answer import ChunkReader, reply_of
from gateway.dialects.translation.conversation import (
    Counted,
    Event,
    Finished,
    Reply,
    Text,
    TextPiece,
    Thinking,
    ThinkingPiece,
    ToolCall,
    ToolPiece,
)
from gateway.dialects.translation.unreadable import Unreadable
from tests.support.fake_backend.scripts import recording

STREAMS = {
    "openai_chat_stream.sse": Usage(27, 16),
    "openai_chat_stream_crlf.sse": Usage(27, 16),
    "openai_chat_stream_llamacpp.sse": Usage(36, 12, 6, None, 0.004022, 0.006116),
    "openai_chat_stream_vllm.sse": Usage(27, 16),
    "openai_tool_call_stream.sse": Usage(27, 16),
}


BOTH_NAMES = ("reasoning", "reasoning_content")


def chunk(delta: Any = None, finish: Any = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **fields}


def call(arguments: Any = None, name: Any = None, **fields: Any) -> dict[str, Any]:
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {**fields, "function": function}


def calls(*deltas: dict[str, Any]) -> dict[str, Any]:
    return chunk({"tool_calls": list(deltas)})


def read(*chunks: dict[str, Any]) -> list[Event]:
    reader = ChunkReader()
    return [event for one in chunks for event in reader.read(one)] + reader.end()


def whole(message: Any, finish: Any = "stop", **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], **fields}


@pytest.mark.parametrize(
    ("text", "fields", "found"),
    [
        ("One, two, three", {"timings": {}}, ", three"),
        (", three", {"timings": {}}, ", three"),
        # Only llama.cpp has timings; elsewhere the model itself wrote it again.
        ("One, two, three", {}, "One, two, three"),
    ],
)
def test_the_beginning_that_llamacpp_gives_again_is_taken_off(text: str, fields: dict[str, Any], found: str) -> None:
    assert reply_of(whole({"content": text}, **fields), "One, two").parts == [Text(found)]
    assert reply_of(whole({"content": text}, **fields)).parts == [Text(text)]


def reply_from(events: Iterable[Event]) -> Reply:
    """What a client puts together."""
    thoughts = text = ""
    found: list[ToolCall] = []
    reply = Reply([], "stop")
    ended = 0
    for event in events:
        assert isinstance(event, Counted) or not ended, "nothing but counts follows the end"
        match event:
            case ThinkingPiece(piece):
                thoughts += piece
            case TextPiece(piece):
                text += piece
            case ToolPiece(index, call_id, name, arguments):
                if call_id:
                    assert index == len(found) and name
                    found.append(ToolCall(call_id, name, arguments))
                else:
                    assert not name and arguments
                    found[index] = ToolCall(found[index].id, found[index].name, found[index].arguments + arguments)
            case Finished(finish):
                reply.finish, ended = finish, ended + 1
            case Counted(usage):
                reply.usage = usage
    assert ended == 1
    reply.parts = [*([Thinking(thoughts)] if thoughts else []), *([Text(text)] if text else []), *found]
    return reply


def chunks_of(stream: bytes, cuts: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The chunks of a stream that arrives in pieces."""
    framing = ServerSentEvents()
    waiting = b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        waiting += stream[start:end]
        done = framing.end_of_frames(waiting)
        yield from (json.loads(payload) for payload in framing.payloads(waiting[:done]) if payload != b"[DONE]")
        waiting = waiting[done:]
    assert not waiting


def sdk_client(content: bytes) -> openai.OpenAI:
    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    client = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(base_url="http://backend/v1", api_key="k", http_client=client)


def as_the_sdk_reads(content: bytes) -> Reply:
    """What the official client makes of the same stream."""
    with (
        sdk_client(content) as client,
        client.chat.completions.stream(
            model="m", messages=[{"role": "user", "content": "Hi"}], stream_options={"include_usage": True}
        ) as stream,
    ):
        extras = [event.chunk.model_extra or {} for event in stream if event.type == "chunk"]
        try:
            final: Any = stream.get_final_completion()
        except openai.LengthFinishReasonError as cut:
            final = cut.completion
    (choice,) = final.choices
    usage = final.usage
    assert usage is not None
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else None
    timings: Any = extras[-1].get("timings")
    took = (timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000) if timings else ()
    found = [ToolCall(one.id, one.function.name, one.function.arguments) for one in choice.message.tool_calls or []]
    text = [Text(choice.message.content)] if choice.message.content else []
    counted = Usage(usage.prompt_tokens, usage.completion_tokens, cached, None, *took)
    return Reply([*text, *found], choice.finish_reason, counted)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("step", [1, 7, 1000, 10**6])
def test_recorded_streams_read_as_the_official_client_reads_them(name: str, step: int) -> None:
    stream = recording(name)
    reader = ChunkReader()
    events = [event for one in chunks_of(stream, range(step, len(stream), step)) for event in reader.read(one)]
    assert reader.end() == []
    reply = reply_from(events)
    assert reply == as_the_sdk_reads(stream)
    assert reply.usage == STREAMS[name]


def test_the_recorded_tool_call_comes_in_pieces_as_they_were_sent() -> None:
    events = read(*chunks_of(recording("openai_tool_call_stream.sse"), []))
    pieces = ['{"city"', ': "Zü', 'rich 🏔"', ', "days": 3', "}"]
    assert events == [
        ToolPiece(0, "chatcmpl-tool-0f1e2d3c4b5a", "get_weather", ""),
        *(ToolPiece(0, arguments=piece) for piece in pieces),
        Finished("tool_calls"),
        Counted(Usage(27, 16)),
    ]


def test_a_recorded_whole_answer() -> None:
    reply = reply_of(json.loads(recording("openai_chat_whole.json")))
    (text,) = reply.parts
    assert isinstance(text, Text) and text.text.startswith("Grüezi, Welt!") and text.text.endswith("data: x.")
    assert (reply.finish, reply.usage, reply.id, reply.created) == ("stop", Usage(27, 16), "chatcmpl-512", 1787335200)


@pytest.mark.parametrize("fields", [{"reasoning": "Hm."}, {"reasoning_content": "Hm."}])
@pytest.mark.parametrize(
    "other", [{}, {"reasoning": None, "reasoning_content": None}, {"reasoning": "", "reasoning_content": ""}]
)
def test_thoughts_have_two_names(fields: dict[str, str], other: dict[str, Any]) -> None:
    message = {**other, **fields, "content": None}
    assert read(chunk(message)) == [ThinkingPiece("Hm."), Finished("stop")]
    assert reply_of(whole({**message, "content": "Yes"})).parts == [Thinking("Hm."), Text("Yes")]


def test_thoughts_under_both_names_are_read_once() -> None:
    message = {"reasoning": "Hm.", "reasoning_content": "Hm.", "content": "<think>a</think>"}
    assert read(chunk(message)) == [ThinkingPiece("Hm."), TextPiece("<think>a</think>"), Finished("stop")]
    assert reply_of(whole(message)).parts == [Thinking("Hm."), Text("<think>a</think>")]


@pytest.mark.parametrize(
    ("content", "thoughts", "text"),
    [
        ([], "", ""),
        ([{"type": "text", "text": "a"}, {"type": "output_text", "text": "b"}, "c", {"text": "d"}], "", "abcd"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}, {"type": "text", "text": "."}]}], "Hm.", ""),
        ([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": None}], "Hm.", ""),
        ([{"type": "refusal", "refusal": "No."}], "", "No."),
    ],
)
def test_content_may_be_parts(content: list[Any], thoughts: str, text: str) -> None:
    wanted = [*([Thinking(thoughts)] if thoughts else []), *([Text(text)] if text else [])]
    assert reply_of(whole({"content": content})).parts == wanted
    assert reply_from(read(chunk({"content": content}))).parts == wanted


def test_one_chunk_may_hold_everything() -> None:
    delta = {
        "tool_calls": [call("{}", "f", index=0, id="a")],
        "content": "Yes",
        "reasoning": "Hm.",
        "function_call": {"name": "g"},
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    assert read(chunk(delta, "tool_calls", usage=usage)) == [
        ThinkingPiece("Hm."),
        TextPiece("Yes"),
        ToolPiece(0, "a", "f", "{}"),
        Finished("tool_calls"),
        Counted(Usage(5, 2, 4)),
    ]


def test_counts_on_each_chunk_without_choices_and_in_timings() -> None:
    timings = {"cache_n": 6, "prompt_n": 30, "predicted_n": 12}
    assert read(
        chunk({"content": "a"}, usage={"prompt_tokens": 5, "completion_tokens": 1}),
        chunk({"content": "b"}, usage={"prompt_tokens": 0, "completion_tokens": 0}),
        chunk({}, "stop", usage=None),
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
        {"choices": None},
        chunk(timings=timings),
    ) == [
        TextPiece("a"),
        Counted(Usage(5, 1)),
        TextPiece("b"),
        Finished("stop"),
        Counted(Usage(5, 2)),
        Counted(Usage(36, 12, 6)),
    ]


@pytest.mark.parametrize(
    ("reason", "finish", "finish_after_calls"),
    [
        ("stop", "stop", "tool_calls"),
        ("tool_calls", "stop", "tool_calls"),
        ("function_call", "stop", "tool_calls"),
        ("length", "length", "length"),
        ("max_tokens", "length", "length"),
        ("content_filter", "content_filter", "content_filter"),
        ("eos_token", "stop", "tool_calls"),
        (None, "stop", "tool_calls"),
        ("", "stop", "tool_calls"),
        ({"type": "stop"}, "stop", "tool_calls"),
    ],
)
def test_reasons_of_the_end(reason: Any, finish: str, finish_after_calls: str) -> None:
    for message, wanted in (({"content": "a"}, finish), ({"tool_calls": [call("{}", "f", id="a")]}, finish_after_calls)):
        assert reply_of(whole(message, reason)).finish == wanted
        assert read(chunk(message, reason))[-1] == Finished(wanted)
        assert read(chunk(message), chunk(None, reason), chunk(None, reason))[-1] == Finished(wanted)


def test_only_the_first_choice_is_read() -> None:
    two = {"choices": [{"index": 1, "delta": {"content": "b"}, "finish_reason": "length"}, {"delta": {"content": "a"}}]}
    assert read(two) == [TextPiece("a"), Finished("stop")]


def test_a_whole_answer_with_several_calls() -> None:
    """vLLM and llama.cpp give no index here; some servers give an object, or no ids."""
    message = {
        "content": None,
        "tool_calls": [call("{ }", "f", id="a", type="function"), call({"é": [1]}, "f"), call(name="f", id="a")],
    }
    reply = reply_of(whole(message))
    first, second, third = reply.parts
    assert first == ToolCall("a", "f", "{ }")
    assert isinstance(second, ToolCall) and isinstance(third, ToolCall)
    assert second.arguments == '{"é":[1]}' and third.arguments == ""
    assert len({"a", second.id, third.id}) == 3 and second.id.startswith("call_")
    assert reply.finish == "tool_calls"


BROKEN_MESSAGES: list[Any] = [
    {"content": 5},
    {"content": {"type": "text", "text": "a"}},
    {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    {"content": [{"type": "text", "text": 5}]},
    {"content": [5]},
    {"reasoning": {"text": "Hm."}},
    {"tool_calls": {"id": "a"}},
    {"tool_calls": ["a"]},
    {"tool_calls": [{"id": "a", "type": "custom", "custom": {"name": "f", "input": ""}}]},
    {"tool_calls": [call("{}", id="a")]},
    {"tool_calls": [call(["a"], "f", id="a")]},
    {"tool_calls": [call("{}", 5, id="a")]},
    {"tool_calls": [call("{}", "f", id=[1])]},
    {"tool_calls": [call("{}", "f", index="0")]},
    {"tool_calls": [call("{}", "f", index=True)]},
]


@pytest.mark.parametrize("message", BROKEN_MESSAGES, ids=str)
def test_what_cannot_be_read_is_an_error(message: Any) -> None:
    with pytest.raises(Unreadable):
        reply_of(whole(message))
    with pytest.raises(Unreadable):
        read(chunk(message), chunk(None, "stop"))


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_failure_is_no_end(reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        reply_of(whole({"content": "a"}, reason))
    with pytest.raises(Unreadable, match=reason):
        read(chunk({"content": "a"}, reason))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"error": {"code": 500, "message": "out of memory", "type": "server_error"}}, "out of memory"),
        ({"error": "out of memory"}, "out of memory"),
        ({"object": "error", "message": "out of memory", "code": 400}, "out of memory"),
        ({"error": {"code": 500}}, "reported an error"),
    ],
)
def test_errors_within_a_stream(error: dict[str, Any], message: str) -> None:
    with pytest.raises(Unreadable, match=message):
        read(chunk({"content": "a"}), error)
    with pytest.raises(Unreadable, match=message):
        reply_of(error)


def test_nothing_follows_the_end() -> None:
    for more in ({"content": "b"}, {"reasoning": "b"}, {"tool_calls": [call("{}", "f", index=0)]}):
        with pytest.raises(Unreadable, match="after its end"):
            read(chunk({"content": "a"}, "stop"), chunk(more))
    assert read(chunk({"content": "a"}, "stop"), chunk({"role": "assistant", "content": ""})) == [
        TextPiece("a"),
        Finished("stop"),
    ]


@pytest.mark.parametrize(
    "answer", [None, [], "a", {}, {"choices": []}, {"choices": [5]}, {"choices": {}}, whole(None), whole([])]
)
def test_a_whole_answer_needs_a_message(answer: Any) -> None:
    with pytest.raises(Unreadable):
        reply_of(answer)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "choices delta message tool_calls function index id name arguments content type text finish_reason".split()
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def mutated(value: Any) -> st.SearchStrategy[Any]:
    """The same value with some of its inner values replaced by others."""
    if isinstance(value, dict):
        kept: st.SearchStrategy[Any] = st.fixed_dictionaries({key: mutated(inner) for key, inner in value.items()})
    elif isinstance(value, list):
        kept = st.tuples(*map(mutated, value)).map(list)
    else:
        kept = st.just(value)
    return st.integers(0, 12).flatmap(lambda dice: kept if dice else JSON_VALUES)


FULL_DELTA = {
    "role": "assistant",
    "content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}],
    "reasoning": "b",
    "tool_calls": [call("{}", "f", index=0, id="a", type="function"), call("{", "g", index=1, id="b")],
}
COUNTS = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
FULL = {
    "id": "x",
    "created": 5,
    "choices": [{"index": 0, "delta": FULL_DELTA, "message": FULL_DELTA, "finish_reason": "stop"}],
    "usage": COUNTS,
    "timings": {"cache_n": 1, "prompt_n": 2, "predicted_n": 3},
}


@given(st.lists(JSON_VALUES | mutated(FULL), max_size=3))
def test_any_json_is_read_or_unreadable(values: list[Any]) -> None:
    reader = ChunkReader()
    for value in values:
        try:
            reply_of(value)
        except Unreadable as wrong:
            assert str(wrong)
        try:
            strict_json.write_with_replacements([repr(event) for event in reader.read(value)])
        except Unreadable as wrong:
            assert str(wrong)


PIECES = st.text(max_size=4)


@given(PIECES, PIECES, st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), PIECES), max_size=3), st.data())
def test_a_stream_says_what_the_whole_answer_says(
    thoughts: str, text: str, asked: list[tuple[str, str]], data: st.DataObject
) -> None:
    """Each call in pieces that come interleaved with those of the others."""
    written = [call(arguments, name, id=f"id_{number}") for number, (name, arguments) in enumerate(asked)]
    message = {"reasoning": thoughts, "content": text, "tool_calls": written}
    queues = [[call("", name, index=number, id=f"id_{number}")] for number, (name, _) in enumerate(asked)]
    for number, (_, arguments) in enumerate(asked):
        queues[number] += [call(letter, index=number) for letter in arguments]
    chunks = [*(chunk({"reasoning_content": letter}) for letter in thoughts), *(chunk({"content": letter}) for letter in text)]
    chunks += [calls(*(queue.pop(0) for queue in queues))] if queues else []
    while waiting := [queue for queue in queues if queue]:
        chunks.append(calls(data.draw(st.sampled_from(waiting)).pop(0)))
    assert reply_from(read(*chunks, chunk(None, "stop"))).parts == reply_of(whole(message)).parts
