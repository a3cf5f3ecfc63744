"""Ollama's /api/chat read into the neutral form, and answers written as its records."""

import base64
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.core.errors import AnswerCutShort, BackendFailed, BadRequest
from gateway.dialects.dialect import Usage
from gateway.dialects.translation.chat_request import body_of
from gateway.dialects.translation.conversation import (
    Counted,
    Finish,
    Finished,
    Format,
    Image,
    Message,
    Reply,
    Text,
    TextPiece,
    Thinking,
    ThinkingPiece,
    Tool,
    ToolCall,
    ToolPiece,
    ToolResult,
)
from gateway.dialects.translation.native_chat import ChatWriter, is_load, load_answer, read_chat, write_chat
from gateway.dialects.translation.native_records import Durations, timestamp
from tests.dialects.translation.native import JSON, NOW, PNG, WEATHER, records


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"model": "qwen3", "messages": list(messages), **fields}


def user(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def calling(*names: str, ids: tuple[str, ...] = ()) -> dict[str, Any]:
    calls = [{"function": {"name": name, "arguments": {"n": number}}} for number, name in enumerate(names)]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": i, **c} for i, c in zip(ids, calls, strict=True)] if ids else calls,
    }


def result(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **fields}


def pairs(*messages: dict[str, Any]) -> list[tuple[str, str]]:
    """The ids of calls and of results, in order."""
    parts = [part for message in read_chat(chat(*messages)).messages for part in message.parts]
    return [
        ("call", part.id) if isinstance(part, ToolCall) else ("result", part.call_id)
        for part in parts
        if isinstance(part, ToolCall | ToolResult)
    ]


def refused(body: dict[str, Any]) -> str:
    with pytest.raises(BadRequest) as found:
        read_chat(body)
    return found.value.message


def test_a_conversation_with_each_role() -> None:
    prompt = read_chat(
        chat({"role": "system", "content": "Be brief."}, user("Hi"), {"role": "assistant", "content": "Hello."}, user(""))
    )
    assert prompt.messages == [
        Message("system", (Text("Be brief."),)),
        Message("user", (Text("Hi"),)),
        Message("assistant", (Text("Hello."),)),
        Message("user", (Text(""),)),
    ]
    assert prompt.stream is True
    assert (prompt.effort, prompt.format, prompt.most_output, prompt.dropped) == (None, None, None, [])


def test_roles_are_read_without_case_as_ollama_does() -> None:
    assert read_chat(chat({"role": "System", "content": "x"})).messages == [Message("system", (Text("x"),))]


@pytest.mark.parametrize("given, read", [(True, True), (None, True), (False, False)])
def test_a_chat_is_streamed_unless_the_client_says_no(given: bool | None, read: bool) -> None:
    assert read_chat(chat(user("x"), stream=given)).stream is read


def test_images_stand_before_the_text_and_have_a_media_type() -> None:
    prompt = read_chat(chat(user("What is this?", images=[PNG, PNG[:20] + "\r\n" + PNG[20:]])))
    assert prompt.messages == [Message("user", (Image("image/png", PNG), Image("image/png", PNG), Text("What is this?")))]


@pytest.mark.parametrize(
    "head, media_type",
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image/webp"),
        (b"BM\x00\x00", "image/bmp"),
        (b"II*\x00", "image/tiff"),
    ],
)
def test_media_types_follow_from_the_first_bytes(head: bytes, media_type: str) -> None:
    data = base64.b64encode(head + bytes(30)).decode()
    assert read_chat(chat(user("", images=[data]))).messages == [Message("user", (Image(media_type, data),))]


@pytest.mark.parametrize(
    "data", ["!!!", "https://example.org/a.png", base64.b64encode(b"RIFF\x00\x00\x00\x00WAVEfmt ").decode(), "", "ä", 7]
)
def test_what_is_not_an_image_is_refused(data: object) -> None:
    assert "'images'" in refused(chat(user("x", images=[data])))


def test_images_of_the_assistant_and_of_the_system_are_refused_by_name() -> None:
    for role in ("assistant", "system"):
        assert "'images'" in refused(chat({"role": role, "content": "", "images": [PNG]}))


