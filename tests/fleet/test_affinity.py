"""Recognises the requests of one conversation, in each client API; never across keys, never after another beginning."""

import copy
import json
import random
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import registry
from gateway.fleet.affinity import MOST_PREFIXES, Conversation, conversation
from gateway.fleet.prompt_checksum import LONGEST_TEXT, MOST_LETTERS, MOST_MESSAGES, MOST_VALUES
from tests.support.coding_agents import recordings

Body = dict[str, Any]
SALT = b"a secret"
OPERATIONS = registry.operations(registry.dialects())
TEXTS = st.text(min_size=1, max_size=40)
TURNS = st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), min_size=1, max_size=9)
DIALECTS = ("ollama", "openai", "anthropic", "responses")
CALLED = {"path": "a.txt"}


def names(body: Body, headers: dict[str, str] | None = None, key: str = "key", prompt_tokens: int = 0) -> Conversation:
    lines = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return conversation(body, lines, key, SALT, prompt_tokens=prompt_tokens)


def tokens_found(later: Conversation, earlier: Conversation) -> int:
    """How much of the later request is cached where the earlier one was answered."""
    return dict(later.prefixes).get(earlier.full, 0)


def written(dialect: str, system: str, turns: list[tuple[str, str, bool]], tools: list[Body]) -> list[Body]:
    """The requests of a conversation: a question each, or the result of a tool that the model called."""
    messages: list[Body] = []
    requests = []
    for number, (asked, answered, calls) in enumerate(turns):
        messages.append({"role": "user", "content": asked})
        requests.append(body_of(dialect, system, messages, tools))
        if calls:
            messages += call_of(dialect, f"call_{number}", answered)
            requests.append(body_of(dialect, system, messages, tools))
        messages.append({"role": "assistant", "content": answered})
    return requests


def body_of(dialect: str, system: str, messages: list[Body], tools: list[Body]) -> Body:
    sent = copy.deepcopy(messages)
    common: Body = {"model": "m", "stream": True, **({"tools": tools} if tools else {})}
    if dialect == "anthropic":
        return {**common, "max_tokens": 9, "system": [{"type": "text", "text": system}], "messages": sent}
    if dialect == "responses":
        return {**common, "instructions": system, "input": sent}
    return {**common, "messages": [{"role": "system", "content": system}, *sent]}


def call_of(dialect: str, name: str, result: str) -> list[Body]:
    if dialect == "anthropic":
        use = {"type": "tool_use", "id": name, "name": "read", "input": CALLED}
        found = {"type": "tool_result", "tool_use_id": name, "content": result}
        return [{"role": "assistant", "content": [use]}, {"role": "user", "content": [found]}]
    if dialect == "responses":
        call = {"type": "function_call", "call_id": name, "name": "read", "arguments": json.dumps(CALLED)}
        return [call, {"type": "function_call_output", "call_id": name, "output": result}]
    arguments = CALLED if dialect == "ollama" else json.dumps(CALLED)
    calls = [{"id": name, "type": "function", "function": {"name": "read", "arguments": arguments}}]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    return [said, {"role": "tool", "tool_call_id": name, "content": result}]


def tool(name: str) -> Body:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("dialect", DIALECTS)
@given(system=TEXTS, turns=TURNS, has_tools=st.booleans(), headers=st.sampled_from([{}, {"X-Session-Id": "abc"}]))
def test_each_request_finds_those_before_it(
    dialect: str, system: str, turns: list[tuple[str, str, bool]], has_tools: bool, headers: dict[str, str]
) -> None:
    requests = [names(body, headers) for body in written(dialect, system, turns, [tool("read")] if has_tools else [])]
    for earlier, later in pairwise(requests):
        assert tokens_found(later, earlier) > 0
        assert later.shared == earlier.shared is not None
    for number, later in enumerate(requests):
        found = [tokens for _, tokens in later.prefixes]
        assert found == sorted(found, reverse=True) and len(found) <= MOST_PREFIXES
        assert tokens_found(later, later) > 0, "it may be sent again"
        if not headers:
            assert [tokens_found(later, earlier) > 0 for earlier in requests[max(0, number - 5) : number]].count(False) == 0


