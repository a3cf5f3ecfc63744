"""Recorded requests of Claude Code and Codex: each is read, becomes a body that a strict server takes, and each turn's prompt
begins with that of the turn before it, byte for byte, so that a backend need not read it again."""

import copy
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from gateway.core import strict_json
from gateway.dialects.dialect import Kind
from gateway.dialects.translation import (
    messages_estimate,
    messages_passthrough,
    messages_request,
    responses_passthrough,
    responses_request,
)
from gateway.dialects.translation.chat_request import body_of
from gateway.dialects.translation.conversation import Prompt
from tests.support import strict_chat
from tests.support.coding_agents import recordings
from tests.support.prompt_tokens import estimate

KINDS: list[Kind] = ["ollama", "openai"]
MESSAGES, COUNT, RESPONSES = "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"


def read_stable(body: dict[str, Any]) -> Prompt:
    """As the gateway reads it, without the line that differs in each request."""
    return messages_request.read(messages_request.without_volatile_lines(body))


READERS: dict[str, Callable[[dict[str, Any]], Prompt]] = {
    MESSAGES: read_stable,
    COUNT: read_stable,
    RESPONSES: responses_request.read,
}
CLAUDE_CODE = ["claude_code", "claude_code_subagent"]
CODEX = ["codex", "codex_unknown_model"]

Body = dict[str, Any]


def turns_of(name: str) -> list[Body]:
    return recordings.session(name).turns(RESPONSES if name in CODEX else MESSAGES)


def read(name: str, body: Body) -> Prompt:
    return READERS[RESPONSES if name in CODEX else MESSAGES](body)


def beginning(body: Body, field: str) -> bytes:
    """The body up to the end of the last entry of a list: a later turn goes on with a comma."""
    before = {key: value for key, value in body.items() if key == field}
    return strict_json.write(before)[: -len("]}")]


def test_every_session_is_of_a_known_agent() -> None:
    found = {name: recordings.session(name) for name in recordings.names()}
    assert set(found) == {*CLAUDE_CODE, *CODEX, "claude_code_small_requests"}
    assert {session.agent for session in found.values()} == {"Claude Code", "Codex"}
    assert [len(turns_of(name)) for name in CLAUDE_CODE + CODEX] == [3, 5, 3, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", recordings.names())
def test_each_request_becomes_one_that_a_strict_server_takes(name: str, kind: Kind) -> None:
    for request in recordings.session(name).requests:
        if request.body is None:
            assert (request.method, request.path) == ("HEAD", "/")
            continue
        # The gateway reads the bytes of a request with this reader.
        body = strict_json.read_object(json.dumps(request.body).encode())
        written = {"model": "m", **body_of(READERS[request.path](body), kind)}
        assert not strict_chat.problem_of(written), request.target


@pytest.mark.parametrize("name", recordings.names())
def test_the_tokens_of_each_request_are_estimated(name: str) -> None:
    for request in recordings.session(name).requests:
        if request.body is not None:
            dialect = responses_request if request.path == RESPONSES else messages_estimate
            size, exact = len(json.dumps(request.body)), estimate(READERS[request.path](request.body))
            rough = dialect.rough_need(request.body).prompt
            assert 0 < exact < size / 2 and 0 < rough < size / 2, request.target
            # The line that differs in each request counts only before the request is read.
            assert abs(rough - exact) <= 0.05 * exact + 30, request.target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLAUDE_CODE + CODEX)
def test_a_turn_begins_with_the_turn_before_it_byte_for_byte(name: str, kind: Kind) -> None:
    for earlier, later in itertools.pairwise(turns_of(name)):
        before, after = (strict_json.write(body_of(read(name, body), kind)) for body in (earlier, later))
        first = beginning(body_of(read(name, earlier), kind), "messages")
        assert before.startswith(first), "messages come first in the body"
        assert after.startswith(first + b","), "all messages of the turn before, and then more"
        assert after[after.index(b',"tools":') :].startswith(before[before.index(b',"tools":') :]), "and nothing else differs"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLAUDE_CODE)