def test_calls_without_ids_are_paired_with_their_results_in_order() -> None:
    assert pairs(user("x"), calling("a", "b"), result("1"), result("2")) == [
        ("call", "call00001"),
        ("call", "call00002"),
        ("result", "call00001"),
        ("result", "call00002"),
    ]


def test_results_in_another_order_are_paired_by_the_name_of_their_tool() -> None:
    found = pairs(calling("a", "b", "a"), result("1", tool_name="b"), result("2", tool_name="a"), result("3", tool_name="a"))
    assert found[3:] == [("result", "call00002"), ("result", "call00001"), ("result", "call00003")]


def test_the_older_name_of_a_tool_is_read_too() -> None:
    assert pairs(calling("a", "b"), result("1", name="b"), result("2", name="a"))[2:] == [
        ("result", "call00002"),
        ("result", "call00001"),
    ]


def test_given_ids_stay_as_they_are() -> None:
    found = pairs(
        calling("a", "b", ids=("call_x", "call_y")), result("2", tool_call_id="call_y"), result("1", tool_call_id="call_x")
    )
    assert found == [("call", "call_x"), ("call", "call_y"), ("result", "call_y"), ("result", "call_x")]


def test_given_ids_of_calls_serve_results_that_have_none() -> None:
    found = pairs(calling("a", "b", ids=("call_x", "call_y")), result("2", tool_name="b"), result("1"))
    assert found[2:] == [("result", "call_y"), ("result", "call_x")]


def test_a_result_with_an_id_belongs_to_a_call_that_came_without() -> None:
    assert pairs(calling("a"), result("1", tool_call_id="mine")) == [("call", "call00001"), ("result", "call00001")]
    assert pairs(calling("a", ids=("other",)), result("1", tool_call_id="mine")) == [("call", "other"), ("result", "mine")]


def test_results_belong_to_the_last_calls() -> None:
    found = pairs(calling("a", "a"), result("1"), user("never mind"), calling("a"), result("2", tool_name="a"))
    assert found == [
        ("call", "call00001"),
        ("call", "call00002"),
        ("result", "call00001"),
        ("call", "call00003"),
        ("result", "call00003"),
    ]


def test_a_result_without_a_call_has_an_id_of_its_own() -> None:
    assert pairs(result("1"), calling("a"), result("2"), result("3")) == [
        ("result", "call00001"),
        ("call", "call00002"),
        ("result", "call00002"),
        ("result", "call00003"),
    ]


def test_invented_ids_have_nine_letters_and_digits_as_mistral_wants() -> None:
    assert all(len(call_id) == 9 and call_id.isalnum() for _, call_id in pairs(*([calling("a"), result("1")] * 30)))


def test_neighbouring_results_are_one_message() -> None:
    prompt = read_chat(chat(calling("a", "b"), result("1", images=[PNG]), result(""), user("Go on")))
    assert prompt.messages[1:] == [
        Message("user", (ToolResult("call00001", (Image("image/png", PNG), Text("1"))), ToolResult("call00002", (Text(""),)))),
        Message("user", (Text("Go on"),)),
    ]


def test_an_assistant_message_with_thinking_text_and_calls() -> None:
    message = {**calling("a"), "content": "Let me see.", "thinking": "Hm."}
    assert read_chat(chat(message)).messages == [
        Message("assistant", (Thinking("Hm."), Text("Let me see."), ToolCall("call00001", "a", '{"n":0}')))
    ]
    assert read_chat(chat({"role": "assistant"})).messages == [Message("assistant", (Text(""),))]


@pytest.mark.parametrize(
    "arguments, text",
    [({}, "{}"), (None, ""), ({"b": 1, "a": [1.5, "ü"]}, '{"b":1,"a":[1.5,"ü"]}'), ('{ "b": 1 }', '{ "b": 1 }')],
)
def test_arguments_are_an_object_or_the_text_of_one(arguments: object, text: str) -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": arguments}}]}
    (part,) = read_chat(chat(message)).messages[0].parts
    assert isinstance(part, ToolCall)
    assert part.arguments == text


@pytest.mark.parametrize("arguments", ["[1]", "{", 5, [], "\ud800", {"a": "\ud800"}, {"a": 2**70}])
def test_other_arguments_are_refused(arguments: object) -> None:
    refused(chat({"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": arguments}}]}))


