"""Bodies of chat/completions: what each server and the chat templates behind it accept."""

import copy
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageParam
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming
from pydantic import TypeAdapter

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Kind
from gateway.dialects.openai import OpenAI
from gateway.dialects.translation.chat_request import beginning_of, body_of, losses_of
from gateway.dialects.translation.conversation import (
    Effort,
    Format,
    Image,
    Message,
    Part,
    Prompt,
    Role,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolResult,
)

KINDS: list[Kind] = ["ollama", "openai"]
WEATHER = Tool(
    "get_weather", "The weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
)
CLOCK = Tool("clock")
PNG = Image("image/png", "iVBORw0KGgo=")
PNG_PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def message(role: Role, *parts: Part | str) -> Message:
    return Message(role, tuple(Text(part) if isinstance(part, str) else part for part in parts))


def messages_of(*messages: Message, kind: Kind = "openai") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = body_of(Prompt(list(messages)), kind)["messages"]
    return found


def fields_of(kind: Kind = "openai", **fields: Any) -> dict[str, Any]:
    body = body_of(Prompt([message("user", "hi")], **fields), kind)
    assert body.pop("messages") == [{"role": "user", "content": "hi"}]
    assert body.pop("stream") is fields.get("stream", False)
    return body


def test_a_plain_conversation_has_strings() -> None:
    assert messages_of(
        message("system", "Be brief."), message("user", "Hi"), message("assistant", "Hello"), message("user", "?")
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "?"},
    ]


def test_several_system_messages_are_one_and_the_first() -> None:
    found = messages_of(message("system", "A", "B"), message("system"), message("system", "C"), message("user", "Hi"))
    assert found == [{"role": "system", "content": "A\nB\n\nC"}, {"role": "user", "content": "Hi"}]


def test_a_later_system_message_stays_where_it_is() -> None:
    """Claude Code and Codex append such messages, and rely on what stands before them being cached."""
    before = [message("system", "A"), message("user", "Hi"), message("assistant", "Hello")]
    found = messages_of(*before, message("user", "Now?"), message("system", "Answer only BLUE."))
    assert found[:3] == messages_of(*before)
    reminder = "<system-reminder>\nAnswer only BLUE.\n</system-reminder>"
    assert found[3:] == [{"role": "user", "content": f"Now?\n\n{reminder}"}]
    assert messages_of(message("user", "Hi"), message("system")) == [{"role": "user", "content": "Hi"}]


def test_messages_of_one_role_are_one() -> None:
    found = messages_of(
        message("user", "A", "", "B"), message("user", "C"), message("assistant", "D"), message("assistant", "E")
    )
    assert found == [{"role": "user", "content": "A\nB\n\nC"}, {"role": "assistant", "content": "D\n\nE"}]


@pytest.mark.parametrize(("arguments", "sent"), [("", "{}"), (" \n", "{}"), ('{"b": 1,  "a":"é"}', '{"b": 1,  "a":"é"}')])
def test_tool_calls_keep_their_ids_and_arguments(arguments: str, sent: str) -> None:
    call = ToolCall("toolu_01A", "get_weather", arguments)
    assert messages_of(message("assistant", call)) == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "toolu_01A", "type": "function", "function": {"name": "get_weather", "arguments": sent}}],
        }
    ]


def test_results_of_tools_come_before_the_text_and_images_after_all_results() -> None:
    turn = message(
        "user",
        "Before",
        ToolResult("b", (Text("1"), Text("2"), PNG)),
        ToolResult("a", (PNG,)),
        ToolResult("c", ()),
        "After",
    )
    assert messages_of(turn) == [
        {"role": "tool", "tool_call_id": "b", "content": "1\n2"},
        {"role": "tool", "tool_call_id": "a", "content": "(The result is in the images of the next message.)"},
        {"role": "tool", "tool_call_id": "c", "content": ""},
        {"role": "user", "content": [PNG_PART, PNG_PART, {"type": "text", "text": "Before\nAfter"}]},
    ]


def test_results_alone_need_no_message_of_the_user() -> None:
    results = [message("user", ToolResult("a", (Text("1"),))), message("user", ToolResult("b", (Text("2"),)), "")]
    assert [found["role"] for found in messages_of(*results)] == ["tool", "tool"]
    assert messages_of(message("user")) == [{"role": "user", "content": ""}]


