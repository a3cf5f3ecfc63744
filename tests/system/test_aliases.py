"""MODEL_ALIASES with the official clients: the answer of the first model that can answer, under the name that was asked for."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import ollama
import openai
import pytest

from gateway.auth.key import ADMIN_MODELS, SHOW_BACKEND
from gateway.limits.quota import UNLIMITED
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Reset
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MESSAGES: Any = [{"role": "user", "content": "Say hi"}]
ALIASES = {
    "gpt-4o-mini": ["missing", "llama3.2", "qwen/qwen3-8b"],
    "embedder": "bge",
    "claude-*": "qwen/qwen3-8b",
    "nothing": "missing",
    "no-*": "missing",
}
TOKEN = "a-token-for-metrics-only"
# Both models have these, one on each backend.
NAMES = ["gpt-4o-mini", "GPT-4o-Mini:latest", "claude-opus-4-1", "Claude-X"]


@pytest.fixture
def alpha() -> Iterator[FakeBackend]:
    with FakeBackend(kind="ollama", models=["llama3.2:latest", "bge:latest", "gpt-oss:120b-cloud"], name="alpha") as alpha:
        yield alpha


@pytest.fixture
def beta() -> Iterator[FakeBackend]:
    with FakeBackend(kind="openai", models=["qwen/qwen3-8b"], name="beta") as beta:
        yield beta


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, beta, MODEL_ALIASES=json.dumps(ALIASES), METRICS_TOKEN=TOKEN)


def backend_of(name: str) -> tuple[str, str]:
    return ("alpha", "llama3.2:latest") if name.lower().startswith("gpt") else ("beta", "qwen/qwen3-8b")


@pytest.mark.parametrize("name", NAMES)
def test_openai_answers_have_the_name_that_was_asked_for(
    gateway: RunningGateway, alpha: FakeBackend, beta: FakeBackend, name: str
) -> None:
    backend, served = backend_of(name)
    with gateway.openai(gateway.key()) as client:
        whole = client.chat.completions.create(model=name, messages=MESSAGES)
        assert (whole.model, whole.choices[0].message.content) == (name, f"{backend} heard: Say hi")
        for options in ({}, {"stream_options": {"include_usage": True}}):
            chunks = list(client.chat.completions.create(model=name, messages=MESSAGES, stream=True, **options))
            assert {chunk.model for chunk in chunks} == {name}
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert text == f"{backend} heard: Say hi"
        assert client.completions.create(model=name, prompt="Say hi").model == name
    calls = (alpha if backend == "alpha" else beta).requests
    sent = [json.loads(one.body)["model"] for one in calls if b'"model"' in one.body]
    assert set(sent) <= {served, served.removesuffix(":latest")} and len(sent) >= 4


def test_ollama_answers_have_the_name_that_was_asked_for(gateway: RunningGateway) -> None:
    client = gateway.ollama(gateway.key())
    for name in ("gpt-4o-mini", "GPT-4o-mini:latest"):
        assert client.chat(name, MESSAGES).model == name
        parts = list(client.chat(name, MESSAGES, stream=True))
        assert {part.model for part in parts} == {name} and parts[-1].done
        assert "".join(part.message.content or "" for part in parts) == "alpha heard: Say hi"
        assert client.generate(name, "Say hi").model == name
        assert client.show(name).capabilities
    assert client.embed("embedder", "x").model == "embedder"


ASKED: Any = {"max_tokens": 50, "messages": MESSAGES}


@pytest.mark.parametrize("name", NAMES)
def test_answers_of_the_other_apis_have_the_name_that_was_asked_for(gateway: RunningGateway, name: str) -> None:
    """Passed through by the first backend, or translated for the second."""
    key = gateway.key()
    with gateway.anthropic(key) as client:
        assert client.messages.create(model=name, **ASKED).model == name
        with client.messages.stream(model=name, **ASKED) as stream:
            assert stream.get_final_message().model == name
        assert client.messages.count_tokens(model=name, messages=MESSAGES).input_tokens > 0
    with gateway.openai(key) as client:
        answer = client.responses.create(model=name, input="Say hi")
        assert answer.model == name and answer.output_text
        events = list(client.responses.create(model=name, input="Say hi", stream=True))
        assert {event.response.model for event in events if hasattr(event, "response")} == {name}


@pytest.mark.parametrize("is_native", [True, False])
def test_a_response_that_breaks_off_has_the_name_that_was_asked_for(start_gateway: StartGateway, is_native: bool) -> None:
    """Its last event repeats the first, as the client got that."""
    with FakeBackend(kind="ollama", models=["llama3.2:latest"], name="alpha", is_native=is_native) as alpha:
        gateway = start_gateway(alpha, MODEL_ALIASES=json.dumps({"gpt-5": "llama3.2"}))
        alpha.play(
            "/v1/responses" if is_native else "/v1/chat/completions",
            lambda request: [*list(alpha.healthy(request))[:4], Reset()],
        )
        with gateway.http(gateway.key()) as client:
            got = client.post("/v1/responses", json={"model": "gpt-5", "input": "Say hi", "stream": True}).text
    assert "event: response.failed" in got and got.count('"model":"gpt-5"') == 3 and "llama" not in got


def test_ollamas_clients_reach_an_alias_of_a_model_of_another_server(gateway: RunningGateway) -> None:
    client = gateway.ollama(gateway.key())
    assert client.chat("claude-x", MESSAGES).model == "claude-x"
    assert {part.model for part in client.chat("claude-x", MESSAGES, stream=True)} == {"claude-x"}


def test_lists_show_aliases_of_one_name_while_one_of_their_models_is_listed(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key()) as client:
        entries = {entry["name"]: entry for entry in client.get("/api/tags").json()["models"]}
        assert list(entries) == ["llama3.2:latest", "bge:latest", "qwen/qwen3-8b", "gpt-4o-mini:latest", "embedder:latest"]
        assert entries["gpt-4o-mini:latest"]["digest"] == entries["llama3.2:latest"]["digest"]
        assert entries["gpt-4o-mini:latest"]["model"] == "gpt-4o-mini:latest"
        ids = [entry["id"] for entry in client.get("/v1/models").json()["data"]]
        assert ids == ["llama3.2:latest", "bge:latest", "qwen/qwen3-8b", "gpt-4o-mini", "embedder"]
        for name in ("gpt-4o-mini", "GPT-4o-mini:latest", "claude-opus-4-1"):
            assert client.get(f"/v1/models/{name}").json()["id"] == name
        running = {entry["name"] for entry in client.get("/api/ps").json()["models"]}
        assert {"llama3.2:latest", "gpt-4o-mini:latest"} <= running and "nothing:latest" not in running
        assert client.post("/api/show", json={"model": "claude-x"}).json()["capabilities"]


def test_the_next_model_of_the_chain_answers_if_the_first_cannot(
    gateway: RunningGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    key = gateway.key(flags=(SHOW_BACKEND,))
    with gateway.openai(key) as client:
        alpha.stop()
        answer = client.chat.completions.with_raw_response.create(model="gpt-4o-mini", messages=MESSAGES)
        assert answer.headers["x-gateway-backend"] == "beta" and answer.parse().model == "gpt-4o-mini"
        chunks = list(client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES, stream=True))
        assert {chunk.model for chunk in chunks} == {"gpt-4o-mini"}
        beta.stop()
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
        assert raised.value.status_code == 503
        alpha.start()
        assert client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES).choices[0].message.content
    gateway.wait_idle()
    rows = [row for row in gateway.audit_rows() if row["status"] == 200]
    assert {row["model"] for row in rows} == {"gpt-4o-mini"}
    assert [row["answered_as"] for row in rows] == ["qwen/qwen3-8b", "qwen/qwen3-8b", "llama3.2:latest"]


def test_allow_lists_and_limits_are_those_of_the_alias(gateway: RunningGateway) -> None:
    def status(client: httpx.Client, name: str) -> int:
        return client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES}).status_code

    with gateway.http(gateway.key("gpt-*")) as client:
        names = ("gpt-4o-mini", "llama3.2", "claude-x", "gpt-oss:120b-cloud")
        assert [status(client, name) for name in names] == [200, 403, 403, 403]
        assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["gpt-4o-mini"]
        assert [entry["name"] for entry in client.get("/api/ps").json()["models"]] == ["gpt-4o-mini:latest"]
    with gateway.http(gateway.key("llama3.2")) as client:
        assert [status(client, name) for name in ("gpt-4o-mini", "llama3.2")] == [403, 200]


def test_limits_for_some_models_are_those_of_the_name(gateway: RunningGateway) -> None:
    key = gateway.key(name="mine")
    for pattern in ("gpt-4o-mini", "claude-*"):
        gateway.call(gateway.key_store().limit("mine", pattern, {"rpm": 1}))
    with gateway.http(key) as client:
        names = ("gpt-4o-mini", "GPT-4o-mini:latest", "claude-1", "claude-2", "llama3.2", "llama3.2")
        answers = [client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES}) for name in names]
    assert [one.status_code for one in answers] == [200, 429, 200, 429, 200, 200]


def test_an_alias_to_nothing_is_a_model_that_does_not_exist(gateway: RunningGateway) -> None:
    def seen(client: httpx.Client, path: str, name: str) -> tuple[int, bytes, dict[str, str]]:
        got = client.post(path, json={"model": name, "messages": MESSAGES})
        return got.status_code, got.content, {k: v for k, v in got.headers.items() if k not in ("date", "x-request-id")}

    for patterns, flags in [((), ()), (("llama3.2",), ()), ((), (ADMIN_MODELS,))]:
        with gateway.http(gateway.key(*patterns, flags=flags, rpm=UNLIMITED, tpm=UNLIMITED)) as client:
            for path in ("/api/chat", "/v1/chat/completions", "/api/show"):
                expected = seen(client, path, "gpt-oss:120b-cloud")
                assert expected[0] == 403
                for name in ("nothing", "no-such", "claude-x:cloud", "gpt-4o-mini:cloud", *(["claude-x"] if patterns else [])):
                    assert seen(client, path, name) == expected, (patterns, name)
    with pytest.raises(ollama.ResponseError) as raised:
        gateway.ollama(gateway.admin_key()).show("unknown")
    assert raised.value.status_code == 404


def test_metrics_count_names_that_match_a_glob_as_the_glob(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key()) as client:
        for name in ("claude-1", "claude-2", "gpt-4o-mini"):
            assert client.post("/v1/chat/completions", json={"model": name, "messages": MESSAGES}).status_code == 200
    gateway.wait_idle()
    with gateway.http(TOKEN) as client:
        text = client.get("/metrics").text
    assert 'model="claude-*"' in text and 'model="gpt-4o-mini:latest"' in text and "claude-1" not in text


def test_callers_cannot_fill_redis_with_names_that_match_a_glob(gateway: RunningGateway, stores: TestStores) -> None:
    with gateway.http(gateway.key()) as client:
        for number in range(20):
            body = {"model": f"claude-{number}", "messages": MESSAGES}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    gateway.wait_idle()
    with stores.client() as redis:
        hashes: Any = [redis.hkeys(keys.means) for keys in redis_keys.BY_SHARD]
    assert [name for names in hashes for name in names] == [b"claude-*"]
    assert list(gateway.components.limits.estimates.output_tokens) == ["claude-*"]


def test_an_alias_is_gone_when_its_models_are(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    times = {"MODEL_DISCOVERY_REFRESH_S": "0.2", "MODEL_DISCOVERY_CACHE_TTL_S": "0.5"}
    gateway = start_gateway(alpha, MODEL_ALIASES='{"mini": "llama3.2"}', **times)
    with gateway.http(gateway.key()) as client:
        assert "mini" in client.get("/v1/models").text
        alpha.healthy.models[:] = ["bge:latest"]
        until(lambda: "mini" not in client.get("/v1/models").text)
        assert client.post("/api/chat", json={"model": "mini", "messages": MESSAGES}).status_code == 403