def test_tools_are_functions_with_the_keys_of_their_schemas_in_order() -> None:
    prompt = read_chat(chat(user("x"), tools=[WEATHER, {"type": "web_search"}, {"function": {"name": "now"}}]))
    schema = WEATHER["function"]["parameters"]  # type: ignore[index]
    assert prompt.tools == [Tool("get_weather", "The weather of a city.", schema), Tool("now")]
    assert list(prompt.tools[0].schema) == ["type", "required", "properties"]
    assert prompt.dropped == ["tools"]


@pytest.mark.parametrize(
    "think, effort",
    [
        (None, None),
        (True, "medium"),
        (False, "none"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("max", "max"),
        ("minimal", "minimal"),
        ("xhigh", "xhigh"),
        ("none", "none"),
        ("ultra", "max"),
    ],
)
def test_think(think: object, effort: str | None) -> None:
    assert read_chat(chat(user("x"), think=think)).effort == effort


@pytest.mark.parametrize("think", ["", "yes", 1, {}, []])
def test_other_words_for_thinking_are_refused(think: object) -> None:
    assert "'think'" in refused(chat(user("x"), think=think))


@pytest.mark.parametrize(
    "given, read",
    [(None, None), ("", None), ("json", Format()), ({"type": "object"}, Format({"type": "object"})), ({}, Format({}))],
)
def test_format(given: object, read: Format | None) -> None:
    assert read_chat(chat(user("x"), format=given)).format == read


@pytest.mark.parametrize("given", ["yaml", 1, [], True])
def test_other_formats_are_refused(given: object) -> None:
    assert "'format'" in refused(chat(user("x"), format=given))


@pytest.mark.parametrize(
    "wished, most", [(None, None), (-1, None), (-2, None), (0, None), (1, 1), (99.9, 99), (1e30, None), (4096, 4096)]
)
def test_the_limit_of_the_output(wished: object, most: int | None) -> None:
    assert (
        read_chat(chat(user("x"), options={"num_predict": wished} if wished != 1e30 else {"num_predict": 2.0**60})).most_output
        == most
    )


def test_options_that_servers_share_are_sent_in_a_fixed_order() -> None:
    options = {
        "seed": 7.0,
        "top_k": 40,
        "temperature": 0,
        "min_p": 0.05,
        "top_p": 0.9,
        "repeat_penalty": 1.1,
        "stop": ["\n", ""],
    }
    prompt = read_chat(chat(user("x"), options=options | {"presence_penalty": 0.5, "frequency_penalty": None}))
    assert list(prompt.sampling.items()) == [
        ("temperature", 0),
        ("top_p", 0.9),
        ("min_p", 0.05),
        ("repeat_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("top_k", 40),
        ("seed", 7),
    ]
    assert json.dumps(prompt.sampling["seed"]) == "7"
    assert prompt.stop == ("\n",)


def test_a_negative_seed_is_a_random_one() -> None:
    assert read_chat(chat(user("x"), options={"seed": -1})).sampling == {}


def test_options_of_loading_and_of_one_server_are_dropped_by_name() -> None:
    options = {"num_ctx": 8192, "num_gpu": 99, "mirostat": 1, "num_keep": None, "unheard_of": 1, "temperature": 1}
    prompt = read_chat(chat(user("x"), options=options, keep_alive=-1, truncate=True, shift=False, unheard_of=1))
    assert prompt.dropped == ["keep_alive", "truncate", "shift", "options.num_ctx", "options.num_gpu", "options.mirostat"]
    assert prompt.sampling == {"temperature": 1}


def test_null_options_are_none() -> None:
    assert read_chat(chat(user("x"), options=None)).sampling == {}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "1"},
        {"seed": True},
        {"top_k": []},
        {"stop": "x"},
        {"stop": [1]},
        {"seed": 1e300},
        {"num_predict": "5"},
        [],
    ],
)
def test_options_of_other_types_are_refused(options: object) -> None:
    assert "option" in refused(chat(user("x"), options=options))