def test_an_error_of_a_tool_is_text() -> None:
    results = (ToolResult("a", (Text("no such file"),), is_error=True), ToolResult("b", (), is_error=True))
    contents = [found["content"] for found in messages_of(message("user", *results))]
    assert contents == ["Error: no such file", "Error: "]


@pytest.mark.parametrize(("kind", "names"), [("ollama", ["reasoning"]), ("openai", ["reasoning", "reasoning_content"])])
def test_earlier_thoughts_are_in_the_fields_that_servers_read(kind: Kind, names: list[str]) -> None:
    (found,) = messages_of(message("assistant", Thinking("Hm."), "Yes", Thinking(""), Thinking("So.")), kind=kind)
    assert found == {"role": "assistant", "content": "Yes", **dict.fromkeys(names, "Hm.\nSo.")}


def test_images_are_parts_between_texts() -> None:
    turn = message("user", "A", "B", Image(url="https://example.com/a.png", detail="low"), PNG, "C")
    assert messages_of(turn, message("user", "D")) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "A\nB"},
                {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}},
                PNG_PART,
                {"type": "text", "text": "C\n\nD"},
            ],
        }
    ]


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (message("user", Image(url="https://example.com/a.png")), "ollama"),
        (message("user", Image(url="file:///etc/passwd")), "openai"),
        (message("system", PNG), "openai"),
        (message("assistant", PNG), "openai"),
        (message("assistant", ToolResult("a", ())), "openai"),
    ],
)
def test_what_no_backend_takes_is_refused(wrong: Message, kind: Kind) -> None:
    with pytest.raises(BadRequest):
        messages_of(wrong, kind=kind)


def test_tools() -> None:
    fields = fields_of(tools=[WEATHER, CLOCK], parallel_tools=False)
    assert fields == {
        "tools": [
            {
                "type": "function",
                "function": {"name": "get_weather", "description": "The weather", "parameters": WEATHER.schema},
            },
            {
                "type": "function",
                "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}},
            },
        ],
        "parallel_tool_calls": False,
    }
    strict = Tool("a", "", {"type": "object"}, strict=True)
    (tool,) = fields_of(tools=[strict])["tools"]
    assert tool["function"] == {
        "name": "a",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
        "strict": True,
    }
    assert strict.schema == {"type": "object"}, "the prompt stays as it was"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_tool_choice_is_sent(choice: str, kind: Kind) -> None:
    assert fields_of(kind, tools=[CLOCK], tool_choice=choice)["tool_choice"] == choice
    assert fields_of(kind, tool_choice=choice, parallel_tools=True) == {}, "vLLM refuses a choice without tools"


def test_no_tools_are_to_be_called() -> None:
    assert fields_of("openai", tools=[CLOCK], tool_choice="none")["tool_choice"] == "none"
    assert fields_of("ollama", tools=[CLOCK], tool_choice="none") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tool_chosen_by_name_is_the_only_one_and_required(kind: Kind) -> None:
    fields = fields_of(kind, tools=[WEATHER, CLOCK], tool_choice=("clock",))
    assert [tool["function"]["name"] for tool in fields["tools"]] == ["clock"]
    assert fields["tool_choice"] == "required"
    with pytest.raises(BadRequest, match="'tool_choice'"):
        fields_of(kind, tools=[WEATHER], tool_choice=("clock",))


@pytest.mark.parametrize(
    ("effort", "sent"),
    [("minimal", "low"), ("low", "low"), ("medium", "medium"), ("high", "high"), ("xhigh", "high"), ("max", "high")],
)
def test_an_effort_is_one_that_the_server_knows(effort: Effort, sent: str) -> None:
    assert fields_of("openai", effort=effort) == {"reasoning_effort": sent}
    body = body_of(Prompt([message("user", "hi")], effort=effort), "ollama", thinks=True)
    assert body["reasoning_effort"] == effort


def test_a_model_on_ollama_that_may_not_think_is_asked_for_no_effort() -> None:
    assert fields_of("ollama", effort="high") == {}
    prompt = Prompt([message("user", "hi")], effort="high")
    assert losses_of(prompt, "ollama") == ["reasoning_effort"]
    assert losses_of(prompt, "ollama", thinks=True) == losses_of(prompt, "openai") == []


def test_thinking_is_switched_off_where_the_server_does_it() -> None:
    assert fields_of("ollama", effort="none") == {"reasoning_effort": "none"}
    assert fields_of("openai", effort="none") == {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}


