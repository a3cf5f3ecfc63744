"""A missing model cannot be told apart from one that a key may not use: same bytes, same time."""

import json
import statistics
import time
from collections.abc import Iterator

import httpx
import ollama
import pytest

from gateway.auth.key import ADMIN_MODELS, SHOW_BACKEND
from gateway.limits.quota import UNLIMITED
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

pytestmark = pytest.mark.usual_slots
HIDDEN, UNKNOWN = "secret-model", "no-such-model"
# They lead to a model that the key may use, to one that it may not use, and to none.
ALIASES = {
    "secret-alias": "llama3.2",
    "secret-chain": [HIDDEN, "llama3.2"],
    "secret-dead": "missing",
    "secret-glob-*": "llama3.2",
    "secret-void-*": "missing",
}
OF_ALIASES = ["secret-alias", "SECRET-chain:latest", "secret-dead", "secret-glob-x", "secret-void-x", "secret-alias:cloud"]
BODIES: dict[str, dict[str, object]] = {
    "/api/chat": {"messages": [{"role": "user", "content": "hi"}]},
    "/api/generate": {"prompt": "hi"},
    "/api/embed": {"input": "hi"},
    "/api/embeddings": {"prompt": "hi"},
    "/api/show": {},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/v1/rerank": {"query": "hi", "documents": ["a"]},
    "/rerank": {"query": "hi", "documents": ["a"]},
    "/v2/rerank": {"query": "hi", "documents": ["a"]},
    "/v1/images/generations": {"prompt": "hi"},
    "/v1/audio/speech": {"input": "hi"},
    "/v1/audio/transcriptions": {},
    "/v1/audio/translations": {},
    "/v1/messages": {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/responses/input_tokens": {"input": "hi"},
}
SPELLINGS = [
    "secret-model",
    "secret-model:latest",
    "SECRET-model:Latest",
    "library/secret-model",
    "registry.ollama.ai/library/secret-model:latest",
    "https://registry.ollama.ai/library/secret-model",
    " secret-model ",
    "secret-model:local",
    "secret-model:latest:local",
    "secret-model:cloud",
]


@pytest.fixture
def alpha() -> Iterator[FakeBackend]:
    with FakeBackend(models=["llama3.2:latest", f"{HIDDEN}:latest", "gpt-oss:120b-cloud"], name="alpha") as alpha:
        yield alpha


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, MODEL_ALIASES=json.dumps(ALIASES))


FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations")


def post(client: httpx.Client, path: str, model: str) -> httpx.Response:
    if path in FORMS:
        return client.post(path, data={"model": model}, files={"file": b"sound"})
    return client.post(path, json={"model": model, **BODIES[path]})


def seen(got: httpx.Response) -> tuple[int, bytes, dict[str, str]]:
    """Everything that a caller can see, except the date and its own request id."""
    content = got.content.replace(got.headers["x-request-id"].encode(), b"")
    return got.status_code, content, {k: v for k, v in got.headers.items() if k not in ("date", "x-request-id", "request-id")}


@pytest.mark.parametrize("path", BODIES)
def test_missing_and_hidden_models_get_the_same_bytes_on_every_route(gateway: RunningGateway, path: str) -> None:
    with gateway.http(gateway.key("llama3.2", rpm=UNLIMITED, tpm=UNLIMITED)) as client:
        expected = seen(post(client, path, UNKNOWN))
        assert expected[0] == 403
        for spelling in (*SPELLINGS, *OF_ALIASES):
            assert seen(post(client, path, spelling)) == expected


def test_missing_and_hidden_models_count_alike(gateway: RunningGateway) -> None:
    def answers(model: str) -> list[tuple[int, str, list[str | None]]]:
        limits = [
            f"x-ratelimit-{what}" for what in ("limit-requests", "remaining-requests", "limit-tokens", "remaining-tokens")
        ]
        with gateway.http(gateway.key("llama3.2", rpm=3, tpm=1000)) as client:
            found = [client.post("/api/chat", json={"model": model, **BODIES["/api/chat"]}) for _ in range(4)]
        return [(one.status_code, one.text.partition(";")[0], [one.headers.get(name) for name in limits]) for one in found]

    assert answers(HIDDEN) == answers(UNKNOWN)
    assert [status for status, *_ in answers(UNKNOWN)] == [403, 403, 403, 429]


def test_one_model_of_the_list_gets_the_same_bytes(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key("llama3.2", rpm=UNLIMITED, tpm=UNLIMITED)) as client:
        assert seen(client.get(f"/v1/models/{HIDDEN}")) == seen(client.get(f"/v1/models/{UNKNOWN}"))
        assert client.get(f"/v1/models/{HIDDEN}").status_code == 403
        for name in OF_ALIASES:
            assert seen(client.get(f"/v1/models/{name}")) == seen(client.get(f"/v1/models/{UNKNOWN}"))


