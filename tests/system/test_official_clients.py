"""The unmodified official clients use two backends through the gateway; each model's answer comes from the right one."""

import json
from collections.abc import Iterator
from typing import Any

import ollama
import openai
import pytest

from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

MESSAGES: Any = [{"role": "user", "content": "Say hi"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def gateway(start_shared_gateway: StartGateway) -> Iterator[RunningGateway]:
    with (
        FakeBackend(kind="ollama", models=["llama3.2:latest", "bge:latest"], name="alpha") as alpha,
        FakeBackend(kind="openai", models=["qwen/qwen3-8b", "bge:latest"], name="beta") as beta,
    ):
        yield start_shared_gateway(alpha, beta)


def test_openai_lists_the_union_without_duplicates(gateway: RunningGateway) -> None:
    with gateway.openai(gateway.key()) as client:
        assert [model.id for model in client.models.list()] == ["llama3.2:latest", "bge:latest", "qwen/qwen3-8b"]
        assert client.models.retrieve("llama3.2").id == "llama3.2"
        assert client.models.retrieve("qwen/qwen3-8b").id == "qwen/qwen3-8b"


def test_ollama_lists_the_union_with_the_fields_its_clients_need(gateway: RunningGateway) -> None:
    client = gateway.ollama(gateway.key())
    listed = client.list().models
    assert [model.model for model in listed] == ["llama3.2:latest", "bge:latest", "qwen/qwen3-8b"]
    assert all(
        model.digest and len(model.digest) >= 12 and model.details and model.details.family is not None for model in listed
    )
    assert isinstance(client.ps().models, list)


@pytest.mark.parametrize(("model", "backend"), [("llama3.2", "alpha"), ("qwen/qwen3-8b", "beta")])
def test_openai_chat_comes_from_the_right_backend(gateway: RunningGateway, model: str, backend: str) -> None:
    with gateway.openai(gateway.key()) as client:
        whole = client.chat.completions.create(model=model, messages=MESSAGES)
        assert whole.choices[0].message.content == f"{backend} heard: Say hi"
        assert whole.usage and whole.usage.completion_tokens > 0
        stream = client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == f"{backend} heard: Say hi"


def test_ollama_chat_and_generate(gateway: RunningGateway) -> None:
    client = gateway.ollama(gateway.key())
    assert client.chat("llama3.2", MESSAGES).message.content == "alpha heard: Say hi"
    chunks = list(client.chat("llama3.2", MESSAGES, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == "alpha heard: Say hi"
    assert chunks[-1].done and chunks[-1].eval_count
    assert client.generate("llama3.2", "Say hi").response == "alpha heard: Say hi"
    assert "".join(chunk.response for chunk in client.generate("llama3.2", "Say hi", stream=True)) == "alpha heard: Say hi"


async def _async_answers(gateway: RunningGateway, key: str) -> list[str]:
    native = ollama.AsyncClient(host=gateway.url, headers={"Authorization": f"Bearer {key}"})
    whole = await native.chat("llama3.2", MESSAGES)
    streamed = [chunk.message.content or "" async for chunk in await native.chat("llama3.2", MESSAGES, stream=True)]
    openai_client: Any = openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key)
    async with openai_client as client:
        answer = await client.chat.completions.create(model="llama3.2", messages=MESSAGES)
        stream = await client.chat.completions.create(model="llama3.2", messages=MESSAGES, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    await native._client.aclose()
    return [whole.message.content or "", "".join(streamed), answer.choices[0].message.content or "", "".join(pieces)]


def test_asynchronous_clients(gateway: RunningGateway) -> None:
    import asyncio

    assert asyncio.run(_async_answers(gateway, gateway.key())) == ["alpha heard: Say hi"] * 4


def test_a_key_in_the_url_works_beside_the_dummy_key_that_a_client_requires(gateway: RunningGateway) -> None:
    address = f"{gateway.url}/k/{gateway.key()}"
    openai_client: Any = openai.OpenAI(base_url=f"{address}/v1", api_key="ollama", max_retries=0, timeout=20)
    with openai_client as client:
        assert "llama3.2:latest" in [model.id for model in client.models.list()]
        answer = client.chat.completions.create(model="llama3.2", messages=MESSAGES)
        assert answer.choices[0].message.content == "alpha heard: Say hi"
    native = ollama.Client(host=address, headers={"Authorization": "Bearer ollama"}, timeout=20)
    assert native.chat("llama3.2", MESSAGES).message.content == "alpha heard: Say hi"
    native._client.close()


@pytest.mark.parametrize("name", ["api_key", "auth_token"])
def test_a_key_in_the_url_works_with_the_anthropic_client(gateway: RunningGateway, name: str) -> None:
    # Imported here, as it takes a second and a half.
    import anthropic

    dummy: Any = {name: "ollama"}
    with anthropic.Anthropic(base_url=f"{gateway.url}/k/{gateway.key()}", max_retries=0, timeout=20, **dummy) as client:
        assert "llama3.2:latest" in [model.id for model in client.models.list()]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("path", "more", "capped"),
    [
        ("/v1/chat/completions", {"max_tokens": 64_000}, "32768"),
        ("/v1/chat/completions", {"max_tokens": 64_000, "n": 2}, "16384"),
        ("/v1/chat/completions", {"max_tokens": 32_768}, None),
        ("/v1/chat/completions", {}, None),
        ("/api/chat", {"options": {"num_predict": -1}}, "32768"),
        ("/api/chat", {"options": {"num_predict": 5}}, None),
    ],
)
def test_an_answer_reports_that_its_token_limit_was_lowered(
    gateway: RunningGateway, stream: bool, path: str, more: dict[str, Any], capped: str | None
) -> None:
    with gateway.http(gateway.key(), headers={"Origin": "https://page.example"}) as client:
        got = client.post(path, json={"model": "llama3.2", "messages": MESSAGES, "stream": stream, **more})
        assert (got.status_code, got.headers.get("x-gateway-max-tokens")) == (200, capped)
        assert "x-gateway-max-tokens" in got.headers["access-control-expose-headers"].split(", ")


def test_embeddings(gateway: RunningGateway) -> None:
    key = gateway.key()
    client = gateway.ollama(key)
    assert len(client.embed("bge", ["one", "two"]).embeddings) == 2
    assert client.embeddings("bge", "one").embedding
    with gateway.openai(key) as openai_client:
        assert len(openai_client.embeddings.create(model="bge", input=["one", "two"]).data) == 2
        assert openai_client.embeddings.create(model="bge", input="one", encoding_format="float").data[0].embedding


def test_completions(gateway: RunningGateway) -> None:
    with gateway.openai(gateway.key()) as client:
        assert client.completions.create(model="llama3.2", prompt="Say hi").choices[0].text == "alpha heard: Say hi"
        stream = client.completions.create(model="llama3.2", prompt="Say hi", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "alpha heard: Say hi"


def test_tool_calls(gateway: RunningGateway) -> None:
    key = gateway.key()
    calls = gateway.ollama(key).chat("llama3.2", MESSAGES, tools=[TOOL]).message.tool_calls
    assert calls and calls[0].function.name == "weather" and "city" in calls[0].function.arguments
    with gateway.openai(key) as client:
        answer = client.chat.completions.create(model="llama3.2", messages=MESSAGES, tools=[TOOL])
        assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["city"]


def test_show(gateway: RunningGateway) -> None:
    client = gateway.ollama(gateway.key())
    assert client.show("llama3.2").modelinfo is not None
    assert client.show("qwen/qwen3-8b").capabilities == ["completion"]


def test_errors_are_what_the_clients_expect(gateway: RunningGateway) -> None:
    key = gateway.key("llama3.2")
    with gateway.openai(key) as client:
        with pytest.raises(openai.PermissionDeniedError) as refused:
            client.chat.completions.create(model="bge", messages=MESSAGES)
        assert "not available to this key" in refused.value.message
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="llama3.2", messages="hi")
    with gateway.openai("nonsense") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with pytest.raises(ollama.ResponseError) as native:
        gateway.ollama(key).chat("bge", MESSAGES)
    assert native.value.status_code == 403 and "not available" in native.value.error
    with pytest.raises(ollama.ResponseError) as unauthorised:
        gateway.ollama("nonsense").list()
    assert unauthorised.value.status_code == 401


def test_ollama_chats_with_a_model_of_an_openai_server(gateway: RunningGateway) -> None:
    client = gateway.ollama(gateway.key())
    assert client.chat("qwen/qwen3-8b", MESSAGES).message.content == "beta heard: Say hi"
    chunks = list(client.chat("qwen/qwen3-8b", MESSAGES, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == "beta heard: Say hi"
    assert chunks[-1].done_reason == "stop" and chunks[-1].eval_count


def test_what_the_ollama_command_line_shows_for_a_401(gateway: RunningGateway) -> None:
    """Since 0.12 its `checkError` (api/client.go) reads a 401 as an AuthorizationError, which shows the body's `status` or
    nothing; with a `signin_url` it would ask users to sign in there. Other clients read the same message from `error`."""
    wrong = gateway.key()[:-1] + "!"
    with gateway.http() as client:
        refused = [
            client.get("/api/tags"),
            client.get(f"/k/{wrong}/api/tags"),
            client.post(f"/k/{wrong}/api/show", json={"model": "llama3.2"}),
        ]
        other = client.get("/api/nothing")
    missing, revoked = (
        "No API key was sent; send it as 'Authorization: Bearer <key>'.",
        "The API key is wrong, expired or revoked.",
    )
    assert [found.json() for found in refused] == [{"error": error, "status": error} for error in (missing, revoked, revoked)]
    assert {found.status_code for found in refused} == {401} and other.json().keys() == {"error"}
    with pytest.raises(ollama.ResponseError, match=r"^The API key is wrong, expired or revoked\. \(status code: 401\)$"):
        gateway.ollama(wrong).list()