@pytest.mark.parametrize("dialect", DIALECTS)
@given(system=TEXTS, turns=TURNS, headers=st.sampled_from([{}, {"Session-Id": "abc"}]))
def test_no_key_finds_the_conversation_of_another(
    dialect: str, system: str, turns: list[tuple[str, str, bool]], headers: dict[str, str]
) -> None:
    body = written(dialect, system, turns, [])[-1]
    of_one, of_other = names(body, headers, "key"), names(body, headers, "key2")
    assert not all_names(of_one) & all_names(of_other)
    assert not all_names(of_one) & all_names(conversation(body, (), "key", b"another secret"))


def all_names(found: Conversation) -> set[str]:
    return {found.full, *(name for name, _ in found.prefixes), found.shared[0] if found.shared else ""} - {""}


@pytest.mark.parametrize("dialect", DIALECTS)
@given(data=st.data(), system=TEXTS, turns=TURNS, headers=st.sampled_from([{}, {"Session-Id": "abc"}]))
def test_a_changed_beginning_is_never_found(
    dialect: str, data: st.DataObject, system: str, turns: list[tuple[str, str, bool]], headers: dict[str, str]
) -> None:
    other = data.draw(TEXTS.filter(lambda text: text != turns[0][0]))
    changed = [(other, *turns[0][1:]), *turns[1:]]
    before = [names(body, headers) for body in written(dialect, system, turns, [])]
    after = [names(body, headers) for body in written(dialect, system, changed, [])]
    assert all(tokens_found(later, earlier) == 0 for later in after for earlier in before)
    assert all(later.shared == before[0].shared for later in after)
    of_others = names(written(dialect, f"{system}.", turns, [])[-1], headers)
    assert all(tokens_found(of_others, earlier) == 0 for earlier in before) and of_others.shared != before[0].shared


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("headers", [{}, {"X-Claude-Code-Session-Id": "abc"}])
def test_after_it_was_shortened_only_the_system_prompt_of_a_conversation_is_cached(
    dialect: str, headers: dict[str, str]
) -> None:
    turns = [(f"question {number}", "an answer", True) for number in range(5)]
    before = [names(body, headers) for body in written(dialect, "You help.", turns, [tool("read")])]
    shortened = names(written(dialect, "You help.", [("A summary: …", "", False)], [tool("read")])[0], headers)
    assert all(tokens_found(shortened, earlier) == 0 for earlier in before)
    assert shortened.shared == before[-1].shared and shortened.shared is not None and shortened.shared[1] > 0
    assert names(written(dialect, "You help.", turns, [tool("write")])[-1], headers).shared != before[-1].shared


FORMS: list[tuple[Body, Body]] = [
    ({"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}),
    ({"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi", "tool_calls": None}),
    ({"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi", "tool_calls": [], "refusal": None}),
    ({"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi", "reasoning_content": "Hm."}),
    ({"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi", "thinking": "Hm."}),
    ({"role": "assistant", "content": "Hi"}, {"content": "Hi", "role": "assistant", "id": "msg_1", "status": "completed"}),
    (
        {"role": "assistant", "content": "Hi"},
        {"role": "assistant", "type": "message", "content": [{"type": "output_text", "text": "Hi"}]},
    ),
    (
        {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Hi"}],
        },
    ),
    (
        {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
    ),
    (
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "2", "function": {"name": "f", "arguments": "{}"}}]},
    ),
]


@pytest.mark.parametrize(("once", "again"), FORMS)
def test_the_form_of_an_answer_makes_no_difference(once: Body, again: Body) -> None:
    def body(answer: Body, *more: Body) -> Body:
        return {"messages": [{"role": "user", "content": "hello"}, answer, {"role": "user", "content": "go on"}, *more]}

    follow_up = ({"role": "assistant", "content": "Yes"}, {"role": "user", "content": "and?"})
    earlier, later = names(body(once)), names(body(again, *follow_up))
    assert earlier.full == names(body(again)).full and tokens_found(later, earlier) > 0


def test_reasoning_between_the_items_of_a_response_makes_no_difference() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "done"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}], "encrypted_content": "x"}
    question = {"role": "user", "content": [{"type": "input_text", "text": "Do it"}]}
    first, second = names({"input": [question]}), names({"input": [question, thought, call, output]})
    assert tokens_found(second, first) > 0
    assert second.full == names({"input": [question, call, output]}).full
    assert tokens_found(second, names({"input": "Do it"})) > 0, "a text is a message of the user"


