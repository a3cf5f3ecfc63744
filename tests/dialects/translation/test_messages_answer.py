"""Answers in Anthropic's Messages API as its official client reads them: whole, streamed, and broken off."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, TextBlock, ThinkingBlock, ToolUseBlock
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.core.errors import AnswerCutShort, BackendFailed
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
from gateway.dialects.translation.messages_answer import SIGNATURE, error_body, write
from gateway.dialects.translation.messages_request import read
from gateway.dialects.translation.messages_stream import EventWriter

HELLO = [{"role": "user", "content": "Hello"}]
USAGE = Usage(prompt_tokens=30, completion_tokens=12, cached_tokens=20)
ASKED: dict[str, Any] = {"model": "m", "max_tokens": 100, "messages": HELLO}
DONE: list[Event] = [Finished("stop"), Counted(USAGE)]


class Pieces(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    """A body in pieces, as a network delivers it."""

    def __init__(self, frames: list[bytes]) -> None:
        self._frames = frames

    def __iter__(self) -> Iterator[bytes]:
        yield from self._frames

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for frame in self._frames:
            yield frame


def transport(frames: list[bytes], status: int = 200) -> httpx2.MockTransport:
    kind = "text/event-stream" if frames[0].startswith(b"event:") else "application/json"
    headers = {"content-type": kind}
    return httpx2.MockTransport(lambda request: httpx2.Response(status, headers=headers, stream=Pieces(frames)))


def client(frames: list[bytes], status: int = 200) -> anthropic.Anthropic:
    http = httpx2.Client(transport=transport(frames, status))
    return anthropic.Anthropic(api_key="k", base_url="http://gateway.test", http_client=http, max_retries=0)


def written(events: Sequence[Event], writer: EventWriter | None = None) -> list[bytes]:
    writer = writer or EventWriter("llama3.2", "msg_1", 25)
    return [frame for frame in [writer.start(), *map(writer.write, events), writer.end()] if frame]


def streamed(events: Sequence[Event]) -> Message:
    frames = written(events)
    check_protocol(frames)
    with client(frames).messages.stream(**ASKED) as stream:
        found = stream.get_final_message().model_dump(exclude={"content": {"__all__": {"parsed_output"}}})
        return Message.model_validate(found)


def whole(reply: Reply) -> Message:
    message: Message = client([strict_json.write(write(reply, "llama3.2", "msg_1", 25))]).messages.create(**ASKED)
    return message


def payloads(frames: list[bytes]) -> list[dict[str, Any]]:
    found = []
    for event in b"".join(frames).split(b"\n\n")[:-1]:
        name, data = event.split(b"\n")
        value = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + value["type"].encode()
        found.append(value)
    return found


def check_protocol(frames: list[bytes]) -> None:
    """One block open at a time, indexes without gaps, deltas of the block's own kind, and the end at the end."""
    values = payloads(frames)
    assert values[0]["type"] == "message_start"
    kinds = {"text": {"text_delta"}, "thinking": {"thinking_delta", "signature_delta"}, "tool_use": {"input_json_delta"}}
    index, allowed = -1, set[str]()
    for value in values[1:]:
        match value["type"]:
            case "content_block_start":
                assert not allowed
                index += 1
                allowed = kinds[value["content_block"]["type"]]
            case "content_block_delta":
                assert value["delta"]["type"] in allowed
            case "content_block_stop":
                allowed = set()
        assert value.get("index", index) == index
    types = [value["type"] for value in values]
    if "error" in types:
        assert types.index("error") == len(types) - 1
    else:
        assert not allowed
        assert types[-2:] == ["message_delta", "message_stop"]
        assert types.count("message_delta") == 1


def inputs(message: Message) -> list[tuple[str, object]]:
    return [(block.name, block.input) for block in message.content if isinstance(block, ToolUseBlock)]


# Whole answers