@pytest.mark.parametrize(
    "message",
    [
        {"content": "x"},
        {"role": "critic", "content": "x"},
        user([{"type": "text", "text": "x"}]),  # type: ignore[arg-type]
        user("x", images="x"),
        user("x", tool_calls=[{"function": {"name": "a"}}]),
        result("x", tool_calls=[{"function": {"name": "a"}}]),
        result("x", tool_call_id=5),
        {"role": "assistant", "thinking": {}},
        {"role": "assistant", "tool_calls": [{"function": {}}]},
        {"role": "assistant", "tool_calls": [{"type": "custom"}]},
        {"role": "assistant", "tool_calls": ["x"]},
    ],
)
def test_messages_that_cannot_be_read_are_refused(message: dict[str, Any]) -> None:
    refused(chat(message))


def test_log_probabilities_and_rendered_prompts_are_refused_by_name() -> None:
    assert "'logprobs'" in refused(chat(user("x"), logprobs=True))
    assert "'_debug_render_only'" in refused(chat(user("x"), _debug_render_only=True))
    assert read_chat(chat(user("x"), logprobs=False, top_logprobs=3)).dropped == ["top_logprobs"]


@pytest.mark.parametrize(
    "keep_alive, reason",
    [
        (None, "load"),
        (0, "unload"),
        (0.0, "unload"),
        ("0", "unload"),
        ("0s", "unload"),
        ("0h0.0m", "unload"),
        ("-0", "unload"),
        (-1, "load"),
        ("5m", "load"),
        ("10s", "load"),
        (False, "load"),
        ("", "load"),
        ("0" * 100_000, "load"),
    ],
)
def test_a_chat_without_messages_loads_or_unloads(keep_alive: object, reason: str) -> None:
    body = {"model": "qwen3", "keep_alive": keep_alive}
    assert is_load(body)
    assert is_load({**body, "messages": []})
    assert load_answer(body, "qwen3", NOW) == {
        "model": "qwen3",
        "created_at": NOW,
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": reason,
    }
    assert not is_load(chat(user("")))


def test_one_more_turn_leaves_the_earlier_messages_as_they_were() -> None:
    turns = [
        user("a", images=[PNG]),
        calling("f", "g"),
        result("1", tool_name="g"),
        result("2"),
        {"role": "assistant", "content": "b"},
    ]
    turns += [user("c"), calling("f"), result("3"), {"role": "assistant", "content": "d", "thinking": "e"}]
    for length in (1, 2, 4, 5, 6, 7, 8):
        shorter, longer = (read_chat(chat(*turns[:end])).messages for end in (length, len(turns)))
        assert longer[: len(shorter)] == shorter


WHOLE = Reply(
    [
        Thinking("Hm. "),
        Text("It is "),
        Text("mild."),
        ToolCall("call_9", "get_weather", '{"city": "Köln"}'),
        ToolCall("", "now", ""),
    ],
    "tool_calls",
    Usage(27, 9, 16),
)


def test_a_whole_answer_has_the_keys_of_ollama_in_its_order() -> None:
    record = write_chat(WHOLE, "qwen3", NOW, Durations(512, 41, 120, 60))
    assert strict_json.write(record).decode() == (
        '{"model":"qwen3","created_at":"2026-08-21T18:00:00.101234567Z","message":{"role":"assistant","content":"It is mild.",'
        '"thinking":"Hm. ","tool_calls":[{"id":"call_9","function":{"index":0,"name":"get_weather",'
        '"arguments":{"city":"Köln"}}},'
        '{"function":{"index":1,"name":"now","arguments":{}}}]},"done":true,"done_reason":"stop","total_duration":512,'
        '"load_duration":41,"prompt_eval_count":27,"prompt_eval_cached_count":16,"prompt_eval_duration":120,"eval_count":9,'
        '"eval_duration":60}'
    )


def test_what_is_zero_or_unknown_is_left_out() -> None:
    assert write_chat(Reply([Text("x")], "length", Usage(0, None, 0)), "m", NOW) == {
        "model": "m",
        "created_at": NOW,
        "message": {"role": "assistant", "content": "x"},
        "done": True,
        "done_reason": "length",
    }


@pytest.mark.parametrize(
    "finish, reason", [("stop", "stop"), ("length", "length"), ("tool_calls", "stop"), ("content_filter", "stop")]
)
def test_reasons(finish: Finish, reason: str) -> None:
    assert write_chat(Reply([], finish), "m", NOW)["done_reason"] == reason