DIFFERENT: list[Body] = [
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"function": {"name": "f", "arguments": {"type": "x"}}}]},
    {"role": "assistant", "content": "Hi", "tool_calls": [{"function": {"name": "f", "arguments": {"type": "y"}}}]},
    {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"id": 1}}]},
    {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"id": 2}}]},
    {"role": "user", "content": "Hi", "images": ["A" * 9000]},
    {"role": "user", "content": "Hi", "images": ["A" * 9001]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAB"}}]},
    {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "B" * 9000}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "1"}]}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "2"}]}]},
    {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin Patch"},
    {"type": "custom_tool_call", "name": "apply_patch", "input": "*** Begin Batch"},
    {"type": "local_shell_call", "action": {"command": ["ls"]}},
    {"type": "local_shell_call", "action": {"command": ["cat"]}},
    {"role": "tool", "tool_name": "f", "content": "1"},
    {"role": "tool", "tool_name": "g", "content": "1"},
]


def test_other_contents_have_other_names() -> None:
    found = [names({"messages": [{"role": "user", "content": "hello"}, message]}).full for message in DIFFERENT]
    assert len(set(found)) == len(DIFFERENT)


ORDER: list[tuple[Body, dict[str, str]]] = [
    ({"metadata": {"user_id": "user_1_session_1"}}, {}),
    ({}, {"X-OpenWebUI-Chat-Id": "chat"}),
    ({}, {"x-session-affinity": "ses_1"}),
    ({}, {"X-Claude-Code-Session-Id": "a"}),
    ({}, {"session_id": "b"}),
    ({}, {"thread-id": "c", "session-id": "of the parent"}),
    ({}, {"X-Olla-Session-ID": "d"}),
    ({}, {"X-Session-Id": "e"}),
    ({"session_id": "f"}, {}),
    ({"prompt_cache_key": "g"}, {}),
]


def test_the_most_exact_name_of_a_client_counts() -> None:
    body: Body = {"messages": [{"role": "user", "content": "hello"}]}
    fields: Body = {}
    headers: dict[str, str] = {}
    found = [names(body).full]
    for more_fields, more_headers in ORDER:
        fields, headers = fields | more_fields, headers | more_headers
        alone, together = names(body | more_fields, more_headers), names(body | fields, headers)
        assert alone.full == together.full
        found.append(alone.full)
    assert len(set(found)) == len(ORDER) + 1
    for useless in ({"prompt_cache_key": None}, {"prompt_cache_key": 5}, {"metadata": {"user_id": ["a"]}}, {"metadata": "a"}):
        assert names(body | useless, {"X-Session-Id": ""}).full == found[0]


@pytest.mark.parametrize("name", ["claude_code", "claude_code_subagent", "codex"])
@pytest.mark.parametrize("is_named", [True, False])
def test_recorded_agents(name: str, is_named: bool) -> None:
    session = recordings.session(name)
    path = "/v1/responses" if name == "codex" else "/v1/messages"
    found = []
    for request in session.of_path(path):
        assert request.body is not None
        operation = OPERATIONS[path]
        body = operation.without_volatile(request.body) if operation.without_volatile else request.body
        known = operation.need(body).prompt if operation.need and is_named else 0
        unnamed = {field: value for field, value in body.items() if field not in ("metadata", "prompt_cache_key")}
        found.append(names(body if is_named else unnamed, request.headers if is_named else {}, prompt_tokens=known))
    turns = found[-2:] if name == "codex" else [each for each in found if each.shared == found[-1].shared]
    assert len(turns) >= 2
    for earlier, later in pairwise(turns):
        # Nearly all of it.
        assert tokens_found(later, earlier) > tokens_found(earlier, earlier) * 0.9
        assert tokens_found(later, earlier) <= tokens_found(earlier, earlier) * 1.1
    title = found[0]
    if name == "claude_code":
        assert not all_names(title) & all_names(turns[-1]), "the title of the session is found beside it"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/generate"])
@pytest.mark.parametrize("letters", ["plain words ", "слова по-русски ", "汉字 and words "])
def test_tokens_are_estimated_as_for_the_limits(path: str, letters: str) -> None:
    text = letters * 60
    turns = [(text, text, True), (text, text, False)]
    dialect = {"/api/chat": "ollama", "/v1/messages": "anthropic", "/v1/responses": "responses"}.get(path, "openai")
    body = {"system": text, "prompt": text} if path == "/api/generate" else written(dialect, text, turns, [tool("read")])[-1]
    need = OPERATIONS[path].need
    assert need is not None
    estimated = need(body).prompt
    found = names(body).prefixes[0][1]
    assert abs(found - estimated) <= max(40, estimated * 0.06)