def test_a_whole_answer() -> None:
    parts: list[Thinking | Text | ToolCall] = [
        Thinking("Hm."),
        Text("I check."),
        ToolCall("call_1", "weather", '{"b": 1, "a": "é"}'),
    ]
    found = write(Reply(parts, "tool_calls", USAGE), "llama3.2", "msg_1")
    assert found == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "llama3.2",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": SIGNATURE},
            {"type": "text", "text": "I check."},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"b": 1, "a": "é"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 20,
            "output_tokens": 12,
        },
    }
    message = whole(Reply(parts, "tool_calls", USAGE))
    assert [type(block) for block in message.content] == [ThinkingBlock, TextBlock, ToolUseBlock]
    assert Message.model_validate(found, strict=True) == message


@pytest.mark.parametrize(
    ("finish", "calls", "reason"),
    [
        ("stop", False, "end_turn"),
        ("length", False, "max_tokens"),
        ("content_filter", False, "refusal"),
        ("tool_calls", True, "tool_use"),
        # Ollama and servers with a forced tool say "stop" for an answer with calls.
        ("stop", True, "tool_use"),
        ("length", True, "max_tokens"),
        ("tool_calls", False, "end_turn"),
    ],
)
def test_stop_reasons_whole_and_streamed(finish: Finish, calls: bool, reason: str) -> None:
    call = [ToolCall("c", "f", "{}")] if calls else []
    assert whole(Reply([Text("a"), *call], finish)).stop_reason == reason
    events: list[Event] = [TextPiece("a"), *([ToolPiece(0, "c", "f", "{}")] if calls else []), Finished(finish)]
    assert streamed(events).stop_reason == reason


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        (USAGE, (10, 20, 12)),
        (Usage(30, 12), (30, 0, 12)),
        (Usage(30, 12, 40), (0, 30, 12)),
        (Usage(), (25, 0, 2)),
        (Usage(completion_tokens=7), (25, 0, 7)),
    ],
)
def test_usage_whole_and_streamed(usage: Usage, counts: tuple[int, int, int]) -> None:
    for message in (
        whole(Reply([Text("five67")], "stop", usage)),
        streamed([TextPiece("five67"), Finished("stop"), Counted(usage)]),
    ):
        found = message.usage
        assert (found.input_tokens, found.cache_read_input_tokens, found.output_tokens) == counts
        assert found.cache_creation_input_tokens == 0


@pytest.mark.parametrize("parts", [[], [Text("")], [Thinking("Hm.")]])
def test_an_answer_without_content_has_an_empty_text(parts: list[Any]) -> None:
    thoughts = [block for block in whole(Reply(parts, "stop")).content if block.type == "thinking"]
    assert whole(Reply(parts, "stop")).content == [*thoughts, TextBlock(type="text", text="")]
    pieces: list[Event] = [ThinkingPiece(part.text) if isinstance(part, Thinking) else TextPiece(part.text) for part in parts]
    with client(written([*pieces, *DONE])).messages.stream(**ASKED) as stream:
        assert stream.get_final_text() == ""
    assert streamed([*pieces, *DONE]).content == whole(Reply(parts, "stop")).content


@pytest.mark.parametrize("arguments", ["", "null", "{}", " "])
def test_a_call_without_arguments_has_an_empty_input(arguments: str) -> None:
    for message in (
        whole(Reply([ToolCall("c", "f", arguments)], "tool_calls")),
        streamed([ToolPiece(0, "c", "f", arguments), *DONE]),
    ):
        assert inputs(message) == [("f", {})]
    # Some clients parse what came in deltas, and an empty text is not JSON.
    deltas = [
        value["delta"]["partial_json"]
        for value in payloads(written([ToolPiece(0, "c", "f", arguments), *DONE]))
        if value["type"] == "content_block_delta"
    ]
    assert json.loads("".join(deltas)) == {}


def test_a_call_without_an_id_gets_one_that_no_other_answer_has() -> None:
    calls: list[Any] = [ToolCall("", "f", "{}"), ToolCall("", "g", "{}")]
    ids = [block["id"] for block in write(Reply(calls, "tool_calls"), "m", "msg_7")["content"]]
    assert ids == ["toolu_7_0", "toolu_7_1"]
    events: list[Event] = [ToolPiece(0, "", "f", "{}"), ToolPiece(1, "", "g", "{}"), *DONE]
    assert [block.id for block in streamed(events).content if isinstance(block, ToolUseBlock)] == ["toolu_1_0", "toolu_1_1"]