@pytest.mark.parametrize("arguments", ['{"city": "Kö', "[]", '"{}"', "NaN", "{}{}", '{"a":' * 400 + "1" + "}" * 400])
def test_arguments_that_are_no_object_fail_unless_the_limit_cut_them(arguments: str) -> None:
    calls = [ToolCall("1", "good", "{}"), ToolCall("2", "bad", arguments)]
    with pytest.raises(BackendFailed, match="'bad'"):
        write_chat(Reply([*calls], "tool_calls"), "m", NOW)
    cut = write_chat(Reply([*calls], "length"), "m", NOW)
    assert [call["function"]["name"] for call in cut["message"]["tool_calls"]] == ["good"]
    assert cut["done_reason"] == "length"


def test_a_last_message_of_the_assistant_is_the_beginning_of_the_answer() -> None:
    beginning = {"role": "assistant", "content": "It is"}
    assert read_chat(chat(user("x"), beginning)).continues_last
    assert not read_chat(chat(user("x"), beginning, user("y"))).continues_last
    assert not read_chat(chat(user("x"), calling("f"))).continues_last
    assert not read_chat(chat(user("x"), {"role": "assistant", "content": ""})).continues_last
    assert not read_chat(chat()).continues_last


def test_a_stream_is_written_piece_by_piece() -> None:
    writer = ChatWriter("llama3.2")
    frames = [
        writer.write(event, NOW)
        for event in (TextPiece("Hi"), TextPiece(""), TextPiece("!"), Finished("stop"), Counted(Usage(27, 3)))
    ]
    assert frames == [
        b'{"model":"llama3.2","created_at":"2026-08-21T18:00:00.101234567Z","message":{"role":"assistant","content":"Hi"},"done":false}\n',
        b"",
        b'{"model":"llama3.2","created_at":"2026-08-21T18:00:00.101234567Z","message":{"role":"assistant","content":"!"},"done":false}\n',
        b"",
        b"",
    ]
    assert writer.end(NOW, Durations(512345678, 41234567, 120000000, 60000000)) == (
        b'{"model":"llama3.2","created_at":"2026-08-21T18:00:00.101234567Z","message":{"role":"assistant","content":""},"done":true,'
        b'"done_reason":"stop","total_duration":512345678,"load_duration":41234567,"prompt_eval_count":27,"prompt_eval_duration":120000000,'
        b'"eval_count":3,"eval_duration":60000000}\n'
    )


def test_interleaved_tool_calls_are_written_whole_when_the_answer_is_finished() -> None:
    writer = ChatWriter("m")
    pieces = [
        ToolPiece(0, "a", "f", '{"x"'),
        ToolPiece(1, "b", "g"),
        ToolPiece(0, arguments=": 1}"),
        ToolPiece(1, arguments="{}"),
    ]
    assert [writer.write(piece, NOW) for piece in pieces] == [b""] * 4
    (record,) = records(writer.write(Finished("tool_calls"), NOW))
    assert record["message"] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "a", "function": {"index": 0, "name": "f", "arguments": {"x": 1}}},
            {"id": "b", "function": {"index": 1, "name": "g", "arguments": {}}},
        ],
    }
    assert record["done"] is False
    assert records(writer.end(NOW))[0]["done_reason"] == "stop"


def test_a_stream_that_ends_early_ends_with_an_error() -> None:
    writer = ChatWriter("m")
    writer.write(TextPiece("x"), NOW)
    assert records(writer.end(NOW)) == [{"error": AnswerCutShort().message}]
    assert writer.failure == AnswerCutShort().message
    assert writer.end(NOW) + writer.write(TextPiece("y"), NOW) + writer.fail(BackendFailed()) == b""


def test_a_stream_with_broken_tool_calls_ends_with_an_error() -> None:
    writer = ChatWriter("m")
    writer.write(ToolPiece(0, "a", "f", "{"), NOW)
    (record,) = records(writer.write(Finished("tool_calls"), NOW))
    assert list(record) == ["error"]
    assert "'f'" in record["error"]
    assert writer.end(NOW) == b""


def test_a_heartbeat_is_a_record_without_content() -> None:
    writer = ChatWriter("m")
    message = {"role": "assistant", "content": ""}
    assert records(writer.ping(NOW)) == [{"model": "m", "created_at": NOW, "message": message, "done": False}]
    writer.write(Finished("stop"), NOW)
    writer.end(NOW)
    assert writer.ping(NOW) == b""


