"""The Messages and Responses APIs of the fake backend: off unless asked for, and in the frames of the two real servers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.support.fake_backend import native_messages, native_responses
from tests.support.fake_backend.answers import Kind
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import frames_of, recording

MODEL = "m:latest"
SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
HI: Any = [{"role": "user", "content": "Say hi"}]
NATIVE = ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/responses/input_tokens")


@pytest.fixture(params=["ollama", "openai"])
def backend(request: pytest.FixtureRequest) -> Iterator[FakeBackend]:
    with FakeBackend(request.param, [MODEL], name="alpha", is_native=True) as found:
        yield found


def anthropic_client(backend: FakeBackend) -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=backend.url, api_key="x", max_retries=0)


@pytest.mark.parametrize("kind", ["ollama", "openai"])
def test_a_backend_has_these_routes_only_if_asked_for(kind: Kind) -> None:
    with FakeBackend(kind, [MODEL]) as backend, httpx.Client(base_url=backend.url) as http:
        assert [http.post(path, json={}).status_code for path in NATIVE] == [404] * 4


@pytest.mark.parametrize(("kind", "statuses"), [("ollama", [400, 404, 400, 404]), ("openai", [500, 500, 400, 400])])
@pytest.mark.parametrize("body", ["[]", "{}"])
def test_a_body_without_a_request_is_refused_as_by_the_real_servers(kind: Kind, statuses: list[int], body: str) -> None:
    with FakeBackend(kind, [MODEL], is_native=True) as backend, httpx.Client(base_url=backend.url) as http:
        assert [http.post(path, content=body).status_code for path in NATIVE] == statuses


def test_the_anthropic_client_talks_to_it(backend: FakeBackend) -> None:
    backend.healthy.thinking, backend.healthy.parallel_calls, backend.healthy.cached = "Let me see", 2, lambda _: 1
    tools: Any = [{"name": name, "input_schema": SCHEMA} for name in ("one", "two")]
    with anthropic_client(backend) as client:
        whole = client.messages.create(model=MODEL, max_tokens=50, messages=HI)
        assert [block.type for block in whole.content] == ["thinking", "text"]
        assert (whole.content[1].text, whole.stop_reason, whole.usage.output_tokens) == ("alpha heard: Say hi", "end_turn", 6)
        with client.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream:
            assert "".join(stream.text_stream) == "alpha heard: Say hi"
            assert stream.get_final_message().content[0].thinking == "Let me see"
        with client.messages.stream(model=MODEL, max_tokens=50, messages=HI, tools=tools) as stream:
            called = stream.get_final_message()
        zurich = {"city": "Zürich"}
        assert [(block.name, block.input) for block in called.content[1:]] == [("one", zurich), ("two", zurich)]
        assert called.stop_reason == "tool_use"
        backend.healthy.is_cut = True
        assert client.messages.create(model=MODEL, max_tokens=50, messages=HI).stop_reason == "max_tokens"
        usage = whole.usage
    expected = (2, None) if backend.healthy.kind == "ollama" else (1, 1)
    assert (usage.input_tokens, usage.cache_read_input_tokens) == expected


def test_the_openai_client_talks_to_it(backend: FakeBackend) -> None:
    backend.healthy.thinking, backend.healthy.parallel_calls = "Let me see", 2
    tools: Any = [{"type": "function", "name": name, "parameters": SCHEMA, "strict": False} for name in ("one", "two")]
    with openai.OpenAI(base_url=backend.url + "/v1", api_key="x", max_retries=0) as client:
        whole = client.responses.create(model=MODEL, input="Say hi")
        assert (whole.output_text, [item.type for item in whole.output]) == ("alpha heard: Say hi", ["reasoning", "message"])
        events: Any = list(client.responses.create(model=MODEL, input="Say hi", stream=True))
        assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "alpha heard: Say hi"
        called: Any = list(client.responses.create(model=MODEL, input="Say hi", tools=tools, stream=True))[-1]
        assert [json.loads(item.arguments) for item in called.response.output[1:]] == [{"city": "Zürich"}] * 2
        if backend.healthy.kind == "ollama":
            assert [event.sequence_number for event in events] == list(range(len(events)))


def test_llama_cpp_counts_tokens() -> None:
    with FakeBackend("openai", [MODEL], is_native=True) as backend, anthropic_client(backend) as client:
        assert client.messages.count_tokens(model=MODEL, messages=HI).input_tokens == 2
        counted = httpx.post(backend.url + "/v1/responses/input_tokens", json={"model": MODEL, "input": "Say hi"})
        assert counted.json() == {"input_tokens": 2, "object": "response.input_tokens"}


def _shapes(data: bytes) -> list[tuple[Any, ...]]:
    """What each event of a stream is made of, without repeated ones."""
    found: list[tuple[Any, ...]] = []
    for frame in frames_of(data):
        name, _, written = frame.partition(b"\n")
        event = json.loads(written.removeprefix(b"data: "))
        delta = event.get("delta")
        shape = (name, *sorted(event), *(sorted(delta) if isinstance(delta, dict) else ()))
        if shape not in found[-1:]:
            found.append(shape)
    return found


@pytest.mark.parametrize(("kind", "server", "model"), [("ollama", "ollama", "tinyreal"), ("openai", "llamacpp", "tiny-random")])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/messages", {"messages": HI, "max_tokens": 6}), ("/v1/responses", {"input": "Say hi"})]
)
def test_its_frames_have_the_shapes_of_the_recorded_ones(kind: Kind, server: str, model: str, path: str, body: Any) -> None:
    with FakeBackend(kind, [model], is_native=True) as backend:
        played = httpx.post(backend.url + path, json={"model": model, "stream": True, **body}).content
    assert _shapes(played) == _shapes(recording(f"{path.removeprefix('/v1/')}_stream_{server}.sse"))


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_streams_fail_midway(backend: FakeBackend, path: str) -> None:
    kind = backend.healthy.kind
    if path == "/v1/messages":
        backend.play_once(path, native_messages.error_midway(kind), native_messages.death_midway())
    else:
        backend.play_once(path, native_responses.error_midway(kind), native_responses.death_midway(kind))
    failed = httpx.post(backend.url + path).content
    assert b"It was a" in failed and (b"slot unavailable" in failed) == (kind == "openai")
    with pytest.raises(httpx.ReadError):
        httpx.post(backend.url + path)