@pytest.mark.parametrize("arguments", ['{"command": "rm -rf /', '{"a": tru}', "[1]", "ls"])
def test_arguments_that_are_no_object_fail_the_answer(arguments: str) -> None:
    with pytest.raises(BackendFailed, match="the tool Bash"):
        write(Reply([ToolCall("c", "Bash", arguments)], "tool_calls"), "m", "msg_1")
    cut = write(Reply([ToolCall("c", "Bash", arguments)], "length"), "m", "msg_1")
    assert (cut["stop_reason"], cut["content"][0]["input"]) == ("max_tokens", {})


# Streams


def test_the_frames_of_a_stream_come_at_once() -> None:
    writer = EventWriter("llama3.2", "msg_1", 25)
    assert writer.start() == (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant",'
        b'"model":"llama3.2","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":25,'
        b'"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":0}}}\n\n'
    )
    assert writer.write(ThinkingPiece("Hm")) == (
        b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        b'"content_block":{"type":"thinking","thinking":"","signature":""}}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"thinking_delta","thinking":"Hm"}}\n\n'
    )
    assert writer.write(TextPiece("")) == b""
    assert writer.write(TextPiece("Hi")) == (
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"signature_delta","signature":"' + SIGNATURE.encode() + b'"}}\n\n'
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        b'event: content_block_start\ndata: {"type":"content_block_start","index":1,'
        b'"content_block":{"type":"text","text":""}}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":1,'
        b'"delta":{"type":"text_delta","text":"Hi"}}\n\n'
    )
    assert writer.ping() == b'event: ping\ndata: {"type":"ping"}\n\n'
    assert writer.write(ToolPiece(0, "call_1", "f", '{"a":')) == (
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":1}\n\n'
        b'event: content_block_start\ndata: {"type":"content_block_start","index":2,'
        b'"content_block":{"type":"tool_use","id":"call_1","name":"f","input":{}}}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":2,'
        b'"delta":{"type":"input_json_delta","partial_json":"{\\"a\\":"}}\n\n'
    )
    assert writer.write(Counted(Usage(30, 1))) == b""
    assert writer.write(ToolPiece(0, arguments="1}")).count(b"event: ") == 1
    assert (
        writer.write(Finished("tool_calls")) == b'event: content_block_stop\ndata: {"type":"content_block_stop","index":2}\n\n'
    )
    assert writer.write(Counted(USAGE)) == b""
    assert writer.write(TextPiece("late")) == b""
    assert writer.end() == (
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},'
        b'"usage":{"input_tokens":10,"cache_creation_input_tokens":0,"cache_read_input_tokens":20,"output_tokens":12}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    assert writer.end() == writer.ping() == writer.error("api_error", "late") == b""


MIXED: list[Event] = [
    ThinkingPiece("Let me "),
    ThinkingPiece("see."),
    TextPiece("I check "),
    TextPiece("both.\u2028\u0085\r\n\n"),
    ToolPiece(0, "call_a", "weather", '{"city":'),
    ToolPiece(0, arguments='"Rome"}'),
    ToolPiece(1, "call_b", "time", '{"zone":"CET"}'),
    TextPiece("Done."),
    Finished("tool_calls"),
    Counted(USAGE),
]
MIXED_PARTS: list[Thinking | Text | ToolCall] = [
    Thinking("Let me see."),
    Text("I check both.\u2028\u0085\r\n\n"),
    ToolCall("call_a", "weather", '{"city":"Rome"}'),
    ToolCall("call_b", "time", '{"zone":"CET"}'),
    Text("Done."),
]


def test_a_stream_gives_the_same_message_as_the_whole_answer() -> None:
    assert streamed(MIXED) == whole(Reply(MIXED_PARTS, "tool_calls", USAGE))