def test_a_failure_of_the_backend_is_an_error_in_the_stream() -> None:
    writer = ChatWriter("m")
    writer.write(TextPiece("x"), NOW)
    assert writer.fail(BackendFailed("broken\u2028down")) == b'{"error":"broken\\u2028down"}\n'


def test_the_last_counts_of_a_stream_hold() -> None:
    writer = ChatWriter("m")
    for event in (Counted(Usage(5, 1)), TextPiece("x"), Counted(Usage(5, 2)), Finished("stop"), Counted(Usage(5, 3))):
        writer.write(event, NOW)
    assert records(writer.end(NOW))[0]["eval_count"] == 3


def test_no_text_cuts_a_line_in_two() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh<>&ü\U0001f600"
    writer = ChatWriter("m")
    frame = writer.write(TextPiece(text), NOW)
    assert len(frame.decode().splitlines()) == 1
    assert b"\\u2028" in frame
    assert records(frame)[0]["message"]["content"] == text


def test_times_are_written_as_ollama_does() -> None:
    assert timestamp(1_787_335_200_101_234_567) == "2026-08-21T18:00:00.101234567Z"
    assert timestamp(0) == "1970-01-01T00:00:00.000000000Z"


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool"]) | JSON,
            "content": st.text(max_size=5) | JSON,
            "thinking": st.text(max_size=5) | JSON,
            "images": st.just([PNG]) | JSON,
            "tool_calls": st.just(calling("a", "b")["tool_calls"]) | JSON,
            "tool_name": st.sampled_from(["a", "b"]) | JSON,
            "tool_call_id": st.sampled_from(["call00001", "x"]) | JSON,
        },
    ),
    max_size=6,
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "messages": MESSAGES | JSON,
        "tools": st.just([WEATHER]) | JSON,
        "options": st.dictionaries(st.sampled_from(["num_predict", "seed", "stop", "num_ctx", "top_k"]), JSON, max_size=3)
        | JSON,
        **dict.fromkeys(("format", "think", "stream", "keep_alive", "logprobs", "truncate"), JSON),
    },
)


@given(BODIES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_json_is_read_or_refused(body: dict[str, Any]) -> None:
    is_load(body)
    load_answer(body, "m", NOW)
    try:
        prompt = read_chat(body)
    except BadRequest as refusal:
        assert refusal.message
        return
    assert all(message.parts for message in prompt.messages)
    try:
        body_of(prompt, "openai")
    except BadRequest as refusal:
        assert refusal.message


PARTS = st.lists(
    st.builds(TextPiece, st.text(max_size=6))
    | st.builds(ThinkingPiece, st.text(max_size=6))
    | st.builds(ToolPiece, st.integers(0, 2), st.just("i"), st.just("f"), st.just("{}")),
    max_size=8,
)


@given(PARTS)
def test_a_stream_says_what_the_whole_answer_says(events: list[Any]) -> None:
    calls = sorted({event.index for event in events if isinstance(event, ToolPiece)})
    events = [event for event in events if not isinstance(event, ToolPiece)] + [
        ToolPiece(index, "i", "f", "{}") for index in calls
    ]
    whole = write_chat(
        Reply(
            [
                Text(event.text)
                if isinstance(event, TextPiece)
                else Thinking(event.text)
                if isinstance(event, ThinkingPiece)
                else ToolCall("i", "f", "{}")
                for event in events
            ],
            "stop",
            Usage(1, 2),
        ),
        "m",
        NOW,
    )
    writer = ChatWriter("m")
    data = b"".join(writer.write(event, NOW) for event in (*events, Finished("stop"), Counted(Usage(1, 2)))) + writer.end(NOW)
    found = records(data)
    message = {name: "".join(record["message"].get(name, "") for record in found) for name in ("content", "thinking")}
    assert message["content"] == whole["message"]["content"]
    assert message["thinking"] == whole["message"].get("thinking", "")
    assert [call for record in found for call in record["message"].get("tool_calls", ())] == whole["message"].get(
        "tool_calls", []
    )
    assert {**found[-1], "message": None} == {**whole, "message": None}