BEGUN = [message("user", "Count"), message("assistant", "One, "), message("assistant", Thinking("hm"), "two \n")]


def test_an_answer_that_the_client_has_begun_is_continued_without_thinking() -> None:
    body = body_of(Prompt(BEGUN, continues_last=True, effort="high"), "openai")
    assert body["messages"][-1]["content"] == "One, \n\ntwo"
    assert {name: body[name] for name in body.keys() - {"messages", "stream"}} == {
        "add_generation_prompt": False,
        "continue_final_message": True,
        "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
    }


def test_ollama_continues_by_its_template() -> None:
    body = body_of(Prompt(BEGUN, continues_last=True, effort="high"), "ollama", thinks=True)
    assert body.keys() == {"messages", "reasoning_effort", "stream"}
    assert body["messages"][-1]["content"] == "One, \n\ntwo"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("messages", [BEGUN, [message("user", "Hi"), message("assistant", " \n")]])
def test_another_last_message_is_not_continued(messages: list[Message], kind: Kind) -> None:
    begun = Prompt(messages, continues_last=messages is not BEGUN)
    assert body_of(begun, kind).keys() == {"messages", "stream"}
    assert beginning_of(begun) == ""


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"sampling": {"temperature": 1, "top_k": 1, "min_p": 0.1, "repeat_penalty": 1}}, ["top_k", "min_p", "repeat_penalty"]),
        ({"tools": [CLOCK], "tool_choice": "required"}, ["tool_choice"]),
        ({"tools": [CLOCK], "tool_choice": ("clock",)}, ["tool_choice"]),
        ({"tools": [CLOCK], "tool_choice": "none"}, []),
        ({"tools": [CLOCK], "tool_choice": "auto"}, []),
        ({"tools": [CLOCK], "parallel_tools": False}, ["parallel_tool_calls"]),
        ({"tools": [CLOCK], "parallel_tools": True}, []),
        ({"parallel_tools": False}, []),
        ({"user": "u"}, ["user"]),
        ({"effort": "none", "stop": ["x"], "most_output": 1, "format": Format()}, []),
    ],
)
def test_what_ollama_ignores_is_named(fields: dict[str, Any], lost: list[str]) -> None:
    prompt = Prompt([message("user", "hi")], **fields)
    assert losses_of(prompt, "ollama") == lost
    assert losses_of(prompt, "openai") == []


def test_an_effort_is_lost_where_an_answer_is_continued() -> None:
    assert losses_of(Prompt(BEGUN, continues_last=True, effort="high"), "openai") == ["reasoning_effort"]
    assert losses_of(Prompt(BEGUN, continues_last=True, effort="none"), "openai") == []
    assert losses_of(Prompt(BEGUN, effort="high"), "openai") == []


def test_losses_have_the_names_of_the_client() -> None:
    names = {"user": "metadata.user_id"}
    assert losses_of(Prompt([message("user", "hi")], user="u", client_names=names), "ollama") == ["metadata.user_id"]


@pytest.mark.parametrize(
    ("form", "sent"),
    [
        (Format(), {"name": "answer", "schema": {"type": "object"}}),
        (Format({}), {"name": "answer", "schema": {}}),
        (Format({"type": "array"}, "list", strict=True), {"name": "list", "schema": {"type": "array"}, "strict": True}),
    ],
)
def test_a_format_is_a_schema(form: Format, sent: dict[str, Any]) -> None:
    assert fields_of(format=form) == {"response_format": {"type": "json_schema", "json_schema": sent}}


def test_settings_come_in_the_same_order_whatever_the_client_sent_first() -> None:
    sampling = {"repeat_penalty": 1.1, "seed": 42.0, "temperature": 0.5, "top_k": 40, "unknown": 1.0, "top_p": 1.0}
    fields = fields_of(sampling=sampling, stop=("a", "b"), most_output=9, user="u", stream=True)
    assert list(fields.items()) == [
        ("max_tokens", 9),
        ("stop", ["a", "b"]),
        ("temperature", 0.5),
        ("top_p", 1.0),
        ("top_k", 40),
        ("seed", 42),
        ("repeat_penalty", 1.1),
        ("repetition_penalty", 1.1),
        ("user", "u"),
        ("stream_options", {"include_usage": True}),
    ]
    assert b'"seed":42,' in strict_json.write(fields), "Ollama refuses 42.0"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