def test_a_stream_cut_anywhere_gives_the_same_message() -> None:
    data = b"".join(written(MIXED))
    for size in (1, 7, 100):
        with client([data[begin : begin + size] for begin in range(0, len(data), size)]).messages.stream(**ASKED) as stream:
            assert inputs(stream.get_final_message()) == [("weather", {"city": "Rome"}), ("time", {"zone": "CET"})]


def test_the_raw_stream_and_the_events_of_the_helper() -> None:
    with client(written(MIXED)).messages.create(**ASKED, stream=True) as raw:
        kinds = [event.type for event in raw]
    assert kinds == [value["type"] for value in payloads(written(MIXED))]
    with client(written(MIXED)).messages.stream(**ASKED) as stream:
        events = list(stream)
    assert "".join(event.text for event in events if event.type == "text") == "I check both.\u2028\u0085\r\n\nDone."
    assert "".join(event.thinking for event in events if event.type == "thinking") == "Let me see."
    assert [event.signature for event in events if event.type == "signature"] == [SIGNATURE]
    assert [event.snapshot for event in events if event.type == "input_json"][-1] == {"zone": "CET"}


def test_the_asynchronous_client_reads_the_same() -> None:
    async def ask() -> tuple[Message, Message]:
        http = httpx2.AsyncClient(transport=transport(written(MIXED)))
        asynchronous = anthropic.AsyncAnthropic(api_key="k", base_url="http://gateway.test", http_client=http, max_retries=0)
        async with asynchronous.messages.stream(**ASKED) as stream:
            message: Message = await stream.get_final_message()
        answer = [strict_json.write(write(Reply(MIXED_PARTS, "tool_calls", USAGE), "llama3.2", "msg_1"))]
        http = httpx2.AsyncClient(transport=transport(answer))
        asynchronous = anthropic.AsyncAnthropic(api_key="k", base_url="http://gateway.test", http_client=http, max_retries=0)
        return message, await asynchronous.messages.create(**ASKED)

    message, other = asyncio.run(ask())
    assert [block.type for block in message.content] == [block.type for block in other.content]
    assert inputs(message) == inputs(other)
    assert message.usage == other.usage


def test_a_ping_may_stand_anywhere() -> None:
    writer = EventWriter("llama3.2", "msg_1", 25)
    frames = [frame for event in MIXED for frame in (writer.ping(), writer.write(event))]
    with client([writer.ping(), writer.start(), *frames, writer.end()]).messages.stream(**ASKED) as stream:
        assert len(stream.get_final_message().content) == 5


def test_parallel_calls_that_come_interleaved_wait_for_the_first() -> None:
    writer = EventWriter("llama3.2", "msg_1", 25)
    events: list[Event] = [
        ToolPiece(0, "a", "f", '{"x":"}'),
        ToolPiece(1, "b", "g", '{"y":'),
        ToolPiece(2, "c", "h", '{"z":[1,'),
        ToolPiece(0, arguments='\\"{"'),
        ToolPiece(1, arguments="1}"),
        ToolPiece(2, arguments="2]}"),
    ]
    frames = [writer.start(), *map(writer.write, events)]
    assert [frame.count(b"event: ") for frame in frames] == [1, 2, 0, 0, 1, 0, 0]
    frames.append(writer.write(ToolPiece(0, arguments="}")))
    assert frames[-1].count(b"content_block_start\n") == 2, "as soon as the first is complete"
    frames += [writer.write(Finished("tool_calls")), writer.end()]
    check_protocol(frames)
    with client(frames).messages.stream(**ASKED) as stream:
        found = stream.get_final_message()
    assert [(block.id, block.input) for block in found.content if block.type == "tool_use"] == [
        ("a", {"x": '}"{'}), ("b", {"y": 1}), ("c", {"z": [1, 2]}),
    ]  # fmt: skip


