"""Claude Code and Codex use models of servers that have only chat/completions, and of an Ollama that has their routes.

Their recorded requests are replayed everywhere; where the agents are installed they work through the gateway themselves.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.core import strict_json
from tests.conftest import StartGateway
from tests.support import documents, strict_chat
from tests.support.coding_agents import played, recordings, sessions
from tests.support.coding_agents.played import Call, Plan
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

MODEL = "qwen3-coder"
CHAT, MESSAGES, COUNT, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens", "/v1/responses"
# As agents need it; the bounds of a deployment are meant for people who chat.
FOR_AGENTS = {"MAX_REQUEST_BODY_BYTES": "33554432", "MAX_NUM_PREDICT": "32768"}
SAY = Call("Bash", {"command": "echo hello", "description": "Say hello"})
PATCH = "*** Begin Patch\n*** Add File: made.txt\n+made\n*** End Patch\n"
EXECUTE, APPLY = Call("exec_command", {"cmd": "echo hello"}), Call("apply_patch", {"input": PATCH})
# The calls of the recorded sessions, in their order.
RECORDED = {
    "claude_code": (SAY, Call("Read", {"file_path": "/home/user/project/notes.txt"})),
    "claude_code_subagent": (Call("Agent", {"description": "Look", "prompt": "Look", "subagent_type": "Explore"}),),
    "claude_code_small_requests": (),
    "codex": (EXECUTE, APPLY),
    "codex_unknown_model": (EXECUTE,),
}

Json = dict[str, Any]


@pytest.fixture
def strict() -> Iterator[FakeBackend]:
    with FakeBackend("openai", [MODEL], name="strict") as backend:
        yield backend


@pytest.fixture
def native() -> Iterator[FakeBackend]:
    with FakeBackend("ollama", [MODEL], name="native") as backend:
        yield backend


def replay(gateway: RunningGateway, name: str) -> list[tuple[recordings.Request, httpx.Response]]:
    answers = []
    with gateway.http(gateway.key()) as client:
        for request in recordings.session(name).requests:
            body = request.body and {**request.body, "model": MODEL}
            content = json.dumps(body, ensure_ascii=False).encode() if body else b""
            answer = client.request(request.method, request.target, headers=request.headers, content=content)
            assert answer.status_code == 200, f"{request.target}: {answer.text}"
            answers.append((request, answer))
    return answers


def events_of(answer: httpx.Response) -> list[Json]:
    """The events of a stream; each has its type twice, as both agents need one or the other."""
    frames = [frame for frame in answer.text.split("\n\n") if frame and not frame.startswith(":")]
    named = [(frame.split("\n", 1)[0].removeprefix("event: "), json.loads(frame.split("\ndata: ", 1)[1])) for frame in frames]
    assert all(name == event["type"] for name, event in named)
    return [event for _, event in named]


def call_of(path: str, answer: httpx.Response) -> Call | None:
    """The tool that an answer calls, read as the agent reads it; the answer must be complete."""
    return _call_of_messages(events_of(answer)) if path == MESSAGES else _call_of_responses(events_of(answer))


def _call_of_messages(events: list[Json]) -> Call | None:
    assert (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")
    (end,) = (event for event in events if event["type"] == "message_delta")
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert blocks[0]["type"] == "thinking" and end["usage"]["output_tokens"] > 0
    last = blocks[-1]
    assert end["delta"]["stop_reason"] == ("tool_use" if last["type"] == "tool_use" else "end_turn")
    pieces = [event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta"]
    return Call(last["name"], json.loads("".join(pieces))) if last["type"] == "tool_use" else None


def _call_of_responses(events: list[Json]) -> Call | None:
    assert (events[0]["type"], events[-1]["type"]) == ("response.created", "response.completed")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    ended = events[-1]["response"]
    assert ended["usage"]["total_tokens"] == 128 and [item["id"] for item in ended["output"]] == [item["id"] for item in done]
    last = done[-1]
    if last["type"] == "custom_tool_call":
        return Call(last["name"], {"input": last["input"]})
    return Call(last["name"], json.loads(last["arguments"])) if last["type"] == "function_call" else None


def asked(backend: FakeBackend, path: str) -> list[bytes]:
    """The bodies of its requests, without those by which the gateway finds out whether there is the route."""
    return [request.body for request in backend.calls(path) if isinstance(request.json, dict) and request.json]


def turns_at(backend: FakeBackend, path: str) -> list[bytes]:
    """The bodies of the turns of the conversation."""
    return [body for body in asked(backend, path) if len(json.loads(body).get("tools", ())) > 1]


@pytest.mark.parametrize("name", recordings.names())
def test_recorded_sessions_on_a_strict_chat_server(start_gateway: StartGateway, strict: FakeBackend, name: str) -> None:
    gateway, plan = start_gateway(strict, **FOR_AGENTS), Plan(RECORDED[name])
    played.play_strict_chat(strict, plan)
    results = 0
    for request, answer in replay(gateway, name):
        if request.path == COUNT:
            assert answer.json()["input_tokens"] > 0
        elif request.body is not None:
            call = call_of(request.path, answer)
            if len(request.body.get("tools", ())) > 1:
                assert call == plan.call(results, [call.tool for call in plan.calls])
                results += 1
    chats = [json.loads(body) for body in asked(strict, CHAT)]
    assert [strict_chat.problem_of(chat) for chat in chats] == [""] * len(chats)
    for earlier, later in itertools.pairwise(turns_at(strict, CHAT)):
        beginning = strict_json.write({"messages": json.loads(earlier)["messages"]})[1 : -len("]}")]
        assert beginning in earlier and beginning + b"," in later, "a server finds the turn before in its cache"


@pytest.mark.parametrize("name", recordings.names())
def test_recorded_sessions_on_an_ollama_with_their_routes(start_gateway: StartGateway, native: FakeBackend, name: str) -> None:
    plan = Plan(RECORDED[name])
    played.play_native(native, plan)
    gateway = start_gateway(native, **FOR_AGENTS)
    for request, answer in replay(gateway, name):
        if request.path == COUNT:
            assert answer.json()["input_tokens"] > 0
        elif request.body is not None:
            call_of(request.path, answer)
    ways = [path for path in (CHAT, MESSAGES, RESPONSES) if turns_at(native, path)]
    assert len(ways) <= 1, "all turns of a session go one way, as another way is another prompt"


@pytest.mark.parametrize("kind", ["ollama", "openai"])
def test_the_calls_of_copilot_in_vs_code(
    start_gateway: StartGateway, strict: FakeBackend, native: FakeBackend, kind: str
) -> None:
    """Its Ollama provider sends no key but in the address, and an empty one when it chats."""
    gateway = start_gateway(strict if kind == "openai" else native)
    key = gateway.key()
    with httpx.Client(base_url=f"{gateway.url}/k/{key}") as editor:
        assert [int(part) for part in editor.get("/api/version").json()["version"].split(".")] >= [0, 6, 4]
        (model,) = editor.get("/api/tags").json()["models"]
        shown = editor.post("/api/show", json={"model": model["model"]}).json()
        assert "completion" in shown["capabilities"] and isinstance(shown["model_info"], dict)
        body = {"model": model["model"], "messages": [{"role": "user", "content": "Hello"}], "stream": True}
        body["stream_options"] = {"include_usage": True}
        answer = editor.post(CHAT, json=body, headers={"Authorization": "Bearer"})
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")


def documented(page: str, language: str, word: str, gateway: RunningGateway, key: str) -> str:
    """The lines of a page that set an agent up, for this gateway."""
    (lines,) = [block for block in documents.blocks(documents.page(page), language) if word in block]
    return lines.replace("http://127.0.0.1:8080", gateway.url).replace("nz_…", key).replace("llama3.2", MODEL)


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.skipif(not sessions.executable("claude"), reason="Claude Code is not installed")
def test_claude_code_as_the_readme_sets_it_up(
    start_gateway: StartGateway, native: FakeBackend, tmp_path: Path, is_native: bool
) -> None:
    plan = Plan((SAY,), text="Claude Code is done.")
    (played.play_native if is_native else played.play_strict_chat)(native, plan)
    gateway = start_gateway(native, **FOR_AGENTS)
    lines = documented("README.md", "sh", "ANTHROPIC_BASE_URL", gateway, gateway.key())
    assert "Claude Code is done." in sessions.claude_code(lines, "Say hello", tmp_path)
    assert b"hello" in (turns_at(native, CHAT) + turns_at(native, MESSAGES))[-1]


@pytest.mark.skipif(not sessions.executable("claude"), reason="Claude Code is not installed")
def test_claude_code_shows_at_once_that_the_key_is_wrong(
    start_gateway: StartGateway, strict: FakeBackend, tmp_path: Path
) -> None:
    gateway = start_gateway(strict)
    wrong = gateway.key()[:-1] + "!"
    lines = documented("README.md", "sh", "ANTHROPIC_BASE_URL", gateway, f"'{wrong}'")
    with pytest.raises(AssertionError, match="401 "):
        sessions.claude_code(lines, "Say hello", tmp_path)
    assert [line["status"] for line in gateway.request_lines() if line["dialect"] == "anthropic"] in ([401], [401, 401])


@pytest.mark.skipif(not sessions.executable("claude"), reason="Claude Code is not installed")
def test_subagents_of_claude_code_use_the_same_model(start_gateway: StartGateway, strict: FakeBackend, tmp_path: Path) -> None:
    search = Call("Agent", {"description": "Look", "prompt": "Look at the notes", "subagent_type": "Explore"})
    played.play_strict_chat(strict, Plan((search,), text="Claude Code is done."))
    gateway = start_gateway(strict, **FOR_AGENTS)
    lines = documented("README.md", "sh", "ANTHROPIC_BASE_URL", gateway, gateway.key())
    assert "Claude Code is done." in sessions.claude_code(lines, "Look at the notes", tmp_path)
    assert {row["status"] for row in gateway.audit_rows()} == {200}


@pytest.mark.skipif(not sessions.executable("claude"), reason="Claude Code is not installed")
def test_claude_code_counts_the_tokens_of_its_context(start_gateway: StartGateway, strict: FakeBackend, tmp_path: Path) -> None:
    played.play_strict_chat(strict, Plan(()))
    gateway = start_gateway(strict, **FOR_AGENTS)
    lines = documented("docs/clients.md", "sh", "ANTHROPIC_BASE_URL", gateway, gateway.key()).replace("\nclaude\n", "\n")
    assert "/ 65.5k" in sessions.claude_code(lines, "/context", tmp_path)
    assert asked(strict, CHAT) == [], "counting makes no answer"


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.skipif(not sessions.executable("codex"), reason="Codex is not installed")
def test_codex_as_the_readme_sets_it_up(
    start_gateway: StartGateway, native: FakeBackend, tmp_path: Path, is_native: bool
) -> None:
    (played.play_native if is_native else played.play_strict_chat)(native, Plan((EXECUTE,), text="Codex is done."))
    gateway = start_gateway(native, **FOR_AGENTS)
    key = gateway.key()
    config = documented("README.md", "toml", "wire_api", gateway, key)
    assert "Codex is done." in sessions.codex(config, "Say hello", tmp_path, key)
    assert b"Process exited with code 0" in (turns_at(native, CHAT) + turns_at(native, RESPONSES))[-1]


@pytest.mark.skipif(not sessions.executable("codex"), reason="Codex is not installed")
def test_codex_edits_a_file_if_the_gateway_describes_the_model(
    start_gateway: StartGateway, strict: FakeBackend, tmp_path: Path
) -> None:
    played.play_strict_chat(strict, Plan((EXECUTE, APPLY), text="Codex is done."))
    gateway = start_gateway(strict, **FOR_AGENTS)
    key = gateway.key()
    with gateway.http(key) as client:
        (tmp_path / "models.json").write_text(client.get("/v1/models?client_version=0").text)
    config = documented("docs/clients.md", "toml", "wire_api", gateway, key)
    config = f'model_catalog_json = "{tmp_path}/models.json"\n{config}'
    assert "Codex is done." in sessions.codex(config, "Make a file", tmp_path, key)
    assert (tmp_path / "made.txt").read_text() == "made\n"