def test_the_body_is_one_that_the_operation_takes_and_limits(kind: Kind, stream: bool) -> None:
    prompt = Prompt(
        [message("user", "Hi", PNG), message("assistant", Thinking("Hm."), ToolCall("a", "clock", "")), results("a")],
        [WEATHER, CLOCK],
        "auto",
        most_output=500,
        stream=stream,
    )
    operation = OpenAI().operations[0]
    body = body_of(prompt, kind)
    operation.check(body)
    assert operation.clamp is not None and operation.need is not None
    assert operation.need(body).output == 500
    assert operation.clamp(body, kind, 100, 50) == 100 and body["max_tokens"] == 100
    params: Any = CompletionCreateParamsStreaming if stream else CompletionCreateParamsNonStreaming
    TypeAdapter(params).validate_python({"model": "m", **body})


def results(*ids: str) -> Message:
    return message("user", *(ToolResult(call_id, (Text("12:00"),)) for call_id in ids))


TEXTS = st.text(max_size=8).map(Text)
IMAGES = st.just(PNG)


@st.composite
def turns(draw: st.DrawFn) -> list[Message]:
    """What a user and then the model sent, with results for all calls of the model's turn before."""
    found: list[Message] = []
    open_calls: list[str] = []
    for number in range(draw(st.integers(1, 5))):
        answered: list[Part] = [
            ToolResult(call, tuple(draw(st.lists(TEXTS | IMAGES, max_size=2))), draw(st.booleans())) for call in open_calls
        ]
        written: list[Part] = draw(st.lists(TEXTS | IMAGES, max_size=3))
        found.append(Message("user", tuple(draw(st.permutations([*answered, *written])))))
        if draw(st.booleans()):
            found.append(Message("system", tuple(draw(st.lists(TEXTS, max_size=2)))))
        open_calls = [f"call_{number}_{call}" for call in range(draw(st.integers(0, 2)))]
        thoughts = [Thinking(text.text) for text in draw(st.lists(TEXTS, max_size=1))]
        calls = [ToolCall(call, "clock", "") for call in open_calls]
        found.append(Message("assistant", (*thoughts, *draw(st.lists(TEXTS, max_size=2)), *calls)))
    return found


SYSTEMS = st.lists(st.lists(TEXTS, max_size=2).map(lambda texts: Message("system", tuple(texts))), max_size=2)


@given(SYSTEMS, turns(), st.sampled_from(KINDS))
def test_strict_templates_take_any_conversation(systems: list[Message], conversation: list[Message], kind: Kind) -> None:
    prompt = Prompt([*systems, *conversation])
    before = copy.deepcopy(prompt)
    sent: list[dict[str, Any]] = body_of(prompt, kind)["messages"]
    assert prompt == before
    if sent[0]["role"] == "system":
        assert sent[0]["content"] and sent.pop(0)
    TypeAdapter(list[ChatCompletionMessageParam]).validate_python(sent)
    assert all(one["role"] != other["role"] or one["role"] == "tool" for one, other in pairwise(sent))
    assert {"system"}.isdisjoint(one["role"] for one in sent)
    for one, other in pairwise(sent):
        if other["role"] == "tool":
            assert one["role"] == "tool" or "tool_calls" in one
    for one in sent:
        has_parts = isinstance(one["content"], list)
        assert has_parts == (one["role"] == "user" and "image_url" in repr(one["content"]))
    wanted = [call["id"] for one in sent for call in one.get("tool_calls", [])]
    answered = [one["tool_call_id"] for one in sent if one["role"] == "tool"]
    assert sorted(answered) == sorted(wanted)[: len(answered)]


@given(SYSTEMS, turns(), turns(), st.sampled_from(KINDS))
def test_a_longer_conversation_begins_with_the_same_bytes(
    systems: list[Message], first: list[Message], more: list[Message], kind: Kind
) -> None:
    if any(isinstance(part, ToolCall) for part in first[-1].parts):
        more = [results(*(part.id for part in first[-1].parts if isinstance(part, ToolCall))), *more]
    short, long = (body_of(Prompt(messages), kind) for messages in ([*systems, *first], [*systems, *first, *more]))
    shared = strict_json.write_with_replacements(short["messages"]).removesuffix(b"]")
    assert strict_json.write_with_replacements(long["messages"]).startswith(shared + b",")