def test_text_between_the_pieces_of_a_call_comes_after_it() -> None:
    events: list[Event] = [
        ToolPiece(0, "a", "f", '{"x":'),
        TextPiece("Wait"),
        ToolPiece(0, arguments="1}"),
        TextPiece("!"),
        *DONE,
    ]
    found = streamed(events)
    assert [block.type for block in found.content] == ["tool_use", "text"]
    assert found.content[1] == TextBlock(type="text", text="Wait!")


def error_of(events: Sequence[Event]) -> anthropic.APIStatusError:
    frames = written(events)
    check_protocol(frames)
    with pytest.raises(anthropic.APIStatusError) as failed, client(frames).messages.create(**ASKED, stream=True) as stream:
        list(stream)
    return failed.value


@pytest.mark.parametrize("arguments", [['{"command": "rm -rf /'], ['{"a"', ": tru}"], ["[1]"], ["ls"], ["{}", "{}"]])
@pytest.mark.parametrize("follows", [[], [TextPiece("Done")], [ToolPiece(1, "d", "g", "{}"), ToolPiece(1)]])
def test_arguments_that_are_no_object_end_the_stream_with_an_error(arguments: list[str], follows: list[Event]) -> None:
    calls: list[Event] = [ToolPiece(0, "c", "Bash", arguments[0]), *(ToolPiece(0, arguments=more) for more in arguments[1:])]
    failed = error_of([*calls, *follows, *DONE])
    assert failed.body == {
        "type": "error",
        "error": {
            "type": "api_error",
            "message": "The model called the tool Bash with arguments that are not a JSON object; try again.",
        },
    }
    writer = EventWriter("m", "msg_1", 1)
    written([*calls, *follows, *DONE], writer)
    assert "Bash" in writer.failure


def test_the_last_piece_of_a_wrong_object_is_not_sent() -> None:
    """Else a client that is not careful would run the tool before the error comes."""
    writer = EventWriter("m", "msg_1", 1)
    assert writer.write(ToolPiece(0, "c", "f", '{"a": tr')).count(b"input_json_delta") == 1
    failed = writer.write(ToolPiece(0, arguments="u}"))
    assert failed.startswith(b"event: error\n")
    assert b"input_json_delta" not in failed


def test_arguments_that_come_after_their_object_are_never_lost_in_silence() -> None:
    events: list[Event] = [
        ToolPiece(0, "a", "f", "{}"),
        TextPiece("x"),
        ToolPiece(0, arguments=" \n"),
        ToolPiece(0),
        TextPiece("y"),
    ]
    assert [block.type for block in streamed([*events, *DONE]).content] == ["tool_use", "text"]
    assert "the tool f" in error_of([*events, ToolPiece(0, arguments='{"a":1}'), *DONE]).message


def test_a_call_that_is_cut_at_the_limit_is_left_as_it_is() -> None:
    found = streamed([TextPiece("a"), ToolPiece(0, "c", "f", '{"a": "b'), Finished("length"), Counted(USAGE)])
    assert found.stop_reason == "max_tokens"
    assert [block.type for block in found.content] == ["text", "tool_use"]


def test_a_stream_that_ends_early_ends_with_an_error() -> None:
    for events in ([], [TextPiece("Hel")], [ToolPiece(0, "c", "f", '{"a"')]):
        assert AnswerCutShort().message in error_of(list(events)).message


def test_nothing_comes_after_an_error() -> None:
    writer = EventWriter("m", "msg_1", 3)
    frames = [writer.start(), writer.write(TextPiece("Hel")), writer.error("overloaded_error", "Busy; try again.")]
    assert frames[-1] == (
        b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Busy; try again."}}\n\n'
    )
    assert [writer.write(event) for event in DONE] == [b"", b""]
    assert writer.end() == writer.ping() == writer.error("api_error", "again") == b""
    with pytest.raises(anthropic.APIStatusError) as failed, client(frames).messages.create(**ASKED, stream=True) as stream:
        list(stream)
    assert failed.value.type == "overloaded_error"


# Any events