def test_a_header_that_differs_in_each_request_changes_no_translated_byte(name: str, kind: Kind) -> None:
    for body in turns_of(name):
        changed = with_another_header(body)
        assert changed != body
        assert strict_json.write(body_of(read(name, changed), kind)) == strict_json.write(body_of(read(name, body), kind))


@pytest.mark.parametrize("name", CLAUDE_CODE)
def test_a_turn_that_is_passed_on_begins_with_the_turn_before_it(name: str) -> None:
    for earlier, later in itertools.pairwise(turns_of(name)):
        before, after = (prompt_of(passed_on(body)) for body in (earlier, later))
        assert strict_json.write(after).startswith(beginning(before, "messages") + b",")
        for field in ("system", "tools"):
            assert strict_json.write(after[field]) == strict_json.write(before[field])
        assert b"x-anthropic-billing-header" not in strict_json.write(after)
        assert after == prompt_of(passed_on(with_another_header(later)))


@pytest.mark.parametrize("name", CODEX)
def test_items_that_are_passed_on_begin_with_those_of_the_turn_before(name: str) -> None:
    for earlier, later in itertools.pairwise(turns_of(name)):
        before, after = (responses_passthrough.without_unsupported(body)[0] for body in (earlier, later))
        assert strict_json.write({"input": after["input"]}).startswith(beginning(before, "input") + b",")
        assert strict_json.write(after["tools"]) == strict_json.write(before["tools"])


@pytest.mark.parametrize("name", CLAUDE_CODE + CODEX)
def test_all_turns_of_a_session_go_one_way(name: str) -> None:
    """A backend makes another prompt of a translated body than of one that is passed on."""
    for kind in KINDS:
        ways = [_passes(name, body, kind) for body in turns_of(name)]
        assert ways == [ways[0]] * len(ways)


def _passes(name: str, body: dict[str, Any], kind: Kind) -> bool:
    if name in CODEX:
        return responses_passthrough.passes_unchanged(responses_passthrough.without_unsupported(body)[0])
    return messages_passthrough.passes_unchanged(messages_passthrough.without_unsupported(body)[0], kind)


def test_reminders_stay_where_they_were() -> None:
    """Claude Code has system messages in the conversation; moved to the beginning they would change the prompt behind it."""
    *_, last = turns_of("claude_code_subagent")
    roles = [message["role"] for message in last["messages"]]
    assert roles[:5] == ["user", "system", "assistant", "user", "system"]
    written = body_of(read_stable(last), "openai")["messages"]
    assert [message["role"] for message in written[:6]] == ["system", "user", "assistant", "tool", "user", "assistant"]
    assert written[1]["content"].endswith("</system-reminder>") and written[4]["content"].startswith("<system-reminder>")


def test_nothing_of_a_machine_is_recorded() -> None:
    for name in recordings.names():
        text = (recordings.RECORDINGS / f"{name}.json").read_text()
        assert not re.search(r"/tmp/|/root/|/Users/|/home/(?!user\b)|[Aa]uthorization|x-api-key|Bearer", text)
        ids = re.findall(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|[0-9a-f]{64}", text)
        assert all(re.fullmatch(r"[-0]*\d{1,2}", found) for found in ids)


def with_another_header(body: Body) -> Body:
    changed = copy.deepcopy(body)
    changed["system"][0]["text"] = re.sub(r"\.[0-9a-f]{3};", ".0a1;", changed["system"][0]["text"]) + " cch=0aaa9;"
    return changed


def passed_on(body: Body) -> Body:
    return messages_passthrough.without_unsupported(messages_request.without_volatile_lines(body))[0]


def prompt_of(body: Body) -> Body:
    """What a server makes a prompt of. Claude Code moves its marks for caches to the last message, and no server shows them."""
    kept = {key: body[key] for key in ("messages", "system", "tools")}
    without = json.loads(json.dumps(kept), object_hook=lambda found: {k: v for k, v in found.items() if k != "cache_control"})
    return dict(without)