@given(st.text(min_size=1, max_size=50), st.integers(0, 12_000), st.integers(0, 9_000))
def test_a_prompt_that_grows_is_found(unit: str, length: int, growth: int) -> None:
    text = unit * (length // len(unit) + 1)
    earlier = names({"prompt": text, "system": "You go on."})
    later = names({"prompt": text + "!" * growth, "system": "You go on."})
    if len(text) >= 2_048 or not growth:
        assert 0 < tokens_found(later, earlier) <= later.prefixes[0][1]
    other = names({"prompt": f"?{text}", "system": "You go on."})
    assert tokens_found(other, earlier) == 0 or text[:2048] == f"?{text}"[:2048]
    assert other.shared == earlier.shared


def test_what_is_no_conversation_has_no_names() -> None:
    bodies: list[Body] = [{}, {"input": 5}, {"prompt": ""}, {"prompt": [1, 2]}, {"messages": []}, {"prompt": {"id": "p"}}]
    for body in bodies:
        assert names(body) == Conversation()


ODD: list[Any] = [
    None,
    5,
    "text",
    [],
    [[]],
    {"role": 5, "content": 5},
    {"content": None},
    {"type": ["a"]},
    {"role": "user", "content": {}},
]


def test_odd_messages_do_no_harm() -> None:
    found = names({"messages": [*ODD, {"role": "user", "content": [*ODD, "\ud800"]}], "tools": 5, "system": {"a": 1}})
    assert found.full and found.shared
    deep: Any = "x"
    for _ in range(3_000):
        deep = [deep]
    assert names({"messages": [{"role": "user", "content": deep}], "tools": deep}).full


def many(count: int, text: str = "words") -> list[Body]:
    return [{"role": "assistant" if number % 2 else "user", "content": f"{text} {number}"} for number in range(count)]


@pytest.mark.parametrize(
    "messages",
    [
        many(MOST_MESSAGES + 51),
        many(9, "long " * (LONGEST_TEXT // 4)),
        many(MOST_LETTERS // 10_000 + 21, "long " * 2_000),
        [*many(2), {"role": "user", "content": [{"type": "text", "text": "a"}] * (MOST_VALUES + 1)}, *many(21)[1:]],
    ],
)
def test_requests_beyond_the_bounds_are_found_by_what_was_read(messages: list[Body]) -> None:
    earlier, later = names({"messages": messages[:-2]}), names({"messages": messages})
    assert 0 < tokens_found(later, earlier) < later.prefixes[0][1]
    before = names({"messages": messages[:-4]})
    assert tokens_found(later, before) < tokens_found(later, earlier)
    changed = [{"role": "user", "content": "other"}, *messages[1:]]
    assert tokens_found(names({"messages": changed}), earlier) == 0


def test_the_ends_and_the_length_of_a_long_text_count() -> None:
    letters = random.Random(7).choices("abcdefgh ", k=5 * LONGEST_TEXT)
    texts = [
        "".join(letters),
        "!" + "".join(letters[1:]),
        "".join([*letters[:-1], "!"]),
        "".join(letters[: 2 * LONGEST_TEXT]),
        "",
    ]
    assert len({names({"messages": [{"role": "user", "content": text}]}).full for text in texts}) == len(texts)


def calls_of(body: Body, headers: list[tuple[bytes, bytes]], **more: int) -> int:
    """How many functions are called, which takes most of the time and is the same on every machine."""
    counted = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        conversation(body, headers, "key", SALT, **more)
    finally:
        sys.setprofile(None)
    return counted


def test_a_request_costs_few_function_calls() -> None:
    assert calls_of({"messages": many(1)}, []) <= 70
    plain = {"messages": many(60, "words " * 200)}
    assert calls_of(plain, []) <= 10 * 60 + 150
    turns = [("words " * 80, "words " * 80, True)] * 20
    body = written("openai", "You help.", turns, [tool(f"tool {number}") for number in range(20)])[-1]
    assert len(body["messages"]) == 80
    assert calls_of(body, []) <= 14 * 80 + 150
    # An agent that names its conversation, as it is asked for in a gateway.
    assert calls_of(body, [(b"x-session-id", b"abc")], prompt_tokens=10_000) <= 3 * 80 + 100