NAMES = st.sampled_from(["f", "g"])
ARGUMENTS = st.dictionaries(st.text(max_size=3), st.text(max_size=8) | st.lists(st.integers(0, 9), max_size=2), max_size=3)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def scrambled(draw: st.DrawFn) -> tuple[list[Event], dict[str, Any], str, str]:
    """Events of an answer whose pieces come in any order that keeps the order within each call and each kind of text."""
    inputs = {f"call_{index}": draw(ARGUMENTS) for index in range(draw(st.integers(0, 4)))}
    tracks: list[list[Event]] = []
    for index, (call_id, value) in enumerate(inputs.items()):
        text, track = json.dumps(value), [ToolPiece(index, call_id, "f")]
        size = draw(st.integers(1, 5))
        track += [ToolPiece(index, arguments=text[begin : begin + size]) for begin in range(0, len(text), size)]
        tracks.append(list(track))
    texts, thoughts = draw(st.lists(TEXTS, max_size=4)), draw(st.lists(TEXTS, max_size=4))
    tracks += [[TextPiece(text) for text in texts], [ThinkingPiece(text) for text in thoughts]]
    events: list[Event] = []
    while tracks := [track for track in tracks if track]:
        events.append(draw(st.sampled_from(tracks)).pop(0))
    return events, inputs, "".join(texts), "".join(thoughts)


@settings(deadline=None)
@given(scrambled())
def test_pieces_in_any_order_never_corrupt_a_block(given: tuple[list[Event], dict[str, Any], str, str]) -> None:
    events, expected, text, thinking = given
    frames = written([*events, *DONE])
    check_protocol(frames)
    with client(frames).messages.stream(**ASKED) as stream:
        content = stream.get_final_message().content
    assert {block.id: block.input for block in content if block.type == "tool_use"} == expected
    assert "".join(block.text for block in content if block.type == "text") == text
    assert "".join(block.thinking for block in content if block.type == "thinking") == thinking


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    part = (
        st.builds(Text, TEXTS.filter(bool))
        | st.builds(Thinking, TEXTS.filter(bool))
        | st.builds(
            ToolCall, st.from_regex(r"call_[0-9]{8}", fullmatch=True), NAMES, ARGUMENTS.map(strict_json.write).map(bytes.decode)
        )
    )
    return Reply(draw(st.lists(part, min_size=1, max_size=5)), "stop", USAGE)


@given(replies())
def test_what_a_client_sends_back_is_what_the_model_wrote(reply: Reply) -> None:
    content = write(reply, "m", "msg_1")["content"]
    message = read({"messages": [*HELLO, {"role": "assistant", "content": content}, *HELLO]}).messages[1]
    assert list(message.parts) == reply.parts


# Errors


@pytest.mark.parametrize(
    ("status", "kind", "raised"),
    [
        (400, "invalid_request_error", anthropic.BadRequestError),
        (401, "authentication_error", anthropic.AuthenticationError),
        (403, "permission_error", anthropic.PermissionDeniedError),
        (404, "not_found_error", anthropic.NotFoundError),
        (405, "invalid_request_error", anthropic.APIStatusError),
        (413, "request_too_large", anthropic.APIStatusError),
        (422, "invalid_request_error", anthropic.UnprocessableEntityError),
        (429, "rate_limit_error", anthropic.RateLimitError),
        (500, "api_error", anthropic.InternalServerError),
        (502, "api_error", anthropic.InternalServerError),
        (503, "overloaded_error", anthropic.APIStatusError),
        (504, "timeout_error", anthropic.APIStatusError),
        (529, "overloaded_error", anthropic.APIStatusError),
    ],
)
def test_errors_have_the_type_of_their_status(status: int, kind: str, raised: type[anthropic.APIStatusError]) -> None:
    body = error_body(status, "No.", "req_1")
    assert body == {"type": "error", "error": {"type": kind, "message": "No."}, "request_id": "req_1"}
    assert "request_id" not in error_body(status, "No.", "")
    with pytest.raises(raised) as failed:
        client([strict_json.write(body)], status).messages.create(**ASKED)
    assert failed.value.status_code == status
    assert failed.value.body == body