def test_lists_show_exactly_the_models_that_would_be_admitted(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    for patterns, visible in [
        (("llama3.2",), {"llama3.2:latest"}),
        (("secret*", "llama3.2:latest"), {"llama3.2:latest", "secret-model:latest"}),
        ((), {"llama3.2:latest", "secret-model:latest"}),
        (("*",), {"llama3.2:latest", "secret-model:latest"}),
        (("gpt-oss:*-cloud",), {"gpt-oss:120b-cloud"}),
        (("gpt-oss:120b-cloud", "llama*"), {"gpt-oss:120b-cloud", "llama3.2:latest"}),
        (("gpt-oss*",), set()),
    ]:
        with gateway.http(gateway.key(*patterns)) as client:
            assert {entry["name"] for entry in client.get("/api/tags").json()["models"]} == visible
            assert {entry["id"] for entry in client.get("/v1/models").json()["data"]} == visible
            for name in ("llama3.2", "secret-model", "gpt-oss:120b-cloud"):
                admitted = client.post("/api/chat", json={"model": name, **BODIES["/api/chat"]}).status_code == 200
                assert admitted == (name in visible or f"{name}:latest" in visible), (patterns, name)


@pytest.mark.parametrize("hidden", [HIDDEN, "secret-alias", "secret-glob-x"])
def test_missing_and_hidden_models_take_the_same_time(gateway: RunningGateway, hidden: str) -> None:
    """Many interleaved requests: the medians differ no more than those of equal requests."""
    with gateway.http(gateway.key("llama3.2")) as client:

        def ask(model: str) -> float:
            began = time.perf_counter()
            client.post("/api/chat", json={"model": model, **BODIES["/api/chat"]})
            return time.perf_counter() - began

        def ratio() -> float:
            times: dict[str, list[float]] = {hidden: [], UNKNOWN: []}
            for _ in range(250):
                for model in (hidden, UNKNOWN):
                    times[model].append(ask(model))
            return statistics.median(times[hidden]) / statistics.median(times[UNKNOWN])

        for _ in range(50):
            ask(hidden)
        # A real difference appears every time, other load of the machine only now and then.
        ratios: list[float] = []
        while not any(0.9 < found < 1.1 for found in ratios) and len(ratios) < 4:
            ratios.append(ratio())
    assert any(0.9 < found < 1.1 for found in ratios), ratios


@pytest.mark.parametrize("path", BODIES)
def test_only_a_key_that_may_pull_any_model_learns_that_one_is_missing(gateway: RunningGateway, path: str) -> None:
    def statuses(*patterns: str, flags: tuple[str, ...] = ()) -> list[int]:
        with gateway.http(gateway.key(*patterns, flags=flags)) as client:
            names = (UNKNOWN, "gpt-oss:120b-cloud", "no-such:120b-cloud")
            return [post(client, path, name).status_code for name in names]

    assert statuses(flags=(ADMIN_MODELS,)) == [404, 403, 403]
    for patterns, flags in [((), ()), (("llama3.2",), (ADMIN_MODELS,)), (("*",), (ADMIN_MODELS,)), ((), (SHOW_BACKEND,))]:
        assert statuses(*patterns, flags=flags) == [403] * 3


def test_a_missing_model_is_reported_as_ollama_does(gateway: RunningGateway) -> None:
    with gateway.http(gateway.admin_key()) as client:
        assert client.post("/api/show", json={"model": UNKNOWN}).json() == {"error": f"model '{UNKNOWN}' not found"}
        error = client.post("/v1/chat/completions", json={"model": UNKNOWN, **BODIES["/api/chat"]}).json()["error"]
        assert (error["message"], error["code"]) == (f"model '{UNKNOWN}' not found", "model_not_found")
        assert client.get(f"/v1/models/{UNKNOWN}").status_code == 404


def test_a_pulled_model_is_available_to_the_next_request(gateway: RunningGateway) -> None:
    """Like `ollama run`: show, pull after a 404, show again, chat."""
    client = gateway.ollama(gateway.admin_key())
    with pytest.raises(ollama.ResponseError) as raised:
        client.show("fresh")
    assert raised.value.status_code == 404
    assert [progress.status for progress in client.pull("fresh", stream=True)][-1] == "success"
    assert client.show("fresh").capabilities
    assert client.chat("fresh", [{"role": "user", "content": "Say hi"}]).message.content == "alpha heard: Say hi"
